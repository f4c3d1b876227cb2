"""Safe files: whole or not at all when written, checked with a reason when read. No pickle.

Every file of this package is written to a temporary file in the target's own folder, flushed to
the disk and renamed over the target. A kill, an error or a full disk leaves the old file as it
was. Tensors travel as safetensors; everything else about them is one JSON object in the header
(key "t2k"), with a "kind" that says what the file is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import SaveError, StrPath, atomic_path, folder_lock, remove_temporaries

__all__ = [
    "CorruptFileError",
    "Header",
    "SaveError",
    "atomic_path",
    "check_name",
    "file_sha256",
    "folder_lock",
    "load_tensors",
    "read_header",
    "read_json",
    "remove_temporaries",
    "save_tensors",
    "write_json",
]

# safetensors keeps its metadata in an unordered map: with one key the bytes of a file depend on
# its contents alone.
_METADATA_KEY = "t2k"
_DIGEST_KEY = "digest"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# Room for a suffix and the temporary's decoration below the 255 bytes of common file systems.
_MAX_NAME = 200
_RESERVED = {"con", "prn", "aux", "nul", *(f"{p}{i}" for p in ("com", "lpt") for i in range(1, 10))}
# The safetensors format allows a header of at most 100 MB.
_MAX_HEADER = 100_000_000
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_BYTES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}


class CorruptFileError(ValueError):
    """A file is truncated, damaged, or not of the expected kind or version."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself before its data."""

    #: name -> (dtype as safetensors writes it, e.g. "F32", shape)
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    #: this package's own JSON object, {} in foreign files
    metadata: dict[str, Any] = field(default_factory=dict)
    #: the file's plain string metadata
    strings: dict[str, str] = field(default_factory=dict)
    #: checksum of all that the file holds, as ``save_tensors`` wrote it
    digest: str | None = None


def check_name(name: str, what: str = "name") -> str:
    """Returns ``name`` if it can safely be part of a path: letters, digits, ``.``, ``_``, ``-``.

    Refuses an empty name, a leading dot or dash, "..", separators, a name longer than 200
    characters and the device names of Windows.

    >>> check_name("model.layers.0.mlp.up_proj")
    'model.layers.0.mlp.up_proj'
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a str, got {type(name).__name__}.")
    rule = "letters, digits, '.', '_' and '-', starting with a letter, a digit or '_', no '..'"
    if not _NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise ValueError(f"{what} must consist of {rule}, got {name!r}.")
    if len(name) > _MAX_NAME:
        raise ValueError(
            f"{what} must have at most {_MAX_NAME} characters, got {len(name)}: {name[:40]!r}..."
        )
    if name.split(".")[0].lower() in _RESERVED:
        raise ValueError(f"{what} {name!r} is a device name on Windows. Choose another.")
    return name


def write_json(path: StrPath, value: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, keys in their order; inf and NaN are refused."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot write {path} as JSON: {error}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def read_json(
    path: StrPath, *, kind: str | None = None, version: int | None = None
) -> dict[str, Any]:
    """Reads a JSON object and checks its "kind" and "version" where they are given."""
    path = _existing(path, "JSON file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 4,300 digits
        raise CorruptFileError(
            f"{path} is not valid JSON: {error}. It is truncated or damaged; make it again."
        ) from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    _check_kind(path, value, kind, version)
    return value


def save_tensors(
    path: StrPath,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    *,
    digest: bool = True,
) -> None:
    """Writes tensors and a JSON-able ``metadata`` as one safetensors file, atomically.

    The bytes depend only on names, values and metadata, so that two runs can be compared. Strided
    views are made contiguous; ``metadata`` should have "kind" and "version" for ``load_tensors``.
    A checksum of both joins the metadata, unless the caller keeps one of the file elsewhere
    (``digest=False``).
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{path}: {name!r} must be a tensor, got {type(tensor).__name__}.")
    # A copy of its own for each name: safetensors refuses tensors that share memory.
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    strings = None
    if metadata is not None:
        if _DIGEST_KEY in metadata:
            raise ValueError(f"{path}: metadata must not have a key {_DIGEST_KEY!r}. Rename it.")
        try:
            # There and back: keys that are numbers become text, and sorted as such.
            facts = json.loads(json.dumps(metadata, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{path}: metadata must be what JSON can hold: text, finite numbers, lists and "
                f"mappings ({error}). Replace NaN and inf by None or by text."
            ) from error
        if digest:
            marks = {name: _hash(tensor).hexdigest() for name, tensor in plain.items()}
            facts[_DIGEST_KEY] = _digest(plain, marks, facts)
        strings = {_METADATA_KEY: json.dumps(facts, sort_keys=True)}
    with atomic_path(path) as temporary:
        save_file(plain, str(temporary), metadata=strings)


def read_header(path: StrPath) -> Header:
    """Parses and checks a safetensors header without touching the data.

    Compares the file's size with what the header says, so that a truncated file is found here.
    """
    return _read_header(_existing(path, "safetensors file"))[0]


def _read_header(path: Path) -> tuple[Header, bytes, list[str]]:
    """(header, the bytes before the data, the tensors' names in the order of the data)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or not 2 <= length <= _MAX_HEADER:
            raise CorruptFileError(
                f"{path} is not a safetensors file ({size} bytes). "
                "Pickled checkpoints (.bin, .pt) are never read: convert them to safetensors first."
            )
        if size < 8 + length:
            raise _truncated(path, 8 + length, size)
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        strings = dict(entries.pop("__metadata__", None) or {})
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        begin: dict[str, int] = {}
        end = 0
        for name, entry in entries.items():
            shape = tuple(int(s) for s in entry["shape"])
            first, last = (int(i) for i in entry["data_offsets"])
            width = _BYTES.get(entry["dtype"])
            if width is not None and last - first != width * math.prod(shape):
                raise ValueError(f"{name!r} has {last - first} bytes for shape {shape}")
            tensors[name], begin[name] = (str(entry["dtype"]), shape), first
            end = max(end, last)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError,
            OverflowError) as error:  # fmt: skip
        raise CorruptFileError(
            f"{path} is not a safetensors file or its header is damaged: {error}. Make it again."
        ) from error
    if size != 8 + length + end:
        raise _truncated(path, 8 + length + end, size)
    metadata = _own_metadata(path, strings)
    header = Header(tensors, metadata, strings, metadata.pop(_DIGEST_KEY, None))
    return header, start + raw, sorted(tensors, key=lambda name: begin[name])


def load_tensors(
    path: StrPath,
    *,
    kind: str | None = None,
    version: int | None = None,
    expect: Mapping[str, tuple[int, ...] | None] | None = None,
    device: str | torch.device = "cpu",
    sha256: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file of ``save_tensors``: (tensors, metadata), checked before any data is used.

    The checksum is taken of what was read, in memory: the file is read once, and no more than its
    tensors are held. Files without one (of other programs, of earlier releases) are accepted.

    Args:
        kind, version: what the metadata must say.
        sha256: of the whole file, where it is known; then it is what counts.
        expect: the names the file must hold, no more and no less; with a shape where it matters.
        device: where the tensors go. On the CPU they are copies in memory, not a mapped file:
            aligned, and untouched by what later happens to the file.

    Raises:
        FileNotFoundError: no such file. CorruptFileError: truncated, damaged, another kind or
        version, missing or surplus tensors, wrong shapes, a wrong checksum.
    """
    path = _existing(path, "safetensors file")
    header, start, order = _read_header(path)
    _check_kind(path, header.metadata, kind, version)
    if expect is not None:
        _check_tensors(path, header, expect)
    device = torch.device(device)
    whole = None if sha256 is None else hashlib.sha256(start)
    tensors: dict[str, Tensor] = {}
    marks: dict[str, str] = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in order:
                values = file.get_tensor(name).clone()
                if whole is not None:
                    _hash(values, whole)
                elif header.digest is not None:
                    marks[name] = _hash(values).hexdigest()
                tensors[name] = values.to(device)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}. Make it again.") from error
    if whole is not None:
        sound = whole.hexdigest() == sha256
    else:
        sound = header.digest in (None, _digest(tensors, marks, header.metadata))
    if not sound:
        raise CorruptFileError(
            f"{path} is damaged: its {'checksum' if whole is None else 'sha256'} is not the one "
            "that was taken when it was written. Copy or make it again."
        )
    return {name: tensors[name] for name in header.tensors}, header.metadata


