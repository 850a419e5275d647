from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from sam3.engine import hub

ROOT = Path(__file__).parents[2]
LARGE = bytes(range(256)) * 100
SMALL = b'{"model_type": "sam3"}\n'
# `printf 'hello\n' | git hash-object --stdin`
HELLO_IN_GIT = "ce013625030ba8dba906f756967f9e9ca394464a"


class FakeHub:
    """Stands in for the two hub functions in use. `served` are the bytes that a download gives; `raised` maps the
    name of a function to the error it raises."""

    def __init__(self) -> None:
        small = hashlib.sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()
        self.digests = {"sam3.pt": hashlib.sha256(LARGE).hexdigest(), "config.json": small}
        self.sizes = {"sam3.pt": len(LARGE), "config.json": len(SMALL)}
        self.served = {"sam3.pt": LARGE, "config.json": SMALL}
        self.raised: dict[str, Exception] = {}
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()

    def get_hf_file_metadata(self, url: str, token: str | None = None) -> SimpleNamespace:
        if error := self.raised.get("metadata"):
            raise error
        self.tokens.add(token)
        name = url.rpartition("/")[2]
        assert url == f"https://huggingface.co/facebook/sam3/resolve/main/{name}"
        return SimpleNamespace(commit_hash="c" * 40, etag=self.digests[name], size=self.sizes[name])

    def hf_hub_download(self, repo: str, name: str, *, revision: str, local_dir: Path, token: str | None) -> str:
        if error := self.raised.get("download"):
            raise error
        assert (repo, revision) == ("facebook/sam3", "c" * 40), "the commit must be pinned"
        self.fetched.append(name)
        path = Path(local_dir) / name
        path.write_bytes(self.served[name])
        return str(path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fake.get_hf_file_metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def http_error(kind: type[Exception], status: int = 403) -> Exception:
    return kind("as the server said", response=SimpleNamespace(headers={}, request=None, status_code=status))


def test_fetches_verifies_and_does_not_fetch_again(
    fake: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = hub.download_sam3(tmp_path / "new", token="secret")
    assert paths == [tmp_path / "new/sam3.pt", tmp_path / "new/config.json"]
    assert [path.read_bytes() for path in paths] == [LARGE, SMALL]
    assert fake.tokens == {"secret"}
    assert "secret" not in capsys.readouterr().out
    hub.download_sam3(tmp_path / "new", token="secret")
    assert fake.fetched == ["sam3.pt", "config.json"]


def test_dry_run_says_what_it_would_fetch(fake: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.download_sam3(tmp_path / "new", dry_run=True)
    assert f"to fetch into {tmp_path / 'new'}: 25.62 kB; free there: " in capsys.readouterr().out
    assert fake.fetched == [] and not (tmp_path / "new").exists()


def test_another_file_of_the_name_is_kept_unless_forced(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "sam3.pt").write_bytes(b"my own")
    with pytest.raises(ValueError, match=r"sam3.pt \(6 B\) is not the file of facebook/sam3 .* --force"):
        hub.download_sam3(tmp_path)
    assert (tmp_path / "sam3.pt").read_bytes() == b"my own" and fake.fetched == []
    hub.download_sam3(tmp_path, force=True)
    assert (tmp_path / "sam3.pt").read_bytes() == LARGE


@pytest.mark.parametrize(("served", "message"), [(LARGE[:-1], "25599 bytes, not 25600"), (LARGE[::-1], "digest ")])
def test_a_damaged_file_is_deleted(fake: FakeHub, tmp_path: Path, served: bytes, message: str) -> None:
    fake.served["sam3.pt"] = served
    with pytest.raises(ValueError, match=f"came damaged .*{message}"):
        hub.download_sam3(tmp_path)
    assert not (tmp_path / "sam3.pt").exists()


def test_a_damaged_small_file_is_noticed(fake: FakeHub, tmp_path: Path) -> None:
    fake.served["config.json"] = SMALL.replace(b"sam3", b"sam2")
    with pytest.raises(ValueError, match=r"config.json came damaged"):
        hub.download_sam3(tmp_path)


@pytest.mark.parametrize("step", ["metadata", "download"])
@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: http_error(errors.GatedRepoError), PermissionError, "accept the conditions .* `hf auth login`"),
        (
            lambda: http_error(errors.RepositoryNotFoundError),
            FileNotFoundError,
            "knows no facebook/sam3, or your token",
        ),
        (lambda: http_error(errors.RevisionNotFoundError), FileNotFoundError, "has no revision"),
        (lambda: errors.EntryNotFoundError("gone"), FileNotFoundError, r"has no file sam3\.pt"),
        (
            lambda: errors.LocalEntryNotFoundError("offline"),
            ConnectionError,
            "no connection to the hub .* run the same",
        ),
        (lambda: errors.OfflineModeIsEnabled("HF_HUB_OFFLINE"), ConnectionError, "HF_HUB_OFFLINE"),
        (lambda: http_error(errors.HfHubHTTPError, 503), ConnectionError, "refused .* as the server said"),
        (lambda: ConnectionResetError("reset by peer"), ConnectionError, "ConnectionResetError: reset by peer"),
        (lambda: RuntimeError("of the HTTP client"), ConnectionError, "RuntimeError: of the HTTP client"),
        (lambda: OSError(errno.ENOSPC, "No space left"), OSError, r"cannot write sam3\.pt: No space left; free some"),
    ],
)
def test_errors_say_what_to_do(
    fake: FakeHub, tmp_path: Path, make: Callable[[], Exception], kind: type[Exception], message: str, step: str
) -> None:
    fake.raised[step] = make()
    with pytest.raises(kind, match=message) as caught:
        hub.download_sam3(tmp_path)
    assert caught.value.__cause__ is fake.raised[step]
    assert "\n" not in str(caught.value)


def test_ctrl_c_passes(fake: FakeHub, tmp_path: Path) -> None:
    fake.raised["download"] = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        hub.download_sam3(tmp_path)


def test_a_full_disk_is_noticed_before_fetching(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sam3.engine.files.free_bytes", lambda path: 100)
    with pytest.raises(OSError, match=r"fetching sam3\.pt and config\.json needs 25\.62 kB"):
        hub.download_sam3(tmp_path)
    assert fake.fetched == []


def test_metadata_without_digest_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    fake.digests["sam3.pt"] = ""
    with pytest.raises(ValueError, match="no size and digest"):
        hub.download_sam3(tmp_path)


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"hello\n")
    assert hub.digest_of(tmp_path / "hello", "0" * 40) == HELLO_IN_GIT
    assert hub.digest_of(tmp_path / "hello", "0" * 64) == hashlib.sha256(b"hello\n").hexdigest()


def test_checkpoint_is_counted(tmp_path: Path) -> None:
    torch.save({f"w{i}": torch.zeros(1) for i in range(3)}, tmp_path / "sam3.pt")
    hub.check_checkpoint(tmp_path / "sam3.pt", 3)
    with pytest.raises(ValueError, match=r"holds 3 tensors, but the published sam3\.pt holds 1465"):
        hub.check_checkpoint(tmp_path / "sam3.pt")


def test_the_count_is_that_of_the_layout() -> None:
    assert len((ROOT / "tests/manifests/sam3.tsv").read_text().splitlines()) == hub.SAM3_TENSORS


def test_importing_does_not_import_the_hub_library() -> None:
    code = "import sys, sam3.engine.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
