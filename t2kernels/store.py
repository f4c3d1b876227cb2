"""A whole checkpoint's factors in a folder: made weight by weight, resumable, checked when read.

    out/manifest.json                  what is in the folder, settings, accuracy, fingerprints
    out/<layer name>.safetensors       U (m, r), S (r,), Vh (r, n)

A weight's file is written whole, then the manifest that names it: whatever moment a run is killed
at, every entry of the manifest is good, and the next run goes on behind the last one.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import Checkpoint, Weight
from .factorstore import FILE_KIND, KIND, MANIFEST, VERSION, FactorStore, read_manifest
from .files import (
    CorruptFileError,
    SaveError,
    StrPath,
    file_sha256,
    folder_lock,
    read_header,
    remove_temporaries,
    save_tensors,
    write_json,
)
from .svd import SVDFactors, accuracy, decompose_and_tell, fingerprint
from .targets import Targets, listed

__all__ = ["FactorStore", "decompose_checkpoint"]

logger = logging.getLogger(__name__)

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}


def decompose_checkpoint(
    path: StrPath,
    out: StrPath,
    *,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    precision: str = "fp32",
    device: str | torch.device | None = None,
    method: str | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> FactorStore:
    """Decomposes the 2-D weights of a checkpoint into the folder ``out``; see ``decompose``.

    Run it again after a kill: finished weights are kept if the settings and their fingerprints
    agree. A run with other ``targets`` adds to the folder, so that a large checkpoint can be done
    in parts; nothing is removed. In memory are at most two weights, their factors and the workspace
    of one SVD (fp32: about 7 copies of the weight in fp32, fp64 and "gram" twice that). The
    manifest says of every weight what made it and how accurate it is.

    Args:
        path: a local Hugging Face folder (``model.safetensors`` or an index of shards) or one
            .safetensors file. GPT-2's Conv1D weights are decomposed as (out, in).
        out: the folder to make or to go on with.
        targets, exclude: as in ``convert``; see ``t2kernels.targets.match``.
        rank: keep at most this many singular values of each weight.
        dtype: of U and V; None is each weight's own.
        precision: "fp32" or "fp64", see ``decompose``.
        device: where to compute; None is the first GPU where there is one, else the CPU.
        method: "svd", "gram" or None, see ``decompose``. A weight that misses the bounds is made
            again by "svd" in fp64, and its entry says so.
        progress: a bar with the layer and the time left, on stderr if that is a terminal.
        overwrite: drop the factors that are in ``out`` instead of going on.

    Returns:
        The finished ``FactorStore``.

    Raises:
        FileNotFoundError, CorruptFileError: the checkpoint. ValueError: targets that match
        nothing, ``out`` made with other settings or from another checkpoint, weights with NaN.
        SaveError: no room on the disk. RuntimeError: another process writes to ``out``.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"decompose_checkpoint: rank must be a positive int or None, got {rank!r}."
        )
    if dtype is not None and dtype not in _DTYPES.values():
        raise TypeError(f"decompose_checkpoint: dtype must be a float or None, got {dtype}.")
    if precision not in ("fp32", "fp64"):
        raise ValueError(
            f"decompose_checkpoint: precision must be 'fp32' or 'fp64', got {precision!r}."
        )
    targets = listed("targets", targets)
    exclude = None if exclude is None else listed("exclude", exclude)
    checkpoint = Checkpoint(path)
    weights, skipped = checkpoint.weights(targets, exclude)
    for name, reason in skipped.items():
        logger.warning("%s is left out: %s", name, reason)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"rank": rank, "dtype": _dtype_name(dtype), "precision": precision}

    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot make the folder {folder}: {error}.") from error
    with folder_lock(folder):
        manifest = _open_manifest(folder, settings, overwrite)
        entries: dict[str, Any] = manifest["weights"]
        _check_same_source(folder, manifest, checkpoint, weights)
        pending = [w for w in weights if not _is_done(folder, w, entries.get(w.name))]
        _check_room(folder, pending, rank, dtype)
        order = [*entries, *(w.name for w in pending if w.name not in entries)]
        manifest |= {
            "source": str(path),
            "model_types": sorted(checkpoint.model_types),
            "targets": targets,
            "exclude": exclude,
            "skipped": skipped,
            "complete": not pending,
        }
        write_json(folder / MANIFEST, manifest)
        waiting: tuple[str, Future[dict[str, Any]]] | None = None

        def record() -> None:
            """What the writer was given last, into the manifest."""
            nonlocal waiting
            if waiting is None:
                return
            (name, written), waiting = waiting, None
            entries[name] = written.result()
            manifest["weights"] = {name: entries[name] for name in order if name in entries}
            manifest["complete"] = len(manifest["weights"]) == len(order)
            write_json(folder / MANIFEST, manifest)

        # One weight is hashed and written while the next is made.
        with ThreadPoolExecutor(1, thread_name_prefix="factors") as writer:
            try:
                for weight in _with_bar(pending, len(weights), progress):
                    write = _decompose_one(folder, weight, rank, dtype, precision, device, method)
                    record()
                    waiting = weight.name, writer.submit(write)
            finally:
                record()
    store = FactorStore(folder)
    store.made = tuple(weight.name for weight in pending)
    return store


