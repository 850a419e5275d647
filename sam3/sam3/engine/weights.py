"""Weight files: safe memory-mapped reading, streamed atomic writing, strict loading.

Two formats, told apart by suffix: torch zip files (`.pt`, `.pth`, `.bin`) and `.safetensors`. Reading maps the file
into memory, so that a tensor costs RAM only once it is touched; writing goes from those maps straight to the new file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from sam3.engine.files import atomic_path, human_bytes, require_free_space

log = logging.getLogger(__name__)

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"

ROTARY_TABLES = "freqs_cis"  # buffers of that name follow from the size of the pictures

# Names that the safetensors format gives to element types. complex64 (the rotary tables) needs safetensors >= 0.7.
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}

# Public training checkpoints keep their configuration as a yacs node, a dict with a class of its own. It is read as a
# plain dict under that name; yacs is neither imported nor called.
FOREIGN_DICTS = [(OrderedDict, "yacs.config.CfgNode")]


@dataclass
class WeightFile:
    """What `load_weights` found: `tensors` by key in file order, `meta` (plain dict, empty if the file has none),
    `payload` = the other entries of the file (epoch, optimizer, ...), `entry` = the one that held the tensors, None if
    the file is a bare state dict."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path = Path("(in memory)")
    payload: dict[str, Any] = field(default_factory=dict)
    entry: str | None = "model"


def load_weights(path: str | Path) -> WeightFile:
    """Map a weight file into memory. Nothing in the file is ever executed.

    Torch files hold the state dict under `model`, under `state_dict`, or are the state dict themselves.
    Raises FileNotFoundError; ValueError for a truncated or foreign file, a pickle that would run code, no tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a weight file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"weight file {path} {what}")
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    return _unwrap(_read_torch(path), path)


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(24)
    is_zip = zipfile.is_zipfile(path)
    if start.startswith(b"PK\x03\x04") and not is_zip:
        size = human_bytes(path.stat().st_size)
        raise ValueError(f"{path} is cut off after {size} (its zip directory is missing); copy or download it again")
    try:
        # Files of torch < 1.6 are no zips and cannot be mapped.
        with torch.serialization.safe_globals(FOREIGN_DICTS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ValueError(
                f"{path} would run Python code when opened ({code[1]}), so it was not opened; have its author save "
                "plain tensors, numbers, strings, lists and dicts: torch.save({'model': model.state_dict()}, ...)"
            ) from error
        kind = "a bare pickle, which may run code, so it was not opened" if start[:1] == b"\x80" else "no weight file"
        raise ValueError(f"{path} is {kind} (it starts with {start!r}); wanted a torch zip file") from error
    except Exception as error:  # torch reports damage with many types
        reason = str(error).split(". ")[0].strip() or "it is empty"
        raise ValueError(f"{path} is damaged or no weight file (starts with {start!r}): {reason}") from error


def _unwrap(content: Any, path: Path) -> WeightFile:
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; wanted a dict of tensors")
    name = next((n for n in ("model", "state_dict") if isinstance(content.get(n), dict)), None)
    tensors = content[name] if name else content
    strange = [str(key) for key, value in tensors.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange:
        where = f"entry '{name}' of {path}" if name else str(path)
        raise ValueError(
            f"{where} is not a dict of tensors: {list_names(strange)} are of other types; wanted a state dict, "
            "under 'model', under 'state_dict' or by itself"
        )
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    payload = {key: value for key, value in content.items() if key not in (name, "meta")} if name else {}
    meta = content.get("meta", {}) if name else {}
    if not isinstance(meta, dict):
        raise ValueError(f"entry 'meta' of {path} is a {type(meta).__name__}; wanted a dict")
    return WeightFile(dict(tensors), meta, path, payload, name)


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
    except safetensors.SafetensorError as error:
        size = human_bytes(path.stat().st_size)
        raise ValueError(f"{path} ({size}) is cut off, damaged or no safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    header.pop("format", None)  # the library's own mark, written anew with every file
    try:
        meta = json.loads(header.pop("meta", "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"header entry 'meta' of {path} is not JSON: {error}") from error
    return WeightFile(tensors, meta, path, header)


def save_weights(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any] | None = None,
    *,
    payload: Mapping[str, Any] | None = None,
    entry: str | None = "model",
) -> None:
    """Write `{entry: tensors, "meta": meta, **payload}` as a torch zip file, or safetensors with `meta` as JSON in the
    header beside `payload`, which then may hold texts only. `entry` None: a torch file that is the bare state dict.

    The file appears whole or not at all, and only after the free space was checked. Tensors that fill a storage of
    their own are written from where they lie (mapped files included); others are copied first: all of them for a torch
    file, one at a time for safetensors. `meta` must be plain JSON values, `payload` what `load_weights` reads.
    Raises ValueError for what cannot be written, OSError for a disk that is full or refuses.
    """
    path = Path(path)
    if path.suffix not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        raise ValueError(f"no weight format goes with the name {path}; end it in .pt, .pth or {SAFETENSORS_SUFFIX}")
    payload = dict(payload or {})
    _check_writable(path, tensors)
    _check_extras(path, meta, payload, entry)
    try:
        meta_json = json.dumps(dict(meta or {}))
    except TypeError as error:
        raise ValueError(f"meta for {path} must be plain numbers, strings, lists and dicts: {error}") from error
    # A torch file adds a zip record (alignment, name, directory entry) and a pickle entry per tensor.
    needed = num_bytes(tensors) + sum(map(_size, _tensors_in(payload))) + 1024 * len(tensors) + (64 << 10)
    require_free_space(path.parent, needed, f"writing {path.name}")
    with atomic_path(path) as temporary:
        try:
            if path.suffix == SAFETENSORS_SUFFIX:
                _write_safetensors(temporary, tensors, {**payload, "format": "pt", "meta": meta_json})
            else:
                _write_torch(temporary, tensors, {"meta": json.loads(meta_json), **payload}, entry)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns OSError into RuntimeError
            reason = str(error).splitlines()[0]
            raise OSError(f"could not write {path}, is the disk full or over quota? {reason}") from error


def _check_writable(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        raise ValueError(f"nothing to write to {path}: there are no tensors")
    for key, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise ValueError(f"'{key}' cannot be written to {path}: it is on {tensor.device} with {tensor.layout}")
        if path.suffix == SAFETENSORS_SUFFIX and tensor.dtype not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"'{key}' has dtype {tensor.dtype}, which safetensors files cannot hold; write a .pth file"
            )


def _check_extras(path: Path, meta: Mapping[str, Any] | None, payload: Mapping[str, Any], entry: str | None) -> None:
    if path.suffix == SAFETENSORS_SUFFIX:
        others = [key for key, value in payload.items() if not isinstance(value, str)]
        if others:
            raise ValueError(f"{path} cannot hold the entries {list_names(others)} beside tensors; write a .pt file")
    elif entry is None and (meta or payload):
        names = ["meta"] * bool(meta) + list(payload)
        raise ValueError(f"a bare state dict has no place for {list_names(names)}, so {path} is not written")


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of all tensors together."""
    return sum(map(_size, tensors.values()))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


