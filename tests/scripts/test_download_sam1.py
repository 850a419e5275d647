from __future__ import annotations

import hashlib
import json
import sys
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from sam3.engine import transfer
from sam3.engine.cli import run_main
from sam3.sam.sam1 import build_sam1
from sam3.sam1_files import save_sam1
from scripts import download_sam1
from scripts.download_sam1 import main
from tests.data import file_server
from tests.data.file_server import FileServer, serve


class PatientServer(ThreadingHTTPServer):
    """Says nothing about clients that leave after the headers, as one that asks for a size does."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@dataclass
class Site:
    """A server in the place of both publishers, with the smallest ViT of the family for the large ones."""

    server: FileServer
    vit: str  # its file names
    mobile: str
    folder: Path

    def run(self, *types: str, extra: tuple[str, ...] = ()) -> int:
        return main(["--output", str(self.folder), "--types", *types, *extra])

    def asked(self, name: str) -> list[str | None]:
        return [span for path, span in self.server.ranges if path.endswith(name) and not path.startswith("contents")]

    def describe_mobile(self, **changes: object) -> None:
        """What GitHub says about the file."""
        body = self.server.files[f"raw/{self.mobile}"]
        sha = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        link = f"{self.server.url}/raw/{self.mobile}"
        stated = {"name": self.mobile, "size": len(body), "sha": sha, "download_url": link, **changes}
        self.server.files["contents"] = json.dumps([{"name": "README.md"}, stated]).encode()


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Files of a vit_tiny and of a MobileSAM."""
    folder = tmp_path_factory.mktemp("published")
    save_sam1(build_sam1("vit_tiny", 64), folder / "vit.pth")
    save_sam1(build_sam1("vit_t"), folder / "mobile.pt")
    return (folder / "vit.pth").read_bytes(), (folder / "mobile.pt").read_bytes()