def _decompose_one(
    folder: Path,
    weight: Weight,
    rank: int | None,
    dtype: torch.dtype | None,
    precision: str,
    device: str | torch.device,
    method: str | None,
) -> Callable[[], dict[str, Any]]:
    """The factors of one weight; what is returned writes them and gives their manifest entry."""
    start = time.perf_counter()
    values = weight.read()
    stored = _DTYPES[weight.dtype] if dtype is None else dtype
    # First in the dtype of the computation: the error of the SVD and the error of rounding its
    # factors to bf16 are told apart.
    full = torch.float64 if stored == torch.float64 else torch.float32
    try:
        cut = None if rank is None else min(rank, weight.rank)
        factors, how = decompose_and_tell(values, cut, full, precision, device, method)
    except ValueError as error:
        raise ValueError(f"{weight.file}: {weight.name}: {error}") from error
    measured = "fp64" if full == torch.float64 else precision
    reached = accuracy(values, factors, precision=measured)
    relative_error_stored = reached.relative_error
    if stored != full:
        factors = factors.to(dtype=stored)
        relative_error_stored = accuracy(values, factors, precision=measured).relative_error
    factors = factors.to("cpu")
    made = {
        "shape": list(weight.shape),
        "rank": factors.rank,
        "dtype": _dtype_name(stored),
        "transposed": weight.transposed,
        "method": how,
        # The first result missed its bounds.
        "repeated": how == "svd fp64" and full == torch.float32 and precision == "fp32",
        "accuracy": {
            "relative_error": reached.relative_error,
            "relative_error_stored": relative_error_stored,
            "orthogonality_u": reached.orthogonality_u,
            "orthogonality_v": reached.orthogonality_v,
        },
        "seconds": round(time.perf_counter() - start, 3),
    }
    return partial(_write_one, folder, weight.name, values, factors, made)


def _write_one(
    folder: Path, name: str, values: Tensor, factors: SVDFactors, made: dict[str, Any]
) -> dict[str, Any]:
    """Factors of one weight on the disk; returns its entry in the manifest."""
    mark = fingerprint(values)
    file = f"{name}.safetensors"
    metadata = {"kind": FILE_KIND, "version": VERSION, "name": name, "fingerprint": mark}
    tensors = {"U": factors.U, "S": factors.S, "Vh": factors.V.t()}
    save_tensors(folder / file, tensors, metadata, digest=False)  # the manifest has one
    return {
        **made,
        "fingerprint": mark,
        "file": file,
        "bytes": (folder / file).stat().st_size,
        "sha256": file_sha256(folder / file),
    }


