"""What a run's config does not say about it: versions, devices, source, command line."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from sam3.engine import files


def write_env(path: str | Path, argv: Sequence[str]) -> None:
    """Write what the config does not say about a run: versions, device, git commit, command line."""
    files.write_json(
        path,
        {
            "argv": list(argv),
            "cwd": str(Path.cwd()),
            "git_commit": _git_commit(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {name: _version(name) for name in ("torch", "torchvision", "timm", "numpy")},
            "cuda": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "cpu_count": os.cpu_count(),
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the source tree, with `-dirty` if files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
