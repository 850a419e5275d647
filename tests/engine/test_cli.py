from __future__ import annotations

import signal

import pytest

from sam3.engine.cli import make_parser, run_main
from sam3.engine.signals import StoppedBySignal


def outcome(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        run_main(main, [])
    return caught.value.code, capsys.readouterr().err


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "text"),
    [
        (lambda argv: None, 0, ""),
        (lambda argv: 3, 3, ""),
        (raising(ValueError("wanted 72,\n  found 64")), 1, "error: wanted 72, found 64\n"),
        (raising(FileNotFoundError("no a.jpg")), 1, "error: no a.jpg\n"),
        (raising(KeyboardInterrupt()), 130, "stopped by Ctrl-C\n"),
        (raising(StoppedBySignal(signal.SIGTERM, "saved x")), 143, "saved x\n"),
    ],
)
def test_exit_codes_and_the_one_line(main, code, text, capsys):
    assert outcome(main, capsys) == (code, text)


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda argv: 1 // 0, [])


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("SAM3_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x"):
        run_main(raising(ValueError("x")), [])


def test_wrong_arguments_are_2(capsys):
    assert outcome(lambda argv: make_parser("d").parse_args(["--nope"]), capsys)[0] == 2


def test_help_shows_defaults_but_not_none():
    parser = make_parser("line one\nline two")
    parser.add_argument("--a", default=3, help="first")
    parser.add_argument("--b", help="second")
    text = parser.format_help()
    assert "line one\nline two" in text
    assert "first (default: 3)" in text
    assert "None" not in text
