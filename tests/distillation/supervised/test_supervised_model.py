"""The whole SAM3 with its losses: what learns and what does not, terms by hand, and a loss that falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from distillation.supervised.batch import ClickRows, SceneBatch
from distillation.supervised.dataset import SceneDataset
from distillation.supervised.evaluation import SceneValidator, WordValidator
from distillation.supervised.model import SupervisedSam3, click_terms, rows_with_error, switch_off_noise
from distillation.supervised.set_loss import SetLoss, SetWeights
from sam3.engine.distributed import World
from sam3.engine.scene_names import COLOURS, SHAPES, Kind, kinds_of
from sam3.model.config import Sam3Config
from sam3.model.tracker_config import TrackerConfig
from sam3.model_builder import assemble_image_model
from sam3.tracker_builder import assemble_tracker

TINY = Sam3Config.preset("tiny")
SIDE = TINY.img_size // 2  # of the pictures, which are parts of scenes; a quarter of the time of whole ones
LOG2, LOG3 = math.log(2), math.log(3)
SET_TERMS = {"presence", "score", "box_l1", "box_giou", "mask_bce", "mask_dice", "semantic_bce", "semantic_dice"}
MANY_TERMS = {"many_score", "many_box_l1", "many_box_giou"}
CLICK_TERMS = {"click_bce", "click_dice", "click_iou", "click_object"}
TRAINED = (
    *("detector.backbone.vision_backbone.trunk.", "detector.backbone.vision_backbone.sam2_convs.0."),
    *("detector.backbone.language_backbone.", "detector.geometry_encoder.", "detector.transformer.decoder."),
    *("detector.segmentation_head.", "tracker.sam_mask_decoder.", "tracker.sam_prompt_encoder."),
)
# Memory and object pointers, and the entries of sam3.pt that no output depends on.
UNTRAINED = (
    *("tracker.transformer.", "tracker.maskmem_", "tracker.mask_downsample.", "tracker.obj_ptr_", "tracker.no_obj_"),
    *("tracker.no_mem_pos_enc", "detector.backbone.language_backbone.encoder.text_projection"),
    *(f"detector.backbone.vision_backbone.{convs}.3." for convs in ("convs", "sam2_convs")),
    *(f"detector.segmentation_head.pixel_decoder.{part}.2." for part in ("conv_layers", "norms")),
)


def build(seed: int = 0, **options: float) -> SupervisedSam3:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        detector = assemble_image_model(replace(TINY, img_size=SIDE), with_sam2_neck=True)
        tracker = assemble_tracker(replace(TrackerConfig.preset("tiny"), img_size=SIDE))
    return SupervisedSam3(detector, tracker, SetLoss(SetWeights()), **options)


def scenes(model: SupervisedSam3, indices: list[int], split: str = "train", **options: int) -> SceneBatch:
    data = SceneDataset(64, TINY.img_size, model.detector.preprocess, TINY.patch_size, split, **options)
    return data.load(indices, 0)


@pytest.fixture(scope="module")
def model() -> SupervisedSam3:
    """Not to be trained."""
    return build()


# Training -------------------------------------------------------------------------------------------------------------


def test_gradients_reach_detector_and_click_head_and_nothing_of_the_memory():
    model = build()
    batch = scenes(model, [0, 1, 2], prompts=6, seed=1)
    assert {"text", "box", "point"} <= set(batch.kinds)
    losses = model(batch)
    losses["total"].backward()
    untrained = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untrained == {name for name, _ in model.named_parameters() if name.startswith(UNTRAINED)}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for part in TRAINED:
        reached = [bool(gradient.any()) for name, gradient in gradients.items() if name.startswith(part)]
        assert sum(reached) > 0.8 * len(reached), part
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_steps_on_one_batch_lower_the_loss():
    model = build(mask_share=1.0)
    batch = scenes(model, [0, 1], prompts=2, seed=1, click_every=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history: list[dict[str, float]] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(8):
            losses = model(batch)
            history.append({name: value.item() for name, value in losses.items()})
            optimizer.zero_grad()
            losses["total"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    first, last = history[0], history[-1]
    assert last["total"] < 0.8 * first["total"]
    assert last["mask_bce"] < first["mask_bce"] and last["click_bce"] < first["click_bce"]
    assert last["score"] < first["score"] and last["presence"] < first["presence"]


# Words ----------------------------------------------------------------------------------------------------------------


def said(model: SupervisedSam3, word: str) -> Tensor:
    """(C,), the text encoder's mean over a word's tokens, its start and its end."""
    text = model.detector.backbone.forward_text([word], device=torch.device("cpu"))
    return text["language_features"][~text["language_mask"][0], 0].mean(0)


def likeness(model: SupervisedSam3, words: Sequence[str], others: Sequence[str]) -> Tensor:
    """Cosines (words, others)"""
    ours, theirs = (torch.stack([said(model, word) for word in row]) for row in (words, others))
    return F.cosine_similarity(ours[:, None], theirs[None], dim=-1)


@torch.no_grad()
def test_an_object_is_named_by_the_word_it_looks_like(model: SupervisedSam3):
    """The left half looks like a star, the right half like red; the two objects are the halves, both red stars."""
    seen = torch.zeros(1, TINY.dim, 4, 4)
    seen[0, :, :, :2], seen[0, :, :, 2:] = (said(model, word)[:, None, None] for word in ("star", "red"))
    masks = torch.zeros(1, 2, 16, 16, dtype=torch.uint8)
    masks[0, 0, :, :8] = masks[0, 1, :, 8:] = 255
    star, red = SHAPES.index("star"), COLOURS.index("red")
    batch = SimpleNamespace(masks=masks, words=torch.tensor([[[star, red, -1], [star, red, -1]]]))
    loss, named = model.word_term(seen, batch)
    looks = ("star", "red")
    red_ones = [s for s in SHAPES if s == "star" or Kind(s, "red", "plain") in kinds_of("train")]
    stars = [c for c in COLOURS if c == "red" or Kind("star", c, "plain") in kinds_of("train")]
    expected = F.cross_entropy(likeness(model, looks, red_ones) / 0.1, torch.full((2,), red_ones.index("star")))
    expected += F.cross_entropy(likeness(model, looks, stars) / 0.1, torch.full((2,), stars.index("red")))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert named["shape"].item() >= 0.5 and named["colour"].item() >= 0.5  # one of the two each, at the least
    assert named["texture"].item() == 0  # none has one


def test_words_alone_train_what_tells_them_apart():
    model = build(only_words=True, word_weight=1.0, outline_weight=1.0)
    batch = scenes(model, [0, 1], prompts=1, clicks=0)
    losses = model(batch)
    assert set(losses) == {"total", "words", "outlines", "shape_named", "colour_named", "texture_named"}
    losses["total"].backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    neck = "detector.backbone.vision_backbone."
    parts = (f"{neck}trunk.", f"{neck}convs.2.", "detector.backbone.language_", "outlines.")
    assert all(name.startswith(parts) for name in reached)
    assert any(name.startswith(f"{neck}trunk.patch_embed") for name in reached)


def test_what_words_reach_may_learn_at_a_rate_of_its_own():
    model = build(only_words=True, word_weight=1.0, outline_weight=1.0, named_lr=0.3)
    model(scenes(model, [0, 1], prompts=1, clicks=0))["total"].backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    prefixes = tuple(model.lr_scales())
    assert set(model.lr_scales().values()) == {0.3} and all(name.startswith(prefixes) for name in reached)
    assert all(any(name.startswith(prefix) for name in reached) for prefix in prefixes)


def test_words_are_a_term_among_others(model: SupervisedSam3):
    batch = scenes(model, [0, 1], seed=1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        without = model(batch)
        torch.manual_seed(0)
        model.word_weight = 2.0
        losses = model(batch)
        model.word_weight = 0.0
        term, named = model.word_term(model.name_map(model.embed(batch)), batch)
    assert set(losses) == {*without, "words", "shape_named"}
    assert losses["words"].item() == pytest.approx(2 * term.item(), rel=1e-4)
    assert losses["total"].item() == pytest.approx(without["total"].item() + 2 * term.item(), rel=1e-4)
    assert losses["shape_named"].item() == named["shape"].item()


@torch.no_grad()
def test_words_are_validated_by_their_shares(model: SupervisedSam3):
    batch = scenes(model, [0, 1, 2], "val")
    named = model.word_term(model.name_map(model.embed(batch)), batch)[1]
    result = WordValidator(model, [batch], World(0, 1, 0, torch.device("cpu")))(0, 0)
    shares = {f"val/{part}_named": pytest.approx(share.item()) for part, share in named.items()}
    assert result == {**shares, "val/target": min(share.item() for share in named.values())}


# Terms ----------------------------------------------------------------------------------------------------------------


def test_the_total_is_the_sum_of_the_weighted_terms(model: SupervisedSam3):
    batch = scenes(model, [0, 1], seed=1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        losses = model(batch)
        torch.manual_seed(0)
        model.click_weight = 0.5
        halved = model(batch)
        model.click_weight = 0.0
        none = model(batch)
        model.click_weight = 1.0
    assert set(losses) == {"total", "iou_of_clicks"} | SET_TERMS | MANY_TERMS | CLICK_TERMS
    terms = [losses[name] for name in SET_TERMS | MANY_TERMS | CLICK_TERMS]
    assert losses["total"].item() == pytest.approx(sum(term.item() for term in terms), rel=1e-5)
    assert 0 <= losses["iou_of_clicks"].item() <= 1
    for name in CLICK_TERMS:
        assert halved[name].item() == pytest.approx(losses[name].item() / 2, rel=1e-4)
    assert set(none) == {"total"} | SET_TERMS | MANY_TERMS


def test_batches_without_clicks_and_without_exemplars(model: SupervisedSam3):
    batch = scenes(model, [0], seed=1, clicks=0)
    no_boxes = {name: getattr(batch, name)[:, :0] for name in ("exemplars", "exemplar_labels", "exemplar_mask")}
    no_points = {name: getattr(batch, name)[:, :0] for name in ("points", "point_labels", "point_mask")}
    with torch.no_grad():
        losses = model(replace(batch, **no_boxes, **no_points))
    assert set(losses) == {"total"} | SET_TERMS | MANY_TERMS and losses["total"].isfinite()


def test_all_absent_is_a_loss_too(model: SupervisedSam3):
    batch = scenes(model, [0, 1], seed=1)
    with torch.no_grad():
        losses = model(replace(batch, wanted=torch.zeros_like(batch.wanted)))
    assert losses["score"] == losses["box_l1"] == losses["mask_bce"] == losses["many_score"] == 0
    assert losses["presence"] > 0 and losses["semantic_bce"] > 0 and losses["total"].isfinite()


def test_pairs_with_something_to_find_get_the_masks():
    """Half of four pairs learn masks: those two that show something, whatever the draw."""
    model = build(mask_share=0.5)
    batch = scenes(model, [0, 1], seed=1, clicks=0)
    wanted = torch.zeros_like(batch.wanted)
    wanted[1, 0] = wanted[2, 0] = True
    chosen = []
    handle = model.detector.segmentation_head.register_forward_pre_hook(lambda _, args: chosen.append(args[2].tolist()))
    with torch.no_grad():
        for _ in range(3):
            model(replace(batch, wanted=wanted))
    handle.remove()
    assert chosen == [batch.image[[1, 2]].tolist()] * 3 == [[0, 1]] * 3


def test_names_without_weight_decay_are_names_of_weights(model: SupervisedSam3):
    names = [name for name, _ in model.named_parameters()]
    for keyword in model.no_weight_decay_keywords():
        assert any(keyword in name for name in names), keyword


def test_nothing_is_dropped():
    parts = nn.ModuleList([nn.Dropout(0.1), StochasticDepth(0.2, "row"), nn.MultiheadAttention(4, 1, dropout=0.3)])
    switch_off_noise(parts.train())
    assert [parts[0].p, parts[1].p, parts[2].dropout] == [0, 0, 0]
    model = build().train()
    batch = scenes(model, [0], seed=1)
    with torch.no_grad():
        first, second = (model.predict_boxes(model.embed(batch), batch)["pred_boxes"] for _ in range(2))
    assert torch.equal(first, second)


# The click head -------------------------------------------------------------------------------------------------------


def test_clicks_see_their_own_picture(model: SupervisedSam3):
    """Only pictures with clicks pass the second neck; in a batch or alone, a click gives the same masks."""
    batch = scenes(model, [3, 4, 5], seed=1, clicks=3, click_every=2)
    alone = scenes(model, [5], seed=1, clicks=3)
    assert batch.clicks.image.tolist() == [0, 0, 2, 2] and batch.corners.image.tolist() == [0, 2]
    with torch.no_grad():
        features, slots = model.click_features(model.embed(batch), batch)
        masks, ious, objects = model.decode(features, slots, batch.clicks)
        wanted = model.decode(*model.click_features(model.embed(alone), alone), alone.clicks)
        boxes, *_ = model.decode(features, slots, batch.corners)
        after_mask, *_ = model.decode(features, slots, batch.clicks, masks[:, :1])
    assert len(features.top) == 2 and slots.tolist() == [0, 0, 1]
    side = 4 * SIDE // TINY.patch_size
    assert masks.shape == (4, 3, side, side) and ious.shape == (4, 3) and objects.shape == (4, 1)
    assert boxes.shape == (2, 1, side, side) and after_mask.shape[2:] == (side, side)
    for found, own in zip((masks, ious, objects), wanted, strict=True):
        torch.testing.assert_close(found[2:], own, atol=1e-4, rtol=1e-4)


def test_terms_of_clicks_by_hand():
    """The second mask is right: its BCE and Dice count, although the first is thought the better one."""
    true = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    masks = torch.stack((torch.full((2, 2), LOG3), LOG3 * (2 * true[0] - 1)))[None]
    terms = click_terms(masks, torch.tensor([[0.9, 0.4]]), torch.zeros(1, 1), true)
    assert terms["bce"].item() == pytest.approx(math.log(4 / 3))
    assert terms["dice"].item() == pytest.approx(1 - (2 * 1.5 + 1) / (2 + 2 + 1))
    assert terms["iou"].item() == pytest.approx((abs(0.9 - 0.5) + abs(0.4 - 1.0)) / 2)
    assert terms["object"].item() == pytest.approx(LOG2)
    assert terms["shown_iou"].item() == pytest.approx(0.5)


def rows(count: int) -> ClickRows:
    return ClickRows(
        torch.arange(count), torch.zeros(count).long(), torch.zeros(count, 1, 2), torch.ones(count, 1).long()
    )


def test_the_next_click_goes_where_the_mask_is_wrong():
    """Cells of 4 px on 8 px: a lower left one that is missing, an upper right one too much."""
    true = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    masks = torch.tensor([[[-1.0, -1.0], [-1.0, -1.0]], [[-1.0, 1.0], [-1.0, -1.0]]])
    more = rows_with_error(rows(2), masks, true, side=2, img_size=8)
    assert more.points.tolist() == [[[0, 0], [1.5, 5.5]], [[0, 0], [5.5, 1.5]]]
    assert more.labels.tolist() == [[1, 1], [1, 0]] and more.image.tolist() == [0, 1]


def test_the_next_click_on_a_right_mask_confirms_it():
    true = torch.tensor([[[0.6, 0.4], [0.0, 1.0]]]).expand(40, -1, -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        more = rows_with_error(rows(40), true - 0.5, true, side=2, img_size=4)
    seen: dict[tuple[float, ...], set[int]] = {}
    for xy, label in zip(more.points[:, 1].tolist(), more.labels[:, 1].tolist(), strict=True):
        seen.setdefault(tuple(xy), set()).add(label)
    assert seen == {(0.5, 0.5): {1}, (2.5, 0.5): {0}, (0.5, 2.5): {0}, (2.5, 2.5): {1}}


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_the_validator_takes_the_model(model: SupervisedSam3):
    batch = scenes(model, [0, 1, 2], split="val")
    found = SceneValidator(model.eval(), [batch], World(0, 1, 0, torch.device("cpu")))(0, 0)
    model.train()
    ious = {f"val/{name}_iou" for name in ("text", "box", "point", "click", "corner")}
    assert ious | {"val/rejected", "val/box_found", "val/target"} <= set(found)
    assert all(0 <= found[name] <= 1 for name in ious)
    assert all(math.isfinite(value) for value in found.values())  # with these weights no phrase finds anything


def test_embeddings_are_those_of_the_image_model(model: SupervisedSam3):
    """Pictures go the way that `Sam3Processor` sends them: scaled to -1..1, none of it padding."""
    batch = scenes(model, [0], seed=1)
    seen: list[Tensor] = []
    trunk = model.detector.backbone.vision_backbone.trunk
    handle = trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.embed(batch)
    handle.remove()
    torch.testing.assert_close(seen[0], batch.images / 127.5 - 1)
