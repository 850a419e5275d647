"""The whole of Stage 1 as its user sees it: the commands of the README on sample data, through the launchers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from sam3.engine.weights import load_weights
from sam3.model_builder import build_efficientsam3_image_model
from scripts import evaluate_student, predict
from stage1 import convert_stage1_weights, train_stage1
from tests.stage1.runs import ROOT, free_port, model_of, student_arguments


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory, exported: Path, sa1b: Path) -> Path:
    """Output folder of 15 epochs."""
    output = tmp_path_factory.mktemp("longer")
    opts = {"TRAIN__EPOCHS": 15, "TRAIN__BASE_LR": 3e-3, "SAVE_FREQ": 15, "PRINT_FREQ": 4}
    assert train_stage1.main(student_arguments(exported, sa1b, output, **opts)) == 0
    return output


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, longer: Path, teacher_file: Path) -> Path:
    """The student of `longer` merged into its teacher."""
    path = tmp_path_factory.mktemp("merged") / "efficient_sam3.pt"
    arguments = ["--student-ckpt", str(longer / "ckpt_epoch_14.pth"), "--sam3-ckpt", str(teacher_file)]
    assert convert_stage1_weights.main([*arguments, "--output", str(path)]) == 0
    return path


def test_the_merged_model_holds_the_student_bit_by_bit(merged: Path, longer: Path):
    student, tensors = model_of(longer / "ckpt_epoch_14.pth"), load_weights(merged).tensors
    prefix = "detector.backbone.vision_backbone.trunk.model."
    assert all(torch.equal(tensors[prefix + key], value) for key, value in student.items())
    model = build_efficientsam3_image_model(merged, device="cpu")
    assert model.preprocess.resize == "pad" and model.preprocess.img_size == 224
    assert model.backbone.vision_backbone.trunk.model.output_stride == 16, "as the config says"


def test_evaluation_sees_the_gain_over_the_untrained_student(
    merged: Path, teacher_file: Path, sa1b: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    arguments = ["--teacher", str(teacher_file), "--students", str(merged), "--names", "student", "--untrained"]
    arguments += ["--data-path", str(sa1b), "--split", "train", "--output", str(tmp_path), "--device", "cpu"]
    assert evaluate_student.main(arguments) == 0
    assert "student, untrained" in capsys.readouterr().out
    teacher, before, after = json.loads((tmp_path / "evaluation.json").read_text())["models"]
    assert teacher["cosine"] == 1 and teacher["box_iou"] == 1 and teacher["point_iou"] == 1
    assert abs(before["cosine"]) < 0.2
    assert after["cosine"] > before["cosine"] + 0.3
    assert Image.open(tmp_path / "evaluation.png").size == (4 * 320, Image.open(tmp_path / "evaluation.png").height)


def test_evaluation_of_the_teacher_against_itself_is_perfect(teacher_file: Path, merged: Path, sa1b: Path, tmp_path):
    arguments = ["--teacher", str(teacher_file), "--data-path", str(sa1b), "--output", str(tmp_path), "--device", "cpu"]
    assert evaluate_student.main([*arguments, "--students", str(teacher_file)]) == 0
    _, itself = json.loads((tmp_path / "evaluation.json").read_text())["models"]
    assert itself["cosine"] == pytest.approx(1, abs=1e-5) and itself["box_iou"] == 1
    with pytest.raises(ValueError, match="holds no student"):
        evaluate_student.main([*arguments, "--students", str(teacher_file), "--untrained"])
    with pytest.raises(ValueError, match="evaluate them one at a time"):
        evaluate_student.main([*arguments, "--students", str(teacher_file), str(merged)])


def test_prediction_runs_on_the_merged_model(merged: Path, sa1b: Path, tmp_path: Path):
    image = next((sa1b / "images/val").glob("*.jpg"))
    arguments = ["--checkpoint", str(merged), "--image", str(image), "--box", "10", "10", "60", "60"]
    arguments += ["--threshold", "0", "--output", str(tmp_path / "out.png"), "--json", str(tmp_path / "out.json")]
    assert predict.main([*arguments, "--device", "cpu"]) == 0
    assert Image.open(tmp_path / "out.png").size == Image.open(image).size
    assert json.loads((tmp_path / "out.json").read_text())


@pytest.mark.slow
def test_the_users_commands(teacher_file: Path, sa1b: Path, tmp_path: Path):
    """Export, check, train, convert: the launchers and flags as documented, with the tiny configs."""
    tiny = ["DATA.NUM_WORKERS", "1", "MODEL.RESUME", str(teacher_file)]
    data, teacher, student = f"DATA_PATH={sa1b}", f"OUTPUT={tmp_path}/stage1_teacher", f"OUTPUT={tmp_path}/stage1/ev_s"
    export = ["stage1/scripts/save_stage1_embeddings.sh", "CFG=stage1/configs/teacher/sam3_tiny.yaml", data, teacher]
    launch(*export, "GPUS=0", "--dry-run", "--opts", *tiny)
    assert not (tmp_path / "stage1_teacher").exists()
    launch(*export, "GPUS=2", "DEVICE=cpu", f"MASTER_PORT={free_port()}", "BATCH_SIZE=2", "--opts", *tiny)
    launch(*export, "GPUS=0", "--check-saved-embed", "--opts", *tiny)
    alias = ["stage1/scripts/save_image_embeddings.sh", *export[1:]]
    launch(*alias, "GPUS=0", "--verify-store", "--opts", *tiny)
    opts = ["DISTILL.TEACHER_EMBED_PATH", f"{tmp_path}/stage1_teacher/embeddings", "TRAIN.EPOCHS", "2"]
    train = ["stage1/scripts/train_stage1_student.sh", "CFG=stage1/configs/es_ev_s_tiny.yaml", data, student]
    launch(*train, "BATCH_SIZE=4", "GPUS=0", "--opts", *opts, "DATA.NUM_WORKERS", "1")
    merged = tmp_path / "efficient_sam3_efficientvit_b0.pt"
    launch(
        *("stage1/convert_stage1_weights.py", "--student-ckpt", f"{tmp_path}/stage1/ev_s/ckpt_epoch_1.pth"),
        *("--sam3-ckpt", str(teacher_file), "--output", str(merged)),
        *("--target-prefix", "detector.backbone.vision_backbone.trunk.model."),
        *("--replace-prefix", "detector.backbone.vision_backbone.trunk."),
        program="python",
    )
    assert merged.exists()


def launch(*arguments: str, program: str = "bash") -> None:
    """Run from the root; the interpreter is the one of this test."""
    python = str(ROOT / ".venv/bin/python") if (ROOT / ".venv/bin/python").exists() else "python3"
    command = [program if program == "bash" else python, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
