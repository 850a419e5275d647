from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.download_files import main, read_links, read_names
from sam3.engine import transfer
from tests.data.file_server import FileServer, serve

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(transfer, "WAIT_S", 0.01)
    with serve() as state:
        yield state


def content(seed: int, size: int = 50_000) -> bytes:
    return random.Random(seed).randbytes(size)


def arguments(server: FileServer, folder: Path, names: list[str], *extra: str) -> list[str]:
    """Writes both lists; the link list has a heading and one link too many."""
    links = ["file_name\tcdn_link", *(f"{name}\t{server.url}/{name}?key=1" for name in [*names, "other.tar"])]
    (folder / "links.txt").write_text("\n".join(links) + "\n")
    (folder / "names.txt").write_text("# names\n" + "\n".join(names) + "\n")
    lists = ["--links", str(folder / "links.txt"), "--names", str(folder / "names.txt")]
    return [*lists, "--output", str(folder / "out"), *extra]


def test_gets_every_file_and_skips_them_the_second_time(server: FileServer, tmp_path: Path) -> None:
    server.files = {f"{i}.tar": content(i) for i in range(5)}
    argv = arguments(server, tmp_path, sorted(server.files), "--jobs", "2")
    assert main(argv) == 0
    for name, body in server.files.items():
        assert (tmp_path / "out" / name).read_bytes() == body
    assert not list((tmp_path / "out").glob("*.part"))
    asked = len(server.ranges)
    assert main(argv) == 0
    assert len(server.ranges) == asked == 5


def test_goes_on_from_a_part_file(server: FileServer, tmp_path: Path) -> None:
    body = content(1)
    server.files = {"a.tar": body}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.tar.part").write_bytes(body[:20_000])
    assert main(arguments(server, tmp_path, ["a.tar"])) == 0
    assert (tmp_path / "out/a.tar").read_bytes() == body
    assert server.ranges == [("a.tar", "bytes=20000-")]


def test_a_part_that_was_already_whole_is_recognised(server: FileServer, tmp_path: Path) -> None:
    server.files = {"a.tar": content(1)}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.tar.part").write_bytes(server.files["a.tar"])
    assert main(arguments(server, tmp_path, ["a.tar"])) == 0
    assert (tmp_path / "out/a.tar").read_bytes() == server.files["a.tar"]


def test_a_part_longer_than_the_file_starts_again(server: FileServer, tmp_path: Path) -> None:
    server.files = {"a.tar": content(1)}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.tar.part").write_bytes(content(2, 60_000))
    assert main(arguments(server, tmp_path, ["a.tar"])) == 0
    assert (tmp_path / "out/a.tar").read_bytes() == server.files["a.tar"]


def test_a_server_without_ranges_starts_again(server: FileServer, tmp_path: Path) -> None:
    server.files, server.faults = {"a.tar": content(1)}, {"a.tar": "no range"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.tar.part").write_bytes(b"x" * 100)
    assert main(arguments(server, tmp_path, ["a.tar"])) == 0
    assert (tmp_path / "out/a.tar").read_bytes() == server.files["a.tar"]


def test_an_answer_that_ends_early_is_resumed(server: FileServer, tmp_path: Path) -> None:
    server.files = {"a.tar": content(1)}
    server.cuts["a.tar"] = 2
    assert main(arguments(server, tmp_path, ["a.tar"])) == 0
    assert (tmp_path / "out/a.tar").read_bytes() == server.files["a.tar"]
    assert server.ranges == [("a.tar", None), ("a.tar", "bytes=25000-"), ("a.tar", "bytes=37500-")]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (403, "HTTP 403: the link has expired"),
        (404, "HTTP 404"),
        (503, "HTTP 503"),
        ("no size", "does not state the file's size"),
        ("page", "sent a web page"),
    ],
)
def test_a_faulty_file_is_listed_and_the_others_arrive(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: int | str, reason: str
) -> None:
    server.files, server.faults = {"good.tar": content(1), "bad.tar": content(2)}, {"bad.tar": fault}
    assert main(arguments(server, tmp_path, ["bad.tar", "good.tar"])) == 1
    assert (tmp_path / "out/good.tar").read_bytes() == server.files["good.tar"]
    assert not (tmp_path / "out/bad.tar").exists()
    summary = capsys.readouterr().out.split("files are missing:")[1]
    assert "bad.tar" in summary and reason in summary and "good.tar" not in summary
    tries = sum(name == "bad.tar" for name, _ in server.ranges)
    assert tries == (transfer.ATTEMPTS if fault == 503 else 1)


