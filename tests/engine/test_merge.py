from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sam3.engine import merge
from sam3.engine.merge import (
    LANGUAGE,
    STUDENT_TRUNK,
    TRUNK,
    check_merge,
    check_teacher,
    merged_meta,
    plan_merge,
    plan_update,
    prove_merge,
    stated_teacher,
    write_merge,
)
from sam3.engine.weights import WeightFile, load_weights, same_bytes, save_weights
from tests.manifests import manifest_tensors


@pytest.fixture(scope="module")
def sam3():
    return WeightFile(manifest_tensors("sam3"), path=Path("sam3.pt"))


@pytest.fixture
def student():
    return WeightFile(manifest_tensors("es_rv_m"), path=Path("student.pth"))


def stage1_plan(student, sam3, **changes):
    return plan_merge(student, sam3, **{"target_prefix": STUDENT_TRUNK, "replace_prefixes": [TRUNK]} | changes)


# Keys of each student's Stage-1 checkpoint; the merged file has 1045 more.
COUNTS = {"es_rv_s": 707, "es_rv_m": 653, "es_rv_l": 1463, "es_tv_s": 300, "es_tv_m": 300, "es_tv_l": 300}
COUNTS |= {"es_ev_s": 194, "es_ev_m": 269, "es_ev_l": 362}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_every_student(sam3, name):
    student = WeightFile(manifest_tensors(name), path=Path(name))
    plan = stage1_plan(student, sam3)
    check_merge(plan)
    assert (plan.copied, plan.replaced, plan.skipped, plan.appended) == (COUNTS[name], 420, 0, 1045)
    assert len(plan.tensors) == COUNTS[name] + 1045
    assert list(plan.tensors)[: plan.copied] == [f"{STUDENT_TRUNK}.{key}" for key in student.tensors]
    assert list(plan.tensors)[plan.copied :] == [key for key in sam3.tensors if not key.startswith(f"{TRUNK}.")]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_written_file_holds_the_sources_bit_for_bit(tmp_path, sam3, student, suffix):
    plan = stage1_plan(student, sam3)
    seen = []
    proof = write_merge(tmp_path / f"m{suffix}", plan, {"backbone": "repvit_m1_1"}, verify=seen.append)
    assert (proof.from_student, proof.from_base) == (653, 1045)
    assert proof.file_bytes == (tmp_path / f"m{suffix}").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == [f"m{suffix}"]
    assert [p.suffix for p in seen] == [suffix]
    found = load_weights(tmp_path / f"m{suffix}")
    assert found.meta == {"backbone": "repvit_m1_1"}
    assert len(found.tensors) == 1698
    for key, tensor in found.tensors.items():
        source = student.tensors[key.removeprefix(f"{STUDENT_TRUNK}.")] if key.startswith(TRUNK) else sam3.tensors[key]
        assert same_bytes(tensor, source), key


@pytest.mark.parametrize("wrapper", ["module.", "student_trunk.", "module.student_trunk.", f"{STUDENT_TRUNK}."])
def test_wrappers_of_the_student_are_taken_off(sam3, student, wrapper):
    wrapped = WeightFile({wrapper + key: tensor for key, tensor in student.tensors.items()}, path=student.path)
    assert list(stage1_plan(wrapped, sam3).tensors) == list(stage1_plan(student, sam3).tensors)


def test_second_student_replaces_the_first(sam3, student):
    merged = WeightFile(stage1_plan(student, sam3).tensors, path=Path("merged.pt"))
    plan = stage1_plan(student, merged, replace_prefixes=[f".{STUDENT_TRUNK}."])
    check_merge(plan)
    assert (plan.copied, plan.replaced, plan.appended) == (653, 653, 1045)


def test_new_and_replaced_tracker_keys_need_no_trunk(sam3):
    trained = {"memory_attention.layers.0.weight": torch.ones(2), "no_mem_embed": torch.ones(1, 1, 4)}
    student = WeightFile(trained, path=Path("stage2.pth"))
    plan = plan_merge(student, sam3, "tracker", ["tracker.transformer", "tracker.no_mem_embed"])
    check_merge(plan)
    assert (plan.copied, plan.replaced, plan.appended) == (2, 107, 1358)
    assert same_bytes(plan.tensors["tracker.no_mem_embed"], trained["no_mem_embed"])


def test_skipped_prefixes_stay_out(sam3, student):
    plan = stage1_plan(student, sam3, skip_prefixes=["tracker.", LANGUAGE])
    check_merge(plan)
    assert (plan.skipped, plan.appended) == (309 + 295, 1045 - 309 - 295)
    assert not any(key.startswith("tracker.") for key in plan.tensors)