@pytest.fixture
def site(bodies: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    name = f"sam_vit_tiny_{hashlib.md5(bodies[0]).hexdigest()[:6]}.pth"
    monkeypatch.setattr(transfer, "WAIT_S", 0.01)
    monkeypatch.setattr(file_server, "ThreadingHTTPServer", PatientServer)
    monkeypatch.setattr(download_sam1, "FILES", {"vit_tiny": name, "vit_t": "mobile_sam.pt"})
    with serve() as server:
        monkeypatch.setattr(download_sam1, "SAM_SITE", f"{server.url}/sam")
        monkeypatch.setattr(download_sam1, "MOBILE_SAM_SITE", f"{server.url}/contents")
        server.files = {f"sam/{name}": bodies[0], "raw/mobile_sam.pt": bodies[1]}
        site = Site(server, name, "mobile_sam.pt", tmp_path / "weights")
        site.describe_mobile()
        yield site


def test_fetches_verifies_and_does_not_fetch_again(
    site: Site, bodies: tuple[bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.run("vit_tiny", "vit_t") == 0
    assert ((site.folder / site.vit).read_bytes(), (site.folder / site.mobile).read_bytes()) == bodies
    text = capsys.readouterr().out
    assert f"{site.folder / site.vit} is whole and holds the 202 entries of vit_tiny" in text
    assert "mobile_sam.pt is whole and holds the 439 entries of vit_t" in text
    assert not list(site.folder.glob("*.part"))
    assert site.run("vit_tiny", "vit_t") == 0
    assert capsys.readouterr().out.count("is there already and matches") == 2
    assert len(site.asked(site.mobile)) == 1


def test_dry_run_states_sizes_and_fetches_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.run("vit_t", "vit_tiny", extra=("--dry-run",)) == 0
    text = capsys.readouterr().out
    assert f"mobile_sam.pt: 40.71 MB from {site.server.url}/raw/mobile_sam.pt" in text
    assert f"to fetch into {site.folder}: " in text and "nothing was fetched" in text
    assert not site.folder.exists() and site.asked(site.mobile) == []


def test_goes_on_where_an_earlier_run_stopped(
    site: Site, bodies: tuple[bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    site.folder.mkdir()
    (site.folder / "mobile_sam.pt.part").write_bytes(bodies[1][:40_000_000])
    site.server.cuts["raw/mobile_sam.pt"] = 1
    assert site.run("vit_t") == 0
    assert (site.folder / site.mobile).read_bytes() == bodies[1]
    first, second = site.asked(site.mobile)
    assert first == "bytes=40000000-" and second is not None and second > first
    assert f"to fetch into {site.folder}: {(len(bodies[1]) - 40_000_000) / 1e3:.2f} kB" in capsys.readouterr().out


@pytest.mark.parametrize("type", ["vit_tiny", "vit_t"])
def test_a_damaged_file_is_deleted(site: Site, bodies: tuple[bytes, bytes], type: str) -> None:
    key, name = (f"sam/{site.vit}", site.vit) if type == "vit_tiny" else ("raw/mobile_sam.pt", site.mobile)
    body = site.server.files[key]
    site.server.files[key] = body[:-1] + bytes([body[-1] ^ 1])
    with pytest.raises(ValueError, match=f"{name} came damaged .digest .*, not .* and was deleted; run the same"):
        site.run(type)
    assert [path.name for path in site.folder.iterdir()] == [".download.lock"]


def test_another_size_than_announced_is_noticed(site: Site, bodies: tuple[bytes, bytes]) -> None:
    site.describe_mobile(size=len(bodies[1]) + 1)
    with pytest.raises(ValueError, match=rf"came damaged \({len(bodies[1])} bytes, not {len(bodies[1]) + 1}\)"):
        site.run("vit_t")


def test_another_file_of_the_name_is_kept_unless_forced(site: Site, bodies: tuple[bytes, bytes]) -> None:
    site.folder.mkdir()
    (site.folder / site.mobile).write_bytes(b"my own")
    with pytest.raises(ValueError, match=r"mobile_sam\.pt is not the published file \(6 bytes, not \d+\).* --force"):
        site.run("vit_t")
    assert (site.folder / site.mobile).read_bytes() == b"my own"
    assert site.run("vit_t", extra=("--force",)) == 0
    assert (site.folder / site.mobile).read_bytes() == bodies[1]


def test_a_file_of_another_layout_is_refused(
    site: Site, bodies: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_sam1, "FILES", {"vit_h": site.vit})
    with pytest.raises(ValueError, match="holds a vit_tiny, but a vit_h was asked for"):
        site.run("vit_h")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sha": "abc"}, "gives no link, size and SHA-1"), ({"download_url": None}, "gives no link, size and SHA-1")],
)
def test_a_strange_description_is_refused(site: Site, changes: dict[str, object], message: str) -> None:
    site.describe_mobile(**changes)
    with pytest.raises(ValueError, match=message):
        site.run("vit_t")


def test_a_description_that_is_none_is_refused(site: Site) -> None:
    for stated in (b"<html>", b"[]", b'{"message": "moved"}'):
        site.server.files["contents"] = stated
        with pytest.raises(ValueError, match=r"contents describes no file"):
            site.run("vit_t")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (403, "HTTP 403 for .*: the server refuses; behind a proxy"),
        (404, "HTTP 404 for .*: the file is no longer there"),
        ("page", "the server sent a web page, not a file; the server refuses"),
        ("no size", "does not state the file's size"),
    ],
)
def test_what_the_server_refuses_is_explained(site: Site, fault: int | str, message: str) -> None:
    site.server.faults[f"sam/{site.vit}"] = fault
    with pytest.raises(ConnectionError, match=message):
        site.run("vit_tiny")


def test_a_connection_that_keeps_failing_leaves_what_arrived(site: Site, bodies: tuple[bytes, bytes]) -> None:
    site.folder.mkdir()
    (site.folder / "mobile_sam.pt.part").write_bytes(bodies[1][:1000])
    site.server.faults["raw/mobile_sam.pt"] = 503
    with pytest.raises(ConnectionError, match=r"mobile_sam\.pt: HTTP 503 .* 5 attempts, 1\.00 kB are kept"):
        site.run("vit_t")
    assert (site.folder / "mobile_sam.pt.part").stat().st_size == 1000


def test_a_full_disk_is_noticed_before_fetching(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sam3.engine.files.free_bytes", lambda path: 100)
    with pytest.raises(OSError, match=r"fetching mobile_sam\.pt needs 40\.71 MB in .*, but only 100 B are free"):
        site.run("vit_t")
    assert site.asked(site.mobile) == [] and not site.folder.exists()


@pytest.mark.parametrize(
    ("type", "link"),
    [
        ("vit_h", "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth"),
        ("vit_l", "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth"),
        ("vit_b", "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"),
        ("vit_t", "https://api.github.com/repos/ChaoningZhang/MobileSAM/contents/weights"),
    ],
)
def test_without_a_network_it_says_what_to_do_in_one_line(
    type: str, link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(asked: str) -> None:
        assert asked == link
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(download_sam1, "open_link", offline)
    with pytest.raises(SystemExit) as caught:
        run_main(main, ["--types", type, "--output", str(tmp_path / "weights")])
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith(f"error: no connection for {link} (Name or service not known); run the same command again")
    assert text.count("\n") == 1 and not (tmp_path / "weights").exists()


def test_the_two_files_of_the_instructions_are_the_default() -> None:
    arguments = download_sam1.parse_arguments([])
    assert [download_sam1.FILES[type] for type in arguments.types] == ["sam_vit_h_4b8939.pth", "mobile_sam.pt"]
    assert arguments.output == Path("weights")
