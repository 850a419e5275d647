from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data import reorg_sa1b
from data.reorg_sa1b import main

KEYS = [f"sa_{i}" for i in range(100, 120)]
EXPECTED_VAL = {"sa_105", "sa_119"}  # sorted, random.seed(42), shuffle, first int(20 * 0.1)


def picture(key: str) -> bytes:
    return random.Random(key).randbytes(3000)


def annotation(key: str) -> bytes:
    return json.dumps({"image": {"file_name": f"{key}.jpg"}, "annotations": []}).encode()


def write_loose(folder: Path, keys: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        (folder / f"{key}.jpg").write_bytes(picture(key))
        (folder / f"{key}.json").write_bytes(annotation(key))


def write_tar(path: Path, keys: list[str], extra: dict[str, bytes] | None = None, prefix: str = "./") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {f"{prefix}{key}{suffix}": make(key) for key in keys for suffix, make in MAKERS.items()}
    with tarfile.open(path, "w") as tar:
        for name, body in {**members, **(extra or {})}.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


MAKERS: dict[str, Callable[[str], bytes]] = {".jpg": picture, ".json": annotation}


def tree(root: Path) -> dict[str, bytes]:
    """Relative path -> bytes of the sorted data set."""
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.j*"))}
    return {name: path.read_bytes() for name, path in files.items()}


def expected_tree(keys: list[str] = KEYS, val: set[str] = EXPECTED_VAL) -> dict[str, bytes]:
    files = {}
    for key in keys:
        split = "val" if key in val else "train"
        files[f"images/{split}/{key}.jpg"] = picture(key)
        files[f"annotations/{split}/{key}.json"] = annotation(key)
    return files


def run(folder: Path, *arguments: str) -> int:
    return main(["--source", str(folder / "src"), "--output", str(folder / "out"), "--workers", "2", *arguments])


def test_the_split_is_the_documented_one() -> None:
    keys = sorted(KEYS)
    random.seed(42)
    random.shuffle(keys)
    assert set(keys[:2]) == EXPECTED_VAL


def test_archives_are_sorted_and_stay(tmp_path: Path) -> None:
    write_tar(tmp_path / "src/sa_000000.tar", KEYS[:12])
    write_tar(tmp_path / "src/sa_000001.tar", KEYS[12:], prefix="sa_000001/")
    before = (tmp_path / "src/sa_000000.tar").read_bytes()
    assert run(tmp_path) == 0
    assert tree(tmp_path / "out") == expected_tree()
    assert (tmp_path / "src/sa_000000.tar").read_bytes() == before
    assert not list((tmp_path / "src").glob("*.j*"))


def test_loose_files_move(tmp_path: Path) -> None:
    write_loose(tmp_path / "src", KEYS[:5])
    write_loose(tmp_path / "src/sa_000020", KEYS[5:])
    assert run(tmp_path) == 0
    assert tree(tmp_path / "out") == expected_tree()
    assert not tree(tmp_path / "src")


def test_loose_files_copy_and_a_second_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_loose(tmp_path / "src", KEYS)
    assert run(tmp_path, "--copy") == 0
    assert tree(tmp_path / "out") == expected_tree()
    assert len(tree(tmp_path / "src")) == 2 * len(KEYS)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.j*")}
    capsys.readouterr()
    assert run(tmp_path, "--copy") == 0
    assert "20 pairs: 18 train, 2 val; 0 of them new" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.j*")}


def test_archives_that_were_unpacked_by_hand_are_not_read_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "src/sa_000000.tar", KEYS)
    write_loose(tmp_path / "src", KEYS)
    assert run(tmp_path) == 0
    assert tree(tmp_path / "out") == expected_tree()
    assert not tree(tmp_path / "src"), "the loose files were to move"


@pytest.mark.parametrize("stop_after", [0, 1, 7, 39])
@pytest.mark.parametrize("packed", [False, True])
def test_a_stopped_run_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, packed: bool
) -> None:
    if packed:
        write_tar(tmp_path / "src/sa_000000.tar", KEYS)
    else:
        write_loose(tmp_path / "src", KEYS)
    bring, done = reorg_sa1b.bring, []

    def stopping(*arguments: object) -> None:
        if len(done) == stop_after:
            raise KeyboardInterrupt
        bring(*arguments)
        done.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(reorg_sa1b, "bring", stopping)
        with pytest.raises(KeyboardInterrupt):
            main(["--source", str(tmp_path / "src"), "--output", str(tmp_path / "out"), "--workers", "1"])
    assert len(tree(tmp_path / "out")) == stop_after
    assert run(tmp_path) == 0
    assert tree(tmp_path / "out") == expected_tree()


def test_a_file_cut_short_in_place_is_brought_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "src/sa_000000.tar", KEYS)
    assert run(tmp_path) == 0
    (tmp_path / "out/images/val/sa_119.jpg").write_bytes(b"half")
    assert run(tmp_path) == 0
    assert tree(tmp_path / "out") == expected_tree()


