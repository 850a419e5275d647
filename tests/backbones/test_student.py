"""Names, counts, loading and recognising of the students."""

from __future__ import annotations

import copy

import pytest
import torch

from sam3.backbones.student import (
    BACKBONES,
    StudentTrunk,
    build_student,
    check_student,
    recognise_student,
    untrained_student,
)
from sam3.engine.weights import load_strict
from tests.backbones.samples import filled, manifest, on_meta, pictures

# entries of the checkpoint, parameters of the backbone, parameters of the head in thousands (rounded)
COUNTS = {
    "efficientvit_b0": (194, 682_608, 9_571),
    "efficientvit_b1": (269, 4_643_936, 9_702),
    "efficientvit_b2": (362, 14_977_008, 9_833),
    "repvit_m0_9": (707, 4_717_792, 9_833),
    "repvit_m1_1": (653, 7_774_864, 9_965),
    "repvit_m2_3": (1463, 22_404_232, 10_096),
    "tiny_vit_5m": (300, 5_071_124, 9_768),
    "tiny_vit_11m": (300, 10_547_076, 9_899),
    "tiny_vit_21m": (300, 20_620_416, 10_030),
}
ONE_OF_EACH_FAMILY = ["efficientvit_b0", "repvit_m0_9", "tiny_vit_5m"]
TRUNK_PREFIX = "detector.backbone.vision_backbone.trunk.model."


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_state_dict_is_the_manifest(name: str) -> None:
    student = on_meta(name)
    entries = [(k, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in student.state_dict().items()]
    assert entries == manifest(name)
    num_entries, backbone, head_k = COUNTS[name]
    assert len(entries) == num_entries
    assert parameters(student.backbone) == backbone
    assert round(parameters(student.head) / 1e3) == head_k


@pytest.mark.parametrize("name", BACKBONES)
def test_parts_hold_every_parameter_once(name: str) -> None:
    backbone = on_meta(name).backbone.model
    parts = backbone.parts()
    assert len(parts) == 5
    ids = [id(p) for modules in parts.values() for module in modules for p in module.parameters()]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in backbone.parameters()}


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_parts_give_the_strides_they_are_named_after(name: str) -> None:
    """At 128 pixels, stride 4 gives a side of 32."""
    student = filled(name, embed_dim=8, embed_size=4)
    sides = {}
    for part, modules in student.backbone.model.parts().items():
        modules[-1].register_forward_hook(
            lambda module, args, out, part=part: sides.update(
                {part: out.shape[1] if out.shape[1] == out.shape[2] else out.shape[2]}
            )
        )
    student(pictures(1, 128))
    strides = {part: 128 // side for part, side in sides.items()}
    assert list(strides) == [f"{part.split(' (')[0]} (/{stride})" for part, stride in strides.items()]


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_weights_survive_a_round_trip_under_any_prefix(name: str) -> None:
    first = filled(name, embed_dim=8, embed_size=5)
    second = StudentTrunk(build_student(name, embed_dim=8, embed_size=5)).eval()
    x = pictures()
    assert not torch.equal(second(x)[0], first(x))
    load_strict(second, {f"model.{k}": t for k, t in first.state_dict().items()}, source="first")
    assert torch.equal(second(x)[0], first(x))
    assert torch.equal(copy.deepcopy(second)(x)[0], first(x))


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_a_student_built_on_meta_takes_the_tensors_themselves(name: str) -> None:
    first = filled(name, embed_dim=8, embed_size=5)
    with torch.device("meta"):
        second = build_student(name, embed_dim=8, embed_size=5)
    load_strict(second, first.state_dict(), source="first")
    assert not any(t.is_meta for t in [*second.parameters(), *second.buffers()])
    assert torch.equal(second.eval()(pictures()), first(pictures()))


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_eval_mode_follows_newly_loaded_weights(name: str) -> None:
    """TinyViT implementations keep gathered attention biases in eval mode; weights loaded later must still count."""
    student = build_student(name, embed_dim=8, embed_size=5).eval()
    student(pictures())
    wanted = filled(name, embed_dim=8, embed_size=5)
    student.load_state_dict(wanted.state_dict())
    assert torch.equal(student(pictures()), wanted(pictures()))


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_channels_last_and_odd_sizes(name: str) -> None:
    student = filled(name, embed_dim=8, embed_size=5)
    x = pictures(2, 103)
    plain = student(x)
    assert plain.shape == (2, 8, 5, 5)
    channels_last = student.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, plain, rtol=1e-3, atol=1e-4)


def test_tiny_vit_rounds_sizes_up() -> None:
    """252 -> 126 -> 63 -> 32: the third halving rounds up, 1008 / 32 = 31.5 would not."""
    backbone = filled("tiny_vit_5m", embed_dim=8).backbone
    with torch.inference_mode():
        assert backbone(pictures(1, 1008)).shape == (1, 320, 32, 32)
        assert backbone(pictures(1, 126)).shape == (1, 320, 4, 4)


def test_no_resize_when_the_grid_has_the_size_already() -> None:
    student = filled("efficientvit_b0", embed_dim=8, embed_size=3)
    assert torch.equal(student(pictures()), student.head(student.backbone(pictures())))


