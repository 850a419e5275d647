"""A server on 127.0.0.1 that answers like a CDN with faults."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """`files` by name. A name in `faults` is answered wrongly: an HTTP status, "cut" (half of what was asked, once per
    count), "no size", "no range", "page". `ranges` records what was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, int | str] = field(default_factory=dict)
    cuts: Counter[str] = field(default_factory=Counter)
    ranges: list[tuple[str, str | None]] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name, span = request.path.strip("/").partition("?")[0], request.headers.get("Range")
        self.ranges.append((name, span))
        fault, body = self.faults.get(name), self.files.get(name)
        if isinstance(fault, int) or body is None:
            request.send_error(fault if isinstance(fault, int) else 404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and fault != "no range" else 0
        if start and start >= len(body):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(body)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        request.send_header("Content-Type", "text/html" if fault == "page" else "application/x-tar")
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if fault != "no size":
            request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        rest = body[start:]
        if self.cuts[name] > 0:
            self.cuts[name] -= 1
            rest = rest[: len(rest) // 2]
        request.wfile.write(rest)


@contextlib.contextmanager
def serve() -> Iterator[FileServer]:
    """A running FileServer."""
    state = FileServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
