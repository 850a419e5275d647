"""SAM3's tracker: masks of objects in a frame from prompts, or from what is remembered of earlier frames.

The steps of a frame are methods; which frames are remembered and read is the bank's matter (`memory_bank`), prompts
and sessions are the predictor's. All steps take a batch of objects and keep gradients.

Letters: B objects, n = 1 (one frame shared by all objects) or B, C channels, G side of the feature map, D memory
channels, N memory tokens of a frame, K masks proposed for an object, P points of an object, S side of the input, px.
Mask logits "low" have the side 4 G.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.memory_bank import MemoryRecord
from sam3.model.memory_plan import MemoryPlan
from sam3.model.model_misc import MLP
from sam3.model.position_encoding import PositionEmbeddingSine, sine_of_distance
from sam3.model.tracker_config import TrackerConfig
from sam3.model.tracker_memory import CompressedMemory, DenseMemory, GatheredMemory
from sam3.sam.mask_decoder import MaskDecoder
from sam3.sam.prompt_encoder import PromptEncoder

NO_OBJECT_LOGIT = -1024.0  # of every pixel of an object that is not in the frame
MASK_SCALE, MASK_BIAS = 20.0, -10.0  # what the memory encoder sees of a mask in 0..1
KNOWN_LOGIT = 10.0  # object logit of a mask that was given
MAX_CLICKS_WITH_CHOICE = 1  # up to so many points, several masks are proposed and the best is taken


@dataclass
class FrameFeatures:
    """Of n frames: s0 (n, C / 8, 4 G, 4 G), s1 (n, C / 4, 2 G, 2 G), top (n, C, G, G)."""

    s0: Tensor
    s1: Tensor
    top: Tensor

    @property
    def high_res(self) -> tuple[Tensor, Tensor]:
        """What the mask decoder refines its masks with."""
        return self.s0, self.s1

    def select(self, rows: Tensor | slice) -> FrameFeatures:
        """The frames `rows`, (B,) long, one for each object, or a slice of them, which copies nothing."""
        return FrameFeatures(self.s0[rows], self.s1[rows], self.top[rows])


@dataclass
class ObjectMasks:
    """What the heads say of B objects in a frame.

    low (B, 1, 4G, 4G): logits of the chosen mask, NO_OBJECT_LOGIT where the object is not in the frame. candidates
    (B, K, 4G, 4G): logits of all proposals, whether the object is there or not. ious (B, K): their predicted IoU, 0..1.
    object_logits (B, 1): above 0 = it is in the frame. pointer (B, C).
    """

    low: Tensor
    candidates: Tensor
    ious: Tensor
    object_logits: Tensor
    pointer: Tensor


class Sam3Tracker(nn.Module):
    """Children are named as in `sam3.pt` after `tracker.`.

    `memory` reads and writes the memory: SAM3's dense one (`transformer.encoder`), or a compressed one
    (`memory_attention`, `spatial_perceiver`), by `config.memory`.
    """

    def __init__(
        self,
        config: TrackerConfig,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        memory_encoder: nn.Module,
        transformer: nn.Module | None = None,
        memory_attention: nn.Module | None = None,
        spatial_perceiver: nn.Module | None = None,
    ):
        """
        Args:
            transformer: holds `encoder`, the dense memory attention; None with a compressed memory.
            memory_attention, spatial_perceiver: of a compressed memory; the latter may be None in it.
        """
        super().__init__()
        assert (transformer is None) != (memory_attention is None), "one memory: dense or compressed"
        dim, mem_dim = config.dim, config.mem_dim
        self.config = config
        self.sam_prompt_encoder = prompt_encoder
        self.sam_mask_decoder = mask_decoder
        self.maskmem_backbone = memory_encoder
        self.obj_ptr_proj = MLP(dim, dim, dim, 3)
        self.obj_ptr_tpos_proj = nn.Linear(dim, mem_dim)
        self.mask_downsample = nn.Conv2d(1, 1, 4, stride=4)
        self.maskmem_tpos_enc = nn.Parameter(torch.zeros(config.num_maskmem, 1, 1, mem_dim))
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, dim))
        self.no_mem_pos_enc = nn.Parameter(torch.zeros(1, 1, dim))  # in the file; nothing reads it
        self.no_obj_ptr = nn.Parameter(torch.zeros(1, dim))
        self.no_obj_embed_spatial = nn.Parameter(torch.zeros(1, mem_dim))
        self.position_encoding = PositionEmbeddingSine(dim)
        if transformer is not None:
            self.transformer = transformer
            self.memory = DenseMemory(transformer.encoder, mem_dim, config.grid)
        else:
            self.memory_attention = memory_attention
            if spatial_perceiver is not None:
                self.spatial_perceiver = spatial_perceiver
            self.memory = CompressedMemory(memory_attention, spatial_perceiver, mem_dim, config.grid)

    # A frame's features -----------------------------------------------------------------------------------------------

    def prepare_features(self, levels: Sequence[Tensor]) -> FrameFeatures:
        """The second neck's maps (n, C, kG, kG), k = 4, 2, 1; once per frame, for all objects."""
        s0, s1, top = levels
        return FrameFeatures(self.sam_mask_decoder.conv_s0(s0), self.sam_mask_decoder.conv_s1(s1), top)

    def condition(
        self, top: Tensor, gathered: GatheredMemory | None, memory: DenseMemory | CompressedMemory | None = None
    ) -> Tensor:
        """The map that masks are read from: `top` (n, C, G, G) after a look at the memory, (B, C, G, G).

        Without memory, which is how prompted frames are seen, it is (n, C, G, G).

        Args:
            memory: another than the tracker's own, which `gathered` was made by.
        """
        if gathered is None:
            return top + self.no_mem_embed.mT[..., None]  # (1, C, 1, 1)
        x = top.flatten(2).mT.expand(gathered.tokens.shape[0], -1, -1)  # (B, L, C)
        position = self.position_encoding(top)[0].flatten(1).T  # (L, C)
        return (memory or self.memory).attend(x, position, gathered).mT.unflatten(2, top.shape[-2:])

    # Masks ------------------------------------------------------------------------------------------------------------

    def predict_masks(
        self,
        conditioned: Tensor,
        high_res: tuple[Tensor, Tensor],
        num_objects: int,
        points: tuple[Tensor, Tensor] | None = None,
        mask_logits: Tensor | None = None,
        multimask: bool | None = None,
    ) -> ObjectMasks:
        """Masks of B = `num_objects` objects.

        Args:
            conditioned: (n, C, G, G), from `condition`; high_res: of the same n frames, or of one.
            points: coordinates (B, P, 2) in pixels of the S x S input, labels (B, P): 1 on the object, 0 beside it,
                2 and 3 the box's corners, -1 no point.
            mask_logits: (B, 1, h, w), an earlier mask to go on from.
            multimask: propose several masks; left out, they are proposed for up to one point.
        """
        if multimask is None:
            multimask = points is None or points[1].shape[1] <= MAX_CLICKS_WITH_CHOICE
        if points is None:
            points = (
                conditioned.new_zeros(num_objects, 1, 2),
                conditioned.new_full((num_objects, 1), -1, dtype=torch.long),
            )
        if mask_logits is not None:
            mask_logits = _resize(mask_logits, self.low_side, antialias=True).to(self.no_mem_embed.dtype)
        sparse, dense = self.sam_prompt_encoder(points=points, boxes=None, masks=mask_logits)
        decoded = self.sam_mask_decoder(
            conditioned, self.sam_prompt_encoder.get_dense_pe(), sparse, dense, multimask, high_res
        )
        appearing = decoded.object_logits > 0  # (B, 1)
        candidates = decoded.masks.float()
        best = decoded.ious.argmax(dim=1, keepdim=True)  # (B, 1); 0 where there is one mask only
        low = candidates.gather(1, best[:, :, None, None].expand(-1, -1, *candidates.shape[-2:]))
        token = decoded.tokens.gather(1, best[:, :, None].expand(-1, -1, decoded.tokens.shape[-1]))[:, 0]
        return ObjectMasks(
            low=torch.where(appearing[:, :, None, None], low, NO_OBJECT_LOGIT),
            candidates=candidates,
            ious=decoded.ious,
            object_logits=decoded.object_logits,
            pointer=self._gate_pointer(self.obj_ptr_proj(token), appearing),
        )

    def take_mask(self, features: FrameFeatures, mask: Tensor) -> ObjectMasks:
        """The outputs for objects whose masks are given: (B, 1, h, w) in 0..1 over the square input."""
        mask = mask.float()
        low = _resize(mask * MASK_SCALE + MASK_BIAS, self.low_side, antialias=True)
        heads = self.predict_masks(
            features.top,  # as it is: the released model adds no `no_mem_embed` here
            features.high_res,
            num_objects=len(mask),
            mask_logits=self.mask_downsample(mask.to(self.no_mem_embed.dtype)),
            multimask=False,
        )
        appearing = (mask.flatten(1) > 0).any(dim=1, keepdim=True)  # (B, 1)
        return ObjectMasks(
            low=low,
            candidates=low,
            ious=torch.ones_like(heads.ious),
            object_logits=torch.where(appearing, KNOWN_LOGIT, -KNOWN_LOGIT),
            pointer=self._gate_pointer(heads.pointer, appearing),
        )

    def upsample(self, low: Tensor) -> Tensor:
        """Mask logits (B, K, 4G, 4G) -> (B, K, S, S)."""
        return _resize(low, self.config.img_size)

    # Memory -----------------------------------------------------------------------------------------------------------

    def encode_memory(self, top: Tensor, mask_logits: Tensor, object_logits: Tensor, from_prompt: bool) -> Tensor:
        """What is to be remembered of a frame: (B, D, G, G).

        Args:
            top: (n, C, G, G), without memory.
            mask_logits: (B, 1, h, w); "low" ones are upsampled to the input's size first.
            object_logits: (B, 1).
            from_prompt: the mask comes from a user's prompt, so that it is taken as certain: 0 or 1.
        """
        logits = mask_logits.float()
        if logits.shape[-1] == self.low_side:
            logits = self.upsample(logits)
        mask = (logits > 0).float() if from_prompt else logits.sigmoid()
        seen = _resize(mask * MASK_SCALE + MASK_BIAS, 16 * self.config.grid, antialias=True)
        remembered = self.maskmem_backbone(top, seen.to(top.dtype))
        absent = (object_logits <= 0).to(top.dtype)  # (B, 1)
        return remembered + (absent * self.no_obj_embed_spatial)[:, :, None, None]

    def remember(
        self, memory_map: Tensor, heads: ObjectMasks, memory: DenseMemory | CompressedMemory | None = None
    ) -> MemoryRecord:
        """What the bank keeps of a frame: its tokens in bfloat16, as the released model stores them."""
        tokens = (memory or self.memory).compress(memory_map)
        return MemoryRecord(tokens.to(torch.bfloat16), heads.pointer, heads.object_logits)

    def gather(
        self,
        plan: MemoryPlan,
        records: Mapping[int, MemoryRecord],
        memory: DenseMemory | CompressedMemory | None = None,
    ) -> GatheredMemory:
        """Tokens and positions of the frames that `plan` names; `records` holds them by frame."""
        dtype = self.no_mem_embed.dtype
        tokens = [records[frame].tokens.to(dtype) for frame, _ in plan.spatial]  # (B, N, D) each
        own = (memory or self.memory).positions(self.no_mem_embed)  # (N, D)
        # Not by a list of numbers, which would wait for the GPU.
        times = torch.cat([self.maskmem_tpos_enc[index] for _, index in plan.spatial])  # (F, 1, D)
        positions = [(own + times).flatten(0, 1)]  # (F * N, D)
        num_pointer_tokens = 0
        if plan.pointers:
            pointers = torch.stack([records[frame].pointer for frame, _ in plan.pointers], dim=1)  # (B, P, C)
            parts = self.config.dim // self.config.mem_dim  # a pointer makes so many tokens
            tokens.append(pointers.to(dtype).unflatten(2, (parts, -1)).flatten(1, 2))  # (B, P * parts, D)
            distances = torch.tensor([distance for _, distance in plan.pointers]).to(own.device, non_blocking=True)
            code = sine_of_distance(distances / plan.span, self.config.dim).to(dtype)
            positions.append(self.obj_ptr_tpos_proj(code).repeat_interleave(parts, dim=0))
            num_pointer_tokens = tokens[-1].shape[1]
        return GatheredMemory(
            torch.cat(tokens, dim=1), torch.cat(positions)[None], len(plan.spatial), num_pointer_tokens
        )

    # Sizes ------------------------------------------------------------------------------------------------------------

    @property
    def low_side(self) -> int:
        """Side of the masks that the decoder gives."""
        return 4 * self.config.grid

    def _gate_pointer(self, pointer: Tensor, appearing: Tensor) -> Tensor:
        return torch.where(appearing, pointer, self.no_obj_ptr)


def _resize(maps: Tensor, side: int, antialias: bool = False) -> Tensor:
    """(B, K, h, w) -> (B, K, side, side), bilinear, in float32; antialias: where that makes them smaller."""
    if maps.shape[-2:] == (side, side):
        return maps
    # Enlarged maps would be the same with it, only slower, and its gradients on a GPU vary from run to run.
    antialias = antialias and side < max(maps.shape[-2:])
    return F.interpolate(maps.float(), (side, side), mode="bilinear", align_corners=False, antialias=antialias)