def _hash(tensor: Tensor, into: Any = None) -> Any:
    """sha256 of a CPU tensor's bytes, or those bytes added to a hash."""
    into = hashlib.sha256() if into is None else into
    into.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return into


def _digest(
    tensors: Mapping[str, Tensor], marks: Mapping[str, str], metadata: Mapping[str, Any]
) -> str:
    """One checksum of metadata, names, dtypes, shapes and the hashes of the tensors' bytes."""
    parts = [[name, str(t.dtype), list(t.shape), marks.get(name)] for name, t in tensors.items()]
    text = json.dumps([metadata, sorted(parts, key=lambda part: str(part[0]))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: StrPath) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(_existing(path, "file"), "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _existing(path: StrPath, what: str) -> Path:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a {what}.")
    if not path.exists():
        raise FileNotFoundError(f"{what} {path} does not exist. Check the path for a slip.")
    return path


def _check_kind(
    path: Path, found: Mapping[str, Any], kind: str | None, version: int | None
) -> None:
    if kind is not None and found.get("kind") != kind:
        raise CorruptFileError(
            f"{path} must be of kind {kind!r}, got {found.get('kind')!r}. "
            "Was another file meant, or was it written by another program?"
        )
    if version is not None and found.get("version") != version:
        raise CorruptFileError(
            f"{path} must have format version {version}, got {found.get('version')!r}. "
            "Make it again, or use the release of t2kernels that wrote it."
        )


def _check_tensors(
    path: Path, header: Header, expect: Mapping[str, tuple[int, ...] | None]
) -> None:
    missing, surplus = (
        sorted(expect.keys() - header.tensors),
        sorted(header.tensors.keys() - expect),
    )
    if missing or surplus:
        raise CorruptFileError(
            f"{path} must hold the tensors {sorted(expect)}, got {sorted(header.tensors)[:8]}"
            f"{' ...' if len(header.tensors) > 8 else ''}. Was another file meant?"
        )
    for name, shape in expect.items():
        got = header.tensors[name][1]
        if shape is not None and got != tuple(shape):
            raise CorruptFileError(
                f"{path}: {name!r} must have shape {tuple(shape)}, got {got}. "
                "Does the file belong to another layer?"
            )


def _own_metadata(path: Path, strings: dict[str, str]) -> dict[str, Any]:
    if _METADATA_KEY not in strings:
        return {}
    try:
        value = json.loads(strings[_METADATA_KEY])
    except (json.JSONDecodeError, RecursionError, TypeError) as error:
        raise CorruptFileError(f"{path} has damaged metadata: {error}. Make it again.") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: its metadata must be a JSON object, got {value!r}.")
    return value


def _truncated(path: Path, expected: int, got: int) -> CorruptFileError:
    state = "truncated" if got < expected else "followed by foreign bytes"
    return CorruptFileError(
        f"{path} is {state}: expected {expected} bytes, got {got}. Copy or make it again."
    )
