"""Teachers' caches: what is in them, whose they are, and that writing goes on where it was interrupted."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distillation import cache_writer
from distillation.cache import OUTPUTS, OutputCache, open_output_cache, open_trunk_cache, require_cached
from distillation.cache_writer import keep_best, write_cache
from distillation.config import DistillationConfig
from distillation.dataset import SA1BDistillDataset
from distillation.listing import scan_sa1b
from distillation.teachers.build import build_teacher, describe_teacher
from distillation.teachers.fake import FakeTeacher
from sam3.engine import distributed, files
from sam3.engine.embedding_verify import verify_store
from sam3.engine.signals import StoppedBySignal
from sam3.engine.weights import save_weights
from stage1 import save_embedding_stage1
from tests.engine.processes import fork
from tests.samples import write_sa1b
from tests.stage1.runs import teacher_arguments

NUM_PICTURES = 11  # of the fixture `sa1b`


@pytest.fixture
def config(sa1b: Path, tmp_path: Path) -> DistillationConfig:
    return DistillationConfig(
        sa1b_dir=str(sa1b),
        teacher_backend="fake",
        image_size=112,
        cache_dir=str(tmp_path / "cache"),
        cache_queries=12,
        cache_mask_size=16,
        batch_size=2,
    )


def pictures_of(config: DistillationConfig) -> SA1BDistillDataset:
    return SA1BDistillDataset(scan_sa1b(config.sa1b_dir), config, training=False)


def write(kind: str, config: DistillationConfig, teacher: torch.nn.Module | None = None, **options: int) -> int:
    teacher = teacher or build_teacher(config, "cpu")
    with distributed.start("cpu") as world:
        return write_cache(kind, config, teacher, pictures_of(config), world, **options)


def opened(config: DistillationConfig) -> OutputCache:
    return open_output_cache(config, describe_teacher(config), min_queries=10)


def normalised(config: DistillationConfig, index: int) -> torch.Tensor:
    return pictures_of(config).sample(index)["teacher_pixel_values"][None]


# Outputs --------------------------------------------------------------------------------------------------------------


def test_the_best_queries_are_kept():
    masks = torch.tensor([[0.0, 4, 0, 0], [8, 4, 0, 0], [2, 2, 6, 6], [2, 2, 6, 6]])
    found = {
        "pred_masks": torch.stack([masks, -masks, 10 * masks])[None],
        "pred_boxes": torch.arange(12.0).view(1, 3, 4),
        "pred_logits": torch.tensor([[0.5, -3.0, 2.0]]),
        "presence_logits": torch.tensor([[1.0]]),
        "semantic_seg": masks[None, None],
    }
    kept = keep_best(found, count=2, side=2)
    assert kept["pred_logits"].tolist() == [[2.0, 0.5]]
    assert kept["pred_boxes"].tolist() == [[[8, 9, 10, 11], [0, 1, 2, 3]]]
    assert kept["pred_masks"].tolist() == [[[[40, 0], [20, 60]], [[4, 0], [2, 6]]]]  # means of 2 x 2 cells
    assert kept["pred_masks"].dtype == kept["semantic_seg"].dtype == torch.float16
    assert kept["presence_logits"].tolist() == [[1.0]] and torch.equal(kept["semantic_seg"][0, 0].float(), masks)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_outputs_are_what_the_teacher_says(config: DistillationConfig, num_workers: int):
    teacher = build_teacher(config, "cpu")
    assert write("outputs", config, teacher, num_workers=num_workers) == 0
    cache, pictures = opened(config), pictures_of(config).pictures
    assert cache.missing(pictures.keys()) == [] and cache.prompt_index == 0
    require_cached(cache, pictures.keys())
    for index in (0, 10):
        stored = cache.read(pictures.key(index))
        fresh = keep_best(teacher(normalised(config, index), torch.tensor([0]), features=False), 12, 16)
        assert set(stored) == set(OUTPUTS)
        for name, tensor in stored.items():
            assert tensor.dtype == fresh[name].dtype
            torch.testing.assert_close(tensor, fresh[name][0], rtol=1e-3, atol=1e-3)
    shown = SA1BDistillDataset(pictures, config, training=True, outputs=cache).load([3, 4])
    assert shown.prompt_index.tolist() == [0, 0] and shown.outputs["pred_masks"].shape == (2, 12, 16, 16)
    meta = json.loads((Path(config.cache_dir) / "meta.json").read_text())
    assert (meta["queries"], meta["mask_size"], meta["prompts"]) == (12, 16, list(config.prompts))
    assert (meta["teacher"]["sha256"], meta["preprocess"]["img_size"]) == (teacher.meta["sha256"], 112)


def test_whole_files_are_kept_and_others_written_again(config: DistillationConfig, caplog: pytest.LogCaptureFixture):
    write("outputs", config)
    folder, cache = Path(config.cache_dir), opened(config)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    content = (folder / "sa_3.safetensors").read_bytes()
    (folder / "sa_2.safetensors").unlink()
    (folder / "sa_3.safetensors").write_bytes(content[:-1])
    (folder / ".sa_4.safetensors.1-00.tmp").write_bytes(b"of a killed process")
    assert cache.missing(["sa_1", "sa_2", "sa_3"]) == ["sa_2"]
    with pytest.raises(ValueError, match=r"lacks 1 of 3 pictures: sa_2; write them with python train_distill"):
        require_cached(cache, ["sa_1", "sa_2", "sa_3"])
    with pytest.raises(ValueError, match=r"no teacher outputs for 'sa_2' in .*; write them with python train_distill"):
        cache.read("sa_2")
    with pytest.raises(ValueError, match=r"sa_3\.safetensors .* is cut off.*; write it again with python"):
        cache.read("sa_3")
    with caplog.at_level(logging.INFO, "sam3.distillation"):
        assert write("outputs", config) == 0
    assert "11 pictures, 9 there already, 2 to do" in caplog.text
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert {name for name in before if before[name] != after[name]} == {"sa_2.safetensors", "sa_3.safetensors"}
    assert (folder / "sa_3.safetensors").read_bytes() == content and not list(folder.glob(".*.tmp"))


def test_a_cache_of_another_run_is_refused(config: DistillationConfig):
    write("outputs", config)
    meta = describe_teacher(config)
    assert open_output_cache(config, {**meta, "name": "renamed"}, 12).num_queries == 12
    for changes, message in (
        ({"prompts": ("cats",)}, r"prompts: found \['objects.*wanted \['cats'\]"),
        ({"cache_queries": 11}, "queries: found 12, wanted 11"),
        ({"cache_mask_size": 8}, "mask_size: found 16, wanted 8"),
        ({"teacher_mean": (0.4, 0.4, 0.4)}, "preprocess.mean"),
    ):
        other = replace(config, **changes)
        with pytest.raises(ValueError, match=rf"written for another run \(.*{message}.*\); change the settings"):
            opened(other)
        with pytest.raises(ValueError, match=rf"begun by another run \(.*{message}.*\); choose another folder"):
            write("outputs", other)
    with pytest.raises(ValueError, match=r"begun by another run \(teacher\.sha256: found"):
        write("outputs", config, FakeTeacher(config, "cpu", seed=1))
    with pytest.raises(ValueError, match=r"begun by another run"):
        write("trunk", config)
    with pytest.raises(ValueError, match="keeps 12 queries of a picture, but the student has 100"):
        open_output_cache(config, meta, min_queries=100)
    with pytest.raises(FileNotFoundError, match=r"no teacher outputs in .*elsewhere; write them with"):
        opened(replace(config, cache_dir=f"{config.cache_dir}/elsewhere"))


def test_files_of_unknown_origin_or_form_are_refused(config: DistillationConfig):
    write("outputs", config)
    folder, cache = Path(config.cache_dir), opened(config)
    save_weights(folder / "sa_1.safetensors", {"pred_logits": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"sa_1\.safetensors holds \{'pred_logits': \(3,\)\}, wanted .*remove it"):
        cache.read("sa_1")
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"holds files but no meta\.json"):
        write("outputs", config)


def test_settings_that_cannot_work_are_refused(config: DistillationConfig, monkeypatch: pytest.MonkeyPatch):
    for changes, message in (
        ({"cache_queries": 21}, "cache_queries is 21, but this teacher has 20 queries; set cache_queries 20"),
        ({"cache_queries": 9}, "keeps 9 queries of a picture, but the student has 10"),
        ({"cache_dir": ""}, "--write-cache outputs needs a folder"),
        ({"horizontal_flip": True}, "horizontal_flip false"),
    ):
        with pytest.raises(ValueError, match=message):
            write("outputs", replace(config, **changes), min_queries=10)
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    for kind in cache_writer.KINDS:
        chosen = replace(config, cache_dir=f"{config.cache_dir}_{kind}")
        with pytest.raises(OSError, match=f"caching the {kind} of 11 pictures needs .* only 1.00 kB are free"):
            write(kind, chosen)
        assert not list(Path(chosen.cache_dir).glob("*.safetensors"))


def test_pictures_that_cannot_be_read_are_listed(config: DistillationConfig, tmp_path: Path):
    write_sa1b(tmp_path / "data", num_train=4, num_val=1)
    (tmp_path / "data/images/train/sa_2.jpg").write_bytes(b"")
    config = replace(config, sa1b_dir=str(tmp_path / "data"))
    assert write("outputs", config) == 1
    assert opened(config).missing([f"sa_{i}" for i in range(1, 6)]) == ["sa_2"]
    assert (Path(config.cache_dir) / "skipped.txt").read_text().startswith("sa_2\tpicture ")
    require_cached(opened(config), ["sa_1", "sa_2"])
    with pytest.raises(ValueError, match="lacks 1 of 3 pictures: sa_99;"):
        require_cached(opened(config), ["sa_1", "sa_2", "sa_99"])
    assert write("trunk", replace(config, cache_dir=f"{config.cache_dir}_trunk")) == 1
    report = verify_store(f"{config.cache_dir}_trunk", [f"sa_{i}" for i in (1, 3, 4, 5)], shape=(32, 8, 8))
    assert report.ok, str(report)  # also: the picture that would have stood in for it is there once
    (tmp_path / "data/images/train/sa_2.jpg").write_bytes((tmp_path / "data/images/train/sa_1.jpg").read_bytes())
    assert write("outputs", config) == 0 and not (Path(config.cache_dir) / "skipped.txt").exists()


# Interruptions --------------------------------------------------------------------------------------------------------


class Interrupted(FakeTeacher):
    """Sends a signal while it looks at the second batch."""

    calls = 0

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().embed(images)


@pytest.mark.parametrize("kind", cache_writer.KINDS)
def test_a_signal_ends_after_the_batch_and_the_same_command_goes_on(config: DistillationConfig, kind: str):
    with pytest.raises(StoppedBySignal, match=str(128 + signal.SIGTERM)):
        write(kind, config, Interrupted(config, "cpu"))
    assert len(stored_keys(kind, config)) == 4
    assert write(kind, config) == 0 and len(stored_keys(kind, config)) == NUM_PICTURES


@pytest.mark.parametrize("kind", cache_writer.KINDS)
def test_a_kill_leaves_nothing_half_written(config: DistillationConfig, kind: str):
    def killed(argv: Sequence[str]) -> None:
        write_whole = files.fsync

        def fsync(path: Path) -> None:
            if "sa_5" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            write_whole(path)

        files.fsync = fsync  # outputs: dies with the file written under its other name
        teacher = FakeTeacher(config, "cpu")
        embed, calls = teacher.embed, []

        def dying(images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            if kind == "trunk" and len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return embed(images)

        teacher.embed = dying
        write(kind, config, teacher)

    (process,) = fork(killed, [])
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert write(kind, config) == 0 and len(stored_keys(kind, config)) == NUM_PICTURES
    assert not list(Path(config.cache_dir).glob(".*.tmp"))
    if kind == "outputs":
        assert opened(config).read("sa_5")["pred_boxes"].shape == (12, 4)
    else:
        assert verify_store(config.cache_dir, stored_keys(kind, config), shape=(32, 8, 8)).ok


@pytest.mark.parametrize("kind", cache_writer.KINDS)
def test_processes_share_the_pictures(config: DistillationConfig, kind: str):
    processes = fork(lambda argv: write(kind, config), [], num_processes=2)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(stored_keys(kind, config)) == NUM_PICTURES
    alone = replace(config, cache_dir=f"{config.cache_dir}_alone")
    write(kind, alone)
    read = reader_of(kind)
    for key in ("sa_1", "sa_2", "sa_11"):
        torch.testing.assert_close(read(config)(key), read(alone)(key), rtol=1e-3, atol=1e-3)


def stored_keys(kind: str, config: DistillationConfig) -> list[str]:
    if kind == "trunk":
        return open_trunk_cache(config, describe_teacher(config)).keys()
    return [path.stem for path in Path(config.cache_dir).glob("*.safetensors")]


def reader_of(kind: str) -> Callable[[DistillationConfig], Callable[[str], torch.Tensor]]:
    if kind == "trunk":
        return lambda config: lambda key: open_trunk_cache(config, describe_teacher(config)).read(key)[0]
    return lambda config: lambda key: opened(config).read(key)["pred_masks"]


# The trunk ------------------------------------------------------------------------------------------------------------


def test_trunk_maps_give_the_outputs_of_the_whole_teacher(config: DistillationConfig):
    teacher = build_teacher(config, "cpu")
    assert write("trunk", config, teacher) == 0
    store = open_trunk_cache(config, teacher.meta)
    dataset = SA1BDistillDataset(scan_sa1b(config.sa1b_dir), config, training=False, store=store)
    batch = dataset.read_embeddings(dataset.load([6, 2]))
    heads = build_teacher(config, "cpu", with_trunk=False)
    found = heads.forward_from_trunk(batch.embeddings.values(), batch.prompt_index, features=True)
    images = torch.cat([normalised(config, 6), normalised(config, 2)])
    wanted = teacher(images, batch.prompt_index, features=True)
    for name in (*OUTPUTS, "encoder_output"):
        torch.testing.assert_close(found[name], wanted[name], rtol=0.01, atol=0.01)
    with pytest.raises(ValueError, match=r"lacks 1 of 2 pictures: sa_99; write them with .* --write-cache trunk"):
        require_cached(store, ["sa_1", "sa_99"])
    with pytest.raises(ValueError, match=r"begun by another run"):
        write("outputs", config)


@pytest.fixture(scope="module")
def square_export(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, sa1b: Path) -> Path:
    """A store that Stage 1 exported with square pictures."""
    output = tmp_path_factory.mktemp("square")
    assert save_embedding_stage1.main(teacher_arguments(teacher_file, sa1b, output, DATA__RESIZE="square")) == 0
    return output / "embeddings"


def test_a_store_of_stage_1_serves_and_can_be_extended(
    square_export: Path, teacher_file: Path, sa1b: Path, caplog: pytest.LogCaptureFixture
):
    config = DistillationConfig(
        sa1b_dir=str(sa1b), teacher_model_name=str(teacher_file), image_size=224, cache_dir=str(square_export)
    )
    teacher = build_teacher(config, "cpu")
    store = open_trunk_cache(config, teacher.meta)
    wanted = teacher.embed(normalised(config, 4))[0]
    torch.testing.assert_close(store.read("sa_5")[0], wanted, rtol=1e-2, atol=1e-2)
    with caplog.at_level(logging.INFO, "sam3.distillation"):
        assert write("trunk", config, teacher) == 0
    assert "11 there already, 0 to do" in caplog.text
    for changes, message in (
        ({"teacher_std": (0.25, 0.25, 0.25)}, r"preprocess\.std"),
        ({"image_size": 112}, r"preprocess\.img_size: found 224, wanted 112"),
    ):
        with pytest.raises(ValueError, match=rf"written for another run \(.*{message}"):
            open_trunk_cache(replace(config, **changes), teacher.meta)
    with pytest.raises(ValueError, match=r"teacher\.sha256: found '[0-9a-f]{64}', wanted 'other'"):
        open_trunk_cache(config, {**teacher.meta, "sha256": "other"})


def test_other_stores_of_stage_1_are_refused(
    exported: Path, square_export: Path, teacher_file: Path, sa1b: Path, tmp_path: Path
):
    config = DistillationConfig(
        teacher_model_name=str(teacher_file), image_size=224, cache_dir=str(exported / "embeddings")
    )
    meta = describe_teacher(config)
    with pytest.raises(ValueError, match=r"\(preprocess\.resize: found 'pad', wanted 'square'\); change"):
        open_trunk_cache(config, meta)
    opts = {"DATA__RESIZE": "square", "DISTILL__NO_RAND": False, "DATA__NUM_SAMPLES": 2, "DATA__NUM_VAL_SAMPLES": 0}
    assert save_embedding_stage1.main(teacher_arguments(teacher_file, sa1b, tmp_path / "random", **opts)) == 0
    with pytest.raises(ValueError, match=r"\(augmentation\.enabled: found True, wanted False\); change"):
        open_trunk_cache(replace(config, cache_dir=str(tmp_path / "random/embeddings")), meta)
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in square_export.glob("rank0-*"):
        (plain / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"has no meta\.json, so nobody knows its teacher"):
        open_trunk_cache(replace(config, cache_dir=str(plain)), meta)
    with pytest.raises(FileNotFoundError, match=r"no embedding shards in .*; write them with python train_distill\.py"):
        open_trunk_cache(replace(config, cache_dir=str(tmp_path / "none")), meta)