def test_prefixes_end_at_dots(sam3, student):
    plan = stage1_plan(student, sam3, replace_prefixes=[TRUNK[:-1]])
    assert plan.replaced == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"replace_prefixes": ["image_encoder"]},
            "below the replace prefix 'image_encoder', so nothing would be replaced",
        ),
        ({"replace_prefixes": [""]}, "nothing would be replaced"),
        ({"replace_prefixes": [f"{TRUNK}.blocks"]}, f"4 of the teacher's tensors below '{TRUNK}' would stay"),
        ({"target_prefix": "image_encoder"}, f"{TRUNK} would be removed, but the student goes to 'image_encoder.'"),
        ({"target_prefix": TRUNK}, f"wanted the student's last layer at {STUDENT_TRUNK}.head.3.weight"),
    ],
)
def test_wrong_prefixes_are_refused(sam3, student, changes, message):
    with pytest.raises(ValueError, match=message):
        check_merge(stage1_plan(student, sam3, **changes))


def test_base_that_kept_the_teachers_trunk_is_refused(sam3, student):
    bloated = sam3.tensors | {f"{STUDENT_TRUNK}.{key}": tensor for key, tensor in student.tensors.items()}
    with pytest.raises(ValueError, match=f"420 of the teacher's tensors below '{TRUNK}' would stay"):
        check_merge(stage1_plan(student, WeightFile(bloated), replace_prefixes=[STUDENT_TRUNK]))


def test_collisions_are_refused(sam3):
    student = WeightFile({"transformer.x": torch.ones(1), "no_mem_embed": torch.ones(1)}, path=Path("s.pth"))
    with pytest.raises(ValueError, match=r"1 keys are in both .*: tracker.no_mem_embed"):
        check_merge(plan_merge(student, sam3, "tracker", ["tracker.transformer"]))


def test_empty_student_is_refused(sam3):
    with pytest.raises(ValueError, match="the student has no tensors"):
        check_merge(stage1_plan(WeightFile({}), sam3))


def test_base_without_trunk_is_refused(sam3, student):
    kept = {key: tensor for key, tensor in sam3.tensors.items() if not key.startswith(f"{TRUNK}.")}
    with pytest.raises(ValueError, match=r"nothing would be replaced; the base has keys below .*vision_backbone"):
        check_merge(stage1_plan(student, WeightFile(kept, path=Path("sam3.pt"))))


def test_sam3_given_as_student_is_refused(sam3):
    with pytest.raises(ValueError, match="wanted the student's last layer"):
        check_merge(stage1_plan(sam3, sam3))


@pytest.mark.parametrize(
    "neck", ["convs.0.dconv_2x2_0", "convs.1.dconv_2x2", "convs.3.conv_1x1", "sam2_convs.2.conv_1x1"]
)
def test_student_that_does_not_fit_the_neck_is_refused(sam3, student, neck):
    key = f"{merge.VISION}.{neck}.weight"
    tensors = sam3.tensors | {key: torch.zeros(5, 6, 2, 2)}
    reads = 5 if "dconv" in neck else 6
    with pytest.raises(ValueError, match=f"the student gives 4 channels, but {key} reads {reads}"):
        check_merge(stage1_plan(student, WeightFile(tensors, path=Path("sam3.pt"))))


