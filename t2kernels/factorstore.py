"""Reading a folder of factors: names, accuracy and the factors themselves, checked on the way."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import (
    CorruptFileError,
    StrPath,
    file_sha256,
    load_tensors,
    read_header,
    read_json,
)
from .svd import SVDFactors, check_factors, fingerprint
from .targets import normalise, same_layer

__all__ = ["FactorStore"]

MANIFEST = "manifest.json"
KIND = "t2k-factor-store"
FILE_KIND = "t2k-factors"
VERSION = 1


class FactorStore:
    """Read side of a folder made by ``decompose_checkpoint``.

    Opening reads the manifest only; each weight's file is checked when it is used.

    Raises:
        FileNotFoundError: no manifest. CorruptFileError: damaged, another version. ValueError:
        the run that makes it has not finished (``partial=True`` opens it all the same).
    """

    def __init__(self, path: StrPath, *, partial: bool = False) -> None:
        self.path = Path(path)
        #: the names that the call of ``decompose_checkpoint`` which returned this object made
        self.made: tuple[str, ...] = ()
        if not (self.path / MANIFEST).exists():
            raise FileNotFoundError(
                f"{self.path} holds no {MANIFEST}. Make it with decompose_checkpoint()."
            )
        self.manifest = read_manifest(self.path)
        self._entries: dict[str, dict[str, Any]] = self.manifest["weights"]
        if not self.manifest["complete"] and not partial:
            raise ValueError(
                f"{self.path} is unfinished ({len(self._entries)} weights are there). "
                "Run the decomposition again to finish it, or open it with partial=True."
            )

    @property
    def names(self) -> list[str]:
        """Layer names, without ".weight", in the order of the checkpoint."""
        return list(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None

    def find(self, name: str, weight: Tensor | None = None) -> str | None:
        """The store's name for a layer that a model may call otherwise; see ``same_layer``.

        ``weight`` (out, in) decides by its fingerprint where names do not. Raises ValueError
        where several stored weights have that fingerprint.
        """
        name = normalise(name)
        if name in self._entries or weight is None:
            return same_layer(name, self._entries)
        mark = fingerprint(weight)
        return same_layer(name, self._entries, lambda s: self._entries[s]["fingerprint"] == mark)

    def info(self, name: str) -> dict[str, Any]:
        """shape, rank, dtype, transposed, fingerprint, method, repeated, accuracy, seconds, file,
        bytes, sha256."""
        return dict(self._entry(name)[1])

    def load(
        self,
        name: str,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> SVDFactors:
        """The factors of a layer on ``device`` (CPU), U and V in ``dtype`` (as stored).

        What is read is compared with the file's sha256 in the manifest.
        """
        name, entry = self._entry(name)
        path = self.path / entry["file"]
        (m, n), r = entry["shape"], entry["rank"]
        expect = {"U": (m, r), "S": (r,), "Vh": (r, n)}
        tensors, metadata = load_tensors(
            path, kind=FILE_KIND, version=VERSION, expect=expect, sha256=entry["sha256"]
        )
        if metadata.get("name") != name or metadata.get("fingerprint") != entry["fingerprint"]:
            raise CorruptFileError(
                f"{path} holds the factors of {metadata.get('name')!r} "
                f"({metadata.get('fingerprint')}), expected {name!r} ({entry['fingerprint']}). "
                "Were files moved between folders? Run the decomposition again."
            )
        factors = SVDFactors(tensors["U"], tensors["S"], tensors["Vh"].t())
        try:
            check_factors(factors, what=str(path))
        except (TypeError, ValueError) as error:
            raise CorruptFileError(f"{error} Run the decomposition again.") from error
        return factors.to(device, dtype)

    def verify(self, name: str, weight: Tensor) -> None:
        """Raises ValueError unless ``weight`` (out, in) is what the factors were made from."""
        name, entry = self._entry(name)
        if list(weight.shape) != list(entry["shape"]):
            raise ValueError(
                f"{self.path}: {name!r} was made from a weight of shape {tuple(entry['shape'])}, "
                f"got {tuple(weight.shape)}. Pass Conv1D weights as weight.t()."
            )
        found = fingerprint(weight)
        if found != entry["fingerprint"]:
            raise ValueError(
                f"{self.path}: {name!r} was made from a weight with fingerprint "
                f"{entry['fingerprint']}, got {found}. Decompose the checkpoint that is in use."
            )

    def check(self, name: str | None = None) -> None:
        """Reads the files of one or all layers and compares them with their sha256."""
        for key in self.names if name is None else [name]:
            _, entry = self._entry(key)
            path = self.path / entry["file"]
            read_header(path)
            if file_sha256(path) != entry["sha256"]:
                raise CorruptFileError(
                    f"{path} is damaged: its sha256 is not the one in {MANIFEST}. "
                    "Delete it and run the decomposition again."
                )

    def __repr__(self) -> str:
        return f"FactorStore({str(self.path)!r}, {len(self)} weights)"

    def _entry(self, name: str) -> tuple[str, dict[str, Any]]:
        found = self.find(name)
        if found is None:
            near = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.6)
            raise ValueError(
                f"{self.path} has no factors for {name!r}; "
                + (f"near are {near}." if near else f"it has {self.names[:4]} ...")
                + " Decompose the same checkpoint with targets that include it."
            )
        return found, self._entries[found]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of a folder of factors."""
    path = folder / MANIFEST
    manifest = read_json(path, kind=KIND, version=VERSION)
    needed = {"shape", "rank", "dtype", "transposed", "fingerprint", "file", "sha256"}
    weights = manifest.get("weights")
    sound = (
        isinstance(weights, dict)
        and isinstance(manifest.get("settings"), dict)
        and isinstance(manifest.get("complete"), bool)
        # A file name other than the layer's own could lead out of the folder.
        and all(
            isinstance(e, dict) and needed <= e.keys() and e["file"] == f"{name}.safetensors"
            and "/" not in name and "\\" not in name
            for name, e in weights.items()
        )
    )  # fmt: skip
    if not sound:
        raise CorruptFileError(
            f"{path} is damaged: it lacks settings, weights or one of {sorted(needed)}. "
            "Delete the folder and run the decomposition again."
        )
    return manifest
