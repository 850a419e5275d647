"""The printed counts against the public table, which was counted from the checkpoint files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stage1 import compare_models
from stage1.compare_models import Count, count_teacher, main

ROOT = Path(__file__).parents[2]
# Backbone, millions of parameters, percent smaller than the teacher's vision backbone.
PUBLISHED = {
    "ES-EV-S": ("EfficientViT-B0", "0.68M", 99.85),
    "ES-EV-M": ("EfficientViT-B1", "4.64M", 99.00),
    "ES-EV-L": ("EfficientViT-B2", "14.98M", 96.76),
    "ES-RV-S": ("RepViT-M0.9", "4.72M", 98.98),
    "ES-RV-M": ("RepViT-M1.1", "7.77M", 98.32),
    "ES-RV-L": ("RepViT-M2.3", "22.40M", 95.15),
    "ES-TV-S": ("TinyViT-5M", "5.07M", 98.90),
    "ES-TV-M": ("TinyViT-11M", "10.55M", 97.72),
    "ES-TV-L": ("TinyViT-21M", "20.62M", 95.53),
}
# Entries of sam3.pt below each root, parameters in millions.
TEACHER = {
    "backbone.vision_backbone.trunk": (420, 446.238),
    "backbone.vision_backbone.convs": (22, 7.802),
    "backbone.vision_backbone.sam2_convs": (22, 7.802),
    "backbone.language_backbone": (295, 353.725),
    "geometry_encoder": (76, 8.216),
    "transformer.encoder": (108, 9.473),
    "transformer.decoder": (175, 11.575),
    "dot_prod_scoring": (10, 1.183),
    "segmentation_head": (28, 2.299),
    "tracker": (309, 11.743),
}


def manifest_count() -> dict[str, Count]:
    """Counts per root from the layout of sam3.pt, whose rotary tables and random frequencies are no parameters."""
    buffers = ("freqs_cis", "positional_encoding_gaussian_matrix")
    counts = dict.fromkeys(TEACHER, Count(0, 0))
    for line in (ROOT / "tests" / "manifests" / "sam3.tsv").read_text().splitlines():
        key, shape, _ = line.split("\t")
        root = next(r for r in TEACHER if key.removeprefix("detector.").startswith(f"{r}."))
        numel = 1
        for side in shape.split("x") if shape else []:
            numel *= int(side)
        counts[root] += Count(1, 0 if key.endswith(buffers) else numel)
    return counts


def test_teacher_is_counted_from_its_modules() -> None:
    counts = count_teacher()
    assert {name: (c.keys, round(c.params / 1e6, 3)) for name, c in counts.items()} == TEACHER
    assert compare_models.total(counts.values()) == Count(1465, 860_055_224)


def test_tracker_constant_agrees_with_the_checkpoint_layout() -> None:
    counts = manifest_count()
    assert counts["tracker"] == compare_models.TRACKER
    assert compare_models.total(counts.values()) == Count(1465, 860_055_224)


def test_summary_is_the_published_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--student", "all"]) == 0
    printed = capsys.readouterr().out
    for figure in ("860.06M", "461.84M", "446.24M", "353.72M", "44.49M"):
        assert figure in printed
    rows = {m[1]: m.groups()[1:] for m in re.finditer(r"(ES-\w\w-\w) +(\S+) +(\S+) +([\d.]+)% smaller", printed)}
    assert list(rows) == list(PUBLISHED)
    for name, (backbone, params, smaller) in PUBLISHED.items():
        assert rows[name][:2] == (backbone, params)
        # The published percentages come from rounded counts: 98.99 stands there as 99.00, 95.54 as 95.53.
        assert float(rows[name][2]) == pytest.approx(smaller, abs=0.011)


def test_details_of_one_student(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--student", "es_rv_m"]) == 0
    lines = [re.sub(r"\s+", " ", line.strip()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "ES-RV-M: RepViT-M1.1 (repvit_m1_1)",
        "stem (/4) 12 0.019M",
        "stage 2 (/16) 373 3.975M",
        "backbone 645 7.775M 98.32% smaller than the vision backbone",
        "head 8 9.965M 512 -> 1024 channels",
        "total 653 17.739M",
        "detector.backbone.vision_backbone.trunk 420 446.238M replaced",
        "detector.segmentation_head 28 2.299M kept",
        "tracker 309 11.743M kept",
        "total 1465 860.055M",
        "vision backbone 697 33.344M was 461.842M",
        "total 1698 431.557M was 860.055M",
    ):
        assert line in lines


def test_verify_prints_shapes_at_any_size(capsys: pytest.CaptureFixture[str]) -> None:
    """126 pixels: 126 / 14 = 9 cells for the teacher, 126 -> 63 -> 32 -> 16 -> 8 -> 4 in the backbone."""
    assert main(["--student", "es_ev_s", "--verify", "--img-size", "126"]) == 0
    printed = re.sub(r" +", " ", capsys.readouterr().out)
    assert printed == "ES-EV-S backbone (1, 128, 4, 4) output (1, 1024, 9, 9)\n"


@pytest.mark.slow
def test_all_nine_give_the_teachers_grid_at_1008(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert all(", 32, 32)" in line and line.endswith("output (1, 1024, 72, 72)") for line in lines)


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--img-size is 1000; the teacher takes multiples of 14, such as 1008"):
        main(["--student", "es_ev_s", "--verify", "--img-size", "1000"])
    with pytest.raises(SystemExit) as stop:
        main(["--student", "es_ev_s", "--img-size", "1008"])
    assert stop.value.code == 2
    assert "--img-size acts only with --verify" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--student", "es_xx_s"])
    assert stop.value.code == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_needs_less_than_a_gigabyte() -> None:
    """The peak (`VmHWM`) less the mapped files: torch's CUDA libraries alone map up to 0.6 GB of shared code."""
    script = (
        "import runpy, sys; sys.argv = ['compare_models.py', '--student', 'all']\n"
        "try: runpy.run_path('stage1/compare_models.py', run_name='__main__')\n"
        "finally: print(*[line for line in open('/proc/self/status') if line.startswith(('VmHWM', 'RssFile'))])"
    )
    environment = os.environ | {"PYTHONPATH": "sam3", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "860.06M" in run.stdout
    peak_kib, mapped_kib = (int(re.search(rf"{name}:\s+(\d+) kB", run.stdout)[1]) for name in ("VmHWM", "RssFile"))
    assert 1024 * (peak_kib - mapped_kib) < 1e9
