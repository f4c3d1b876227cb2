"""What a path holds that a command is given: an expert, an adapter of PEFT, a factor store, ..."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from t2kernels.files import CorruptFileError

#: Adapters that sit in the model's own layers, so that it can be called as before.
_INSIDE = ("LORA", "IA3", "SVF")
_MARKS = {
    "adapter_config.json": "adapter",
    "manifest.json": "factor store",
    "metrics.jsonl": "run",
    "config.json": "model",
}


def kind_of(path: Path) -> str:
    """ "expert" for any file; of a folder "adapter" (PEFT's), "factor store", "run" (what training
    wrote beside its expert), "model" or "folder", by the file that marks it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_file():
        return "expert"
    return next((kind for mark, kind in _MARKS.items() if (path / mark).exists()), "folder")


def refuse(path: Path, expected: str) -> ValueError:
    """The error for a folder that is something else than what a command takes."""
    kind = kind_of(path)
    more = ", which trained the expert or adapter beside it" if kind == "run" else ""
    said = "no kind of folder that is known here" if kind == "folder" else f"the folder of a {kind}"
    return ValueError(f"{path} is {said}{more}; expected {expected}")


def adapter_facts(folder: Path) -> dict[str, Any]:
    """Of an adapter of PEFT: method, base model, rank, tensors by name with shape and root mean
    square, and what training wrote beside it.
    """
    config = _json(folder / "adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise FileNotFoundError(f"{folder} is an adapter without {weights.name}; save it again")
    tensors: dict[str, Any] = {}
    try:
        with safe_open(str(weights), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_tensor(name).float()
                rms = float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
                tensors[name] = {"shape": list(tensor.shape), "rms": rms}
    except Exception as error:  # safetensors has its own kinds
        raise CorruptFileError(f"{weights} cannot be read: {error}. Copy it again") from error
    beside = folder / "training.json"
    return {
        "method": "dora" if config.get("use_dora") else str(config.get("peft_type")).lower(),
        "rank": config.get("r") or config.get("rank"),
        "base_model": config.get("base_model_name_or_path"),
        "training": _json(beside) if beside.exists() else {},
        "tensors": tensors,
    }


@contextmanager
def with_adapter(model: Any, folder: Path) -> Iterator[None]:
    """Inside, the model is under an adapter of PEFT; afterwards its layers are its own again."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"{folder} is an adapter of PEFT: pip install 't2kernels[peft]' ({error})"
        ) from error
    kind = str(_json(folder / "adapter_config.json").get("peft_type"))
    if kind not in _INSIDE:
        raise ValueError(
            f"{folder} is an adapter of type {kind}; expected one of {', '.join(_INSIDE)}"
        )
    if kind == "SVF":
        import t2runtime.peft  # noqa: F401 - teaches PEFT the method
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers in its old words.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            wrapped = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder} does not fit this model: {reason}") from error
    try:
        yield
    finally:
        wrapped.unload()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found
