"""Pictures in, network input out: reading, resizing, padding, normalising, and the way back for coordinates and maps.

Training, export and inference all go through this file, so that a student sees what its teacher saw.
What travels to the device is uint8; the division and the zeros of the padding happen there.

Letters: `B` images, `H W` rows and columns of the original picture, `S` side of the model's square,
`h w` rows and columns of the picture inside that square.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces that a later release will drop its decoders
    decode_jpeg = None

RESIZE_MODES = ("pad", "square")
JPEG_SIGNATURE = b"\xff\xd8\xff"
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")

logger = logging.getLogger(__name__)

# How many pictures of each kind this process read with Pillow instead of the fast JPEG decoder.
fallback_counts: Counter[str] = Counter()


def read_image(path: str | Path) -> Tensor:
    """The picture at `path` as RGB, uint8 `(3, H, W)`, with no EXIF rotation (SA-1B's masks know none).

    JPEG goes through torchvision; what that refuses, and every other format, through Pillow: counted in
    `fallback_counts`, logged once per kind. Grey, palette, CMYK and 16-bit pictures become 8-bit RGB, transparency is
    dropped. Raises FileNotFoundError, or ValueError naming the file if it is empty, truncated or no picture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no picture {path}; check the path")
    data = np.fromfile(path, dtype=np.uint8)
    if data.size == 0:
        raise ValueError(f"picture {path} is empty (0 bytes); fetch it again or remove it")
    if decode_jpeg is not None and data[:3].tobytes() == JPEG_SIGNATURE:
        try:
            return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
        except RuntimeError as error:
            if "truncated" in str(error):
                raise ValueError(f"picture {path} is truncated ({data.size} bytes); fetch it again") from error
    return _read_with_pillow(path)


def _read_with_pillow(path: Path) -> Tensor:
    try:
        with Image.open(path) as picture:
            kind = f"{picture.format} {picture.mode}"
            pixels = to_rgb(picture)
    except Exception as error:  # Pillow's decoders raise many types; each of them means that this file is damaged
        raise ValueError(f"cannot read picture {path}: {error}; fetch it again or remove it") from error
    fallback_counts[kind] += 1
    if fallback_counts[kind] == 1:
        logger.info("%s: %s pictures are read with Pillow, which is slower than JPEG through torchvision", path, kind)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_rgb(picture: Image.Image) -> np.ndarray:
    """Any Pillow picture -> uint8 `(H, W, 3)`; 16 bits are scaled to 8. Raises ValueError for floating-point pixels."""
    if picture.mode in SIXTEEN_BIT_MODES:
        grey = np.asarray(picture).astype(np.int64).clip(0, 65535)
        grey = ((grey * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it as 8-bit RGB")
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the model's square input; one value shared by a teacher, its store and its students.

    img_size: side `S` of the square. resize: `pad` brings the longest side to `S` and zero-pads right and bottom,
    `square` squashes both sides to `S`. mean, std: per RGB channel, on 0..255.
    """

    img_size: int = 1008
    resize: str = "pad"
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.resize not in RESIZE_MODES:
            raise ValueError(f"resize {self.resize!r} is unknown; choose one of {', '.join(RESIZE_MODES)}")
        if self.img_size < 1:
            raise ValueError(f"img_size (={self.img_size}) must be positive")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must be three numbers each, std above 0")

    def to_meta(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON files and checkpoints."""
        meta = asdict(self)
        return {**meta, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_meta`; ValueError if a field is missing or unknown."""
        wanted = set(cls.__dataclass_fields__)
        if set(meta) != wanted:
            raise ValueError(f"preprocess meta has the fields {sorted(meta)}, wanted {sorted(wanted)}")
        return cls(**meta)

    def fitted_size(self, height: int, width: int) -> tuple[int, int]:
        """`(h, w)` that a picture of `height` x `width` pixels takes in the square; at least one pixel each."""
        if self.resize == "square":
            return self.img_size, self.img_size
        scale = self.img_size / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def fit(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Resize and pad a uint8 picture `(3, H, W)`: uint8 `(3, S, S)`, zeros outside the picture, and `(h, w)`."""
        fitted = torch.zeros(3, self.img_size, self.img_size, dtype=torch.uint8)
        return fitted, self.fit_into(image, fitted)

    def fit_into(self, image: Tensor, out: Tensor) -> tuple[int, int]:
        """`fit` into the caller's zeroed uint8 `(3, S, S)`, fastest if channels last; returns `(h, w)`.

        The resize is bilinear with antialiasing, on uint8: six times as fast as on floats, and within one grey level.
        """
        height, width = self.fitted_size(image.shape[1], image.shape[2])
        if image.shape[1:] != (height, width):
            # Channels last also in the eyes of torch, which looks at the stride of the batch: twice as fast.
            batch = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
            image = F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]
        out[:, :height, :width] = image
        return height, width

    def normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """(x - mean) / std on whatever device `images` lies, then exact zeros in the padding.

        images: uint8 `(B, 3, S, S)`; sizes: integer `(B, 2)`, `(h, w)` of each picture. Returns float32 `(B, 3, S, S)`.
        """
        result = images.to(torch.float32, copy=True)
        for channel in range(3):
            result[:, channel].sub_(self.mean[channel]).div_(self.std[channel])
        if self.resize == "square":
            return result
        sizes = sizes.to(images.device, non_blocking=True)
        steps = torch.arange(images.shape[-1], device=images.device)
        outside_rows = steps >= sizes[:, :1]  # (B, S)
        outside_columns = steps >= sizes[:, 1:]
        outside = outside_rows[:, :, None] | outside_columns[:, None, :]  # (B, S, S)
        return result.masked_fill_(outside[:, None], 0.0)

    def coords_to_input(self, coords: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Pixels of the original picture -> 0..1 of the model's square.

        coords: `(..., 2)` points xy or `(..., 4)` boxes xyxy, float. image_size: `(H, W)`.
        For boxes as centre and size (cxcywh, xywh) the same factors hold, so they may be passed as well.
        """
        return coords * self._coord_scale(coords, image_size)

    def coords_to_image(self, coords: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The inverse of `coords_to_input`: 0..1 of the model's square -> pixels of the original picture."""
        return coords / self._coord_scale(coords, image_size)

    def _coord_scale(self, coords: Tensor, image_size: tuple[int, int]) -> Tensor:
        height, width = image_size
        h, w = self.fitted_size(height, width)
        scale = coords.new_tensor([w / (width * self.img_size), h / (height * self.img_size)])
        return scale.repeat(coords.shape[-1] // 2)

    def crop_valid(self, maps: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The cells of `(..., M, M)` maps over the model's square that see a picture of `image_size` `(H, W)`: a view.

        A cell that the picture's edge cuts is kept.
        """
        h, w = self.fitted_size(*image_size)
        rows, columns = (-(-side * maps.shape[-1] // self.img_size) for side in (h, w))
        return maps[..., :rows, :columns]

    def maps_to_image(self, maps: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Resize `(N, C, M, M)` float maps over the model's square to the original picture: `(N, C, H, W)`.

        Bilinear, exact in position for both resize modes even where the picture's edge cuts a cell.
        """
        height, width = image_size
        h, w = self.fitted_size(height, width)
        pixels_per_cell = self.img_size / maps.shape[-1]
        # The hair above the true factor keeps rounding from costing the last row; the rest is cut off below.
        factors = [side * pixels_per_cell / fitted * (1 + 1e-9) for side, fitted in ((height, h), (width, w))]
        if min(height, width) == 0 or not maps.numel():
            return maps.new_zeros(*maps.shape[:2], height, width)
        resized = F.interpolate(
            self.crop_valid(maps, image_size),
            scale_factor=tuple(factors),
            mode="bilinear",
            align_corners=False,
            recompute_scale_factor=False,
        )
        return resized[..., :height, :width]
