"""What was trained is what runs: the merged model tracks in a video as the student did in validation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sam3.engine.distributed import World
from sam3.engine.stage_config import teacher_meta
from sam3.tracker_builder import build_sam3_video_predictor
from stage2 import config as stage2_config
from stage2 import convert_memory_weights_stage2
from stage2.data.batch import ClipBatch
from stage2.data.sources import open_sources
from stage2.model import ClipEvaluation
from stage2.train_memory_stage2 import build_distiller, build_teacher, load_memory
from tests.samples import TINY_MAP
from tests.stage2.runs import Inputs

BOXES = {"DISTILL__PROMPTS__MASK": 0.0, "DISTILL__PROMPTS__BOX": 1.0, "DISTILL__PROMPTS__CLICK": 0.0}


@pytest.fixture(scope="module")
def evaluated(memory_run: Path, inputs: Inputs) -> tuple[ClipBatch, ClipEvaluation]:
    """A val clip of pictures, and the trained student in it."""
    words = inputs.arguments(Path("unused"), DATA__USE_PRECOMPUTED=False, DATA__EMBEDDING_DIR=None, **BOXES)
    config = stage2_config.load(stage2_config.make_parser("").parse_intermixed_args(words))
    world = World(0, 1, 0, torch.device("cpu"))
    model = build_teacher(config, world)
    distiller = build_distiller(config, model, world).eval()
    load_memory(distiller, memory_run / "ckpt_latest.pth", {})
    teacher = teacher_meta(inputs.teacher, "MODEL.SAM3_CHECKPOINT")
    batch = open_sources(config, model.preprocess, TINY_MAP, teacher).val_dataset(config).load([0])
    return batch, distiller.evaluate(batch)


def test_the_predictor_draws_the_masks_of_validation(
    evaluated: tuple[ClipBatch, ClipEvaluation], memory_run: Path, inputs: Inputs, tmp_path: Path
):
    batch, result = evaluated
    merged, clip = tmp_path / "merged.pt", tmp_path / "clip"
    paths = ["--stage2_weights", memory_run / "ckpt_latest.pth", "--sam3_weights", inputs.teacher]
    assert convert_memory_weights_stage2.main(list(map(str, [*paths, "--output_path", merged]))) == 0
    clip.mkdir()
    for video, number in batch.frames[0]:
        shutil.copy(inputs.frames / video / f"{number:05d}.jpg", clip)

    drawn = {}
    for name, checkpoint in (("student", merged), ("teacher", inputs.teacher)):
        predictor = build_sam3_video_predictor(checkpoint, device="cpu")
        with predictor.start_session(clip) as session:
            for row, corners in enumerate(batch.points):
                share = (corners / predictor.model.preprocess.img_size).flatten()
                predictor.add_new_points_or_box(session, 0, row + 1, box=share, rel_coordinates=True)
            found = [masks.low_masks[:, 0] for masks in predictor.propagate_in_video(session)]
        drawn[name] = torch.stack(found, dim=1)  # (B, T, M, M)
    assert drawn["student"].shape[:2] == (2, 3)
    for name, logits in drawn.items():
        wanted = getattr(result, name)
        assert wanted.any()
        other = (logits[:, 1:] > 0) != wanted
        # Rounding, which grows from frame to frame, turns logits next to 0; these are about 2 in size.
        assert other.float().mean() < 0.005 and (logits[:, 1:][other].abs() < 0.1).all(), name
    assert ((drawn["student"] > 0) != (drawn["teacher"] > 0)).float().mean() > 0.05
