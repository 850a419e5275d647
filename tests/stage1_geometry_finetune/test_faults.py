"""Bad input ends in one message that names the thing and says what to do next."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import make_tiny_sam3
from stage1 import save_embedding_stage1
from tests.samples import TINY_RECORD
from tests.stage1.runs import finish, metrics, start, teacher_arguments
from tests.stage1_geometry_finetune.runs import TUNE, Inputs

# The picture at fault comes third or fourth of eight.
ONE_EPOCH = {"DISTILL__MAX_PROMPTS": 1, "DATA__NUM_VAL_SAMPLES": 0}
SKIP = {"DATA__SKIP_BAD_IMAGES": True}
LEAVE_OUT = "leave them out with DATA.SKIP_BAD_IMAGES True"


@pytest.fixture
def data(inputs: Inputs, tmp_path: Path) -> Path:
    """A copy of the pictures and annotations, to be spoilt."""
    return shutil.copytree(inputs.data, tmp_path / "data")


def change_annotations(data: Path, change: Callable[[dict[str, Any]], Any], key: str = "train/sa_2") -> None:
    path = data / f"annotations/{key}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def each(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: [entry.update(values) for entry in document["annotations"]]


def refused(inputs: Inputs, output: Path, message: str, kind: type[Exception] = ValueError, **opts: Any) -> None:
    with pytest.raises(kind, match=message):
        inputs.tune(output, **{**ONE_EPOCH, **opts})
    assert not list(output.glob("*.pth"))


# Pictures and annotations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "opts", "message"),
    [
        (lambda d: d.update(annotations=[]), {}, r"sa_2.json lists no objects; remove such .*SKIP_BAD_IMAGES True"),
        (
            each(bbox=[5, 5, 0.2, 30]),
            {},
            r"none of the 2 objects in .*sa_2.json can be a prompt \(wanted: a box in",
        ),
        (
            each(bbox=[-90, 5, 50, 30]),
            {},
            r"none of the 2 objects in .*sa_2.json .* sides of at least 1 pixel\); re",
        ),
        (each(bbox=[5, 5, -9, 30]), {}, r"none of the 2 objects in .*sa_2.json"),
        (each(bbox=[float("nan")] * 4), {}, r"none of the 2 objects in .*sa_2.json"),
        (
            each(point_coords=[]),
            {"DISTILL__USE_BOX_PROMPTS": False},
            r"sa_2.json can be a prompt .*, and a point\)",
        ),
        (
            lambda d: d["annotations"][0].pop("bbox"),
            {},
            r"sa_2.json is damaged: it has no entry 'bbox'; fetch it",
        ),
        (
            each(segmentation={"size": [130, 92], "counts": "zz"}),
            {"DATA__LOAD_GT_MASK": True},
            r"segmentation 0 of .*sa_2.json cannot be decoded: its counts are cut off .*; fetch the file again",
        ),
    ],
    ids=["empty", "flat", "outside", "inverted", "nan", "no point", "no box", "bad mask"],
)
def test_images_without_usable_annotations(
    change: Callable, opts: dict, message: str, inputs: Inputs, data: Path, tmp_path: Path
):
    change_annotations(data, change)
    refused(dataclasses.replace(inputs, data=data), tmp_path / "run", message, **opts)


def test_files_that_are_cut_off_or_do_not_belong_together(inputs: Inputs, data: Path, tmp_path: Path):
    spoilt = dataclasses.replace(inputs, data=data)
    annotations, picture = data / "annotations/train/sa_2.json", data / "images/train/sa_2.jpg"
    text, pixels = annotations.read_text(), picture.read_bytes()
    annotations.write_text(text[:100])
    refused(spoilt, tmp_path / "json", r"annotation file .*sa_2.json is damaged: .*; fetch it again")
    annotations.write_text(text)
    picture.write_bytes(pixels[: len(pixels) // 2])
    refused(spoilt, tmp_path / "jpg", r"picture .*sa_2.jpg is truncated \(\d+ bytes\); fetch it again")
    shutil.copy(data / "images/train/sa_1.jpg", picture)
    refused(spoilt, tmp_path / "size", r"sa_2.jpg has \(90, 130\) .* about one of \(130, 92\); fetch both again")


def test_what_cannot_be_used_is_skipped_if_asked(inputs: Inputs, data: Path, tmp_path: Path, capsys):
    """With one picture a batch, a batch becomes empty, which changes no weight and no count of steps."""
    change_annotations(data, lambda document: document.update(annotations=[]))
    spoilt = dataclasses.replace(inputs, data=data)
    assert spoilt.tune(tmp_path / "run", DATA__BATCH_SIZE=1, **SKIP, **ONE_EPOCH) == 0
    losses = metrics(tmp_path / "run", "train/loss_total")
    assert len(losses) == 8 and losses.count(0) == 1
    assert max(metrics(tmp_path / "run", "train/skipped_steps")) == 0
    assert capsys.readouterr().out.count("sa_2.json lists no objects") == 1


def test_a_val_split_without_a_usable_picture(inputs: Inputs, data: Path, tmp_path: Path, capsys):
    for key in (9, 10, 11):
        change_annotations(data, lambda document: document.update(annotations=[]), f"val/sa_{key}")
    spoilt = dataclasses.replace(inputs, data=data)
    flags = ("--eval", "--resume", str(inputs.start))
    with pytest.raises(ValueError, match=r"val/sa_\d+.json lists no objects"):
        spoilt.tune(tmp_path / "run", *flags)
    with pytest.raises(ValueError, match=r"no picture of the val split could be used; .* DATA.NUM_VAL_SAMPLES 0"):
        spoilt.tune(tmp_path / "run", *flags, **SKIP)
    shutil.rmtree(data / "images/val")
    with pytest.raises(ValueError, match=r"there is no val split in .*data to evaluate on"):
        spoilt.tune(tmp_path / "run", *flags)


def test_annotations_that_are_missing(inputs: Inputs, data: Path, tmp_path: Path):
    spoilt = dataclasses.replace(inputs, data=data)
    (data / "annotations/train/sa_2.json").unlink()
    message = rf"1 pictures in .*images/train have no JSON file in .*annotations/train: sa_2; .*{LEAVE_OUT}"
    refused(spoilt, tmp_path / "refused", message)
    assert spoilt.tune(tmp_path / "run", TRAIN__MAX_STEPS=1, **SKIP, **ONE_EPOCH) == 0
    assert (tmp_path / "run/left_out.txt").read_text().startswith("sa_2\ttrain: no annotation file in ")
    shutil.rmtree(data / "annotations")
    message = r"no folder .*annotations/train: prompts come from SA-1B's annotation files; put .* with data/reorg_sa1b"
    refused(spoilt, tmp_path / "none", message, **SKIP)


# The store ----------------------------------------------------------------------------------------------------------


def test_a_store_that_covers_only_a_part(inputs: Inputs, data: Path, tmp_path: Path, capsys):
    for folder, suffix in (("images", "jpg"), ("annotations", "json")):
        for name in ("sa_77", "sa_78"):
            shutil.copy(data / f"{folder}/train/sa_1.{suffix}", data / f"{folder}/train/{name}.{suffix}")
    larger = dataclasses.replace(inputs, data=data)
    message = rf"no teacher embedding for 2 of 10 pictures in .*: sa_77, sa_78; write them with bash .*{LEAVE_OUT}"
    refused(larger, tmp_path / "refused", message)
    assert larger.tune(tmp_path / "run", TRAIN__MAX_STEPS=1, **SKIP, **ONE_EPOCH) == 0
    assert "8 train, 0 val" in capsys.readouterr().out
    lines = (tmp_path / "run/left_out.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["sa_77", "sa_78"]


def test_a_store_that_does_not_fit(inputs: Inputs, tmp_path: Path):
    for opts, message in (
        ({"DATA__RESIZE": "square"}, r"preprocess.resize: found 'pad', wanted 'square'\); change the config or export"),
        ({"DISTILL__EMBED_DIM": 32}, r"shape: found \[96, 16, 16\], wanted \[32, 16, 16\]\); change the config"),
        ({"DATA__BATCH_SIZE": 9}, r"a batch of 9 .* needs 9 samples, but the data set has 8; lower the batch size"),
    ):
        refused(inputs, tmp_path / "run", message, **opts)
    opts = {"DISTILL__NO_RAND": False}
    assert save_embedding_stage1.main(teacher_arguments(inputs.teacher, inputs.data, tmp_path / "turned", **opts)) == 0
    turned = dataclasses.replace(inputs, exported=tmp_path / "turned")
    refused(turned, tmp_path / "run", r"turned/embeddings are of flipped and recoloured pictures.*; export again")


def test_damaged_embeddings(inputs: Inputs, tmp_path: Path):
    spoilt = dataclasses.replace(inputs, exported=shutil.copytree(inputs.exported, tmp_path / "export"))
    path = tmp_path / "export/embeddings/rank0-values.bin"
    values = bytearray(path.read_bytes())
    for record in range(8):
        values[record * TINY_RECORD + 4 : record * TINY_RECORD + 6] = b"\x00\x7e"  # NaN
    path.write_bytes(values)
    message = r"gradients were not finite in 2 steps in a row, up to step 2; lower the learning rate"
    refused(spoilt, tmp_path / "nan", message, TRAIN__MAX_BAD_STEPS=2)
    refused(spoilt, tmp_path / "crc", r"does not match its checksum; remove the shard", DISTILL__VERIFY_CRC=True)
    path.write_bytes(values[:-1000])
    refused(spoilt, tmp_path / "short", r"rank0-values.bin has 539716 bytes = 10.98 records of 49156")


# Weights ------------------------------------------------------------------------------------------------------------


def test_the_store_of_another_teacher(inputs: Inputs, merged: Path, tmp_path: Path):
    other = tmp_path / "other.pt"
    assert make_tiny_sam3.main(["--output", str(other), "--seed", "2"]) == 0
    for teacher in (other, merged):
        message = rf"come from sam3_tiny.pt with SHA-256 \w+, but .*{teacher.name} has \w+; pass that file with --sam3-"
        refused(dataclasses.replace(inputs, teacher=teacher), tmp_path / "run", message)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        (
            ("transformer", "geometry_encoder", "segmentation_head"),
            "lacks SAM3's geometry encoder, fusion encoder",
        ),
        (("segmentation_head",), "lacks SAM3's segmentation head; wanted the full sam3.pt"),
        (("language_backbone",), "has no text encoder .*; wanted the full sam3.pt"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_sam3_file_without_heads(
    lacking: tuple[str, ...], message: str, inputs: Inputs, anonymous: Path, tmp_path: Path
):
    payload = torch.load(inputs.teacher, weights_only=True)
    tensors = payload.get("model", payload)
    part = tmp_path / "part.pt"
    torch.save({"model": {k: v for k, v in tensors.items() if not any(word in k for word in lacking)}}, part)
    without = dataclasses.replace(inputs, teacher=part, exported=anonymous)
    refused(without, tmp_path / "run", f"part.pt {message}")


@pytest.fixture
def anonymous(inputs: Inputs, tmp_path: Path) -> Path:
    """The export without a word about its teacher, so that any is taken."""
    copy = shutil.copytree(inputs.exported, tmp_path / "anonymous")
    path = copy / "embeddings/meta.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "teacher"}))
    return copy


def test_weights_that_are_something_else(inputs: Inputs, anonymous: Path, tmp_path: Path):
    whole = inputs.teacher.read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    for teacher, message in (
        (
            inputs.start,
            r"ckpt_epoch_1.pth is no SAM3 checkpoint: wanted keys below .*, found backbone, head",
        ),
        (tmp_path / "half.pt", r"half.pt is cut off after .*; copy or download it again"),
    ):
        refused(dataclasses.replace(inputs, teacher=teacher, exported=anonymous), tmp_path / "run", message)
    message = r"sam3_tiny.pt holds no student, but keys below detector.backbone.*; wanted a training's ckpt_epoch_<n>"
    refused(dataclasses.replace(inputs, start=inputs.teacher), tmp_path / "run", message)


def test_a_start_from_another_student_or_other_pictures(inputs: Inputs, merged: Path, tmp_path: Path):
    for start_from in (inputs.start, merged):
        refused(
            dataclasses.replace(inputs, start=start_from),
            tmp_path / "run",
            rf"{start_from.name}: these are the weights of ES-EV-S .*, but the student is ES-EV-M .*; choose the backb",
            MODEL__BACKBONE="efficientvit_b1",
        )
    payload = torch.load(inputs.start, weights_only=True)
    payload["meta"]["preprocess"]["resize"] = "square"
    torch.save(payload, tmp_path / "square.pth")
    message = r"square.pth was trained on pictures prepared otherwise: found .*'square'.*, wanted .*'pad'.*; set DATA."
    refused(dataclasses.replace(inputs, start=tmp_path / "square.pth"), tmp_path / "run", message)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "data",
            r"no folder .*nothing/images/train; arrange the pictures with data/reorg_sa1b.py, or set DATA",
        ),
        (
            "teacher",
            r"no teacher checkpoint .*nothing; fetch it with python scripts/download_sam3.py, or set MODEL",
        ),
        (
            "exported",
            r"no embedding shards in .*nothing/embeddings; write them with bash stage1/scripts/save_stage1_",
        ),
        ("start", r"no weights .*nothing to start from; make them with stage1/train_stage1.py .*, or pass another"),
    ],
)
def test_files_that_are_missing(missing: str, message: str, inputs: Inputs, tmp_path: Path):
    without = dataclasses.replace(inputs, **{missing: tmp_path / "nothing"})
    refused(without, tmp_path / "run", message, FileNotFoundError)


def test_a_student_that_does_not_exist(inputs: Inputs, tmp_path: Path):
    message = r"unknown backbone 'repvit_m9'; there are efficientvit_b0"
    refused(inputs, tmp_path / "run", message, MODEL__BACKBONE="repvit_m9")


@pytest.mark.slow
def test_a_program_ends_with_one_line_and_exit_code_1(inputs: Inputs, data: Path, tmp_path: Path):
    """Also if a loader process meets the fault."""
    change_annotations(data, lambda document: document.update(annotations=[]))
    spoilt = dataclasses.replace(inputs, data=data)
    code, text = finish(start(TUNE, spoilt.arguments(tmp_path / "run", DATA__NUM_WORKERS=1, **ONE_EPOCH)))
    assert code == 1
    assert text.splitlines()[-1].startswith("error: ") and "sa_2.json lists no objects" in text.splitlines()[-1]
    assert "Traceback" not in text
