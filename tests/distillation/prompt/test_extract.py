"""Extraction from end to end with a tiny teacher: what is written, going on after an interruption, and failures."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from distillation.prompt import extract, store_format
from distillation.prompt.config import DatasetSettings, TeacherSettings
from distillation.prompt.dataset import open_dataset
from distillation.prompt.prompts import Prompts
from distillation.prompt.store import FeatureStore
from distillation.prompt.teachers import Teacher, build_teacher, load_model
from sam3.engine.locks import FileLock
from sam3.engine.signals import StoppedBySignal
from sam3.sam.sam1 import build_sam1
from sam3.sam1_files import save_sam1
from scripts import extract_teacher_features
from tests.distillation.prompt.test_teachers import SIDE, losses, tiny_sam
from tests.parity.fill import image

ALL = ("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vit_tiny.pt and vit_tiny.yaml."""
    folder = tmp_path_factory.mktemp("weights")
    save_sam1(tiny_sam(), folder / "vit_tiny.pt")
    (folder / "vit_tiny.yaml").write_text(yaml.safe_dump({"model": {"type": "vit_tiny", "image_size": SIDE}}))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Layout folder: train has `a` with two masks and `b` without any, val has `c` with one."""
    for split, key, masks in (("train", "a", 2), ("train", "b", 0), ("val", "c", 1)):
        write_picture(tmp_path / "data" / split, key, masks)
    return tmp_path / "data"


def write_picture(folder: Path, key: str, masks: int) -> None:
    (folder / "image").mkdir(parents=True, exist_ok=True)
    Image.fromarray(image(60, 90, seed=len(key) + masks)).save(folder / "image" / f"{key}.png")
    for number in range(masks):
        mask = np.zeros((60, 90), np.uint8)
        mask[10 + 20 * number : 30 + 20 * number, 15:50] = 255
        (folder / "mask" / key).mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / "mask" / key / f"obj_{number}.png")


def arguments(weights: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--teacher_name", "tiny", "--teacher_cfg", f"{weights}/vit_tiny.yaml"),
        *("--teacher_ckpt", f"{weights}/vit_tiny.pt", "--dataset_base_dir", str(data)),
        *("--output_base_dir", str(output), "--device", "cpu", "--num_workers", "0", *more),
    ]


def run(*args: str | Path) -> int:
    return extract_teacher_features.main(arguments(*args))


def sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.npy"))}


def teacher_of(weights: Path, *components: str, **prompt_embed) -> Teacher:
    named = TeacherSettings("tiny", checkpoint=f"{weights}/vit_tiny.pt")
    return build_teacher(named, losses(*components, **prompt_embed), "cpu")


def test_the_documents_command_reads_as_it_stands():
    command = """--teacher_name SAM_vitH --teacher_cfg  ./configs/sam_vith.yaml
      --teacher_ckpt ./weights/sam_vit_h_4b8939.pth --dataset_base_dir ./datasets
      --output_base_dir ./precomputed/SAM_vitH --splits train val --fp16"""
    args = extract_teacher_features.parse_args(shlex.split(command))
    settings = extract_teacher_features.extract_settings(args)
    assert settings.half and settings.components == ALL and settings.dataset.mode == "single"
    args = extract_teacher_features.parse_args(shlex.split(f"{command} --mode everything --grid_points 16"))
    settings = extract_teacher_features.extract_settings(args)
    assert settings.components == ALL[:3] and settings.dataset.grid_points == 16


@pytest.mark.parametrize(
    "more",
    ["--mode everything --prompts none", "--limit 0", "--splits a a", "--components dense_logits --no_dense_logits"],
)
def test_arguments_that_cannot_act_are_refused(weights: Path, data: Path, tmp_path: Path, more: str):
    with pytest.raises(SystemExit) as stopped:
        run(weights, data, tmp_path / "out", *more.split())
    assert stopped.value.code == 2


def test_files_sizes_and_a_second_run(weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(weights, data, tmp_path / "full") == 0
    assert run(weights, data, tmp_path / "half", "--fp16") == 0
    grid, full = 16 * 16, sizes(tmp_path / "full")
    prompts = {"train/a": 2, "train/b": 1, "val/c": 1}
    wanted = {}
    for key, count in prompts.items():
        elements = {"enc_patch": 256 * grid, "prompt_embed": 256 * grid, "mask_token": count * 4 * 256}
        for name, number in {**elements, "dense_logits": count * 16 * grid}.items():
            wanted[f"{key}_{name}.npy"] = 4 * number + 128
    assert full == wanted
    assert sizes(tmp_path / "half") == {name: (size - 128) // 2 + 128 for name, size in full.items()}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "full").rglob("*.np?")}
    assert len(before) == 15 and not list((tmp_path / "full").rglob("*.tmp"))
    assert run(weights, data, tmp_path / "full") == 0
    assert "train: 2 pictures, 0 to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "full").rglob("*.np?")}


def test_meta_says_all_that_the_features_depend_on(weights: Path, data: Path, tmp_path: Path):
    assert run(weights, data, tmp_path / "out", "--fp16", "--splits", "val") == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["format_version"] == 1 and meta["dtype"] == "float16" and meta["computed_in"]["dtype"] == "float32"
    assert {name: meta["teacher"][name] for name in ("name", "type", "checkpoint", "bytes")} == {
        "name": "tiny",
        "type": "vit_tiny",
        "checkpoint": "vit_tiny.pt",
        "bytes": (weights / "vit_tiny.pt").stat().st_size,
    }
    assert len(meta["teacher"]["sha256"]) == 64
    assert (meta["mode"], meta["grid_points"], meta["image_size"], meta["multimask"]) == ("single", None, SIDE, False)
    assert (meta["tap"], meta["enc_projection"], meta["encoder_channels"]) == ("input_keys", "neck", 256)
    assert meta["components"] == list(ALL)
    drawn = {"prompt_mode": "mixed", "min_points": 1, "max_points": 3, "max_bbox_shift": 20}
    assert meta["prompts"] == {"source": "auto", "seed": 0, **drawn}
    assert {"python", "torch", "numpy"} == set(meta["tools"])


def test_the_store_holds_what_the_teacher_says_to_the_trainings_prompts(weights: Path, data: Path, tmp_path: Path):
    """Float32: bit for bit what the teacher gives online, asked about one picture."""
    assert run(weights, data, tmp_path / "out", "--splits", "train") == 0
    store, teacher = FeatureStore(tmp_path / "out", "train"), teacher_of(weights, *ALL)
    preprocess = extract.sam_preprocess(SIDE)
    drawn = open_dataset(str(data / "train"), DatasetSettings(), preprocess, training=True, seed=0)
    neck = teacher.neck_projection()
    for index in range(2):
        batch = drawn.load([index], epoch=0)
        key, name = batch.keys[0].split("/")
        images = preprocess.normalise(batch.images, batch.sizes)
        online = teacher.features_of(images, store.prompts(key)[0], False)
        row = store.row(key, name)
        assert torch.equal(store.prompts(key)[0][row].points, batch.prompts.points)  # as training draws them first
        projected = torch.nn.functional.conv2d(online["encoder_patch"], neck)[0]
        assert torch.equal(store.read(key, "encoder_patch"), projected)
        assert torch.equal(store.read(key, "prompt_embed"), online["prompt_embed"][0])
        for component in ("decoder_mask_token", "dense_mask_logits", "ious"):
            assert torch.equal(store.read(key, component, name), online[component][row])


def test_training_reads_its_batches_from_the_store(weights: Path, data: Path, tmp_path: Path):
    assert run(weights, data, tmp_path / "out", "--splits", "train", "--prompt_mode", "box", "--fp16") == 0
    store = FeatureStore(tmp_path / "out", "train")
    drawn = open_dataset(
        str(data / "train"), DatasetSettings(), extract.sam_preprocess(SIDE), training=True, stores={"tiny": store},
        components=ALL,
    )  # fmt: skip
    batch = drawn.load([0, 1], epoch=5)
    assert torch.equal(batch.prompts.boxes, store.prompts("a")[0].boxes)
    found = {name: tuple(value.shape) for name, value in batch.features["tiny"].items()}
    assert found["encoder_patch"] == (2, 256, 16, 16) and found["decoder_mask_token"] == (2, 4, 256)
    assert found["dense_mask_logits"] == (2, 1, 64, 64) and found["ious"] == (2, 1)


def test_a_grid_of_four_by_four(weights: Path, data: Path, tmp_path: Path):
    more = ("--mode", "everything", "--grid_points", "4", "--splits", "val", "--points_per_batch", "5")
    assert run(weights, data, tmp_path / "out", *more) == 0
    store = FeatureStore(tmp_path / "out", "val")
    assert store.meta["components"] == list(ALL[:3]) and store.meta["prompts"] == {"source": "grid"}
    assert store.read("c", "decoder_mask_token").shape == (16, 4, 256)
    prompts, names = store.prompts("c")
    assert names == [] and prompts.points.shape == (16, 1, 2)
    # 60 x 90 pixels become 171 x 256; the first point is the middle of the first of 4 x 4 parts.
    assert prompts.points[0, 0].tolist() == [32.0, 21.375] and prompts.points[1, 0].tolist() == [96.0, 21.375]
    assert store.read("c", "prompt_embed").shape == (256, 16, 16)  # once, not for each of the 4 chunks
    assert run(weights, data, tmp_path / "once", *more[:-1], "64") == 0
    whole = FeatureStore(tmp_path / "once", "val").read("c", "decoder_mask_token")
    torch.testing.assert_close(store.read("c", "decoder_mask_token"), whole, rtol=1e-4, atol=1e-4)


def test_output_keys_multimask_and_raw_features(weights: Path, data: Path, tmp_path: Path):
    more = ("--prompt_embed_tap", "output_keys", "--multimask", "--enc_projection", "none", "--splits", "train")
    assert run(weights, data, tmp_path / "out", *more) == 0
    store = FeatureStore(tmp_path / "out", "train")
    assert store.read("a", "encoder_patch").shape == (192, 16, 16) and store.encoder_channels == 192
    assert store.read("a", "prompt_embed").shape == (2, 256, 16, 16)
    assert store.read("a", "dense_mask_logits").shape == (2, 3, 64, 64) and store.read("a", "ious").shape == (2, 3)
    online = teacher_of(weights, *ALL, tap="output_keys")
    picture = extract.PicturesWithPrompts(
        extract_teacher_features.open_split(data / "train"), ["a"], extract.ExtractSettings(), SIDE
    ).load([0])
    images = extract.sam_preprocess(SIDE).normalise(picture.images, picture.sizes)
    wanted = online.features_of(images, picture.prompts, True)
    assert torch.equal(store.read("a", "prompt_embed"), wanted["prompt_embed"])
    assert torch.equal(store.read("a", "encoder_patch"), wanted["encoder_patch"][0])


def test_a_hook_behind_the_prompts_is_stored_for_each_of_them(weights: Path, data: Path, tmp_path: Path):
    hook = "prompt_embed=mask_decoder.transformer.layers[0]@out.1"
    assert run(weights, data, tmp_path / "out", "--splits", "train", "--hooks", hook) == 0
    assert np.load(tmp_path / "out/train/a_prompt_embed.npy").shape == (2, 256, 16, 16)
    store = FeatureStore(tmp_path / "out", "train")
    assert store.is_per_prompt("prompt_embed") and store.meta["tap"] == "output_keys"
    with pytest.raises(SystemExit):
        run(weights, data, tmp_path / "other", "--hooks", "prompt_embed")


def test_prompts_of_masks_or_none(weights: Path, data: Path, tmp_path: Path):
    assert run(weights, data, tmp_path / "masks", "--prompts", "masks", "--splits", "train") == 0
    assert sorted({path.name.split("_")[0] for path in (tmp_path / "masks" / "train").glob("*.npz")}) == ["a"]
    assert run(weights, data, tmp_path / "none", "--prompts", "none", "--splits", "train") == 0
    store = FeatureStore(tmp_path / "none", "train")
    prompts, names = store.prompts("a")
    assert names == [""] and prompts == Prompts() and store.read("a", "decoder_mask_token").shape == (1, 4, 256)
    both = FeatureStore(tmp_path / "none", "train"), FeatureStore(tmp_path / "masks", "train")
    encoders = [each.read("a", "encoder_patch") for each in both]
    assert torch.equal(*encoders)  # it knows nothing of prompts


def test_mobile_sams_features_are_those_behind_its_neck(tmp_path: Path, data: Path):
    torch.manual_seed(0)
    save_sam1(build_sam1("vit_t", 128), tmp_path / "vit_tiny.pt")
    (tmp_path / "vit_tiny.yaml").write_text(yaml.safe_dump({"model": {"type": "vit_t", "image_size": 128}}))
    assert run(tmp_path, data, tmp_path / "out", "--splits", "val", "--components", "enc_patch") == 0
    store = FeatureStore(tmp_path / "out", "val")
    named = TeacherSettings("M", cfg=str(tmp_path / "vit_tiny.yaml"), checkpoint=str(tmp_path / "vit_tiny.pt"))
    model, _ = load_model(named)
    with Image.open(data / "val" / "image" / "c.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    square, size = model.preprocess.fit(pixels)
    with torch.no_grad():
        embedding = model.encode(model.preprocess.normalise(square[None], torch.tensor([size])))
    assert torch.equal(store.read("c", "encoder_patch"), embedding[0])


# Going on -------------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_or_cut_off_is_done_again(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    output = tmp_path / "out"
    assert run(weights, data, output, "--limit", "1") == 0
    assert sorted(path.name for path in (output / "train").glob("*.npz")) == ["a_prompts.npz"]
    assert run(weights, data, output) == 0
    said = capsys.readouterr().out
    assert "train: 2 pictures, 1 to do" in said and "val: 1 pictures, 0 to do" in said
    whole = sizes(output)
    os.truncate(output / "train" / "a_dense_logits.npy", 500)
    (output / "train" / "b_mask_token.npy").unlink()
    (output / "val" / ".c_enc_patch.npy.1-2.tmp").write_bytes(b"left by a process that was killed")
    kept = (output / "val" / "c_enc_patch.npy").stat().st_mtime_ns
    assert run(weights, data, output) == 0
    assert sizes(output) == whole and not list(output.rglob("*.tmp"))
    assert (output / "val" / "c_enc_patch.npy").stat().st_mtime_ns == kept
    assert run(weights, data, output, "--overwrite", "--splits", "val") == 0
    assert (output / "val" / "c_enc_patch.npy").stat().st_mtime_ns != kept


def test_another_teacher_or_setting_in_the_same_folder_is_refused(weights: Path, data: Path, tmp_path: Path):
    output = tmp_path / "out"
    assert run(weights, data, output, "--splits", "val") == 0
    for more, message in (
        (("--fp16",), "dtype: found 'float32', wanted 'float16'"),
        (("--prompt_seed", "3"), r"prompts\.seed: found 0, wanted 3"),
        (("--no_dense_logits", "--overwrite"), "components: found"),
    ):
        with pytest.raises(ValueError, match=message):
            run(weights, data, output, *more)
    other = tmp_path / "other"
    other.mkdir()
    save_sam1(tiny_sam(seed=1), other / "vit_tiny.pt")
    (other / "vit_tiny.yaml").write_text((weights / "vit_tiny.yaml").read_text())
    with pytest.raises(ValueError, match=r"teacher\.sha256: found"):
        run(other, data, output)
    (output / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"holds features but no meta\.json"):
        run(weights, data, output)


def test_a_dry_run_writes_nothing(weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(weights, data, tmp_path / "out", "--dry-run", "--fp16") == 0
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    # 2 x 256 x 16 x 16 + P x (4 x 256 + 64 x 64) numbers of 2 bytes and 4 headers; P is 2 and 1, so 1.5 in the mean.
    assert "train: 2 pictures, 2 to do, about 278.02 kB each, 556.03 kB in all" in said
    assert "free in" in said


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_damaged_picture_fails_and_the_others_are_done(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (data / "train" / "image" / "b.png").write_bytes(b"no picture")
    assert run(weights, data, tmp_path / "out") == 1
    assert "1 of 2 pictures failed" in capsys.readouterr().out
    listed = (tmp_path / "out" / "train" / "failed.txt").read_text()
    assert listed.startswith("b\tcannot read picture") and (tmp_path / "out" / "train" / "a_prompts.npz").exists()
    write_picture(data / "train", "b", 0)
    assert run(weights, data, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "train" / "failed.txt").exists()


def test_features_that_are_not_finite_fail(weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    model = tiny_sam()
    with torch.no_grad():
        model.image_encoder.neck[0].weight.mul_(1e6)  # fine in float32, beyond float16
    broken = tmp_path / "broken"
    broken.mkdir()
    save_sam1(model, broken / "vit_tiny.pt")
    (broken / "vit_tiny.yaml").write_text((weights / "vit_tiny.yaml").read_text())
    assert run(broken, data, tmp_path / "out", "--fp16", "--splits", "val") == 1
    assert "c (encoder_patch holds values that are not finite in float16)" in capsys.readouterr().out
    assert not list((tmp_path / "out" / "val").glob("*.np?"))


def test_a_full_disk_keeps_what_is_written(weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = store_format.write_features

    def full(folder: Path, key: str, *rest) -> None:
        if key == "b":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(folder, key, *rest)

    monkeypatch.setattr(extract, "write_features", full)
    with pytest.raises(
        OSError, match=r"features of b .*No space left.*the 1 pictures written so far are whole and stay"
    ):
        run(weights, data, tmp_path / "out")
    assert store_format.is_complete(
        tmp_path / "out" / "train", "a", json.loads((tmp_path / "out" / "meta.json").read_text())
    )
    monkeypatch.undo()
    assert run(weights, data, tmp_path / "out") == 0


def test_a_signal_stops_after_the_picture_under_way(weights, data, tmp_path, monkeypatch: pytest.MonkeyPatch):
    real = extract.features_of

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(extract, "features_of", signalled)
    with pytest.raises(StoppedBySignal) as stopped:
        run(weights, data, tmp_path / "out")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert stopped.value.message.endswith("the same command goes on from there")
    assert [path.name for path in (tmp_path / "out").rglob("*.npz")] == ["a_prompts.npz"]
    monkeypatch.undo()
    assert run(weights, data, tmp_path / "out") == 0
    assert len(list((tmp_path / "out").rglob("*.npz"))) == 3


def test_too_little_space_is_said_before_anything_is_computed(weights, data, tmp_path, monkeypatch):
    monkeypatch.setattr("sam3.engine.files.free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"the features of 3 pictures needs .* only 1.00 kB are free"):
        run(weights, data, tmp_path / "out")


def test_two_runs_do_not_write_one_split(weights: Path, data: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".val.lock", "writing"), pytest.raises(ValueError, match="already writing"):
        run(weights, data, tmp_path / "out", "--splits", "val")


@pytest.mark.parametrize("num_workers", ["1"])
def test_worker_processes_give_the_same(weights: Path, data: Path, tmp_path: Path, num_workers: str):
    assert run(weights, data, tmp_path / "here", "--splits", "train") == 0
    assert run(weights, data, tmp_path / "there", "--splits", "train", "--num_workers", num_workers) == 0
    for path in (tmp_path / "here" / "train").glob("*.np?"):
        assert path.read_bytes() == (tmp_path / "there" / "train" / path.name).read_bytes()
