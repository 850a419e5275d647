"""What a run reports: log lines, metrics as JSON lines and TensorBoard events, progress of long passes."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from tqdm import tqdm

from sam3.engine import files

Item = TypeVar("Item")
LINE = "[%(asctime)s] %(message)s"
# Name of a number in the training loop -> the names it is recorded under, each with the factor that its unit asks for.
Tags = Mapping[str, Sequence[tuple[str, float]]]


def setup(output: str | Path | None = None, rank: int = 0, main_file: str = "log_rank0.txt") -> logging.Logger:
    """Make the loggers below `sam3` speak: on the console in process 0, and in a file in `output` in each.

    The files are `main_file` of process 0 and `log_rank<r>.txt` of the others; they are appended to, and hold debug
    lines too. Calling it again replaces what an earlier call set up.
    """
    logger = logging.getLogger("sam3")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    handlers: list[logging.Handler] = [console]
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        name = main_file if rank == 0 else f"log_rank{rank}.txt"
        handlers.append(logging.FileHandler(Path(output) / name, mode="a", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LINE, datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


class MetricLog:
    """Numbers and pictures of a run, written by process 0; in other processes (or without output) it does nothing.

    Numbers go to `<output>/metrics.jsonl`, one object a line with `step` and `time`, appended over restarts, and with
    the pictures to TensorBoard events in `<output>/<YYYY-MM-DD>/<HH-MM-SS>/` (or in `tensorboard_folder`, absolute or
    below the output) and to wandb, as asked for. tags: numbers that are recorded under other names.
    resume_step: lines of this step and later are removed first, because the resumed run writes them again.
    Units stand in the names: `train/step_ms`, `train/max_mem_gib`. Raises ValueError if an asked-for package is absent.
    """

    def __init__(
        self,
        output: str | Path | None,
        *,
        enabled: bool = True,
        tensorboard: bool = True,
        tensorboard_folder: str = "",
        wandb_project: str | None = None,
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        tags: Tags | None = None,
        resume_step: int | None = None,
    ) -> None:
        self._tags = tags or {}
        self._lines = self._board = self._wandb = None
        if output is None or not enabled:
            return
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            folder = tensorboard_folder or time.strftime("%Y-%m-%d/%H-%M-%S")
            self._board = _open_tensorboard(output / folder, resume_step)
        if wandb_project:
            self._wandb = _open_wandb(output, wandb_project, run_name, config)
        path = output / "metrics.jsonl"
        if resume_step is not None:
            _drop_lines_from(path, resume_step)
        self._lines = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record named numbers; NaN and infinities become null in the JSON."""
        if self._lines is None:
            return
        values = {
            other: value * factor
            for name, value in values.items()
            for other, factor in self._tags.get(name, ((name, 1),))
        }
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **clean}) + "\n")
        self._lines.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: Tensor) -> None:
        """Record a picture: uint8 `(3, H, W)`."""
        if self._board:
            self._board.add_image(name, picture, step)
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(picture.permute(1, 2, 0).cpu().numpy())}, step=step)

    def close(self) -> None:
        """Write out what is buffered. The log can be used no more."""
        if self._lines:
            self._lines.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()
        self._lines = self._board = self._wandb = None

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _open_tensorboard(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            'TENSORBOARD is True, but tensorboard is not installed; pip install -e ".[stage1]", or TENSORBOARD False'
        ) from error
    return SummaryWriter(str(folder), purge_step=resume_step)


def _open_wandb(output: Path, project: str, run_name: str | None, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "wandb was asked for, but is not installed; pip install wandb, or leave out --use-wandb"
        ) from error
    return wandb.init(project=project, name=run_name, dir=str(output), config=dict(config or {}), resume="allow")


def _drop_lines_from(path: Path, step: int) -> None:
    """Keep the lines before `step`; a last line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    files.write_text(path, "".join(kept))


# Progress -----------------------------------------------------------------------------------------------------------


def progress(
    items: Iterable[Item],
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    count: Callable[[Item], int] | None = None,
    interval_s: float = 10.0,
    main: bool = True,
) -> Iterator[Item]:
    """Pass the items through and report done/total, rate and remaining time.

    A bar if stderr is a terminal and this is the `main` process, else a log line every `interval_s` seconds and one
    at the end. unit: what is counted, in the plural ("images"). count: how many of them an item stands for (one).
    total: in these units; by default the number of items, if that is known.
    """
    if total is None and count is None and hasattr(items, "__len__"):
        total = len(items)
    count = count or (lambda item: 1)
    if main and sys.stderr.isatty():
        with tqdm(desc=desc, unit=f" {unit}", total=total, dynamic_ncols=True) as bar:
            for item in items:
                yield item
                bar.update(count(item))
        return
    logger = logging.getLogger("sam3.progress")
    done, start = 0, time.monotonic()
    last = start
    for item in items:
        yield item
        done += count(item)
        now = time.monotonic()
        if now - last >= interval_s:
            last = now
            logger.info(f"{desc}: {_progress_text(done, total, unit, now - start)}")
    logger.info(f"{desc}: {_progress_text(done, total, unit, time.monotonic() - start)}, finished")


def _progress_text(done: int, total: int | None, unit: str, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    text = f"{done}/{total} {unit} ({100 * done / max(total, 1):.1f}%)" if total is not None else f"{done} {unit}"
    text += f", {rate:.3g} {unit}/s"
    if total is not None and done:
        text += f", ETA {duration((total - done) / rate)}"
    return text


def duration(seconds: float) -> str:
    """`3725` -> `1:02:05`, `200000` -> `2 d 7:33:20`."""
    days, rest = divmod(max(round(seconds), 0), 86400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text
