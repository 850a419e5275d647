"""The SAM3 image model: finds every instance of a phrase, or of what boxes and points show, in an image.

Letters: B image-prompt pairs, I images, T phrases, Q queries, N prompt tokens, C channels, H W token grid,
L decoder layers. Boxes are (cx, cy, w, h) in 0..1 of the model's square unless called xyxy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam3.model.box_ops import box_cxcywh_to_xyxy, inverse_sigmoid
from sam3.model.data_misc import FindStage
from sam3.model.decoder import DecoderOutput
from sam3.model.geometry_encoders import Prompt
from sam3.model.interactive_predictor import InteractivePredictor, Masks, Numbers
from sam3.transforms import Preprocess


class Sam3Image(nn.Module):
    """Backbone, geometry encoder, fusion encoder and decoder, scores, masks; children are named as in `sam3.pt`."""

    def __init__(
        self,
        backbone: nn.Module,
        geometry_encoder: nn.Module,
        transformer: nn.Module,
        dot_prod_scoring: nn.Module,
        segmentation_head: nn.Module | None = None,
        supervise_joint_box_scores: bool = False,
        preprocess: Preprocess | None = None,
        inst_interactive_predictor: InteractivePredictor | None = None,
    ):
        """
        Args:
            transformer: holds `encoder` (fusion) and `decoder`.
            segmentation_head: None for a model of boxes only.
            supervise_joint_box_scores: multiplies presence into `pred_logits`, as SAM3's video model does.
            preprocess: how pictures become input; left out, SAM3's own (squashed to 1008 px).
            inst_interactive_predictor: for `predict_inst`, which also needs a backbone with the second neck.
        """
        super().__init__()
        self.backbone = backbone
        self.geometry_encoder = geometry_encoder
        self.transformer = transformer
        self.dot_prod_scoring = dot_prod_scoring
        self.segmentation_head = segmentation_head
        self.supervise_joint_box_scores = supervise_joint_box_scores
        self.preprocess = preprocess or Preprocess(resize="square")
        self.inst_interactive_predictor = inst_interactive_predictor

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.transformer.decoder.query_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the images that go in."""
        return self.transformer.decoder.query_embed.weight.dtype

    def forward(
        self,
        images: Tensor,
        captions: list[str],
        find_input: FindStage | None = None,
        geometric_prompt: Prompt | None = None,
    ) -> dict[str, Any]:
        """Normalised images (I, 3, S, S) and T phrases -> see `forward_grounding`.

        Without `find_input`, phrase i is looked for in image i.
        """
        if find_input is None:
            if len(captions) != len(images):
                raise ValueError(f"{len(captions)} phrases for {len(images)} images; pass find_input to pair them")
            ids = torch.arange(len(images), device=images.device)
            find_input = FindStage(img_ids=ids, text_ids=ids)
        backbone_out = self.backbone.forward_image(images)
        backbone_out.update(self.backbone.forward_text(captions, device=images.device))
        return self.forward_grounding(backbone_out, find_input, geometric_prompt=geometric_prompt)

    def forward_grounding(
        self,
        backbone_out: dict[str, Any],
        find_input: FindStage,
        find_target: None = None,
        geometric_prompt: Prompt | None = None,
        mask_queries: Tensor | None = None,
    ) -> dict[str, Any]:
        """Everything after the backbone.

        Args:
            backbone_out: what `backbone.forward_image` and `backbone.forward_text` returned, in one dict.
            find_input: which image and phrase each of the B pairs uses.
            find_target: takes no part; SAM3's users pass it by position.
            geometric_prompt: boxes and points of the B pairs; left out, there are none.
            mask_queries: (B, K) long, the queries that get a mask; left out, all of them.

        Returns:
            `predict_boxes` joined with `predict_masks`.
        """
        out = self.predict_boxes(backbone_out, find_input, geometric_prompt)
        if self.segmentation_head is not None:
            out.update(self.predict_masks(out, mask_queries))
        return out

    def predict_boxes(
        self, backbone_out: dict[str, Any], find_input: FindStage, geometric_prompt: Prompt | None = None
    ) -> dict[str, Any]:
        """All outputs but the masks.

        Returns:
            pred_logits (B, Q, 1): class logits within +-12. pred_boxes, pred_boxes_xyxy (B, Q, 4).
            presence_logit_dec (B, 1): is the thing in the picture at all; presence_feats (1, B, C).
            queries (B, Q, C): last query states. encoder_hidden_states (HW, B, C).
            prev_encoder_out: {"encoder_out", "backbone_out"}, what `predict_masks` goes on from.
            In train mode also `*_o2m` (one-to-many queries) and `aux_outputs`, a list of the same for layers 0..L-2.
        """
        features, pos = backbone_out["backbone_fpn"][-1], backbone_out["vision_pos_enc"][-1]
        grid_size = tuple(features.shape[-2:])
        tokens = _to_tokens(features)[find_input.img_ids]
        pos = _to_tokens(pos[:1]).expand_as(tokens)  # the same for every image
        prompt, prompt_mask = self._encode_prompt(backbone_out, find_input, geometric_prompt, tokens, pos, grid_size)
        memory = self.transformer.encoder(tokens, pos, prompt, prompt_mask)
        decoded = self.transformer.decoder(memory, pos, prompt, prompt_mask, grid_size)
        out = self._scores_and_boxes(decoded, prompt, prompt_mask)
        out["presence_feats"] = decoded.presence.transpose(0, 1)
        out["presence_logit"] = None  # SAM3 keeps this name for a second presence head that was not released
        out["encoder_hidden_states"] = memory.transpose(0, 1)
        out["prev_encoder_out"] = {
            "encoder_out": {
                "encoder_hidden_states": out["encoder_hidden_states"],
                "pos_embed": pos.transpose(0, 1),
                "vis_feat_sizes": [grid_size],
                "prompt_before_enc": prompt.transpose(0, 1),
                "prompt_after_enc": prompt.transpose(0, 1),
                "prompt_mask": prompt_mask,
            },
            "backbone_out": backbone_out,
        }
        out["find_input"] = find_input
        return out

    def predict_masks(self, out: dict[str, Any], mask_queries: Tensor | None = None) -> dict[str, Tensor]:
        """Masks for the result of `predict_boxes`.

        Args:
            mask_queries: (B, K) long, the queries that get a mask; left out, all of them.

        Returns:
            pred_masks (B, K, 4 H, 4 W) and semantic_seg (B, 1, 4 H, 4 W), logits; in train mode pred_masks_o2m.
        """
        if self.segmentation_head is None:
            raise ValueError(
                "this model was built without its segmentation head; build it with enable_segmentation=True"
            )
        queries = out["queries"]
        count = queries.shape[1]
        if mask_queries is not None:
            queries = queries.gather(1, mask_queries[..., None].expand(-1, -1, queries.shape[-1]))
        elif "queries_o2m" in out:
            queries = torch.cat((queries, out["queries_o2m"]), dim=1)
        encoder_out = out["prev_encoder_out"]["encoder_out"]
        masks = self.segmentation_head(
            out["prev_encoder_out"]["backbone_out"]["backbone_fpn"],
            queries,
            out["find_input"].img_ids,
            encoder_out["encoder_hidden_states"].transpose(0, 1),
            encoder_out["prompt_after_enc"].transpose(0, 1),
            encoder_out["prompt_mask"],
        )
        if mask_queries is None and "queries_o2m" in out:
            masks["pred_masks"], masks["pred_masks_o2m"] = masks["pred_masks"].split(count, dim=1)
        return masks

    def predict_inst(
        self,
        state: dict[str, Any],
        point_coords: Numbers | None = None,
        point_labels: Numbers | None = None,
        box: Numbers | None = None,
        mask_input: Numbers | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> Masks:
        """Masks of what clicks or a box mark, rather than of everything like it: see `InteractivePredictor.predict`."""
        return self._clicks().predict(
            state, point_coords, point_labels, box, mask_input, multimask_output, return_logits, normalize_coords
        )

    def predict_inst_batch(
        self, state: dict[str, Any], *prompts: Any, **options: Any
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """`predict_inst` for every picture of a state: arguments are those of `InteractivePredictor.predict_batch`."""
        return self._clicks().predict_batch(state, *prompts, **options)

    def _clicks(self) -> InteractivePredictor:
        if self.inst_interactive_predictor is None:
            raise ValueError("this model was built without clicks; build it with enable_inst_interactivity=True")
        return self.inst_interactive_predictor

    def _get_dummy_prompt(self, num_prompts: int = 1) -> Prompt:
        """A geometric prompt without boxes and points (SAM3's processors call it by this name)."""
        return Prompt.empty(num_prompts, device=self.device)

    def _encode_prompt(
        self,
        backbone_out: dict[str, Any],
        find_input: FindStage,
        geometric_prompt: Prompt | None,
        tokens: Tensor,
        pos: Tensor,
        grid_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Text tokens, then geometry tokens: (B, N, C) and mask (B, N) True = ignore."""
        if geometric_prompt is None:
            geometric_prompt = self._get_dummy_prompt(len(tokens))
        text = backbone_out["language_features"][:, find_input.text_ids].transpose(0, 1)  # (32, T, C) -> (B, 32, C)
        text_mask = backbone_out["language_mask"][find_input.text_ids]
        geometry, geometry_mask = self.geometry_encoder(geometric_prompt, tokens, pos, grid_size)
        return torch.cat((text, geometry.to(text.dtype)), dim=1), torch.cat((text_mask, geometry_mask), dim=1)

    def _scores_and_boxes(self, decoded: DecoderOutput, prompt: Tensor, prompt_mask: Tensor) -> dict[str, Any]:
        """Per layer and per half (one-to-one, one-to-many), then the last layer on top."""
        layers = slice(None) if self.training else slice(-1, None)
        hs, boxes, presence = decoded.hs[layers], decoded.boxes[layers], decoded.presence_logits[layers]
        logits = self.dot_prod_scoring(hs, prompt, prompt_mask)
        if self.supervise_joint_box_scores:
            joint = logits.sigmoid() * presence.sigmoid()[:, :, None]
            logits = inverse_sigmoid(joint).clamp(-10, 10)
        num_queries = self.transformer.decoder.num_queries
        results = []
        for layer in range(len(hs)):
            result = {"presence_logit_dec": presence[layer]}
            halves = (
                {"": slice(0, num_queries), "_o2m": slice(num_queries, None)} if self.training else {"": slice(None)}
            )
            for suffix, half in halves.items():
                result[f"pred_logits{suffix}"] = logits[layer][:, half]
                result[f"pred_boxes{suffix}"] = boxes[layer][:, half]
                result[f"pred_boxes_xyxy{suffix}"] = box_cxcywh_to_xyxy(boxes[layer][:, half])
                result[f"queries{suffix}"] = hs[layer][:, half]
            results.append(result)
        out = results[-1]
        if self.training:
            out["aux_outputs"] = [{k: v for k, v in r.items() if not k.startswith("queries")} for r in results[:-1]]
        return out


def _to_tokens(maps: Tensor) -> Tensor:
    """(I, C, H, W) -> (I, HW, C), laid out for the linears that follow."""
    return maps.flatten(2).transpose(1, 2).contiguous()
