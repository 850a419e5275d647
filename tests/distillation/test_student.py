"""The student as a whole: parameters, shapes, what may and what may not influence its answers, training modes."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distillation.models.efficient_sam3 import EfficientSAM3, EfficientSAM3Config
from sam3.engine.optim import parameter_groups
from tests.distillation.slim import OUTPUTS, SIDE, inputs, scalar_of, tiny_student

PARTS = {
    "vision": 25_074_824,
    "text": 63_297_280,
    "perceiver_resampler": 1_597_440,
    "encoder": 3_160_320,
    "decoder": 4_445_861,
    "scoring": 657_664,
    "mask_decoder": 2_035_201,
}


@pytest.fixture(scope="module")
def full() -> EfficientSAM3:
    """The full student without numbers."""
    with torch.device("meta"):
        return EfficientSAM3(EfficientSAM3Config.preset("full"))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_parameters_of_the_full_student(full):
    assert {name: count(getattr(full, name)) for name in PARTS} == PARTS
    assert count(full) == sum(PARTS.values()) == 100_268_590
    assert (count(full.vision.backbone), count(full.vision.adapters)) == (22_404_232, 2_670_592)
    assert count(full.text.tower) == 63_165_952


def test_unused_parameters_of_the_full_student():
    with torch.device("meta"):
        student = EfficientSAM3(EfficientSAM3Config.preset("full"))
    assert student.freeze_unused() == 8_720_160
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert {name.rsplit(".", 1)[0] for name in frozen if name.startswith("mask_decoder.")} == {
        "mask_decoder.pixel_decoder.conv_layers.2",
        "mask_decoder.pixel_decoder.norms.2",
    }
    assert sum(p.numel() for p in student.vision.parameters() if not p.requires_grad) == 5_777_440 + 754_688
    assert count(student.perceiver_resampler) == 1_597_440


def test_shapes_of_the_full_student():
    with FakeTensorMode():  # shapes and types of a real forward pass, without its numbers
        student = EfficientSAM3(EfficientSAM3Config.preset("full")).eval()
        out = student.forward_with_intermediates(torch.randn(1, 3, 1008, 1008), torch.ones(1, 77, dtype=torch.long))
    assert {name: tuple(out[name].shape) for name in OUTPUTS} == {
        "pred_masks": (1, 100, 252, 252),
        "pred_boxes": (1, 100, 4),
        "pred_logits": (1, 100),
        "presence_logits": (1, 1),
        "semantic_seg": (1, 1, 252, 252),
    }
    assert [tuple(level.shape) for level in out["fpn_features"]] == [(1, 256, side, side) for side in (252, 126, 63)]
    assert tuple(out["encoder_output"].shape) == (1, 3969, 256)
    assert out["encoder_hw"] == (63, 63)


@pytest.mark.slow
def test_full_size_forward():
    torch.manual_seed(0)
    student = EfficientSAM3(EfficientSAM3Config.preset("full")).eval()
    begin = time.perf_counter()
    with torch.no_grad():
        out = student(torch.randn(1, 3, 1008, 1008), torch.tensor([[49406, 320, 49407] + [0] * 74]))
    print(f"a photo at full size: {time.perf_counter() - begin:.1f} s, {torch.get_num_threads()} CPU threads")
    assert out.keys() == set(OUTPUTS)
    assert all(tensor.isfinite().all() for tensor in out.values())
    assert out["pred_masks"].shape == (1, 100, 252, 252)


def test_nothing_computed_is_in_the_checkpoint():
    student = tiny_student()
    before = set(student.state_dict())
    student(*inputs(1))
    parameters = {name for name, _ in student.named_parameters()}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert set(student.state_dict()) == before
    assert all(name in parameters or name.endswith(statistics) for name in before)


# Answers --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_keep_their_ranges():
    out = tiny_student().forward_with_intermediates(*inputs())
    assert out["pred_boxes"].min() > -0.5
    assert out["pred_boxes"].max() < 1.5
    assert (out["pred_boxes"][..., 2:] > out["pred_boxes"][..., :2]).all()
    assert out["pred_logits"].abs().max() <= 12
    assert out["presence_logits"].abs().max() <= 10
    assert min(level.min() for level in out["fpn_features"]) < 0  # signed, as the teacher's


@torch.no_grad()
def test_a_final_relu_leaves_no_negative_features():
    out = tiny_student(fpn_final_relu=True).forward_with_intermediates(*inputs())
    assert [level.min().item() for level in out["fpn_features"]] == [0, 0, 0]


@torch.no_grad()
def test_a_batch_is_its_pictures_one_by_one():
    student = tiny_student()
    together = student(*inputs(2))
    for i in range(2):
        alone = student(*(tensor[i : i + 1] for tensor in inputs(2)))
        for name in OUTPUTS:
            assert (together[name][i] - alone[name][0]).norm() < 1e-4 * alone[name].norm(), name


@torch.no_grad()
def test_padded_tokens_have_no_say():
    """What the text tower gives at padded places is overwritten; a place that is not padded shows that this reaches
    the outputs."""
    student, (pixels, ids, padding) = tiny_student(), inputs(2)
    reference = student(pixels, ids, padding)

    def outputs_with(where: torch.Tensor) -> dict:
        handle = student.text.register_forward_hook(lambda _m, _i, features: features.masked_fill(where[..., None], 9))
        try:
            return student(pixels, ids, padding)
        finally:
            handle.remove()

    same, other = outputs_with(padding), outputs_with(~padding)
    for name in OUTPUTS:
        torch.testing.assert_close(same[name], reference[name], rtol=0, atol=0)
        assert (other[name] - reference[name]).abs().max() > 1e-5, name


@torch.no_grad()
def test_padding_is_found_in_the_ids():
    student, (pixels, ids, padding) = tiny_student(), inputs(2)
    given, found = student(pixels, ids, padding), student(pixels, ids)
    assert all(torch.equal(given[name], found[name]) for name in OUTPUTS)


@torch.no_grad()
def test_phrase_and_picture_both_count():
    student, (pixels, ids, padding) = tiny_student(), inputs(2)
    out = student(pixels, ids, padding)
    other_phrase = student(pixels, ids.flip(0), padding.flip(0))
    other_picture = student(pixels.flip(0), ids, padding)
    for name in OUTPUTS:
        assert not torch.allclose(out[name], other_phrase[name], atol=1e-5), name
        assert not torch.allclose(out[name], other_picture[name], atol=1e-5), name


def test_wrong_inputs_are_refused():
    student, (pixels, ids, padding) = tiny_student(), inputs(2)
    with pytest.raises(ValueError, match=r"\(2, 32\).*this student reads \(2, 77\).*not the teacher's"):
        student(pixels, ids[:, :32])
    with pytest.raises(ValueError, match=r"\(1, 77\)"):
        student(pixels, ids[:1])
    with pytest.raises(ValueError, match=r"pixel_values are \(3, 112, 112\)"):
        student(pixels[0], ids[:1])
    with pytest.raises(ValueError, match=r"text_padding_mask is \(2, 32\)"):
        student(pixels, ids, padding[:, :32])


# Training -------------------------------------------------------------------------------------------------------------


def test_gradients_reach_all_that_is_not_frozen_and_nothing_else():
    student = tiny_student()
    frozen = student.freeze_unused()
    assert frozen == sum(p.numel() for p in student.parameters() if not p.requires_grad) > 0
    student.train()
    scalar_of(student.forward_with_intermediates(*inputs())).backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_unfrozen_the_same_parameters_go_without():
    student = tiny_student().train()
    scalar_of(student.forward_with_intermediates(*inputs())).backward()
    without = sum(parameter.numel() for parameter in student.parameters() if parameter.grad is None)
    assert without == student.freeze_unused()


def test_gradient_checkpointing_changes_no_gradient():
    plain, recomputed = tiny_student().train(), tiny_student().train()
    recomputed.enable_gradient_checkpointing()
    runs = {"encoder": 0, "decoder": 0}
    for name in runs:  # a layer runs twice if it is computed again
        getattr(recomputed, name).layers[0].register_forward_pre_hook(
            lambda *_, name=name: runs.update({name: runs[name] + 1})
        )
    for student in (plain, recomputed):
        torch.manual_seed(1)  # the same dropout
        scalar_of(student.forward_with_intermediates(*inputs())).backward()
    assert runs == {"encoder": 2, "decoder": 2}
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("mode", "backbone", "adapters"), [("frozen_backbone", False, True), ("train", True, True), ("eval", False, False)]
)
def test_batchnorm_keeps_to_its_mode(mode: str, backbone: bool, adapters: bool):
    student = tiny_student()
    student.set_bn_mode(mode)
    assert not any(module.training for module in student.modules())  # still in eval mode
    wrapper = nn.ModuleDict({"student": student})
    wrapper.train()
    wrapper.eval()
    wrapper.train()  # as a training loop does around validation
    norms = {name: m for name, m in student.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {name: m.running_mean.clone() for name, m in norms.items()}
    student(*inputs())
    changed = {name for name, m in norms.items() if not torch.equal(m.running_mean, before[name])}
    ran = {name for name in norms if not name.startswith(("vision.backbone.stages_3", "vision.adapters.3"))}
    wanted = {name for name in ran if (backbone if name.startswith("vision.backbone.") else adapters)}
    assert changed == wanted
    assert student.encoder.training
    assert student.vision.adapters.training


def test_an_unknown_batchnorm_mode_is_refused():
    with pytest.raises(ValueError, match=r"bn_mode is 'frozen'; choose one of frozen_backbone, train, eval"):
        tiny_student().set_bn_mode("frozen")


def test_autocast_gives_finite_float32_outputs_and_gradients():
    student = tiny_student().train()
    student.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        out = student.forward_with_intermediates(*inputs())
    assert all(out[name].dtype == torch.float32 and out[name].isfinite().all() for name in OUTPUTS)
    assert out["encoder_output"].dtype == torch.float32
    scalar_of(out).backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@torch.no_grad()
def test_autocast_stays_near_float32():
    student = tiny_student()
    exact = student(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = student(*inputs())
    for name in OUTPUTS:
        assert (rounded[name] - exact[name]).norm() < 0.1 * exact[name].norm(), name


def test_tables_are_exempt_from_weight_decay():
    student = tiny_student()
    names = dict(student.named_parameters())
    exempt = student.no_weight_decay()
    assert exempt <= names.keys()
    plain = {id(p) for p in parameter_groups(student, 0.1)[1]["params"]}
    assert all(id(names[name]) in plain for name in exempt)
    assert id(names["text.projection.weight"]) not in plain


def test_losses_fall_on_one_batch():
    """A few steps bring the student nearer to fixed targets, through every kind of output."""
    torch.manual_seed(0)
    student = EfficientSAM3(replace(EfficientSAM3Config.preset("tiny"), image_size=SIDE, dropout=0.0)).train()
    target = tiny_student()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    with torch.no_grad():
        wanted = target(*inputs())
    losses = []
    for _ in range(8):
        out = student(*inputs())
        loss = sum((out[name] - wanted[name]).abs().mean() for name in OUTPUTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# Configuration --------------------------------------------------------------------------------------------------------


def test_sizes_survive_json():
    for name in ("full", "tiny"):
        config = EfficientSAM3Config.preset(name)
        assert EfficientSAM3Config.from_meta(json.loads(json.dumps(config.to_meta()))) == config


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="unknown student 'small'; choose one of full, tiny"):
        EfficientSAM3Config.preset("small")
    meta = EfficientSAM3Config.preset("tiny").to_meta()
    with pytest.raises(ValueError, match=r"differ in \['depth'\]"):
        EfficientSAM3Config.from_meta({**meta, "depth": 3})
    with pytest.raises(ValueError, match=r"differ in \['dim'\]"):
        EfficientSAM3Config.from_meta({key: value for key, value in meta.items() if key != "dim"})
    with pytest.raises(ValueError, match="NoneType"):
        EfficientSAM3Config.from_meta(None)


def test_preprocessing_is_square_with_imagenet_numbers():
    preprocess = EfficientSAM3Config.preset("full").preprocess
    assert (preprocess.img_size, preprocess.resize) == (1008, "square")
    assert preprocess.mean == pytest.approx((123.675, 116.28, 103.53))
    assert preprocess.std == pytest.approx((58.395, 57.12, 57.375))
    assert tiny_student().preprocess.img_size == SIDE
