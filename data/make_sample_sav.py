"""Build a small data set in SA-V's layout out of photos, without any network: cut-outs that move over other photos.

    python data/make_sample_sav.py                       # photos that ship with scikit-image and scikit-learn
    python data/make_sample_sav.py --images ~/photos --output data/mine --num-train 40 --num-val 10 --num-frames 120
    python data/make_sample_sav.py --scenes --output data/scene-videos   # drawn objects, photos behind them
    python data/extract_sav_frames.py --source_dir data/sample-sav/sav_train \\
        --output_dir data/sample-sav/extracted_frames

`sav_train/` holds mp4 files of 24 frames per second with the JSON files of SA-V, `sav_val/` JPEG frames with one PNG
per object and annotated frame. Every fourth frame is annotated. Masks are exact, because they are what was drawn: of
each object the part that no other covers. Objects turn and change size; one passes before another, one comes in late
(train), one leaves, one leaves and returns (val). No photo serves both splits. The same arguments give the same files.

With --scenes the objects are drawn shapes, striped red squares and the like, up to six in a video; what is a pair of a
property and a shape in one split is none in the other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import atomic_path, write_json, write_text
from sam3.engine.sample_set import claim_folder, digests, list_photos
from sam3.engine.sample_video import TRAIN_WAYS, VAL_WAYS, Shape, draw_video
from sam3.engine.sav import ANNOTATION_STEP
from sam3.engine.scene_grounds import list_grounds, read_grounds, split_grounds
from sam3.engine.scene_videos import MAX_OBJECTS, make_clip
from sam3.engine.scenes import number_of_scene

FPS = 24
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Video:
    """One video of the set; photos: the background's, then one for each object."""

    name: str
    split: str
    photos: tuple[str, ...]


@dataclass(frozen=True)
class SceneVideo:
    """One video of drawn objects. seed: the number of the clip; photos: what may lie behind its objects."""

    name: str
    split: str
    seed: int
    photos: tuple[Path, ...]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if find_spec("cv2") is None:
        raise ValueError('OpenCV is needed to write mp4 files; install it with: pip install -e ".[stage2]"')
    root = arguments.output
    if arguments.scenes:
        shape = Shape(arguments.size, arguments.size, arguments.num_frames)
        photos = list_grounds(arguments.images)
        videos = plan_scenes(photos, arguments.num_train, arguments.num_val, arguments.seed)
        record = make_scene_record(videos, shape, arguments.seed)
    else:
        shape = Shape(arguments.width, arguments.height, arguments.num_frames)
        photos = list_photos(arguments.images)
        videos = plan(photos, arguments.num_train, arguments.num_val, arguments.objects, arguments.seed)
        record = make_record(videos, shape, arguments.seed)
    claim_folder(root, record)
    todo = [video for video in videos if not all(path.exists() for path in video_files(root, video))]
    if todo:
        print(f"{len(photos)} photos -> {len(videos)} videos in {root} ({len(todo)} to make)")
        jobs = [(root, video, shape, arguments.seed) for video in todo]
        with contextlib.ExitStack() as stack:
            several = min(arguments.workers, len(jobs)) > 1
            run = stack.enter_context(ProcessPoolExecutor(arguments.workers)).map if several else map
            for _ in tqdm(run(make_video, jobs), total=len(jobs), unit="video", disable=None):
                pass
    names = [video.name for video in videos if video.split == "val"]
    if names:
        write_text(root / "sav_val" / "sav_val.txt", "".join(f"{name}\n" for name in names))
    print(f"{root} is complete: {len(videos) - len(names)} train and {len(names)} val videos")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("data/sample-sav"), help="root of the new data set")
    parser.add_argument(
        "--images", type=Path, help="folder of pictures, searched with its sub-folders (default: the bundled photos)"
    )
    parser.add_argument("--num-train", type=int, default=6, help="videos of the train split")
    parser.add_argument("--num-val", type=int, default=3, help="videos of the val split")
    parser.add_argument("--num-frames", type=int, default=48, help="frames of a video")
    parser.add_argument("--width", type=int, default=320, help="of a frame in pixels, even")
    parser.add_argument("--height", type=int, default=240, help="of a frame in pixels, even")
    parser.add_argument("--objects", type=int, default=4, help="objects of a video")
    parser.add_argument("--scenes", action="store_true", help="draw named objects, over the pictures or over paint")
    parser.add_argument("--size", type=int, default=224, help="side of a frame with --scenes in pixels, even")
    parser.add_argument("--seed", type=int, default=0, help="decides everything that is drawn")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args(argv)
    if (
        min(arguments.num_train, arguments.num_frames, arguments.objects, arguments.workers) < 1
        or arguments.num_val < 0
    ):
        parser.error("--num-train, --num-frames, --objects, --workers must be at least 1, --num-val at least 0")
    for name in ("width", "height", "objects") if arguments.scenes else ("size",):
        if getattr(arguments, name) != parser.get_default(name):
            parser.error(f"--{name} has no effect {'with' if arguments.scenes else 'without'} --scenes")
    if arguments.seed < 0:
        parser.error(f"--seed must be at least 0, got {arguments.seed}")
    for name in ("width", "height", "size"):
        if (side := getattr(arguments, name)) < 32 or side % 2:
            parser.error(f"--{name} must be even, which the video format wants, and at least 32, got {side}")
    return arguments


