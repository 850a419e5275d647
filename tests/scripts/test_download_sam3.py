from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from sam3.engine.cli import run_main
from scripts.download_sam3 import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A hub with a sam3.pt that has the right keys (one number each) and a config.json."""
    keys = [line.split("\t")[0] for line in (ROOT / "tests/manifests/sam3.tsv").read_text().splitlines()]
    torch.save({"model": {key: torch.zeros(1) for key in keys}}, tmp_path / "published.pt")
    files = {"sam3.pt": (tmp_path / "published.pt").read_bytes(), "config.json": b"{}"}

    def metadata(url: str, token: str | None = None) -> SimpleNamespace:
        body = files[url.rpartition("/")[2]]
        return SimpleNamespace(commit_hash="c" * 40, etag=hashlib.sha256(body).hexdigest(), size=len(body))

    def download(repo: str, name: str, *, revision: str, local_dir: Path, token: str | None) -> str:
        (Path(local_dir) / name).write_bytes(files[name])
        return str(Path(local_dir) / name)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return files


def test_downloads_and_opens_the_checkpoint(
    published: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sam3_checkpoints"
    assert main(["--output", str(folder), "--dry-run"]) == 0
    assert not folder.exists()
    assert main(["--output", str(folder)]) == 0
    assert (folder / "sam3.pt").read_bytes() == published["sam3.pt"]
    assert "is whole and holds the 1465 tensors" in capsys.readouterr().out
    assert main(["--output", str(folder)]) == 0
    assert "is there already and matches the hub" in capsys.readouterr().out


def test_a_file_that_is_no_sam3_is_refused(published: dict[str, bytes], tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pt")
    published["sam3.pt"] = (tmp_path / "other.pt").read_bytes()
    with pytest.raises(ValueError, match="holds 1 tensors"):
        main(["--output", str(tmp_path / "out")])


def test_gated_access_is_one_line_and_exit_code_1(
    published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gated(url: str, token: str | None = None) -> SimpleNamespace:
        raise errors.GatedRepoError("403", response=SimpleNamespace(headers={}, request=None, status_code=403))

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", gated)
    with pytest.raises(SystemExit) as caught:
        run_main(main, ["--output", str(tmp_path)])
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith("error: facebook/sam3 is gated") and text.count("\n") == 1
