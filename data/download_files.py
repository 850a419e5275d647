"""Download the files named in a list, from a list of links.

    python data/download_files.py --links links.txt --names data/sa-1b-1p.txt --output data/sa-1b-1p

The link list is what the data set's site gives after its licence was accepted: lines `file_name<TAB>cdn_link`.
A file is `NAME.part` until all of its bytes are there, so a name without `.part` is a whole file. Run the same command
again to go on; if links have expired in between, with a fresh list. Exit code 1 and a list of what is missing unless
every file is there.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import free_bytes, human_bytes
from sam3.engine.locks import FileLock
from sam3.engine.transfer import Progress, Refused, fetch

EXPIRED = "the link has expired or is not yours; links live for days only: get a fresh list and run again with it"
EXPLAINED = {
    401: EXPIRED,
    403: EXPIRED,
    404: "the server does not know this link; get a fresh list",
    410: EXPIRED,
}


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    links, names = read_links(arguments.links), read_names(arguments.names)
    if lacking := [name for name in names if name not in links]:
        raise ValueError(
            f"{arguments.links} has no link for {len(lacking)} of the {len(names)} files of {arguments.names}: "
            f"{' '.join(lacking)}; get the whole list from the data set's site"
        )
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    todo = [name for name in names if not is_whole(output / name)]
    print(f"{len(names)} files in {arguments.names}: {len(names) - len(todo)} already in {output}, {len(todo)} to get")
    print(f"{human_bytes(free_bytes(output))} are free in {output}")
    if arguments.dry_run:
        for name in todo:
            print(f"would get {name}")
        return 0
    failures: dict[str, str] = {}
    if todo:
        with FileLock(output / ".download.lock", f"downloading into {output}"):
            failures = fetch_all({name: links[name] for name in todo}, output, arguments.jobs)
    if failures:
        print(f"{len(failures)} of {len(names)} files are missing:")
        for name, reason in sorted(failures.items()):
            print(f"  {name}: {reason}")
        return 1
    print(f"all {len(names)} files are in {output}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--links", type=Path, required=True, help="your list of links: file_name<TAB>cdn_link")
    parser.add_argument("--names", type=Path, required=True, help="list of the file names to get, one a line")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--jobs", type=int, default=4, help="downloads at a time")
    parser.add_argument("--dry-run", action="store_true", help="check the lists and say what would be fetched")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    return arguments


def read_names(path: Path) -> list[str]:
    """File names of a list, in order, without `#` comments. Raises ValueError if there are none, or no plain names."""
    lines = [line.split("#")[0].strip() for line in read_lines(path)]
    names = [line for line in lines if line]
    for name in names:
        check_name(name, path)
    if not names:
        raise ValueError(f"{path} names no files; wanted one file name a line")
    return list(dict.fromkeys(names))


def read_links(path: Path) -> dict[str, str]:
    """File name -> link. Raises ValueError naming the first line that is not `file_name<TAB>link`."""
    links: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split()
        if not fields or line.lstrip().startswith("#") or (not links and "://" not in line):
            continue  # blank, a comment, or the heading
        if len(fields) != 2 or not fields[1].startswith(("https://", "http://")):
            raise ValueError(f"{path}, line {number}: wanted file_name<TAB>https://..., found '{line.strip()[:100]}'")
        check_name(fields[0], path)
        links[fields[0]] = fields[1]
    if not links:
        raise ValueError(f"{path} holds no links; wanted lines file_name<TAB>https://...")
    return links


def read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; it is the list of links that the data set's site gives after you accept its licence "
            "(https://ai.meta.com/datasets/segment-anything-downloads/ for SA-1B, "
            "https://ai.meta.com/datasets/segment-anything-video-downloads/ for SA-V)"
        )
    return path.read_text(encoding="utf-8-sig").splitlines()


def check_name(name: str, source: Path) -> None:
    if Path(name).name != name or name.startswith(".") or "\\" in name:
        raise ValueError(f"'{name}' in {source} is not a plain file name")


def is_whole(path: Path) -> bool:
    """A finished download: names without `.part` are given to whole files only, and never to empty ones."""
    return path.is_file() and path.stat().st_size > 0


def fetch_all(links: dict[str, str], output: Path, jobs: int) -> dict[str, str]:
    """Get all files, `jobs` at a time; returns name -> reason for those that could not be had.

    Raises OSError when the disk is full or refuses, because then the others would fail too.
    """
    progress, failures = Progress(len(links), EXPLAINED), {}
    with ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(fetch, link, output / name, progress): name for name, link in links.items()}
        try:
            for run in as_completed(runs):
                try:
                    run.result()
                except Refused as refusal:
                    failures[runs[run]] = str(refusal)
                    print(f"{runs[run]}: {refusal}", flush=True)
        except BaseException:
            progress.stop.set()
            pool.shutdown(cancel_futures=True)
            print("what has arrived is kept; run the same command again to go on", flush=True)
            raise
    return failures


if __name__ == "__main__":
    run_main(main)