def plan(photos: list[Path], num_train: int, num_val: int, num_objects: int, seed: int) -> list[Video]:
    """Deal photos to the splits and to the videos, the background of a video never among its objects.

    Raises ValueError if there are too few photos.
    """
    need = 4 if num_val else 2
    if len(photos) < need:
        raise ValueError(f"{len(photos)} photos are too few: each split wants a background and an object; add photos")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(photos))
    share = round(len(photos) * num_val / (num_train + num_val))
    num_val_photos = min(max(share, 2), len(photos) - 2) if num_val else 0
    videos = []
    for split, group, count in (("train", order[num_val_photos:], num_train), ("val", order[:num_val_photos], num_val)):
        for i in range(count):
            background = group[i % len(group)]
            others = generator.permutation([photo for photo in group if photo != background])
            chosen = [background, *(others[k % len(others)] for k in range(num_objects))]
            videos.append(Video(f"sav_{len(videos) + 1:06d}", split, tuple(str(photos[photo]) for photo in chosen)))
    return videos


def plan_scenes(photos: list[Path], num_train: int, num_val: int, seed: int) -> list[SceneVideo]:
    """The clips of both splits, which share no photo. Raises ValueError if there are too few photos."""
    grounds = split_grounds(photos)
    splits = ["train"] * num_train + ["val"] * num_val
    return [
        SceneVideo(f"sav_{number:06d}", split, number_of_scene(seed, number), grounds[split])
        for number, split in enumerate(splits, 1)
    ]


def make_record(videos: list[Video], shape: Shape, seed: int) -> dict[str, Any]:
    """Everything that decides the bytes of the set; photos by name and content, so that the folder may move."""
    sums = digests(photo for video in videos for photo in video.photos)
    entries = [
        {"name": v.name, "split": v.split, "photos": [[Path(photo).name, sums[photo]] for photo in v.photos]}
        for v in videos
    ]
    return {"format": 1, "seed": seed, **asdict(shape), "videos": entries}


def make_scene_record(videos: list[SceneVideo], shape: Shape, seed: int) -> dict[str, Any]:
    """As `make_record`, for scenes."""
    grounds = {video.split: video.photos for video in videos}
    sums = digests(photo for photos in grounds.values() for photo in photos)
    listed = {split: [[photo.name, sums[str(photo)]] for photo in photos] for split, photos in grounds.items()}
    entries = [{"name": video.name, "split": video.split} for video in videos]
    return {"format": 1, "scenes": True, "seed": seed, **asdict(shape), "photos": listed, "videos": entries}


def video_files(root: Path, video: Video | SceneVideo) -> list[Path]:
    """The files or folders that are there once the video is made."""
    if video.split == "val":
        return [root / "sav_val" / folder / video.name for folder in ("JPEGImages_24fps", "Annotations_6fps")]
    folder = root / "sav_train"
    return [folder / f"{video.name}.mp4", *(folder / f"{video.name}_{kind}.json" for kind in kinds_of(video))]


def kinds_of(video: Video | SceneVideo) -> dict[str, range]:
    """Kind of annotation -> its objects. Every second video with several objects has one automatic one, the last.

    Those of a scene are all manual, and how many there are of MAX_OBJECTS is known once it is drawn.
    """
    if isinstance(video, SceneVideo):
        return {"manual": range(MAX_OBJECTS)}
    count = len(video.photos) - 1
    if int(video.name[-1]) % 2 or count < 2:
        return {"manual": range(count)}
    return {"manual": range(count - 1), "auto": range(count - 1, count)}


