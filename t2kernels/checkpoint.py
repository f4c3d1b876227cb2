"""Reading a Hugging Face checkpoint one weight at a time, by name, from safetensors only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import CorruptFileError, StrPath, check_name, read_header, read_json
from .targets import Targets, check_targets, is_conv1d, match, normalise

__all__ = ["Checkpoint", "Weight"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True)
class Weight:
    """One 2-D weight of a checkpoint, as the layer y = x Wᵀ uses it."""

    #: the layer's name, without ".weight"
    name: str
    #: (out, in)
    shape: tuple[int, int]
    #: as safetensors writes it, e.g. "BF16"
    dtype: str
    #: stored as (in, out), as GPT-2's Conv1D does
    transposed: bool
    file: Path

    @property
    def rank(self) -> int:
        return min(self.shape)

    @property
    def cost(self) -> int:
        """Proportional to the time of its SVD."""
        return self.shape[0] * self.shape[1] * self.rank

    def read(self) -> Tensor:
        """The values (out, in). The file is opened anew, so that no more than this stays mapped."""
        try:
            with safe_open(str(self.file), framework="pt", device="cpu") as file:
                weight: Tensor = file.get_tensor(f"{self.name}.weight")
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(
                f"{self.file}: {self.name}.weight cannot be read: {error}. Copy the file again."
            ) from error
        return weight.t() if self.transposed else weight


class Checkpoint:
    """The tensors of a folder (one file or an index of shards) or of one .safetensors file."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(
                f"checkpoint {self.path} does not exist. Give a local folder or .safetensors file."
            )
        folder = self.path if self.path.is_dir() else self.path.parent
        files = _files(self.path)
        #: tensor name -> (file, dtype, shape)
        self.tensors: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for file, wanted in files.items():
            header = read_header(file)
            for name in header.tensors if wanted is None else wanted:
                if name not in header.tensors:
                    raise CorruptFileError(
                        f"{file} lacks {name!r}, which {INDEX} says it holds. Copy it again."
                    )
                self.tensors[name] = (file, *header.tensors[name])
        config = folder / "config.json"
        self.model_types = _model_types(read_json(config)) if config.exists() else set()
        if not self.model_types and self._looks_like_conv1d():
            self.model_types = {"gpt2"}

    def weights(
        self, targets: Targets, exclude: Targets | None
    ) -> tuple[list[Weight], dict[str, str]]:
        """The weights asked for, in the order of the files, and why others were skipped."""
        chosen: list[Weight] = []
        skipped: dict[str, str] = {}
        for tensor, (file, dtype, shape) in self.tensors.items():
            name = normalise(tensor)
            if not match(name, targets, exclude) or len(shape) < 2:
                continue
            if len(shape) != 2:
                skipped[tensor] = (
                    f"shape {shape}: a stack of matrices or a convolution, not a layer"
                )
            elif not tensor.endswith(".weight"):
                skipped[tensor] = "not the .weight of a layer"
            elif dtype not in _FLOATS:
                skipped[tensor] = f"dtype {dtype}: dequantise the checkpoint first"
            elif 0 in shape:
                skipped[tensor] = f"shape {shape}: empty"
            else:
                check_name(name, f"{file}: layer name")
                transposed = is_conv1d(name, self.model_types)
                m, n = reversed(shape) if transposed else shape
                chosen.append(Weight(name, (m, n), dtype, transposed, file))
        # Entries of `targets` that reach only what `exclude` takes away are no slip.
        check_targets([n for n, (_, _, s) in self.tensors.items() if len(s) > 1], targets)
        if not chosen:
            raise ValueError(
                f"{self.path}: nothing left to decompose for targets={targets!r}, "
                f"exclude={exclude!r}. Skipped: {skipped or 'nothing'}."
            )
        return chosen, skipped

    def named(self, names: Iterable[str]) -> list[Weight]:
        """Those of these layers, as ``weights`` names them, whose 2-D weights are here."""
        wanted, found = set(names), []
        for tensor, (file, dtype, shape) in self.tensors.items():
            name = normalise(tensor)
            if name in wanted and len(shape) == 2 and tensor.endswith(".weight"):
                transposed = is_conv1d(name, self.model_types)
                m, n = reversed(shape) if transposed else shape
                found.append(Weight(name, (m, n), dtype, transposed, file))
        return found

    def _looks_like_conv1d(self) -> bool:
        """Without a config: GPT-2's c_attn.weight is (in, out) and its bias says which is out."""
        for name, (_, _, shape) in self.tensors.items():
            if name.endswith("c_attn.weight") and len(shape) == 2 and shape[0] != shape[1]:
                bias = self.tensors.get(name.removesuffix("weight") + "bias")
                return bias is not None and bias[2] == (shape[1],)
        return False


def _files(path: Path) -> dict[Path, list[str] | None]:
    """File -> the tensors the index wants from it (None: all it has)."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"checkpoint {path} must be a folder or a .safetensors file, got {path.suffix!r}. "
                "Pickled checkpoints are never read: convert them to safetensors first."
            )
        return {path: None}
    if (path / INDEX).exists():
        files: dict[Path, list[str] | None] = {}
        index = read_json(path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CorruptFileError(f"{path / INDEX} must hold a 'weight_map'. Copy it again.")
        for name, file in index.items():
            # The index is foreign: a shard must be a plain file of this folder.
            listed = files.setdefault(path / check_name(file, f"{path / INDEX}: file"), [])
            if listed is not None:
                listed.append(name)
        return files
    if (path / SINGLE).exists():
        return {path / SINGLE: None}
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return {others[0]: None}
    pickles = [p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in path.glob(suffix)]
    raise FileNotFoundError(
        f"checkpoint {path} must hold {SINGLE} or {INDEX}, got "
        f"{[p.name for p in others][:4] or pickles[:4] or 'no weights'}. "
        + ("Pickled checkpoints are never read: convert them to safetensors." if pickles else "")
    )


def _model_types(config: Any) -> set[str]:
    """Every "model_type" of a config, also of the models inside a composed one."""
    found: set[str] = set()
    if isinstance(config, dict):
        kind = config.get("model_type")
        if isinstance(kind, str):
            found.add(kind)
        nested: Iterable[Any] = config.values()
        for value in nested:
            if isinstance(value, dict):
                found |= _model_types(value)
    return found