def _plain(tensor: Tensor) -> Tensor:
    """The same values on the CPU, contiguous, without autograd and with no larger storage behind them."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    fills_storage = tensor.untyped_storage().nbytes() == _size(tensor)
    return tensor if tensor.is_contiguous() and fills_storage else tensor.clone(memory_format=torch.contiguous_format)


def _write_torch(path: Path, tensors: Mapping[str, Tensor], extras: Mapping[str, Any], entry: str | None) -> None:
    plain = {key: _plain(tensor) for key, tensor in tensors.items()}
    torch.save(plain if entry is None else {entry: plain, **extras}, path)


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], extras: Mapping[str, str]) -> None:
    """8 bytes header length, JSON header, raw tensors. The library's own writer wants all of it in memory at once."""
    # Wide types first, so that every tensor begins at a multiple of its element size and can be mapped.
    keys = sorted(tensors, key=lambda key: -tensors[key].element_size())
    header: dict[str, Any] = {"__metadata__": extras}
    end = 0
    for key in keys:
        tensor, begin = tensors[key], end
        end += _size(tensor)
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in keys:
            file.write(_raw_bytes(_plain(tensors[key])).numpy().data)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """True if shape, dtype and every bit agree (NaN equals NaN, 0 differs from -0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_raw_bytes(a), _raw_bytes(b))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of the names, types, shapes and bits of tensors on the CPU; their order does not matter."""
    sha256 = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach()
        sha256.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(_raw_bytes(tensor).numpy().data)
    return sha256.hexdigest()