def make_video(job: tuple[Path, Video | SceneVideo, Shape, int]) -> None:
    """Draw and write one video."""
    root, video, shape, seed = job
    if isinstance(video, SceneVideo):
        photos = read_grounds(video.photos, round(1.3 * shape.width))
        clip = make_clip(video.seed, shape.width, shape.num_frames, video.split, photos)
        frames, masks = list(clip.frames), clip.masks
    else:
        generator = np.random.default_rng([seed, int(video.name.removeprefix("sav_"))])
        ways = VAL_WAYS if video.split == "val" else TRAIN_WAYS
        frames, masks = draw_video([Path(photo) for photo in video.photos], shape, ways, generator)
    if video.split == "val":
        write_val(root, video, frames, masks)
    else:
        write_train(root, video, frames, masks)


def annotated(masks: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(frame number, masks `(N, H, W)`) of every annotated frame."""
    return ((number, masks[number]) for number in range(0, len(masks), ANNOTATION_STEP))


def write_train(root: Path, video: Video | SceneVideo, frames: list[np.ndarray], masks: np.ndarray) -> None:
    film, *documents = video_files(root, video)
    for path, (kind, objects) in zip(documents, kinds_of(video).items(), strict=True):
        write_json(path, describe(video, kind, masks[:, objects.start : objects.stop]))
    with atomic_path(film) as temporary:
        temporary.write_bytes(encode_film(frames))


def encode_film(frames: list[np.ndarray]) -> bytes:
    """The bytes of an mp4 file (MPEG-4 part 2, which OpenCV brings along everywhere)."""
    import cv2

    height, width = frames[0].shape[:2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FPS, (width, height))
        if not writer.isOpened():
            raise OSError("this OpenCV cannot write mp4 files; install opencv-python from PyPI")
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
        return path.read_bytes()


def describe(video: Video | SceneVideo, kind: str, masks: np.ndarray) -> dict[str, Any]:
    """The JSON document of SA-V for the objects with `masks`, bool `(T, N, H, W)`."""
    from pycocotools import mask as coco_mask

    num_frames, num_objects, height, width = masks.shape
    rows = []
    for _, shown in annotated(masks):
        codes = coco_mask.encode(np.asfortranarray(shown.transpose(1, 2, 0), dtype=np.uint8))
        rows.append([{"size": [height, width], "counts": code["counts"].decode()} for code in codes])
    areas = np.stack([shown.sum(axis=(1, 2)) for _, shown in annotated(masks)])  # (annotated frames, N)
    seen = areas > 0
    sizes = [float(areas[seen[:, i], i].mean()) if seen[:, i].any() else 0.0 for i in range(num_objects)]
    return {
        "video_id": video.name,
        "video_duration": num_frames / FPS,
        "video_frame_count": float(num_frames),
        "video_height": float(height),
        "video_width": float(width),
        "video_resolution": float(height * width),
        "video_environment": "synthetic",
        "video_split": video.split,
        "masklet": rows,
        "masklet_id": list(range(num_objects)),
        "masklet_size_rel": [size / (height * width) for size in sizes],
        "masklet_size_abs": sizes,
        "masklet_size_bucket": ["small" if s < 32**2 else "medium" if s < 96**2 else "large" for s in sizes],
        "masklet_visibility_changes": np.abs(np.diff(seen.astype(int), axis=0)).sum(0).tolist(),
        "masklet_first_appeared_frame": [float(seen[:, i].argmax()) if s else None for i, s in enumerate(sizes)],
        "masklet_frame_count": seen.sum(0).tolist(),
        "masklet_edited_frame_count": [0] * num_objects,
        "masklet_type": [kind] * num_objects,
        "masklet_stability_score": [[1.0] * num_objects for _ in rows] if kind == "auto" else None,
        "masklet_num": num_objects,
    }


def write_val(root: Path, video: Video | SceneVideo, frames: list[np.ndarray], masks: np.ndarray) -> None:
    pictures, annotations = video_files(root, video)
    with whole_folder(pictures) as folder:
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / f"{number:05d}.jpg", quality=JPEG_QUALITY)
    with whole_folder(annotations) as folder:
        for index in range(masks.shape[1]):
            (folder / f"{index:03d}").mkdir()
            for number, shown in annotated(masks):
                Image.fromarray(shown[index]).save(folder / f"{index:03d}" / f"{number:05d}.png")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder that becomes `path` once everything is in it."""
    temporary = path.with_name(f".{path.name}.tmp")
    for rest in (temporary, path):
        shutil.rmtree(rest, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.replace(path)


if __name__ == "__main__":
    run_main(main)
