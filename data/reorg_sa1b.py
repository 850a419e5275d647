"""Sort downloaded SA-1B archives or loose files into images/{train,val} and annotations/{train,val}.

    python data/reorg_sa1b.py                        # data/sa-1b-10p or data/sa-1b-1p -> data/sa-1b
    python data/reorg_sa1b.py --source /disk/tars --output /disk/sa-1b --dry-run

Takes pairs `x.jpg` + `x.json`, loose at any depth or inside `*.tar`. Archives are read in place and stay as they are:
each member goes straight to its final name, so nothing is stored twice and no path inside an archive is ever used.
Keys are sorted, then shuffled with the seed; the first `int(n * ratio)` are the val split. A run that was stopped is
taken up by the next one, and what is already in place stays in its split.
"""

from __future__ import annotations

import argparse
import os
import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from sam3.engine.archives import Piece, find_pieces
from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import free_bytes, human_bytes, require_free_space
from sam3.engine.locks import FileLock

DEFAULT_SOURCES = (Path("data/sa-1b-10p"), Path("data/sa-1b-1p"), Path("data/sa-1b"))
KINDS = {".jpg": "images", ".json": "annotations"}
SPLITS = ("train", "val")
LISTED = 20  # names printed of a long list


@dataclass
class Plan:
    """`jobs`: archive, or None for loose files -> [(piece, destination)]. The others are names for the report."""

    jobs: dict[Path | None, list[tuple[Piece, Path]]]
    pairs: dict[str, int]  # pairs of each split, once all is done
    num_new: int
    unpaired: list[str]
    empty: list[str]

    def new_bytes(self, free_moves: bool) -> int:
        """Bytes that the output's disk must take; with `free_moves` loose files need none."""
        return sum(p.size for path, jobs in self.jobs.items() for p, _ in jobs if path is not None or not free_moves)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    source, output = find_source(arguments.source), arguments.output
    print(f"source: {source}, output: {output}")
    # Folders of the kinds' names are data sets that have been sorted already.
    pieces = find_pieces(source, KINDS, output, "data/download_sa1b.sh", skip=KINDS.values())
    plan = make_plan(pieces, find_placed(output), output, arguments.val_ratio, arguments.seed)
    needed = plan.new_bytes(free_moves=arguments.move and same_disk(source, output))
    train, val = (plan.pairs[split] for split in SPLITS)
    print(f"{train + val} pairs: {train} train, {val} val; {plan.num_new} of them new")
    print(f"to write: {human_bytes(needed)}; free in {output}: {human_bytes(free_bytes(output))}")
    if not arguments.dry_run and plan.jobs:
        require_free_space(output, needed, "sorting the files")
        carry_out(plan, output, arguments.move, arguments.workers)
    return report(plan, output, arguments.dry_run)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    sources = ", ".join(map(str, DEFAULT_SOURCES))
    parser.add_argument("--source", type=Path, help=f"folder of archives or loose files (default: first of {sources})")
    parser.add_argument("--output", type=Path, default=Path("data/sa-1b"), help="root of the sorted data set")
    parser.add_argument("--val-ratio", type=float, default=0.1, help="share of pairs in the val split, 0 to 1")
    parser.add_argument("--seed", type=int, default=42, help="of the shuffle that decides the split")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--move", dest="move", action="store_true", default=True, help="move loose files (this is the default)"
    )
    mode.add_argument("--copy", dest="move", action="store_false", default=True, help="copy loose files")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="archives read at a time")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, change nothing")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.val_ratio < 1:
        parser.error(f"--val-ratio must be at least 0 and below 1, got {arguments.val_ratio}")
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    return arguments


def find_source(given: Path | None) -> Path:
    """`given`, or the first of DEFAULT_SOURCES that is there and not empty. Raises FileNotFoundError."""
    if given is not None:
        if not given.is_dir():
            raise FileNotFoundError(f"--source {given} is not a folder")
        return given
    present = [folder for folder in DEFAULT_SOURCES if folder.is_dir() and any(folder.iterdir())]
    if present:
        return present[0]
    raise FileNotFoundError(
        f"none of {', '.join(map(str, DEFAULT_SOURCES))} is there with anything in it; download archives with "
        "LINKS=links.txt bash data/download_sa1b.sh, or name their folder with --source"
    )


def same_disk(one: Path, other: Path) -> bool:
    """Whether a file can be renamed from below `one` to below `other`, which need not exist yet."""
    other = other.absolute()
    while not other.exists():
        other = other.parent
    return one.stat().st_dev == other.stat().st_dev


# ---------------------------------------------------------------------------------------------------------------- find


def find_placed(output: Path) -> dict[str, tuple[Path, int]]:
    """File name -> (path, bytes) of what is in place. Raises ValueError if a key is in both splits."""
    placed: dict[str, tuple[Path, int]] = {}
    for suffix, kind in KINDS.items():
        for split in SPLITS:
            folder = output / kind / split
            for entry in os.scandir(folder) if folder.is_dir() else ():
                name = PurePosixPath(entry.name)
                if name.suffix != suffix or entry.name.startswith("."):
                    continue
                twin = placed.get(name.stem + (".jpg" if suffix == ".json" else ".json"))
                other = placed.get(entry.name, twin)
                if other is not None and other[0].parent.name != split:
                    raise ValueError(f"{name.stem} is in both splits: {other[0]} and {entry.path}; delete one of them")
                placed[entry.name] = (Path(entry.path), entry.stat().st_size)
    return placed


