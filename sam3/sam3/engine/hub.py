"""Published weights from the Hugging Face hub: resumed, verified, and with errors that say what to do.

`huggingface_hub` is imported on first use only, so that everything else works without it and without a network.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sam3.engine.files import free_bytes, human_bytes, require_free_space, sha256
from sam3.engine.weights import load_weights

SAM3_REPO = "facebook/sam3"
SAM3_FILES = ("sam3.pt", "config.json")
SAM3_TENSORS = 1465  # entries of the published sam3.pt: detector and tracker
SAM3_FOLDER = Path("sam3_checkpoints")


@dataclass(frozen=True)
class HubFile:
    """One file of a hub repository as the hub describes it. `digest`: hex SHA-256 for large files (64 digits), git's
    SHA-1 for small ones (40 digits). `commit` pins the revision, so that no update can slip in between two requests."""

    repo: str
    name: str
    commit: str
    size: int
    digest: str


def download_sam3(
    folder: str | Path = SAM3_FOLDER,
    *,
    repo: str = SAM3_REPO,
    names: tuple[str, ...] = SAM3_FILES,
    revision: str = "main",
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> list[Path]:
    """Bring the files `names` of `repo` into `folder` and verify them; returns their paths.

    Files that are there and match the hub's size and digest are not fetched again; others of the same name are refused
    unless `force`. `token`: None uses HF_TOKEN or the login of `hf auth login`.
    Raises PermissionError (gated), FileNotFoundError (no such repo, revision or file), ConnectionError (interrupted),
    OSError (disk), ValueError (contents differ from what the hub announced).
    """
    folder = Path(folder)
    files = [describe(repo, name, revision, token) for name in names]
    todo = [file for file in files if not is_current(folder / file.name, file, force)]
    needed = sum(file.size for file in todo)
    print(f"{repo} at {files[0].commit[:12]}: {human_bytes(sum(file.size for file in files))} in {len(files)} files")
    print(f"to fetch into {folder}: {human_bytes(needed)}; free there: {human_bytes(free_bytes(folder))}")
    if not dry_run:
        if todo:
            require_free_space(folder, needed, f"fetching {' and '.join(file.name for file in todo)}")
        for file in todo:
            fetch(file, folder, token)
            verify(folder / file.name, file)
    return [folder / name for name in names]


def describe(repo: str, name: str, revision: str = "main", token: str | None = None) -> HubFile:
    """Size, digest and commit of a file, from one request that also shows whether access is granted."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with explained(repo, name, revision):
        found = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=token)
    if not (found.commit_hash and found.size and found.etag and len(found.etag) in (40, 64)):
        raise ValueError(f"the hub gives no size and digest for {repo}/{name} ({found}); try again later")
    return HubFile(repo, name, found.commit_hash, found.size, found.etag)


def is_current(path: Path, file: HubFile, force: bool) -> bool:
    """Whether `path` is that file already. Raises ValueError for another file of its name, unless `force`."""
    if not path.exists():
        return False
    if path.stat().st_size == file.size and digest_of(path, file.digest) == file.digest:
        print(f"{path} is there already and matches the hub")
        return True
    if not force:
        raise ValueError(
            f"{path} ({human_bytes(path.stat().st_size)}) is not the file of {file.repo} at {file.commit[:12]} "
            f"({human_bytes(file.size)}); move it away, choose another --output, or replace it with --force"
        )
    return False


def fetch(file: HubFile, folder: Path, token: str | None = None) -> Path:
    """Download one file, replacing an older one once it is whole. What an interrupted download got stays in
    `folder`/.cache and is taken up by the next."""
    from huggingface_hub import hf_hub_download

    folder.mkdir(parents=True, exist_ok=True)
    with explained(file.repo, file.name, file.commit):
        return Path(hf_hub_download(file.repo, file.name, revision=file.commit, local_dir=folder, token=token))


def verify(path: Path, file: HubFile) -> None:
    """Compare a fetched file with what the hub announced; a damaged one is deleted. Raises ValueError."""
    size = path.stat().st_size
    found = digest_of(path, file.digest) if size == file.size else None
    if found != file.digest:
        path.unlink()
        what = f"digest {found}, not {file.digest}" if found else f"{size} bytes, not {file.size}"
        raise ValueError(f"{path} came damaged ({what}) and was deleted; run the same command again")


def digest_of(path: Path, like: str) -> str:
    """Hex digest of the kind of `like`: SHA-256, or git's SHA-1 of `blob <size>\\0<bytes>`."""
    if len(like) == 64:
        return sha256(path)
    body = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


def check_checkpoint(path: Path, num_tensors: int = SAM3_TENSORS) -> None:
    """Open a checkpoint without reading its weights and count its entries. Raises ValueError."""
    found = len(load_weights(path).tensors)
    if found != num_tensors:
        raise ValueError(f"{path} holds {found} tensors, but the published sam3.pt holds {num_tensors}")


@contextlib.contextmanager
def explained(repo: str, name: str, revision: str) -> Iterator[None]:
    """Turn the hub library's errors into built-in ones that say what to do next."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo} is gated and you have no access yet: 1. sign in at {page}, accept the conditions there and wait "
            "for the approval (its state: https://huggingface.co/settings/gated-repos); 2. run `hf auth login`, pass "
            "--token or set HF_TOKEN, with a token of that account that may read gated repositories; 3. run this again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the hub knows no {repo}, or your token is wrong or may not see it; look at {page} and at `hf auth whoami`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no revision '{revision}'; see {page}/commits/main") from error
    except errors.LocalEntryNotFoundError as error:  # what the library makes of a lost connection
        raise ConnectionError(no_connection(repo, name, error)) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no file {name} at revision '{revision}'; see {page}/tree/main") from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"the hub refused {repo}/{name}: {error}; run the same command again later") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise OSError(
                error.errno, f"cannot write {name}: {error.strerror}; free some space or choose another --output"
            ) from error
        raise ConnectionError(no_connection(repo, name, error)) from error
    except Exception as error:  # the library's HTTP client, and with it the type of network errors, differs by version
        raise ConnectionError(no_connection(repo, name, error)) from error


def no_connection(repo: str, name: str, error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return (
        f"no connection to the hub for {repo}/{name} ({type(error).__name__}: {first_line}); what has arrived is kept: "
        "run the same command again, with HF_HUB_DISABLE_XET=1 if it hangs"
    )
