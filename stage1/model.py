"""The frozen teacher, and the student that imitates it.

Letters: `B` pictures, `S` input side in pixels, `C` embedding channels, `G` side of the embedding grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from sam3.backbones.student import StudentEncoder, build_student
from sam3.engine.losses import (
    build_valid_mask,
    masked_cosine,
    masked_cosine_per_image,
    masked_mse,
    masked_mse_per_image,
)
from sam3.engine.stage_config import build_preprocess
from sam3.model_builder import build_teacher_trunk
from sam3.transforms import Preprocess
from stage1.data.dataset import Stage1Batch


class TeacherEncoder(nn.Module):
    """SAM3's trunk without gradients: normalised pictures `(B, 3, S, S)` -> float16 grid `(B, C, G, G)`.

    Float16 is what the store holds, so an online teacher gives the very numbers a stored one does.
    """

    def __init__(self, trunk: nn.Module, embed_dim: int, embed_size: int) -> None:
        super().__init__()
        if trunk.channel_list[-1] != embed_dim:
            raise ValueError(
                f"the teacher gives {trunk.channel_list[-1]} channels, but DISTILL.EMBED_DIM is {embed_dim}; "
                f"set DISTILL.EMBED_DIM {trunk.channel_list[-1]}"
            )
        self.trunk = trunk.eval().requires_grad_(False)
        self.embed_size = embed_size

    def train(self, mode: bool = True) -> TeacherEncoder:
        """Stay in evaluation mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        grid = self.trunk(images)[-1]
        if grid.shape[-1] != self.embed_size:
            grid = F.interpolate(grid.float(), size=(self.embed_size,) * 2, mode="bilinear", align_corners=False)
        return grid.half().contiguous()  # the store's layout: it decides the order of sums and so the last bits


class EncoderDistiller(nn.Module):
    """One training step's forward: pictures and teacher grids in, losses out.

    loss = pixel_weight * masked MSE + cosine_weight * (1 - masked cosine), both over the cells that show the picture.
    The student is the only child module: a teacher given for online distillation is kept out of parameters and state.
    """

    def __init__(
        self,
        student: StudentEncoder,
        preprocess: Preprocess,
        *,
        pixel_weight: float = 1.0,
        cosine_weight: float = 1.0,
        mse_reduction: str = "channel_mean",
        teacher: TeacherEncoder | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.preprocess = preprocess
        self.pixel_weight = pixel_weight
        self.cosine_weight = cosine_weight
        self.mse_reduction = mse_reduction
        self.channels_last = channels_last
        self._teacher = (teacher,)  # in a tuple, so that it is no child module

    def forward(self, batch: Stage1Batch) -> dict[str, Tensor]:
        """Scalar losses: `total` to minimise, and its unweighted terms `mse` and `cosine`."""
        if not len(batch):  # no picture of it could be read: no gradient, but the processes stay in step
            zero = 0 * sum(p.sum() for p in self.student.parameters() if p.requires_grad)
            return {"total": zero, "mse": zero, "cosine": zero}
        prediction, target, mask = self._predict(batch)
        mse = masked_mse(prediction, target, mask, self.mse_reduction)
        cosine = masked_cosine(prediction, target, mask)
        return {"total": self.pixel_weight * mse + self.cosine_weight * cosine, "mse": mse, "cosine": cosine}

    @torch.no_grad()
    def evaluate(self, batch: Stage1Batch) -> dict[str, Tensor]:
        """Per picture: `mse` (per element) and `cosine` similarity, each `(B,)`; and the two grids and the mask."""
        prediction, target, mask = self._predict(batch)
        mse = masked_mse_per_image(prediction, target, mask)
        cosine = masked_cosine_per_image(prediction, target, mask)
        return {"mse": mse, "cosine": cosine, "prediction": prediction, "target": target, "mask": mask}

    def _predict(self, batch: Stage1Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Student grid, teacher grid (both float32, `(B, C, G, G)`) and valid mask `(B, 1, G, G)`."""
        images = self.preprocess.normalise(batch.images, batch.sizes)
        target = self._teacher_grid(batch, images)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        prediction = self.student(images)
        if prediction.shape != target.shape:
            raise ValueError(
                f"the student gives {tuple(prediction.shape[1:])}, the teacher {tuple(target.shape[1:])}; "
                f"DISTILL.EMBED_DIM and EMBED_SIZE must be those of the teacher"
            )
        mask = build_valid_mask(batch.sizes, self.preprocess.img_size, target.shape[-1])
        return prediction.float(), target.float(), mask

    def _teacher_grid(self, batch: Stage1Batch, images: Tensor) -> Tensor:
        teacher = self._teacher[0]
        if teacher is not None:
            return teacher(images)
        if batch.embeddings is None:
            raise ValueError("the batch holds no teacher embeddings and there is no online teacher")
        return batch.embeddings.values()


def build_teacher(config: CfgNode, checkpoint: str, device: torch.device) -> TeacherEncoder:
    """The trunk of `checkpoint` (sam3.pt layout), nothing else of it, ready on `device`."""
    trunk = build_teacher_trunk(checkpoint, device=device)
    if trunk.img_size != config.DATA.IMG_SIZE:
        raise ValueError(
            f"the teacher in {checkpoint} takes {trunk.img_size} px pictures (its rotary tables fix that), "
            f"but DATA.IMG_SIZE is {config.DATA.IMG_SIZE}; set DATA.IMG_SIZE {trunk.img_size}"
        )
    return TeacherEncoder(trunk, config.DISTILL.EMBED_DIM, config.DISTILL.EMBED_SIZE)


def build_distiller(config: CfgNode, teacher: TeacherEncoder | None = None) -> EncoderDistiller:
    """The student of `MODEL.BACKBONE` with random weights, and its losses."""
    student = build_student(
        config.MODEL.BACKBONE,
        config.DISTILL.EMBED_DIM,
        config.DISTILL.EMBED_SIZE,
        output_stride=config.MODEL.OUTPUT_STRIDE,
    )
    if config.TRAIN.USE_CHECKPOINT:
        student.set_grad_checkpointing(True)
    return EncoderDistiller(
        student,
        build_preprocess(config),
        pixel_weight=config.DISTILL.PIXEL_WISE,
        cosine_weight=config.DISTILL.COSINE,
        mse_reduction=config.DISTILL.MSE_REDUCTION,
        teacher=teacher,
        channels_last=config.TRAIN.CHANNELS_LAST,
    )