# ---------------------------------------------------------------------------------------------------------------- plan


def make_plan(
    pieces: dict[str, Piece], placed: dict[str, tuple[Path, int]], output: Path, val_ratio: float, seed: int
) -> Plan:
    """Decide where each file goes. Raises ValueError if there is no pair at all."""
    # A file in place counts if it is what the source holds: one cut short by a power loss is brought again.
    good = {n for n, (_, size) in placed.items() if size > 0 and (n not in pieces or pieces[n].size == size)}
    empty = sorted(name for name, piece in pieces.items() if piece.size == 0 and name not in good)
    usable = good | (pieces.keys() - set(empty))
    halves = defaultdict(set)
    for name in usable:
        halves[PurePosixPath(name).stem].add(PurePosixPath(name).suffix)
    keys = sorted(key for key, suffixes in halves.items() if len(suffixes) == len(KINDS))
    if not keys:
        raise ValueError(
            "found no pair x.jpg + x.json, loose or in *.tar; download archives with "
            "LINKS=links.txt bash data/download_sa1b.sh, or name another --source"
        )
    unpaired = sorted(f"{key}{suffixes.copy().pop()}" for key, suffixes in halves.items() if len(suffixes) < len(KINDS))
    random.Random(seed).shuffle(keys)
    num_val = int(len(keys) * val_ratio)
    jobs: dict[Path | None, list[tuple[Piece, Path]]] = defaultdict(list)
    plan = Plan(jobs, dict.fromkeys(SPLITS, 0), 0, unpaired, empty)
    for i, key in enumerate(keys):
        names = [key + suffix for suffix in KINDS]
        there = [placed[name][0].parent.name for name in names if name in placed]
        split = there[0] if there else ("val" if i < num_val else "train")
        plan.pairs[split] += 1
        missing = [name for name in names if name not in good]
        plan.num_new += bool(missing)
        for name in missing:
            piece = pieces[name]
            destination = output / KINDS[PurePosixPath(name).suffix] / split / name
            jobs[piece.path if piece.packed else None].append((piece, destination))
    return plan


# ----------------------------------------------------------------------------------------------------------- carry out


def carry_out(plan: Plan, output: Path, move: bool, workers: int) -> None:
    """Bring every file to its place, one archive per worker; loose files are shared out evenly."""
    for kind in KINDS.values():
        for split in SPLITS:
            (output / kind / split).mkdir(parents=True, exist_ok=True)
    loose = plan.jobs.get(None, [])
    batches = [loose[i::workers] for i in range(workers) if loose[i::workers]]
    batches += [jobs for path, jobs in plan.jobs.items() if path is not None]
    total = sum(map(len, plan.jobs.values()))
    stop: list[bool] = []
    with (
        FileLock(output / ".reorg.lock", f"sorting files into {output}"),
        tqdm(total=total, unit="file", disable=None) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        runs = [pool.submit(bring_batch, jobs, move, stop, bar) for jobs in batches]
        try:
            for run in as_completed(runs):
                run.result()
        except BaseException:
            stop.append(True)
            pool.shutdown(cancel_futures=True)
            raise
    if hasattr(os, "sync"):
        os.sync()  # once, because a sync per file would take hours over a million of them


def bring_batch(jobs: list[tuple[Piece, Path]], move: bool, stop: list[bool], bar: tqdm) -> None:
    """Bring loose files, or members of one archive in their order on disk, until `stop` has an entry."""
    for piece, destination in sorted(jobs, key=lambda job: job[0].offset or 0):
        if stop:
            return
        bring(piece, destination, move)
        bar.update()


def bring(piece: Piece, destination: Path, move: bool) -> None:
    """One file to `destination`, which appears whole or not at all."""
    move = move and not piece.packed
    if move and piece.path.stat().st_dev == destination.parent.stat().st_dev:
        piece.path.replace(destination)
        return
    temporary = destination.with_name(f".{destination.name}.tmp")
    try:
        piece.copy_to(temporary)
        temporary.replace(destination)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if move:
        piece.path.unlink()


def report(plan: Plan, output: Path, dry_run: bool) -> int:
    """Print what was left out and where things stand; returns the exit code."""
    for names, what in ((plan.empty, "empty files"), (plan.unpaired, "files without a partner")):
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            print(f"left out, {len(names)} {what}: {' '.join(names[:LISTED])}{more}")
    if dry_run:
        print("dry run: nothing was changed")
    else:
        print(f"{output} is complete" if not plan.num_new else f"{plan.num_new} pairs brought to {output}")
    return 1 if plan.unpaired or plan.empty else 0


if __name__ == "__main__":
    run_main(main)
