"""What every entry point shares: argument help that shows defaults, and exits that say what went wrong in one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from sam3.engine.signals import StoppedBySignal

Main = Callable[[Sequence[str] | None], int | None]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and shows each default, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default == []:
            return action.help or ""
        return super()._get_help_string(action) or ""


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose `--help` shows defaults and which refuses abbreviated flags."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def run_main(main: Main, argv: Sequence[str] | None = None) -> NoReturn:
    """Run an entry point as a program: `if __name__ == "__main__": run_main(main)`.

    Exit codes: what `main` returns (None counts as 0); 1 with one line `error: ...` on stderr for a ValueError or
    OSError, which are what a user can cause; 130 after Ctrl-C; 128 + signal after a save on a signal; argparse's own 2
    for wrong arguments. Other exceptions are faults of the program and keep their traceback.
    With the environment variable SAM3_TRACEBACK=1 every error keeps it.
    """
    try:
        code = main(argv)
    except StoppedBySignal as stop:
        _print_error(stop.message)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        _print_error("stopped by Ctrl-C")
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("SAM3_TRACEBACK") == "1":
            raise
        logging.getLogger("sam3").debug("traceback of the error below", exc_info=True)
        _print_error(f"error: {error}")
        sys.exit(1)
    sys.exit(code or 0)


def _print_error(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr, flush=True)