def test_nan_in_the_student_is_refused(sam3, student):
    student.tensors["head.3.bias"] = torch.tensor([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"NaN or infinite values in .*head.3.bias"):
        check_merge(stage1_plan(student, sam3))


@pytest.fixture
def merged(sam3, student):
    return WeightFile(stage1_plan(student, sam3).tensors, {"teacher": {"sha256": "a"}}, Path("merged.pt"))


def test_update_keeps_order_types_and_all_other_tensors(merged, student):
    head = f"{STUDENT_TRUNK}.head.3.bias"
    base = WeightFile(dict(reversed(merged.tensors.items())), path=merged.path)
    base.tensors[head] = base.tensors[head].to(torch.bfloat16)
    new = WeightFile({key: tensor + 1 for key, tensor in student.tensors.items()}, path=student.path)
    plan = plan_update(new, base, f"{STUDENT_TRUNK}.")
    check_merge(plan)
    assert (plan.copied, plan.replaced, plan.skipped, plan.appended) == (653, 653, 0, 1045)
    assert plan.student_keys[0] == f"{STUDENT_TRUNK}.backbone.model.features.0.0.c.weight"
    assert list(plan.tensors) == list(base.tensors)
    for key, tensor in plan.tensors.items():
        if key == head:
            assert same_bytes(tensor, new.tensors["head.3.bias"].to(torch.bfloat16))
        elif key in plan.student_keys:
            assert tensor is new.tensors[key.removeprefix(f"{STUDENT_TRUNK}.")]
        else:
            assert tensor is base.tensors[key]


def test_update_names_every_misfit_at_once(merged, student):
    del student.tensors["head.3.bias"]
    student.tensors |= {"head.9": torch.ones(1), "head.1.weight": torch.ones(4, 1), "head.1.bias": torch.ones(4) + 1j}
    with pytest.raises(ValueError) as error:
        plan_update(student, merged, STUDENT_TRUNK)
    text = str(error.value)
    assert text.startswith(f"student.pth does not fit merged.pt: 1 not in merged.pt: {STUDENT_TRUNK}.head.9; ")
    assert f"1 not in student.pth: {STUDENT_TRUNK}.head.3.bias" in text
    assert f"1 of another shape: {STUDENT_TRUNK}.head.1.weight (4, 1) instead of (4,)" in text
    assert f"1 of another type: {STUDENT_TRUNK}.head.1.bias torch.complex64 instead of torch.float32" in text


def test_update_refuses_what_the_place_cannot_hold(merged, student):
    merged.tensors[f"{STUDENT_TRUNK}.head.3.bias"] = torch.zeros(4, dtype=torch.float16)
    student.tensors["head.3.bias"] = torch.tensor([0.0, 65520, 0, 0])  # float16 ends at 65504
    with pytest.raises(ValueError, match=r"head.3.bias has values that torch.float16 cannot hold"):
        plan_update(student, merged, STUDENT_TRUNK)


def test_teachers(merged, student):
    def never() -> str:
        raise AssertionError("hashing a file for nothing")

    def teacher() -> str | None:
        return stated_teacher(merged)

    assert stated_teacher(student) is None
    assert check_teacher(student, merged.path, never, allow_other=False) == [
        "Note: student.pth does not say which SAM3 file it was trained from, so that is not checked"
    ]
    student.meta["teacher"] = {"sha256": "a"}
    assert check_teacher(student, merged.path, teacher, allow_other=False) == []
    student.meta["teacher"] = {"sha256": "b"}
    with pytest.raises(ValueError, match=r"student.pth was trained .* SHA-256 b, merged.pt has a; .* --allow-other"):
        check_teacher(student, merged.path, teacher, allow_other=False)
    assert check_teacher(student, merged.path, teacher, allow_other=True)[0].startswith("Warning: student.pth was")
    merged.meta["teacher"] = "sam3.pt"  # no dict
    assert check_teacher(student, merged.path, teacher, allow_other=False)[0].startswith("Note: merged.pt does not")


def test_merged_meta(merged, student):
    student.meta = {"backbone": "repvit_m1_1", "teacher": {"sha256": "b"}}
    student.payload = {"epoch": 3, "optimizer": {}}
    merged.meta["license"] = "SAM"
    assert merged_meta(student, merged) == {
        "license": "SAM",
        "backbone": "repvit_m1_1",
        "teacher": {"sha256": "b"},
        "student": {"file": "student.pth", "epoch": 3},
    }


def test_prove_merge_names_every_difference(tmp_path, sam3, student):
    plan = stage1_plan(student, sam3)
    tampered = dict(plan.tensors)
    del tampered["tracker.no_mem_embed"]
    tampered[f"{TRUNK}.pos_embed"] = torch.ones(1)
    flipped = tampered[f"{STUDENT_TRUNK}.head.3.bias"].clone()
    flipped.view(torch.uint8)[0] ^= 1  # the lowest bit
    tampered[f"{STUDENT_TRUNK}.head.3.bias"] = flipped
    save_weights(tmp_path / "m.pt", tampered)
    with pytest.raises(ValueError) as error:
        prove_merge(tmp_path / "m.pt", plan)
    text = str(error.value)
    assert "1 missing: tracker.no_mem_embed" in text
    assert f"1 unexpected: {TRUNK}.pos_embed" in text
    assert f"1 of the replaced part: {TRUNK}.pos_embed" in text
    assert f"1 different from their source: {STUDENT_TRUNK}.head.3.bias" in text


def test_nothing_appears_when_the_proof_or_the_model_fails(tmp_path, sam3, student, monkeypatch):
    plan = stage1_plan(student, sam3)
    output = tmp_path / "m.pt"
    output.write_bytes(b"older")

    def refuse(path):
        raise ValueError("does not load")

    with pytest.raises(ValueError, match="does not load"):
        write_merge(output, plan, {}, verify=refuse)
    lossy = {key: tensor for key, tensor in plan.tensors.items() if "head.3" not in key}
    monkeypatch.setattr(merge, "save_weights", lambda path, tensors, meta, **kw: save_weights(path, lossy, meta))
    with pytest.raises(ValueError, match="2 missing"):
        write_merge(output, plan, {})
    assert output.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]
