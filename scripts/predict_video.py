"""Tracks objects through a video from boxes, points and masks, and draws them.

    python scripts/predict_video.py --checkpoint sam3_checkpoints/sam3.pt --video clip.mp4 --box 40 60 210 300 \\
        --output out.mp4
    python scripts/predict_video.py --checkpoint merged.pt --video frames/ --output out.mp4 --masks-dir masks \\
        --object 1 --point 320 240 1 --point 300 400 0 \\
        --object 2 --box 40 60 210 300 \\
        --object 1 --frame 30 --point 200 180 1

--object and --frame hold for the prompts that follow them, until they are given again; before that they are 1 and 0.
The video is a file, a folder of numbered JPEGs, or a picture. All frames are drawn, those that were not tracked as they
are. Where two objects meet, a pixel goes to the one with the higher logit. Takes `sam3.pt`, files with a student or a
compressed memory merged into it, and tiny ones, and needs no GPU.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import atomic_path
from sam3.engine.log import progress
from sam3.model.sam3_video_predictor import DIRECTIONS, Sam3VideoPredictor
from sam3.model.video_prompts import check_box, check_points
from sam3.model.video_session import FrameMasks, VideoSession
from sam3.tracker_builder import build_sam3_video_predictor
from sam3.transforms import read_image
from sam3.video_frames import VideoFrames, open_video
from sam3.video_writer import check_video_path, write_video
from sam3.visualize import object_color, overlay_masks

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
MAX_OBJECT = 255  # ids are the values of 8-bit pictures, where 0 is the background
DEFAULT_FPS = 24.0

logger = logging.getLogger(__name__)


@dataclass
class Prompt:
    """What was said of one object in one frame."""

    points: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    box: list[float] | None = None
    mask: Path | None = None


class AddPrompt(argparse.Action):
    """Puts --box, --point and --mask, in the order of the command line, under the --object and --frame before them."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        key = namespace.frame, namespace.object
        prompt = namespace.prompts.setdefault(key, Prompt())
        where = f"object {key[1]} in frame {key[0]}"
        if self.dest == "point":
            if values[2] not in (0, 1):
                parser.error("the label of a --point is 1 (on the object) or 0 (beside it)")
            prompt.points.append(values[:2])
            prompt.labels.append(int(values[2]))
        elif getattr(prompt, self.dest) is not None:
            parser.error(f"a second --{self.dest} for {where}; put --object NUMBER before that of another object")
        else:
            setattr(prompt, self.dest, values)
        if prompt.mask is not None and (prompt.box is not None or prompt.points):
            parser.error(f"a --mask and other prompts for {where}; give the one or the other")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.set_defaults(prompts={})  # (frame, object) -> Prompt
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="sam3.pt, a merged checkpoint, or a tiny one")
    add("--video", required=True, type=Path, help="video file, folder of <number>.jpg, or picture")
    add("--object", type=int, default=1, help=f"number of the object that the next prompts are about, 1..{MAX_OBJECT}")
    add("--frame", type=int, default=0, help="frame that the next prompts are about; the first is 0")
    add("--box", nargs=4, type=float, action=AddPrompt, metavar=("X0", "Y0", "X1", "Y1"), help="pixels; one an object")
    add("--point", nargs=3, type=float, action=AddPrompt, metavar=("X", "Y", "LABEL"),
        help="pixel on the object (label 1) or beside it (0); may be given again")  # fmt: skip
    add("--mask", type=Path, action=AddPrompt, metavar="FILE", help="picture of the video's size, not black = object")
    add("--direction", choices=DIRECTIONS, default="both", help="where to track to")
    add("--start-frame", type=int, help="where to start; left out, at the first prompt")
    add("--output", type=Path, help="video with the masks drawn over it, .mp4 or .gif")
    add("--fps", type=float, help=f"of --output; left out, the video's own, or {DEFAULT_FPS:g}")
    add("--masks-dir", type=Path, help="folder for a PNG per tracked frame, whose values are the objects' numbers")
    add("--memory-selection", action="store_true", help="remember the best of the recent frames, not the last ones")
    add("--fill-hole-area", type=int, default=0, help="fill holes of so many cells of the low-resolution mask")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=AUTOCAST_DTYPES, default="fp32", help="precision of the matrix products")
    args = parser.parse_args(argv)
    if not args.prompts:
        parser.error("nothing to track: give --box, --point or --mask")
    if not (args.output or args.masks_dir):
        parser.error("nothing to write: give --output, --masks-dir or both")
    if wrong := [number for _, number in args.prompts if not 1 <= number <= MAX_OBJECT]:
        parser.error(f"--object is a number in 1..{MAX_OBJECT}, got {wrong[0]}")
    if args.fps is not None and not 0 < args.fps < float("inf"):
        parser.error(f"--fps must be positive, got {args.fps}")
    if args.fill_hole_area < 0:
        parser.error(f"--fill-hole-area must not be negative, got {args.fill_hole_area}")
    try:
        if args.output:
            check_video_path(args.output)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0."""
    args = parse_args(argv)
    with open_video(args.video) as frames:
        check_prompts(args, frames)
        predictor = build_sam3_video_predictor(
            args.checkpoint,
            args.device,
            autocast_dtype=AUTOCAST_DTYPES[args.dtype],
            memory_selection=args.memory_selection,
            fill_hole_area=args.fill_hole_area,
            keep_logits=False,  # all clicks come before tracking
        )
        holder = tempfile.TemporaryDirectory() if args.masks_dir is None else nullcontext(args.masks_dir)
        with holder as folder, predictor.start_session(frames) as session:
            tracked = track(predictor, session, args, Path(folder))
            if args.output:
                pictures = progress(
                    drawn(frames, Path(folder), tracked), desc="drawing", unit="frames", total=len(frames)
                )
                write_video(args.output, pictures, args.fps or frames.fps or DEFAULT_FPS)
    for path in filter(None, (args.output, args.masks_dir)):
        print(f"wrote {path}")
    return 0


def check_prompts(args: argparse.Namespace, frames: VideoFrames) -> None:
    """ValueError or FileNotFoundError for what does not fit the video, before a model is loaded."""
    size = (frames.height, frames.width)
    for frame in (*(frame for frame, _ in args.prompts), args.start_frame or 0):
        if not 0 <= frame < len(frames):
            raise ValueError(f"frame {frame} does not exist; {frames.title} has frames 0 to {len(frames) - 1}")
    for prompt in args.prompts.values():
        if prompt.points:
            check_points(prompt.points, prompt.labels, size)
        if prompt.box is not None:
            check_box(prompt.box, size)
        if prompt.mask is not None:
            read_mask(prompt.mask, size)


def read_mask(path: Path, size: tuple[int, int]) -> Tensor:
    """bool (H, W): where the picture is not black; ValueError if it is not of `size`."""
    mask = (read_image(path) > 0).any(dim=0)
    if tuple(mask.shape) != size:
        raise ValueError(
            f"the mask {path} is {mask.shape[1]} x {mask.shape[0]} pixels, the video {size[1]} x {size[0]}; "
            "bring the mask to the size of the video"
        )
    return mask


def track(predictor: Sam3VideoPredictor, session: VideoSession, args: argparse.Namespace, folder: Path) -> set[int]:
    """Writes a PNG below `folder` for each tracked frame; returns the frames."""
    began = time.perf_counter()
    for (frame, number), prompt in args.prompts.items():
        add_prompt(predictor, session, frame, number, prompt)
    start = min(frame for frame, _ in args.prompts) if args.start_frame is None else args.start_frame
    total = {"forward": session.num_frames - start, "backward": start + 1, "both": session.num_frames}[args.direction]
    stream = predictor.propagate_in_video(session, start, direction=args.direction)
    tracked = set()
    for masks in progress(stream, desc="tracking", unit="frames", total=total):
        save_labels(folder / f"{session.frames.names[masks.frame_idx]}.png", label_map(masks))
        tracked.add(masks.frame_idx)
    seconds = time.perf_counter() - began
    rate = f"{len(tracked)} frames in {seconds:.2f} s, {len(tracked) / seconds:.3g} frames/s"
    logger.info("tracked %d object(s) through %s on %s", len(session.objects), rate, predictor.model.device)
    return tracked


def add_prompt(
    predictor: Sam3VideoPredictor, session: VideoSession, frame: int, number: int, prompt: Prompt
) -> FrameMasks:
    """Tells the predictor of one object in one frame."""
    if prompt.mask is not None:
        return predictor.add_new_mask(session, frame, number, read_mask(prompt.mask, session.size))
    points, labels = (prompt.points, prompt.labels) if prompt.points else (None, None)
    return predictor.add_new_points_or_box(
        session, frame, number, points, labels, rel_coordinates=False, box=prompt.box
    )


def label_map(masks: FrameMasks) -> np.ndarray:
    """uint8 (H, W): the number of the object with the highest logit above 0, 0 where there is none."""
    logits = masks.video_masks[:, 0]  # (B, H, W)
    best, row = logits.max(dim=0)
    numbers = torch.tensor(masks.obj_ids, dtype=torch.uint8).to(logits.device)
    return torch.where(best > 0, numbers[row], 0).to(torch.uint8).cpu().numpy()


def save_labels(path: Path, labels: np.ndarray) -> None:
    """uint8 (H, W) as a PNG with a palette, in the colours of the overlay."""
    picture = Image.fromarray(labels)
    palette = np.zeros((MAX_OBJECT + 1, 3), dtype=np.uint8)
    palette[1:] = [object_color(number) for number in range(1, MAX_OBJECT + 1)]
    picture.putpalette(palette.tobytes())
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def drawn(frames: VideoFrames, folder: Path, tracked: set[int]) -> Iterator[np.ndarray]:
    """All frames, uint8 (H, W, 3), the tracked ones with the objects that their PNG in `folder` holds."""
    for i, frame in frames.read_ahead(range(len(frames))):
        pixels = frame.permute(1, 2, 0).numpy()
        if i in tracked:
            labels = np.asarray(Image.open(folder / f"{frames.names[i]}.png"))
            pixels = overlay_masks(pixels, {int(k): labels == k for k in np.unique(labels) if k})
        yield np.ascontiguousarray(pixels)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_main(main)
