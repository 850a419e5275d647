"""SAM3 with its losses against ground truth: detector and click head on one trunk.

Letters: `I` images, `N` objects of an image, `B` image-prompt pairs, `Q` queries, `R` click rows, `P` points of a row,
`K` masks proposed for a row, `M` side of the masks, `S` side of the input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from distillation.supervised.batch import ClickRows, SceneBatch
from distillation.supervised.outlines import OutlineLoss, rivals
from distillation.supervised.set_loss import Assignment, SetLoss, Targets, mask_queries, mask_terms
from sam3.engine.losses import mask_bce, mask_dice
from sam3.engine.scene_names import PARTS, WORDS
from sam3.model.data_misc import FindStage
from sam3.model.sam3_image import Sam3Image
from sam3.model.tracker import FrameFeatures, Sam3Tracker

TEMPERATURE = 0.1
# Of the click head's terms; BCE and Dice weigh as the detector's.
CLICK_WEIGHTS = {"bce": 5.0, "dice": 5.0, "iou": 1.0, "object": 0.1}


class SupervisedSam3(nn.Module):
    """`forward(batch)` gives the losses. Children are named so that the state dict has the layout of sam3.pt.

    The tracker's memory takes no part here and gets no gradients. Dropout and stochastic depth are switched off: no
    scene is seen twice, and attention without dropout is several times as fast on a processor.

    set_loss: of the detector. click_weight: of all losses of the click head. mask_share: of the prompts that learn
    masks in a step. word_weight: of the loss that teaches single words; outline_weight: of what goes with it, see
    `outlines.OutlineLoss`, whose weights are the only ones that sam3.pt does not have; only_words: of all losses these
    two alone, behind the trunk and the neck. named_lr: learning rate of the parts that these reach, times that of all
    else.
    """

    def __init__(
        self,
        detector: Sam3Image,
        tracker: Sam3Tracker,
        set_loss: SetLoss,
        click_weight: float = 1.0,
        mask_share: float = 0.5,
        word_weight: float = 0.0,
        outline_weight: float = 0.0,
        only_words: bool = False,
        named_lr: float = 1.0,
    ) -> None:
        super().__init__()
        self.detector, self.tracker = detector, tracker
        self.set_loss, self.click_weight, self.mask_share = set_loss, click_weight, mask_share
        self.word_weight, self.outline_weight, self.only_words = word_weight, outline_weight, only_words
        self.named_lr = named_lr
        if outline_weight:
            self.outlines = OutlineLoss(detector.transformer.decoder.query_embed.embedding_dim)
        switch_off_noise(self)

    def no_weight_decay_keywords(self) -> tuple[str, ...]:
        """Embeddings: what is learnt of a word must not fade while it is not asked for.

        As parts of names these match more: the trunk's patch_embed, the matrices of bbox_embed, boxRPB_embed_x and _y,
        mask_embed and presence_token_head, and the click decoder's attention between tokens and the image. All of it
        is trained by AdamW without decay, with the optimizer `muon` too (see `sam3.engine.muon`).
        """
        return (
            "token_embedding",
            "positional_embedding",
            "pos_embed",
            "query_embed",
            "reference_points",
            "_token",
            "_embed",
        )

    def lr_scales(self) -> dict[str, float]:
        """See `optim.parameter_groups`."""
        neck = self.detector.backbone.vision_backbone
        told = f"convs.{len(neck.convs) - neck.scalp - 1}."
        parts = ("vision_backbone.trunk.", f"vision_backbone.{told}", "language_backbone.")
        return dict.fromkeys((*(f"detector.backbone.{part}" for part in parts), "outlines."), self.named_lr)

    def forward(self, batch: SceneBatch) -> dict[str, Tensor]:
        """`total`, the weighted terms (those of clicks as `click_*`), and for the log `iou_of_clicks` and
        `shape_named`; with `only_words`, what `word_term` gives."""
        grid = self.embed(batch)
        if self.only_words:
            terms, named = self._word_terms(self.name_map(grid), batch)
            return {"total": sum(terms.values()), **terms, **{f"{part}_named": share for part, share in named.items()}}
        targets = batch.targets
        out = self.predict_boxes(grid, batch)
        terms, matched = self.set_loss(out, targets)
        terms |= self._mask_terms(out, targets, matched)
        weighted = self.set_loss.weigh(terms)
        shown: dict[str, Tensor] = {}
        if self.word_weight:
            words, named = self._word_terms(out["prev_encoder_out"]["backbone_out"]["backbone_fpn"][-1], batch)
            weighted, shown["shape_named"] = weighted | words, named["shape"]
        if self.click_weight and (len(batch.clicks) or len(batch.corners)):
            clicks = self._click_terms(grid, batch)
            shown["iou_of_clicks"] = clicks.pop("shown_iou")
            weighted |= {
                f"click_{name}": self.click_weight * CLICK_WEIGHTS[name] * value for name, value in clicks.items()
            }
        return {"total": sum(weighted.values()), **weighted, **shown}

    # The detector -----------------------------------------------------------------------------------------------------

    def predict_boxes(self, grid: Tensor, batch: SceneBatch) -> dict[str, Any]:
        """All outputs but masks (see `Sam3Image.predict_boxes`) for the B pairs; grid: (I, C, G, G), of the trunk."""
        neck, phrases = self.detector.backbone.vision_backbone, sorted(set(batch.phrases))
        levels = [conv(grid) for conv in neck.convs[: len(neck.convs) - neck.scalp]]
        positions = [neck.position_encoding(level[:1]) for level in levels]
        text = self.detector.backbone.forward_text(phrases, device=grid.device)
        text_ids = torch.tensor([phrases.index(phrase) for phrase in batch.phrases]).to(grid.device)
        seen = {"backbone_fpn": levels, "vision_pos_enc": positions, **text}
        return self.detector.predict_boxes(seen, FindStage(batch.image, text_ids), batch.prompt())

    def _mask_terms(self, out: dict[str, Any], targets: Targets, matched: Assignment) -> dict[str, Tensor]:
        """`mask_terms` of `mask_share` of the pairs, as the mask head's maps are what costs most.

        Pairs with something to find come first. Draws from torch's generator.
        """
        count = max(1, round(self.mask_share * len(targets.wanted)))
        urgency = targets.present.float() + torch.rand(len(targets.wanted)).to(targets.wanted.device)
        rows = urgency.topk(count).indices.sort().values
        encoder_out = out["prev_encoder_out"]["encoder_out"]
        matched, targets = matched.take(rows, len(targets.wanted)), targets.take(rows)
        queries, place = mask_queries(matched, count)
        states = out["queries"][rows]
        masks = self.detector.segmentation_head(
            out["prev_encoder_out"]["backbone_out"]["backbone_fpn"],
            states.gather(1, queries[..., None].expand(-1, -1, states.shape[-1])),
            out["find_input"].img_ids[rows],
            encoder_out["encoder_hidden_states"].transpose(0, 1)[rows],
            encoder_out["prompt_after_enc"].transpose(0, 1)[rows],
            encoder_out["prompt_mask"][rows],
        )
        return mask_terms(masks, place, matched, targets)

    def name_map(self, grid: Tensor) -> Tensor:
        """The neck's map in which words are told, (I, C, G, G), from the trunk's."""
        neck = self.detector.backbone.vision_backbone
        return neck.convs[len(neck.convs) - neck.scalp - 1](grid)

    def _word_terms(self, seen: Tensor, batch: SceneBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted terms behind `name_map`, and what `word_term` says is named rightly."""
        words, named = self.word_term(seen, batch)
        terms = {"words": self.word_weight * words}
        if self.outline_weight:
            terms["outlines"] = self.outline_weight * self.outlines(seen, batch)
        return terms, named

    def word_term(self, seen: Tensor, batch: SceneBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """How well objects are told apart by single words, and the share of each of PARTS that is named rightly.

        What the neck's map `seen` (I, C, G, G) shows of an object, a mean over its mask, is compared with the text
        encoder's mean for each word: cross-entropy of cosines over TEMPERATURE, over shapes, over colours and over
        textures (as in Radford et al. 2021, CLIP), of each those that `rivals` gives. A phrase asks for a whole object
        at once, and teaches its words far more slowly.
        """
        shares = F.adaptive_avg_pool2d(batch.masks.float(), seen.shape[-1]).flatten(2)  # (I, N, G G)
        there = batch.words[..., 0] >= 0
        objects = F.normalize((shares @ seen.flatten(2).mT)[there], dim=-1)  # (n, C); a mean, but for its length
        text = self.detector.backbone.forward_text([word for part in PARTS for word in WORDS[part]], device=seen.device)
        kept = (~text["language_mask"]).T[..., None].float()  # (L, words, 1)
        words = F.normalize((text["language_features"] * kept).sum(0), dim=-1)  # (words, C)
        logits = (objects @ words.T / TEMPERATURE).split([len(WORDS[part]) for part in PARTS], dim=1)
        total, named, asked = seen.new_zeros(()), {}, batch.words[there]
        for (part, allowed), own, wanted in zip(rivals(asked).items(), logits, asked.unbind(1), strict=True):
            count = (wanted >= 0).sum().clamp(min=1)
            against = own.masked_fill(~allowed, -torch.inf)
            total = total + F.cross_entropy(against, wanted, ignore_index=-1, reduction="sum") / count
            named[part] = (own.detach().argmax(1) == wanted).sum() / count
        return total, named

    def embed(self, batch: SceneBatch) -> Tensor:
        """(I, C, G, G), what the trunk makes of the images."""
        preprocess = self.detector.preprocess
        sizes = torch.full((len(batch.images), 2), preprocess.img_size)
        images = preprocess.normalise(batch.images, sizes)
        return self.detector.backbone.vision_backbone.trunk(images)[-1]

    # The click head ---------------------------------------------------------------------------------------------------

    def _click_terms(self, grid: Tensor, batch: SceneBatch) -> dict[str, Tensor]:
        """The terms of `click_terms` for clicks, corners, and a second click where the first mask is wrong."""
        features, slots = self.click_features(grid, batch)
        parts = []
        for rows in (batch.clicks, batch.corners):
            if not len(rows):
                continue
            true = batch.masks[rows.image, rows.object].float() / 255
            first, terms = self._decode(features, slots, rows, None, true)
            parts.append((len(rows), terms))
            more = rows_with_error(rows, first, true, grid.shape[-1] * 4, self.tracker.config.img_size)
            parts.append((len(rows), self._decode(features, slots, more, first[:, None], true)[1]))
        total = sum(count for count, _ in parts)
        return {name: sum(count / total * terms[name] for count, terms in parts) for name in parts[0][1]}

    def click_features(self, grid: Tensor, batch: SceneBatch) -> tuple[FrameFeatures, Tensor]:
        """Of the images that have clicks, and where among these each image stands: long `(I,)`."""
        asked = torch.cat((batch.clicks.image, batch.corners.image)).unique()
        slots = asked.new_zeros(len(grid))
        slots[asked] = torch.arange(len(asked), device=asked.device)
        neck = self.detector.backbone.vision_backbone
        maps = grid[asked]
        return self.tracker.prepare_features([conv(maps) for conv in neck.sam2_convs[:3]]), slots

    def decode(
        self, features: FrameFeatures, slots: Tensor, rows: ClickRows, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask logits `(R, K, M, M)`, predicted IoUs `(R, K)`, object logits `(R, 1)`: K is 3 for a lone click, else 1.

        masks: `(R, 1, M, M)` logits to go on from.
        """
        own = features.select(slots[rows.image])
        heads = self.tracker.predict_masks(
            self.tracker.condition(own.top, None), own.high_res, len(rows), (rows.points, rows.labels), masks
        )
        return heads.candidates, heads.ious, heads.object_logits

    def _decode(
        self, features: FrameFeatures, slots: Tensor, rows: ClickRows, masks: Tensor | None, true: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The likeliest masks `(R, M, M)`, without gradient, and the terms."""
        found, ious, objects = self.decode(features, slots, rows, masks)
        best = found.detach()[torch.arange(len(found), device=found.device), ious.argmax(1)]
        return best, click_terms(found, ious, objects, true)


def click_terms(masks: Tensor, ious: Tensor, object_logits: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Losses of the click head, means over rows, and `shown_iou`, the mean IoU of the likeliest masks.

    bce, dice: of the proposal whose weighted sum of the two is least (Kirillov et al. 2023, Segment Anything). iou:
    |predicted - true IoU|, mean over proposals. object: BCE of the object logits, as all objects are there.

    masks: `(R, K, M, M)` logits; ious: `(R, K)`; object_logits: `(R, 1)`; true: `(R, M, M)` in 0..1.
    """
    wanted = true[:, None].expand_as(masks)
    valid = torch.ones_like(true[:, None])
    bce, dice = mask_bce(masks, wanted, valid), mask_dice(masks, wanted, valid)  # (R, K)
    least = (CLICK_WEIGHTS["bce"] * bce + CLICK_WEIGHTS["dice"] * dice).detach().argmin(1, keepdim=True)
    with torch.no_grad():
        ours, theirs = masks > 0, wanted > 0.5
        worth = (ours & theirs).sum((2, 3)) / (ours | theirs).sum((2, 3)).clamp(min=1)  # (R, K)
        likeliest = worth.gather(1, ious.argmax(1, keepdim=True))
    return {
        "bce": bce.gather(1, least).mean(),
        "dice": dice.gather(1, least).mean(),
        "iou": (ious - worth).abs().mean(),
        "object": F.binary_cross_entropy_with_logits(object_logits, torch.ones_like(object_logits)),
        "shown_iou": likeliest.mean(),
    }


@torch.no_grad()
def rows_with_error(rows: ClickRows, masks: Tensor, true: Tensor, side: int, img_size: int) -> ClickRows:
    """The rows with one more click each, on a random cell where mask and truth differ, or anywhere if none does.

    masks: `(R, side, side)` logits; true: the same in 0..1. Draws from torch's generator.
    """
    theirs = (true > 0.5).flatten(1)
    wrong = (masks.flatten(1) > 0) != theirs
    weight = torch.where(wrong.any(1, keepdim=True), wrong.float(), torch.ones_like(wrong, dtype=torch.float32))
    cell = torch.multinomial(weight, 1)  # (R, 1)
    xy = torch.stack((cell % side, cell // side), dim=-1).float().add(0.5) * (img_size / side) - 0.5
    labels = theirs.gather(1, cell).long()
    return ClickRows(
        rows.image, rows.object, torch.cat((rows.points, xy), dim=1), torch.cat((rows.labels, labels), dim=1)
    )


def switch_off_noise(model: nn.Module) -> None:
    """No dropout and no stochastic depth, in train mode too."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
