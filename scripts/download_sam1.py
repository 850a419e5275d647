"""Download the published weights of SAM and MobileSAM into weights/, resumably, and verify them.

    python scripts/download_sam1.py --dry-run      # sizes, free space
    python scripts/download_sam1.py                # sam_vit_h_4b8939.pth and mobile_sam.pt
    python scripts/download_sam1.py --types vit_b

Each file is checked against the digest that its publisher announces (SAM: the beginning of its MD5, which is in the
name; MobileSAM: the git SHA-1 that GitHub states) and then against the layout of its model. An interrupted download
goes on when the command is run again. Exit code 1 unless every file is there, whole.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import urllib.error
from dataclasses import dataclass
from pathlib import Path

from sam3.engine.cli import make_parser, run_main
from sam3.engine.files import free_bytes, human_bytes, require_free_space
from sam3.engine.hub import digest_of
from sam3.engine.locks import FileLock
from sam3.engine.transfer import Progress, Refused, fetch, open_link, part_of, span
from sam3.sam1_files import load_sam1

SAM_SITE = "https://dl.fbaipublicfiles.com/segment_anything"
MOBILE_SAM_SITE = "https://api.github.com/repos/ChaoningZhang/MobileSAM/contents/weights"
FILES = {
    "vit_h": "sam_vit_h_4b8939.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_t": "mobile_sam.pt",
}
ADVICE = {
    403: "the server refuses; behind a proxy or after many requests (GitHub counts them) try again in an hour",
    404: "the file is no longer there; look at the publisher's page",
    429: "too many requests; try again in an hour",
}


@dataclass(frozen=True)
class Published:
    """A file as its publisher announces it. `digest`: the first 6 hex digits of its MD5, or git's SHA-1 (40 digits)."""

    type: str
    name: str
    link: str
    size: int
    digest: str


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    folder: Path = arguments.output
    files = [describe(type) for type in dict.fromkeys(arguments.types)]
    todo = [file for file in files if not is_current(folder / file.name, file, arguments.force)]
    needed = sum(file.size - bytes_kept(folder / file.name, file.size) for file in todo)
    for file in todo:
        print(f"{file.name}: {human_bytes(file.size)} from {file.link}")
    print(f"to fetch into {folder}: {human_bytes(needed)}; free there: {human_bytes(free_bytes(folder))}")
    if arguments.dry_run:
        print("dry run: nothing was fetched")
        return 0
    if todo:
        require_free_space(folder, needed, f"fetching {' and '.join(file.name for file in todo)}")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock", f"downloading into {folder}"):
            fetch_all(todo, folder)
    for file in files:
        model = load_sam1(folder / file.name, file.type)  # mapped: this reads names and shapes, not the weights
        print(f"{folder / file.name} is whole and holds the {len(model.state_dict())} entries of {file.type}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    types = ", ".join(f"{type} = {name}" for type, name in FILES.items())
    parser.add_argument("--types", nargs="+", choices=FILES, default=["vit_h", "vit_t"], help=f"what to get: {types}")
    parser.add_argument("--output", type=Path, default=Path("weights"), help="folder for the files")
    parser.add_argument("--force", action="store_true", help="replace files of the same name that differ")
    parser.add_argument("--dry-run", action="store_true", help="ask for sizes and look at the disk, fetch nothing")
    return parser.parse_args(argv)


def describe(type: str) -> Published:
    """Link, size and digest of a file, from one request. Raises ConnectionError, ValueError for a strange answer."""
    name = FILES[type]
    # Of a file above 1 MB GitHub's listing of its folder tells more than its own page.
    link = MOBILE_SAM_SITE if type == "vit_t" else f"{SAM_SITE}/{name}"
    try:
        with open_link(link) as answer:
            if type != "vit_t":
                return Published(type, name, link, span(answer, ADVICE)[1], Path(name).stem.rpartition("_")[2])
            stated = answer.read()
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"HTTP {error.code} for {link}: {ADVICE.get(error.code, error.reason)}") from error
    except Refused as refusal:
        raise ConnectionError(f"{link}: {refusal}") from refusal
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(
            f"no connection for {link} ({reason}); run the same command again when there is one, or fetch {name} on "
            "another machine and copy it here"
        ) from error
    return read_description(type, name, link, stated)


def read_description(type: str, name: str, link: str, stated: bytes) -> Published:
    """What GitHub's listing of a folder says about a file. Raises ValueError if it is not that."""
    try:
        content = {entry["name"]: entry for entry in json.loads(stated)}[name]
        file = Published(type, name, content["download_url"], content["size"], content["sha"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{link} describes no file ({error!r}); try again later") from error
    well_formed = isinstance(file.link, str) and isinstance(file.size, int) and isinstance(file.digest, str)
    if not well_formed or len(file.digest) != 40:
        raise ValueError(f"{link} gives no link, size and SHA-1 but {file}; try again later")
    return file


def is_current(path: Path, file: Published, force: bool) -> bool:
    """Whether `path` is that file already. Raises ValueError for another file of its name, unless `force`."""
    if not path.exists():
        return False
    if fault(path, file) is None:
        print(f"{path} is there already and matches {file.digest}")
        return True
    if not force:
        raise ValueError(
            f"{path} is not the published file ({fault(path, file)}); move it away, choose another --output, or "
            "replace it with --force"
        )
    return False


def fetch_all(files: list[Published], folder: Path) -> None:
    """Get and verify each file. Raises ConnectionError (what has arrived is kept), ValueError, OSError."""
    progress = Progress(len(files), ADVICE)
    for file in files:
        try:
            fetch(file.link, folder / file.name, progress, lambda part, file=file: verify(part, file))
        except Refused as refusal:
            raise ConnectionError(f"{file.name}: {refusal}; run the same command again to go on") from refusal


def verify(part: Path, file: Published) -> None:
    """Compare what arrived with what was announced; a damaged file is deleted. Raises ValueError."""
    if found := fault(part, file):
        part.unlink()
        raise ValueError(f"{file.name} came damaged ({found}) and was deleted; run the same command again")


def fault(path: Path, file: Published) -> str | None:
    """How a file differs from the published one; None if it does not."""
    size = path.stat().st_size
    if size != file.size:
        return f"{size} bytes, not {file.size}"
    if len(file.digest) == 40:
        found = digest_of(path, file.digest)
    else:
        found = md5(path)[: len(file.digest)]
    return None if found == file.digest else f"digest {found}, not {file.digest}"


def md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


def bytes_kept(path: Path, size: int) -> int:
    """What an earlier run has left of a file of `size` bytes."""
    part = part_of(path)
    return min(part.stat().st_size, size) if part.exists() else 0


if __name__ == "__main__":
    run_main(main)
