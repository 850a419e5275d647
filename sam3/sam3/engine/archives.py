"""Downloaded files, loose or in tar archives that are read in place and not trusted."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from sam3.engine.files import human_bytes


@dataclass(frozen=True)
class Piece:
    """One file of `size` bytes: the one at `path`, or what begins at byte `offset` of the archive at `path`."""

    path: Path
    size: int
    offset: int | None = None

    @property
    def packed(self) -> bool:
        return self.offset is not None

    def copy_to(self, target: Path) -> None:
        """Write the file's bytes to `target`. Raises OSError if they have become fewer since they were counted."""
        with self.path.open("rb") as source, target.open("wb") as file:
            source.seek(self.offset or 0)
            left = self.size
            while left and (data := source.read(min(left, 1 << 20))):
                file.write(data)
                left -= len(data)
        if left:
            raise OSError(f"{self.path} changed while {target.name} was read from it; run the same command again")


def find_pieces(
    source: Path, suffixes: Collection[str], output: Path, downloader: str, skip: Collection[str] = ()
) -> dict[str, Piece]:
    """File name -> piece for every file with one of `suffixes` below `source`, loose ones before those in `*.tar`.

    The folder `output` and folders with names in `skip` are left out. Raises ValueError if a name occurs twice in one
    kind of place, or naming every archive that cannot be used and `downloader`, which gets them again.
    """
    loose: dict[str, Piece] = {}
    archives: list[Path] = []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(
            name for name in folders if name not in skip and (Path(folder) / name).resolve() != output.resolve()
        )
        for path in (Path(folder) / name for name in sorted(names) if not name.startswith(".")):
            if path.suffix == ".tar":
                archives.append(path)
            elif path.suffix in suffixes:
                _add(loose, path.name, Piece(path, path.stat().st_size))
    packed: dict[str, Piece] = {}
    broken = []
    for path in tqdm(archives, desc="archives", unit="tar", disable=None):
        try:
            for member in list_archive(path, suffixes):
                _add(packed, PurePosixPath(member.name).name, Piece(path, member.size, member.offset_data))
        except (tarfile.TarError, EOFError) as error:
            broken.append(f"{path} ({error})")
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(archives)} archives are empty, cut off or damaged, nothing was changed: "
            f"{'; '.join(broken)}; delete them and run {downloader} again"
        )
    return {**packed, **loose}


def _add(pieces: dict[str, Piece], name: str, piece: Piece) -> None:
    if (other := pieces.get(name)) is not None:
        raise ValueError(f"{name} is in {other.path} and in {piece.path}; keep one of them")
    pieces[name] = piece


def list_archive(path: Path, suffixes: Collection[str]) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed archive with one of `suffixes`, hidden ones left out.

    Raises tarfile.TarError if the archive is not whole or not to be trusted: names that lead out of it, links.
    """
    if path.stat().st_size == 0:
        raise tarfile.ReadError("0 bytes")
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise tarfile.ReadError(f"its member '{member.name}' points outside of the archive")
            if name.suffix in suffixes and not name.name.startswith("."):
                if not member.isreg() or member.issparse():
                    raise tarfile.ReadError(f"its member '{member.name}' is a link or device, not a plain file")
                yield member
        # Every whole archive ends in blocks of zeros; one cut between two members shows no other sign.
        with path.open("rb") as file:
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no end mark after {human_bytes(tar.offset)}")