def test_more_archives_later_leave_the_splits_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "src/sa_000000.tar", KEYS)
    assert run(tmp_path) == 0
    more = [f"sa_{i}" for i in range(200, 230)]
    write_tar(tmp_path / "src/sa_000001.tar", more)
    assert run(tmp_path) == 0
    after = tree(tmp_path / "out")
    assert len(after) == 100
    assert expected_tree().items() <= after.items()


def test_val_ratio_and_seed(tmp_path: Path) -> None:
    write_loose(tmp_path / "src", KEYS)
    assert run(tmp_path, "--val-ratio", "0.25", "--seed", "1") == 0
    keys = sorted(KEYS)
    random.Random(1).shuffle(keys)
    assert tree(tmp_path / "out") == expected_tree(val=set(keys[:5]))


def test_unpaired_and_empty_files_are_left_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_loose(tmp_path / "src", KEYS)
    (tmp_path / "src/sa_1.jpg").write_bytes(b"x")
    (tmp_path / "src/sa_2.json").write_bytes(b"{}")
    (tmp_path / "src/sa_3.jpg").touch()
    (tmp_path / "src/sa_3.json").write_bytes(b"{}")
    assert run(tmp_path) == 1
    out = capsys.readouterr().out
    assert "3 files without a partner: sa_1.jpg sa_2.json sa_3.json" in out
    assert "1 empty files: sa_3.jpg" in out
    assert tree(tmp_path / "out") == expected_tree()
    assert (tmp_path / "src/sa_1.jpg").exists()


def test_dry_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "src/sa_000000.tar", KEYS)
    assert run(tmp_path, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    out = capsys.readouterr().out
    assert "20 pairs: 18 train, 2 val; 20 of them new" in out
    size = sum(len(picture(key)) + len(annotation(key)) for key in KEYS)
    assert f"to write: {size / 1000:.2f} kB" in out


def test_broken_archives_are_all_named_and_nothing_is_touched(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write_tar(source / "good.tar", KEYS[:10])
    write_tar(source / "cut.tar", KEYS[10:])
    header_and_picture = 512 + 6 * 512  # 3000 bytes take 6 blocks
    (source / "cut.tar").write_bytes((source / "cut.tar").read_bytes()[:header_and_picture])
    (source / "empty.tar").touch()
    (source / "page.tar").write_bytes(b"<html>expired</html>" * 100)
    with pytest.raises(ValueError, match="3 of 4 archives") as caught:
        run(tmp_path)
    for words in ("cut.tar (no end mark", "empty.tar (0 bytes)", "page.tar"):
        assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_archive_cut_inside_a_file_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "src/a.tar", KEYS)
    whole = (tmp_path / "src/a.tar").read_bytes()
    (tmp_path / "src/a.tar").write_bytes(whole[:5000])
    with pytest.raises(ValueError, match=r"1 of 1 archives .*a.tar"):
        run(tmp_path)


@pytest.mark.parametrize("name", ["../evil.jpg", "/tmp/evil.jpg", "a/../../evil.json"])
def test_members_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "src/bad.tar", KEYS, {name: b"evil"})
    with pytest.raises(ValueError, match="points outside"):
        run(tmp_path)
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "out").exists()


def test_links_in_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src/bad.tar", "w") as tar:
        link = tarfile.TarInfo("sa_1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="link or device"):
        run(tmp_path)


def test_one_key_in_two_places_is_refused(tmp_path: Path) -> None:
    write_loose(tmp_path / "src/a", KEYS[:2])
    write_loose(tmp_path / "src/b", KEYS[1:3])
    with pytest.raises(ValueError, match=r"sa_101.jpg is in .*a/sa_101.jpg and in .*b/sa_101.jpg"):
        run(tmp_path)


def test_nothing_to_sort(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(ValueError, match="found no pair"):
        run(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        main(["--source", str(tmp_path / "nowhere")])


def test_a_full_disk_is_noticed_before_the_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "src/a.tar", KEYS)
    monkeypatch.setattr("sam3.engine.files.free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"only 1\.00 kB are free"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["sa-1b-1p", "sa-1b-10p", "sa-1b"])
def test_without_arguments_the_downloaded_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "data" / folder / "sa_000000.tar", KEYS)
    (tmp_path / "data/sa-1b-10p").mkdir(exist_ok=True)  # an empty one does not count
    assert main([]) == 0
    assert f"source: data/{folder}, output: data/sa-1b" in capsys.readouterr().out
    assert tree(tmp_path / "data/sa-1b") == expected_tree()
    assert main([]) == 0


@pytest.mark.parametrize(
    "flags", [["--val-ratio", "1"], ["--val-ratio", "-0.1"], ["--workers", "0"], ["--copy", "--move"]]
)
def test_wrong_flags_exit_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