@pytest.mark.parametrize("name", BACKBONES)
def test_recognised_from_a_merged_checkpoint(name: str) -> None:
    tensors = {TRUNK_PREFIX + k: t for k, t in on_meta(name, embed_dim=96).state_dict().items()}
    tensors["detector.backbone.vision_backbone.convs.0.weight"] = torch.empty(1)
    assert recognise_student(tensors, TRUNK_PREFIX) == (name, 96)


def test_recognise_refuses_what_is_no_single_student() -> None:
    repvit, other = on_meta("repvit_m1_1").state_dict(), on_meta("efficientvit_b0").state_dict()
    with pytest.raises(ValueError, match=r"no student under the prefix 'x\.'.*'backbone.model.features.0.0.c.weight'"):
        recognise_student(repvit, "x.")
    with pytest.raises(ValueError, match=r"the 0 keys are like \(none\)"):
        recognise_student({})
    with pytest.raises(ValueError, match=r"mix students: ES-EV-S \(efficientvit_b0\) and ES-RV-M \(repvit_m1_1\)"):
        recognise_student(repvit | other)
    cut = {k: t for k, t in repvit.items() if "features.24." not in k}
    with pytest.raises(ValueError, match=r"nearest is ES-RV-M .* 25 missing \(first: 'backbone.model.features.24."):
        recognise_student(cut)
    with pytest.raises(ValueError, match=r"nearest is ES-RV-M .* 1 unexpected \(first: 'backbone.model.classifier"):
        recognise_student(repvit | {"backbone.model.classifier.weight": torch.empty(1)})
    with pytest.raises(ValueError, match=r"1 of another shape \(first: 'backbone.model.features.0.0.bn.bias'"):
        recognise_student(repvit | {"backbone.model.features.0.0.bn.bias": torch.empty(1)})
    headless = {k: t for k, t in repvit.items() if not k.startswith("head.")}
    with pytest.raises(ValueError, match=r"ES-RV-M .* have no head: 'head.3.weight' is missing"):
        recognise_student(headless)


def test_weights_of_another_student_are_named() -> None:
    message = r"weights of ES-TV-M \(tiny_vit_11m\), but the student is ES-TV-S \(tiny_vit_5m\)"
    other = on_meta("tiny_vit_11m").state_dict()
    with pytest.raises(ValueError, match=message):
        on_meta("tiny_vit_5m").load_state_dict(other)
    with pytest.raises(ValueError, match=message):
        StudentTrunk(on_meta("tiny_vit_5m")).load_state_dict({f"model.{k}": t for k, t in other.items()})
    with pytest.raises(ValueError, match=message):
        check_student(other, "tiny_vit_5m")
    check_student(other, "tiny_vit_11m")
    with pytest.raises(RuntimeError, match=r"Missing key.*input_stem"):
        build_student("efficientvit_b0", 8).load_state_dict({"something": torch.empty(1)})


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'repvit_m9'; there are efficientvit_b0, .*tiny_vit_21m"):
        build_student("repvit_m9")
    with pytest.raises(ValueError, match=r"drop_path is 0.1, but ES-RV-M \(repvit_m1_1\) has no stochastic depth"):
        build_student("repvit_m1_1", drop_path=0.1)
    assert on_meta("repvit_m1_1").embed_size == 72


def test_stochastic_depth_of_tiny_vit() -> None:
    def rates(drop_path: float | None) -> list[float]:
        with torch.device("meta"):
            student = build_student("tiny_vit_11m", 8, 4, drop_path)
        return [m.drop_prob for name, m in student.named_modules() if name.endswith(("drop_path", "drop_path1")) and
                hasattr(m, "drop_prob")]  # fmt: skip

    assert rates(0.0) == []
    assert rates(None) == pytest.approx([0.1 * i / 11 for i in range(1, 12)])
    assert rates(0.22) == pytest.approx([0.02 * i for i in range(1, 12)])


def test_weight_decay_exemptions() -> None:
    assert on_meta("repvit_m0_9").no_weight_decay() == set()
    student = on_meta("tiny_vit_5m")
    names = student.no_weight_decay()
    assert len(names) == 2 + 6 + 2
    assert "backbone.model.layers.1.blocks.0.attn.attention_biases" in names
    assert names == {k for k, p in student.named_parameters() if k.endswith("attention_biases") and p.ndim == 2}


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_half_the_output_stride_doubles_the_map_and_keeps_the_weights(name: str) -> None:
    coarse = filled(name, embed_dim=8, embed_size=8)
    fine = build_student(name, embed_dim=8, embed_size=8, output_stride=16).eval()
    fine.load_state_dict(coarse.state_dict())
    x = pictures(1, 128)
    assert coarse.backbone(x).shape[-2:] == (4, 4)
    assert fine.backbone(x).shape[-2:] == (8, 8)
    assert fine(x).shape == coarse(x).shape == (1, 8, 8, 8)
    assert untrained_student(fine).output_stride == 16
    ahead: list[torch.Tensor] = []  # what enters the last stage
    for student in (coarse, fine):
        *_, last = student.backbone.model.parts().values()
        first = next(module for module in last[0].modules() if not list(module.children()))
        handle = first.register_forward_pre_hook(lambda module, args: ahead.append(args[0]))
        student(x)
        handle.remove()
    assert torch.equal(*ahead), "all stages before the last are the same"


def test_other_output_strides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"output_stride is 8; wanted one of \(32, 16\)"):
        build_student("efficientvit_b0", output_stride=8)
