"""Turn the training videos of SA-V (mp4) into numbered JPEG frames, with their annotations beside them.

    python data/extract_sav_frames.py --source_dir data/sa-v/sav_train --output_dir data/sa-v/extracted_frames
    python data/extract_sav_frames.py --source_dir data/sa-v --every 4 --dry-run     # from the archives as downloaded

Takes `x.mp4` with `x_manual.json` and/or `x_auto.json` beside it, loose at any depth or inside `*.tar`, which is read
in place. Gives `<output_dir>/x/00000.jpg, 00001.jpg, ...`, named by the frame's number in the video, and copies of
the JSON files. `--every 4` keeps the annotated frames only, under the same names.
A video's folder appears once it is complete, so a run that was stopped is taken up by the next one.
Exit code 1 and a list if any video cannot be used; the others are extracted all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path

from tqdm import tqdm

from sam3.engine.archives import Piece, find_pieces
from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import free_bytes, fsync, human_bytes, require_free_space, write_json
from sam3.engine.locks import FileLock
from sam3.engine.sav import ANNOTATION_STEP, KINDS

DEFAULT_SOURCES = (Path("data/sa-v/sav_train"), Path("data/sa-v"))
SUFFIXES = (".mp4", ".json")
FILM_COPY = "film.mp4"
MARK = "extraction.json"  # how the frames of a folder were made
SAMPLED_VIDEOS, SAMPLED_FRAMES = 4, 8  # for the estimate of the space needed
LISTED = 20  # names printed of a long list


class Unusable(Exception):
    """A video is damaged or does not fit its annotations."""


@dataclass(frozen=True)
class Settings:
    """every: keep the frames whose number it divides; quality: of the JPEGs, 1 to 100."""

    every: int
    quality: int


@dataclass(frozen=True)
class Facts:
    """What the annotations state about their video; sides in pixels."""

    num_frames: int
    height: int
    width: int


@dataclass
class Video:
    """film: the mp4; annotations: file name -> piece."""

    name: str
    film: Piece
    annotations: dict[str, Piece]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if find_spec("cv2") is None:
        raise ValueError('OpenCV is needed to read mp4 files; install it with: pip install -e ".[stage2]"')
    source, output = find_source(arguments.source_dir), arguments.output_dir
    settings = Settings(arguments.every, arguments.quality)
    videos, faults = pair_up(find_pieces(source, SUFFIXES, output, "data/download_sa_v.sh"), source)
    todo = [video for video in videos if not is_done(output / video.name, settings)]
    print(f"{len(videos)} videos in {source}: {len(videos) - len(todo)} already in {output}, {len(todo)} to extract")
    if todo:
        needed = estimate_bytes(todo, settings)
        print(f"to write: about {human_bytes(needed)}; free in {output}: {human_bytes(free_bytes(output))}")
        if not arguments.dry_run:
            require_free_space(output, needed, "extracting frames")
            faults |= extract_all(todo, output, settings, arguments.workers)
    num_done = sum((output / video.name).is_dir() for video in videos)
    return report(faults, num_done, output, arguments.dry_run)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    sources = ", ".join(map(str, DEFAULT_SOURCES))
    parser.add_argument("--source_dir", type=Path, help=f"folder of videos or archives (default: first of {sources})")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("data/sa-v/extracted_frames"), help="root of the result"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--every", type=int, choices=(1, ANNOTATION_STEP), default=1, help="1: all frames; 4: annotated"
    )
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG files, 1 to 100")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, change nothing")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    if not 1 <= arguments.quality <= 100:
        parser.error(f"--quality must be in 1..100, got {arguments.quality}")
    return arguments


def find_source(given: Path | None) -> Path:
    """`given`, or the first of DEFAULT_SOURCES that is there. Raises FileNotFoundError."""
    for folder in (given,) if given is not None else DEFAULT_SOURCES:
        if folder.is_dir():
            return folder
    wanted = f"--source_dir {given} is not a folder" if given else f"no folder {' or '.join(map(str, DEFAULT_SOURCES))}"
    raise FileNotFoundError(f"{wanted}; download SA-V with LINKS=links.txt bash data/download_sa_v.sh")


# ---------------------------------------------------------------------------------------------------------------- find


def pair_up(pieces: dict[str, Piece], source: Path) -> tuple[list[Video], dict[str, str]]:
    """Videos with their annotations, sorted by name, and the faults (name -> reason) of those without a partner.

    JSON files of other names are left alone. Raises ValueError if there is no video at all.
    """
    films = sorted(name.removesuffix(".mp4") for name in pieces if name.endswith(".mp4"))
    if not films:
        raise ValueError(
            f"found no mp4 files in {source}, loose or in *.tar; download archives with "
            "LINKS=links.txt bash data/download_sa_v.sh, or name another --source_dir"
        )
    videos, faults = [], {}
    for name in films:
        annotations = {f"{name}_{kind}.json" for kind in KINDS} & pieces.keys()
        if annotations:
            videos.append(Video(name, pieces[f"{name}.mp4"], {file: pieces[file] for file in sorted(annotations)}))
        else:
            faults[name] = f"there is no {name}_manual.json or {name}_auto.json with it"
    there = set(films)
    for file in sorted(name for name in pieces if name.endswith(tuple(f"_{kind}.json" for kind in KINDS))):
        if (name := file.rpartition("_")[0]) not in there:
            faults[name] = f"{file} has no {name}.mp4 with it"
    return videos, faults


def is_done(folder: Path, settings: Settings) -> bool:
    """Whether the video of `folder` is extracted. ValueError if with other settings, or not by this program."""
    if not folder.is_dir():
        return False
    try:
        mark = json.loads((folder / MARK).read_text())
        other = Settings(mark["every"], mark["quality"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} was not made by this program (no good {MARK}); delete it or move it away"
        ) from error
    if other != settings:
        raise ValueError(
            f"{folder} was extracted with --every {other.every} --quality {other.quality}; give these, delete the "
            "folder, or choose another --output_dir"
        )
    return True


# ------------------------------------------------------------------------------------------------------------- extract


def estimate_bytes(videos: list[Video], settings: Settings) -> int:
    """Bytes that `videos` will take once extracted, judged by the first frames of a few of them.

    Frames take so many times the bytes of their film; what differs from video to video averages out.
    """
    chosen = videos[:: max(1, len(videos) // SAMPLED_VIDEOS)][:SAMPLED_VIDEOS]
    film_bytes = frame_bytes = 0.0
    for video in chosen:
        with tempfile.TemporaryDirectory() as folder:
            try:
                facts = read_facts(video, Path(folder))
                frames = islice(encode_frames(film_path(video.film, Path(folder)), facts, settings), SAMPLED_FRAMES)
                sizes = [len(data) for _, data in frames if data is not None]
            except Unusable:
                continue  # reported when its turn comes
        if sizes:
            film_bytes += video.film.size
            frame_bytes += sum(sizes) / len(sizes) * -(-facts.num_frames // settings.every)
    copied = sum(piece.size for video in videos for piece in video.annotations.values())
    per_byte = frame_bytes / film_bytes if film_bytes else 0.0
    return copied + round(per_byte * sum(video.film.size for video in videos))


def extract_all(videos: list[Video], output: Path, settings: Settings, workers: int) -> dict[str, str]:
    """Extract all videos, `workers` at a time; returns name -> reason for those that cannot be used."""
    output.mkdir(parents=True, exist_ok=True)
    jobs = [(video, output, settings) for video in videos]
    workers = min(workers, len(jobs))
    with FileLock(output / ".extract.lock", f"extracting frames into {output}"):
        for rest in output.glob(".*.tmp"):  # of a run that was killed
            shutil.rmtree(rest)
        if workers == 1:
            return gather(videos, map(extract, jobs))
        with ProcessPoolExecutor(workers) as pool:
            try:
                return gather(videos, pool.map(extract, jobs))
            except BrokenProcessPool as error:
                raise OSError(
                    "a worker was killed, maybe for want of memory; what is done stays: run again with fewer --workers"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def gather(videos: list[Video], reasons: Iterable[str | None]) -> dict[str, str]:
    bar = tqdm(zip(videos, reasons, strict=True), total=len(videos), unit="video", disable=None)
    return {video.name: reason for video, reason in bar if reason is not None}


def extract(job: tuple[Video, Path, Settings]) -> str | None:
    """One video: its folder appears whole or not at all. Returns why it cannot be used, or None."""
    video, output, settings = job
    folder = output / f".{video.name}.tmp"
    folder.mkdir()
    try:
        facts = read_facts(video, folder)
        film = film_path(video.film, folder)
        total = 0
        for number, data in encode_frames(film, facts, settings):
            total = number + 1
            if data is not None:
                (folder / f"{number:05d}.jpg").write_bytes(data)
        if total < facts.num_frames:
            raise Unusable(f"only {total} of the {facts.num_frames} frames that its JSON states can be decoded")
        if film.parent == folder:
            film.unlink()
        for path in sorted(folder.iterdir()):
            fsync(path)
        write_json(folder / MARK, {"every": settings.every, "quality": settings.quality, "num_frames": total})
        folder.replace(output / video.name)
        fsync(output)
    except Unusable as fault:
        return str(fault)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def read_facts(video: Video, folder: Path) -> Facts:
    """Copy the annotations to `folder` and read what they state about the video. Raises Unusable if damaged."""
    found = set()
    for name, piece in video.annotations.items():
        piece.copy_to(folder / name)
        try:
            document = json.loads((folder / name).read_bytes())
            fields = (document[f"video_{field}"] for field in ("frame_count", "height", "width"))
            found.add(Facts(*(int(value) for value in fields)))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise Unusable(f"{name} is damaged ({error}); fetch it again") from error
    if len(found) > 1:
        raise Unusable(f"{' and '.join(video.annotations)} state different sizes: {sorted(map(str, found))}")
    return found.pop()


def film_path(film: Piece, folder: Path) -> Path:
    """A file that OpenCV can open: the film itself, or a copy in `folder` of one in an archive."""
    if not film.packed:
        return film.path
    film.copy_to(folder / FILM_COPY)
    return folder / FILM_COPY


def encode_frames(film: Path, facts: Facts, settings: Settings) -> Iterator[tuple[int, bytes | None]]:
    """(number, JPEG bytes) of every frame that can be decoded; None for frames that are not to be kept.

    Every frame of the stream counts as one, whatever its time stamp. Raises Unusable for a film that cannot be opened
    or has frames of another size than stated.
    """
    import cv2

    # Processes share the cores already.
    capture = cv2.VideoCapture(str(film), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        if not capture.isOpened():
            raise Unusable("it is no video that OpenCV can open; fetch it again")
        for number in count():
            if not capture.grab():
                return
            if number % settings.every:
                yield number, None
                continue
            decoded, frame = capture.retrieve()
            if not decoded:
                return
            if frame.shape[:2] != (facts.height, facts.width):
                stated = f"{facts.height} x {facts.width}"
                raise Unusable(
                    f"frame {number} has {frame.shape[0]} x {frame.shape[1]} pixels, its JSON states {stated}"
                )
            yield number, cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])[1].tobytes()
    finally:
        capture.release()


def report(faults: dict[str, str], num_done: int, output: Path, dry_run: bool) -> int:
    """Print what was left out and where things stand; returns the exit code."""
    if faults:
        print(f"left out, {len(faults)} videos:")
        for name, reason in sorted(faults.items())[:LISTED]:
            print(f"  {name}: {reason}")
        if len(faults) > LISTED:
            print(f"  and {len(faults) - LISTED} more")
    print("dry run: nothing was changed" if dry_run else f"{num_done} videos are in {output}")
    return 1 if faults else 0


if __name__ == "__main__":
    run_main(main)
