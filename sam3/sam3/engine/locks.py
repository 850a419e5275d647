"""An advisory lock on a file, so that two runs do not write the same thing."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_held: set[Path] = set()


class FileLock:
    """Holds `path` locked until `release`, or until the process ends in whatever way. A context manager.

    A record lock, because it belongs to the process alone: a forked worker that outlives a killed parent by some
    seconds does not keep it. Raises ValueError, naming `purpose`, if it is taken.
    Where there are no such locks (Windows, some network file systems) only this process is kept from locking twice.
    """

    def __init__(self, path: str | Path, purpose: str) -> None:
        self.path = Path(path).absolute()
        if self.path in _held:
            raise ValueError(f"this process is already {purpose}")
        self._handle: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(self._handle)
            raise ValueError(f"another process is {purpose}; wait for it or stop it") from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): make sure that no other run is %s", path, error, purpose)
        _held.add(self.path)

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
            _held.discard(self.path)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()
