"""Tables of tiles that were timed on a GPU, and the one in force.

A table is one JSON file, made by ``python -m t2kernels.tune`` on the GPU that it is for. It is used
where the GPU's name and Triton's minor version are those it was made with: a file named by the
variable T2_TUNING, or one of the package, ``tables/<gpu>-triton<version>.json`` beside this
folder. A file that is damaged, or made for another GPU or Triton, is an error that names it.
Sizes without an entry, and GPUs without a table, go by the rules of ``config.choose``.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ....files import CorruptFileError, read_json, write_json

KIND, VERSION = "t2kernels tuning table", 1
KERNELS = ("project", "expand", "expand_t", "gradient", "delta")
REMEDY = "python -m t2kernels.tune"
SHIPPED = Path(__file__).parents[1] / "tables"
# The largest number of tokens with an entry of its own.
MOST_TOKENS = 32768
# What a GPU is called where there is none.
INTERPRETER = "interpreter"


class Tile(NamedTuple):
    """One way to cut a (tokens, outputs) product.

    ``chunk`` is the epilogue's column step. ``descriptors``: operands come by TMA. ``persistent``:
    one program per multiprocessor, which goes through several tiles and fetches the next one's
    operands during the epilogue.
    """

    tokens: int
    outputs: int
    inner: int
    warps: int
    stages: int
    weights_first: bool = False
    chunk: int = 64
    descriptors: bool = False
    persistent: bool = False


class Table(NamedTuple):
    """Where a table comes from and its tiles by ``key``."""

    path: Path
    tiles: Mapping[str, Tile]


class _Forced:
    kernel: str | None = None
    tile: Tile | None = None


def triton_version() -> tuple[int, ...]:
    """(3, 9): the part of Triton's version that generated code depends on."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def gpu_name(device: torch.device) -> str:
    """The name of the GPU, or ``INTERPRETER``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else INTERPRETER


def file_name(gpu: str) -> str:
    """What a table of the package is called."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"{slug}-triton{'.'.join(map(str, triton_version()))}.json"


def bucket(size: int) -> int:
    """The next power of two: sizes between two of them share an entry."""
    return 1 << max(size - 1, 0).bit_length()


def key(kernel: str, tokens: int, outputs: int, inner: int, x: Tensor, weight: Tensor) -> str:
    """What an entry of a table is called: kernel, dtypes, sizes rounded up."""
    dtypes = f"{str(x.dtype)[6:]} {str(weight.dtype)[6:]}"
    sizes = f"{bucket(outputs)}x{bucket(inner)}"
    return f"{kernel} {dtypes} {sizes} T{min(bucket(tokens), MOST_TOKENS)}"


def lookup(
    kernel: str, tokens: int, outputs: int, inner: int, x: Tensor, weight: Tensor
) -> Tile | None:
    """The tile that the table in force has for a product, if any."""
    if _Forced.kernel == kernel:
        return _Forced.tile
    table = in_force(x.device)
    if table is None:
        return None
    return table.tiles.get(key(kernel, tokens, outputs, inner, x, weight))


@contextmanager
def forced(kernel: str, tile: Tile | None) -> Iterator[None]:
    """Inside, ``kernel`` uses ``tile``, or with None what the rules say."""
    before = _Forced.kernel, _Forced.tile
    _Forced.kernel, _Forced.tile = kernel, tile
    try:
        yield
    finally:
        _Forced.kernel, _Forced.tile = before


def in_force(device: torch.device) -> Table | None:
    """The table for ``device``: of T2_TUNING, else of the package, else None. Read once."""
    return _in_force(device, os.environ.get("T2_TUNING") or None)


@functools.lru_cache(maxsize=64)
def _in_force(device: torch.device, named: str | None) -> Table | None:
    gpu = gpu_name(device)
    if named is not None:
        return read(Path(named), gpu)
    path = SHIPPED / file_name(gpu)
    return read(path, gpu) if path.exists() else None


def read(path: Path, gpu: str) -> Table:
    """The table in ``path``, for the GPU called ``gpu`` and this Triton.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: it is no whole table.
        ValueError: it was made for another GPU or another Triton.
    """
    value = read_json(path, kind=KIND, version=VERSION)
    here = {"gpu": gpu, "triton": list(triton_version())}
    for name, wanted in here.items():
        if name not in value:
            raise CorruptFileError(
                f"{path} has no {name!r}. Make it again: python -m t2kernels.tune"
            )
        if value[name] != wanted:
            raise ValueError(
                f"{path} was made for {name} {value[name]!r}, here it is {wanted!r}. Unset "
                f"T2_TUNING or make a table here: {REMEDY}"
            )
    entries = value.get("tiles")
    if not isinstance(entries, dict):
        raise CorruptFileError(f"{path}: 'tiles' must be an object, got {entries!r}.")
    return Table(path, {name: _tile(path, name, entry) for name, entry in entries.items()})


def write(path: Path, gpu: str, tiles: Mapping[str, Tile], **about: Any) -> None:
    """Write a table atomically. ``about``: what else a reader may want to know."""
    write_json(
        path,
        {
            "kind": KIND,
            "version": VERSION,
            "gpu": gpu,
            "triton": list(triton_version()),
            **about,
            "tiles": {name: tile._asdict() for name, tile in sorted(tiles.items())},
        },
    )


_NAME = re.compile(rf"({'|'.join(KERNELS)}) \w+ \w+ \d+x\d+ T\d+")
_RANGES = {
    "tokens": (16, 512),
    "outputs": (16, 512),
    "inner": (16, 512),
    "warps": (1, 16),
    "chunk": (16, 512),
}


def _tile(path: Path, name: str, entry: Any) -> Tile:
    """An entry as a tile, every value checked: they become sizes in compiled code."""
    if not _NAME.fullmatch(name):
        raise CorruptFileError(f"{path}: {name!r} names no product.")
    if not isinstance(entry, dict) or set(entry) != set(Tile._fields):
        raise CorruptFileError(
            f"{path}: {name!r} must have {', '.join(Tile._fields)}, got {entry!r}."
        )
    tile = Tile(**entry)
    sizes = {field: getattr(tile, field) for field in _RANGES}
    wrong = [
        field
        for field, size in sizes.items()
        if type(size) is not int
        or size & (size - 1)
        or not _RANGES[field][0] <= size <= _RANGES[field][1]
    ]
    if type(tile.stages) is not int or not 1 <= tile.stages <= 8:
        wrong.append("stages")
    switches = ("weights_first", "descriptors", "persistent")
    wrong += [field for field in switches if type(getattr(tile, field)) is not bool]
    if tile.weights_first and (tile.descriptors or tile.persistent):
        wrong.append("weights_first")
    if wrong:
        raise CorruptFileError(f"{path}: {name!r} has an impossible {', '.join(wrong)}: {entry!r}.")
    return tile
