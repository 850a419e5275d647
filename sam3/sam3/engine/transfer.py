"""Files over HTTP: resumed, retried, and told whole from cut off.

A file is `NAME.part` until all of its bytes are there, so a name without `.part` is a whole file.
"""

from __future__ import annotations

import errno
import http.client
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sam3.engine.files import free_bytes, fsync, human_bytes

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0  # without a byte
ATTEMPTS = 5  # in a row without a byte gained
WAIT_S = 2.0  # before the second attempt; doubles with each
LINE_S = 10.0  # between two progress lines
RETRIED = {408, 425, 429, 500, 502, 503, 504}


class Refused(Exception):
    """The server's answer makes further attempts useless."""


class Stopped(Exception):
    """The run is being ended."""


@dataclass
class Progress:
    """Shared by the workers: bytes that arrived in this run, files that are whole, and the wish to stop.

    `advice` explains HTTP statuses to the user; that of 403 also goes with a web page in a file's place.
    """

    num_files: int
    advice: Mapping[int, str] = field(default_factory=dict)
    received: int = 0
    whole: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.started = self.printed = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes; print a line now and then."""
        with self.lock:
            self.received += count
            now = time.monotonic()
            if now - self.printed < LINE_S:
                return
            self.printed = now
            rate = self.received / (now - self.started)
            text = f"{self.whole}/{self.num_files} files, {human_bytes(self.received)} in this run"
        print(f"{text}, {human_bytes(rate)}/s", flush=True)


def part_of(path: Path) -> Path:
    """Where a file that is not whole yet lies."""
    return path.with_name(path.name + ".part")


def fetch(link: str, path: Path, progress: Progress, check: Callable[[Path], None] | None = None) -> None:
    """Get one file, going on where an earlier attempt or run stopped.

    check: called with the whole file before it gets its name; what it raises passes on.
    Raises Refused with the reason; OSError when the disk is full or refuses.
    """
    part = part_of(path)
    attempt = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        reason, pause = "", WAIT_S * 2**attempt
        try:
            if receive(link, part, progress):
                break
            reason = "the server ended its answer early"
        except urllib.error.HTTPError as error:
            if error.code not in RETRIED:
                raise Refused(f"HTTP {error.code}: {progress.advice.get(error.code, error.reason)}") from error
            reason = f"HTTP {error.code} {error.reason}"
            if (asked := error.headers.get("Retry-After", "")).isdigit():
                pause = max(pause, min(float(asked), 300.0))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
                raise
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except http.client.HTTPException as error:
            reason = f"{type(error).__name__} {error}"
        after = part.stat().st_size if part.exists() else 0
        attempt = 0 if after > before else attempt + 1
        if attempt == ATTEMPTS:
            raise Refused(f"{reason}; given up after {ATTEMPTS} attempts, {human_bytes(after)} are kept")
        print(f"{path.name}: {reason}; goes on after {human_bytes(after)} in {pause:.0f} s", flush=True)
        if progress.stop.wait(pause):
            raise Stopped
    if check is not None:
        check(part)
    fsync(part)
    part.replace(path)
    fsync(path.parent)
    with progress.lock:
        progress.whole += 1
    print(f"{path.name}: {human_bytes(path.stat().st_size)}", flush=True)


def receive(link: str, part: Path, progress: Progress) -> bool:
    """One request for what `part` lacks; returns whether it is whole now. Raises Refused, OSError, HTTPException."""
    have = part.stat().st_size if part.exists() else 0
    try:
        answer = open_link(link, have)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        # Nothing lies beyond what is here: it is either whole or not this file.
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
            return True
        part.unlink()
        return False
    with answer:
        start, total = span(answer, progress.advice)
        if start not in (0, have):
            raise Refused(f"asked for bytes from {have}, but the server sent those from {start}")
        check_space(part, total - have)
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            while piece := answer.read1(CHUNK_BYTES):
                file.write(piece)
                progress.add(len(piece))
                if progress.stop.is_set():
                    raise Stopped
    return part.stat().st_size == total


def open_link(link: str, start: int = 0) -> http.client.HTTPResponse:
    """Ask for a file from byte `start` on; the caller closes the answer. Raises OSError (HTTPError is one)."""
    request = urllib.request.Request(link, headers={"User-Agent": "Python", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def span(answer: http.client.HTTPResponse, advice: Mapping[int, str]) -> tuple[int, int]:
    """First byte and size of the whole file, as the server states them. Raises Refused if it is no such file."""
    if answer.headers.get_content_type() == "text/html":
        hint = f"; {advice[403]}" if 403 in advice else ""
        raise Refused(f"the server sent a web page, not a file{hint}")
    length = answer.headers.get("Content-Length", "")
    if answer.status == 206:
        spread, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        first = spread.partition("-")[0]
    else:
        first, total = "0", length
    if not (first.isdigit() and total.isdigit()):
        raise Refused("the server does not state the file's size, so it could not be told whole from cut off")
    if int(total) == 0:
        raise Refused("the file on the server is empty")
    return int(first), int(total)


def check_space(part: Path, needed: int) -> None:
    """Raises OSError (ENOSPC) if the rest of a file does not fit."""
    if (free := free_bytes(part.parent)) < needed:
        text = f"{part.name} needs {human_bytes(needed)} more, but {human_bytes(free)} are free"
        raise OSError(errno.ENOSPC, f"{text}; free some or choose another --output", str(part.parent))