def _raw_bytes(tensor: Tensor) -> Tensor:
    """(bytes,) uint8, without a copy if the tensor is contiguous."""
    tensor = tensor.contiguous()
    # Not reshape(-1): it keeps odd strides of single elements, which cannot be viewed as bytes.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Only the entries below `prefix`, with it removed; empty if there are none."""
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def normalise_sam3_keys(tensors: Mapping[str, Tensor], source: str | Path = "the checkpoint") -> dict[str, Tensor]:
    """Keys in the layout of sam3.pt, with the roots `detector.` and `tracker.`.

    Accepted besides: files of a DDP model (`module.` on every key) and of the image model alone (no `detector.`; a
    click predictor's `inst_interactive_predictor.model.` is `tracker.`). Raises ValueError for anything else.
    """
    keys = dict(tensors)
    if keys and all(key.startswith("module.") for key in keys):
        keys = strip_prefix(keys, "module.")
    roots = {key.split(".", 1)[0] for key in keys}
    if "detector" in roots:
        return keys
    if not any(key.startswith("backbone.vision_backbone.") for key in keys):
        raise ValueError(
            f"{source} is no SAM3 checkpoint: wanted keys below 'detector.' or 'backbone.vision_backbone.', "
            f"found {list_names(sorted(roots))}"
        )
    clicks = "inst_interactive_predictor.model."
    return {
        key.replace(clicks, "tracker.", 1) if key.startswith(clicks) else f"detector.{key}": tensor
        for key, tensor in keys.items()
    }


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str | Path,
    allowed_missing: Sequence[str] = (),
    allowed_unexpected: Sequence[str] = (),
) -> None:
    """Load `tensors` into `module`; every key must fit, except below the named prefixes.

    Values are copied (and cast) into existing parameters; a module on the meta device takes the tensors themselves.
    `source` names the file in messages. Raises one ValueError with all missing, unexpected and misshapen keys, and for
    a prefix that allows a gap where there is none (it would hide a spelling mistake).
    """
    own = module.state_dict()
    missing, unallowed_missing = _split([key for key in own if key not in tensors], allowed_missing)
    unexpected, unallowed_unexpected = _split([key for key in tensors if key not in own], allowed_unexpected)
    shared = {key: tensor for key, tensor in tensors.items() if key in own}
    wrong = [
        f"{key} {_describe(tensor)} instead of {_describe(own[key])}"
        for key, tensor in shared.items()
        if tensor.shape != own[key].shape or tensor.is_complex() != own[key].is_complex()
    ]
    faults = [
        f"{len(found)} {kind}: {list_names(found)}"
        for kind, found in (("missing", unallowed_missing), ("unexpected", unallowed_unexpected), ("misshapen", wrong))
        if found
    ]
    for kind, allowed, found in (("missing", allowed_missing, missing), ("unexpected", allowed_unexpected, unexpected)):
        idle = [prefix for prefix in allowed if not any(key.startswith(prefix) for key in found)]
        if idle:
            faults.append(f"allowed to be {kind}, but no such key is: {list_names(idle)}")
    if faults:
        raise ValueError(f"{source} does not fit {type(module).__name__}: " + "; ".join(faults))
    on_meta = any(tensor.is_meta for tensor in own.values())
    module.load_state_dict(shared, strict=False, assign=on_meta)
    log.info("loaded %d tensors into %s from %s", len(shared), type(module).__name__, source)


def load_for_any_size(module: nn.Module, path: str | Path, optional: tuple[str, ...] = ()) -> None:
    """Load a file into the same model for pictures of another size: all but the rotary tables, which follow from it.

    optional: prefixes of keys that the file or the module may lack. Raises what `load_weights` and `load_strict` raise.
    """
    own = module.state_dict()
    found = {
        key: tensor
        for key, tensor in load_weights(path).tensors.items()
        if not key.endswith(ROTARY_TABLES) and (key in own or not key.startswith(optional))
    }
    kept = {
        key: tensor
        for key, tensor in own.items()
        if key.endswith(ROTARY_TABLES) or (key.startswith(optional) and key not in found)
    }
    load_strict(module, {**found, **kept}, source=path)


def _split(keys: Iterable[str], allowed: Sequence[str]) -> tuple[list[str], list[str]]:
    """(keys below one of the allowed prefixes, the others)."""
    below: list[str] = []
    others: list[str] = []
    for key in keys:
        (below if key.startswith(tuple(allowed)) else others).append(key)
    return below, others


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{' complex' if tensor.is_complex() else ''}"


def list_names(names: Sequence[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
