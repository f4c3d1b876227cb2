"""A plain Hugging Face checkpoint with an expert merged into its weights, shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import t2kernels as t2k
from t2kernels.files import read_json, write_json
from t2runtime.formats.weights import Weights

INDEX = "model.safetensors.index.json"
_WEIGHT_FILES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz",
}  # fmt: skip


def check_belongs(layer: str, expert: t2k.Expert, weight: Tensor, allow_mismatch: bool) -> None:
    """Raise ValueError where the expert's z does not fit the weight or was made for another."""
    rank = expert.z[layer].shape[0]
    if rank > min(weight.shape):
        raise ValueError(
            f"this expert has {rank} values for layer {layer!r}, whose weight {tuple(weight.shape)}"
            f" has {min(weight.shape)} singular values. It was made for another model."
        )
    mark = expert.fingerprints.get(layer)
    if mark is None or allow_mismatch:
        return
    found = t2k.fingerprint(weight)
    if found != mark:
        raise ValueError(
            f"this expert was trained on another base weight of layer {layer!r} (fingerprint "
            f"{mark}, the checkpoint has {found}"
            f"{f'; base model {expert.base_model}' if expert.base_model else ''}). Give that "
            "model, or pass allow_mismatch=True to use it all the same."
        )


def merged_weight(weights: Weights, layer: str, z: Tensor, weight: Tensor) -> Tensor:
    """W′ = W + U·diag(σ⊙(z − 1))·Vᵀ (out, in) in the weight's dtype: what a bank's merge writes."""
    m, n = weight.shape
    factors = weights.factors(layer, weight, z.shape[0])
    holder = nn.Linear(n, m, bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    svf = t2k.SVFLinear.from_linear(holder, factors=factors)
    svf.merge_diagonal(factors.S * z.to(factors.S.device))
    if svf.weight is None:
        raise RuntimeError("a merged layer must have a weight")
    return svf.weight.detach()


def write_merged(
    weights: Weights,
    expert: t2k.Expert,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    allow_mismatch: bool = False,
    tick: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Write the checkpoint of ``weights`` with ``expert`` merged into the empty ``folder``.

    Shards, their names and the index stay as they are; configs, tokenizer and licence are copied.
    In memory are one shard and the decomposition of one weight. dtype: of every floating tensor
    that is written (None: its own).

    Returns {layer: ‖W′ − W‖ / ‖W‖}. Raises ValueError for an expert of another model.
    """
    base = weights.checkpoint
    layers = {weights.by_layer[layer].name: layer for layer in expert.z}
    files: dict[Path, list[str]] = {}
    for name, (file, _, _) in base.tensors.items():
        files.setdefault(file, []).append(name)
    moved: dict[str, float] = {}
    total = 0
    for file, names in files.items():
        plain: dict[str, Tensor] = {}
        with safe_open(str(file), framework="pt", device="cpu") as source:
            for name in names:
                tensor = source.get_tensor(name)
                layer = layers.get(name.removesuffix(".weight"))
                if layer is not None and name.endswith(".weight"):
                    tensor, moved[layer] = _merge(
                        weights, layer, expert, tensor, dtype is not None, allow_mismatch
                    )
                    if tick is not None:
                        tick(layer)
                if dtype is not None and tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                plain[name] = tensor
                total += tensor.numel() * tensor.element_size()
        save_file(plain, str(folder / _name(file, base.path)), metadata={"format": "pt"})
    _copy_rest(base.path, folder, dtype, total)
    return moved


def _merge(
    weights: Weights, layer: str, expert: t2k.Expert, stored: Tensor, wide: bool,
    allow_mismatch: bool,
) -> tuple[Tensor, float]:  # fmt: skip
    """(W′ as it is stored, ‖W′ − W‖ / ‖W‖); ``wide`` leaves W′ in fp32, to be rounded once."""
    turned = weights.by_layer[layer].transposed
    own = (stored.t() if turned else stored).to(weights.device, copy=True)
    check_belongs(layer, expert, own, allow_mismatch)
    own = own.float() if wide else own
    new = merged_weight(weights, layer, expert.z[layer], own.clone())
    norm, change = (float(t.float().norm()) for t in (own, new - own))
    return (new.t() if turned else new).cpu().contiguous(), change / norm if norm else change


def _name(file: Path, folder: Path) -> str:
    """A lone file gets the name that everybody looks for."""
    return file.name if (folder / INDEX).exists() else "model.safetensors"


def _copy_rest(base: Path, folder: Path, dtype: torch.dtype | None, total: int) -> None:
    """Everything of a checkpoint that is neither weights nor its card."""
    for file in sorted(base.iterdir()):
        weights = file.suffix in _WEIGHT_FILES or file.name.endswith(".index.json")
        if not file.is_file() or weights or file.name.startswith("."):
            continue
        if file.name.lower() == "readme.md" or (file.name == "config.json" and dtype is not None):
            continue
        shutil.copyfile(file, folder / file.name)
    if dtype is not None:
        config = read_json(base / "config.json")
        write_json(folder / "config.json", _retyped(config, str(dtype).removeprefix("torch.")))
    if (base / INDEX).exists():
        index = read_json(base / INDEX)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _retyped(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config, and those inside it, with another dtype under the keys that they use for it."""
    keys = {"dtype", "torch_dtype"} & config.keys()
    new = {k: _retyped(v, dtype) if isinstance(v, dict) else v for k, v in config.items()}
    return new | dict.fromkeys(keys or ({"torch_dtype"} if "model_type" in config else ()), dtype)