def _open_manifest(folder: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The manifest to go on with, or a new one; clears what a killed run left half-written."""
    remove_temporaries(folder)
    fresh = {"kind": KIND, "version": VERSION, "complete": False, "settings": settings}
    fresh["weights"] = {}
    path = folder / MANIFEST
    if not path.exists():
        strangers = sorted(p.name for p in folder.iterdir())
        if strangers:
            raise ValueError(
                f"{folder} holds {strangers[:4]} but no {MANIFEST}, so it is not a factor store. "
                "Choose an empty or a new folder."
            )
        return fresh
    if overwrite:
        _clear(folder)
        return fresh
    manifest = read_manifest(folder)
    if manifest["settings"] != settings:
        differing = {k: v for k, v in settings.items() if manifest["settings"].get(k) != v}
        before = {k: manifest["settings"].get(k) for k in differing}
        raise ValueError(
            f"{folder} was made with {before}, now {differing} is asked for. "
            "Use the same settings to go on, another folder, or overwrite=True."
        )
    return manifest


def _check_same_source(
    folder: Path, manifest: dict[str, Any], checkpoint: Checkpoint, weights: Sequence[Weight]
) -> None:
    """A folder holds one checkpoint: one weight that both have must have the values it had.

    The path does not count (checkpoints are moved), the weights asked for now need not be those
    of the run before (other targets); those are compared one by one in ``_is_done``.
    """
    entries: dict[str, Any] = manifest["weights"]
    if not entries or any(w.name in entries for w in weights):
        return
    shared = checkpoint.named(list(entries))
    if not shared:
        raise ValueError(
            f"{folder} holds factors of another checkpoint ({manifest.get('source')}): none of "
            f"its {len(entries)} weights is in {checkpoint.path}. "
            "Use another folder or overwrite=True."
        )
    # The smallest one: enough to tell two checkpoints apart, and soon read.
    weight = min(shared, key=lambda w: w.cost)
    _is_done(folder, weight, entries[weight.name])


def _clear(folder: Path) -> None:
    """Deletes this package's files only, the manifest last, so that a kill can be resumed."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            ours = read_header(path).metadata.get("kind") == FILE_KIND
        except CorruptFileError:
            ours = False
        if ours:
            path.unlink()
    (folder / MANIFEST).unlink()


def _is_done(folder: Path, weight: Weight, entry: dict[str, Any] | None) -> bool:
    """Whether the weight's file is there and whole; raises if it was made from other values."""
    if entry is None:
        return False
    if (
        entry["fingerprint"] != fingerprint(weight.read())
        or entry["transposed"] != weight.transposed
    ):
        raise ValueError(
            f"{folder} holds factors of another checkpoint: {weight.name!r} was made from other "
            f"values than those in {weight.file}. Use another folder or overwrite=True."
        )
    path = folder / entry["file"]
    try:
        read_header(path)
        whole = file_sha256(path) == entry["sha256"]
    except (FileNotFoundError, CorruptFileError) as error:
        logger.warning("%s is made again: %s", weight.name, error)
        return False
    if not whole:
        logger.warning("%s is made again: %s is damaged", weight.name, path)
    return whole


def _check_room(
    folder: Path, pending: Sequence[Weight], rank: int | None, dtype: torch.dtype | None
) -> None:
    """Hours of work must not end at a full disk that could be foreseen."""
    needed = 0
    for w in pending:
        r = w.rank if rank is None else min(rank, w.rank)
        needed += r * sum(w.shape) * (_DTYPES[w.dtype] if dtype is None else dtype).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SaveError(
            f"{folder} needs {needed / 2**30:.1f} GiB for {len(pending)} weights, "
            f"{free / 2**30:.1f} GiB are free. Use another disk, a lower rank or dtype=bfloat16."
        )


def _with_bar(pending: Sequence[Weight], total: int, progress: bool) -> Iterator[Weight]:
    """``pending`` with a bar whose time left follows the cost of the weights, not their number."""
    done = total - len(pending)
    with tqdm(
        total=sum(w.cost for w in pending),
        desc="decompose",
        # None: silent unless stderr is a terminal.
        disable=None if progress else True,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}",
        # The first estimate counts: weights are few and long.
        smoothing=0.1,
    ) as bar:
        for i, weight in enumerate(pending, start=done + 1):
            bar.set_postfix_str(f"{i}/{total} {weight.name}")
            yield weight
            bar.update(weight.cost)


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