def test_an_empty_file_is_a_failure(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.files = {"a.tar": b""}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.tar").touch()  # left by another tool
    assert main(arguments(server, tmp_path, ["a.tar"])) == 1
    assert "a.tar: the file on the server is empty" in capsys.readouterr().out


def test_no_server_at_all(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(server, tmp_path, ["a.tar"])
    (tmp_path / "links.txt").write_text("a.tar\thttp://127.0.0.1:9/a.tar\n")
    assert main(argv) == 1
    assert "given up after 5 attempts" in capsys.readouterr().out


def test_full_disk_stops_the_run(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = {"a.tar": content(1), "b.tar": content(2)}
    monkeypatch.setattr(transfer, "free_bytes", lambda path: 49_999)
    with pytest.raises(OSError, match=r"a.tar.part needs 50.00 kB more, but 50.00 kB are free") as caught:
        main(arguments(server, tmp_path, ["a.tar", "b.tar"], "--jobs", "1"))
    assert caught.value.errno == errno.ENOSPC


def test_names_without_a_link_are_refused_before_anything_is_fetched(server: FileServer, tmp_path: Path) -> None:
    server.files = {"a.tar": content(1)}
    argv = arguments(server, tmp_path, ["a.tar"])
    (tmp_path / "names.txt").write_text("a.tar\nb.tar\nc.tar\n")
    with pytest.raises(ValueError, match=r"no link for 2 of the 3 files .* b.tar c.tar"):
        main(argv)
    assert server.ranges == []


def test_dry_run_fetches_nothing(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(server, tmp_path, ["a.tar"], "--dry-run")) == 0
    assert server.ranges == []
    assert "would get a.tar" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no links"),
        ("file_name\tcdn_link\n", "holds no links"),
        ("a.tar\thttps://h/a\nb.tar\n", "line 2: wanted file_name<TAB>https://..., found 'b.tar'"),
        ("../a.tar\thttps://h/a\n", "'../a.tar' .* not a plain file name"),
        ("a.tar\tftp://h/a\n", "line 1"),
    ],
)
def test_broken_link_lists(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "links.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_links(tmp_path / "links.txt")


def test_a_missing_link_list_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="accept its licence"):
        read_links(tmp_path / "links.txt")


def test_link_list_as_saved_on_windows(tmp_path: Path) -> None:
    (tmp_path / "links.txt").write_bytes("\ufefffile_name\tcdn_link\r\na.tar\thttps://h/a?x=1&y=2\r\n\r\n".encode())
    assert read_links(tmp_path / "links.txt") == {"a.tar": "https://h/a?x=1&y=2"}


@pytest.mark.parametrize(("subset", "count", "last"), [("1p", 10, "sa_000029.tar"), ("10p", 100, "sa_000719.tar")])
def test_shipped_lists(subset: str, count: int, last: str) -> None:
    names = read_names(ROOT / f"data/sa-1b-{subset}.txt")
    assert (len(names), names[0], names[-1]) == (count, "sa_000020.tar", last)


def test_shipped_list_of_videos() -> None:
    names = read_names(ROOT / "data/sa-v.txt")
    assert names == [*(f"sav_{i:03d}.tar" for i in range(56)), "sav_test.tar", "sav_val.tar"]


def run_launcher(
    folder: Path, *arguments: str, launcher: str = "download_sa1b.sh", **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **settings}
    command = ["bash", str(ROOT / "data" / launcher), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_launcher_downloads_the_subset(server: FileServer, tmp_path: Path) -> None:
    names = read_names(ROOT / "data/sa-1b-1p.txt")
    server.files = {name: content(i, 1000) for i, name in enumerate(names)}
    (tmp_path / "links.txt").write_text("".join(f"{name}\t{server.url}/{name}\n" for name in names))
    result = run_launcher(tmp_path, "OUTPUT=tars", JOBS="3")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "tars").glob("*.tar")) == names
    server.faults["sa_000023.tar"] = 403
    (tmp_path / "tars/sa_000023.tar").unlink()
    result = run_launcher(tmp_path, "OUTPUT=tars", LINKS="links.txt")
    assert result.returncode == 1
    assert "sa_000023.tar: HTTP 403" in result.stdout


def test_launcher_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    unknown = run_launcher(tmp_path, "SUBSETS=1p")
    assert unknown.returncode == 2 and "known: LINKS SUBSET OUTPUT JOBS PYTHON" in unknown.stderr
    assert run_launcher(tmp_path, SUBSET="5p").returncode == 2
    bare = run_launcher(tmp_path, PYTHON="/bin/false")
    assert bare.returncode == 1 and "run: bash scripts/setup_env.sh" in bare.stderr
    missing = run_launcher(tmp_path)
    assert missing.returncode == 1 and "links.txt is not there" in missing.stderr
    assert run_launcher(tmp_path, "LINKS=x y.txt", "--dry-run").stderr.count("x y.txt is not there") == 1


def test_launcher_of_videos(server: FileServer, tmp_path: Path) -> None:
    names = read_names(ROOT / "data/sa-v.txt")
    server.files = {name: content(i, 200) for i, name in enumerate(names)}
    (tmp_path / "my links.txt").write_text("".join(f"{name}\t{server.url}/{name}\n" for name in names))
    result = run_launcher(tmp_path, "LINKS=my links.txt", launcher="download_sa_v.sh")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "data/sa-v").glob("*.tar")) == sorted(names)
    (tmp_path / "mine.txt").write_text("sav_val.tar\n")
    result = run_launcher(
        tmp_path, "--dry-run", NAMES="mine.txt", LINKS="my links.txt", OUTPUT="other", launcher="download_sa_v.sh"
    )
    assert result.returncode == 0 and "would get sav_val.tar" in result.stdout
    assert not list((tmp_path / "other").glob("*.tar"))
    unknown = run_launcher(tmp_path, "SUBSET=1p", launcher="download_sa_v.sh")
    assert unknown.returncode == 2 and "known: LINKS NAMES OUTPUT JOBS PYTHON" in unknown.stderr
