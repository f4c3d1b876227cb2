"""The best rank-k LoRA of an expert: from the factors, without another decomposition.

W′ − W = U·diag(e)·Vᵀ with e = σ⊙(z − 1). U and V have orthonormal columns, so |e| are the singular
values of W′ − W, and the k largest of them give its best approximation of rank k (Eckart–Young).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import t2kernels as t2k
from t2runtime.formats.merged import check_belongs
from t2runtime.formats.weights import Weights


@dataclass(frozen=True)
class Low:
    """B·A (out, in) ≈ W′ − W: A (k, in), B (out, k), fp32 on the CPU.

    error: ‖W′ − W − B·A‖ / ‖W′ − W‖, 0 where W′ = W. change: ‖W′ − W‖ / ‖W‖.
    """

    A: Tensor
    B: Tensor
    error: float
    change: float


def best_rank(factors: t2k.SVDFactors, z: Tensor, k: int) -> Low:
    """The best rank-k approximation of U·diag(σ⊙(z − 1))·Vᵀ; z (r,). Both halves carry √|e|.

    Where k > r the rows of A and columns of B beyond r are 0.

    >>> import torch
    >>> f = t2k.decompose(torch.diag(torch.tensor([3.0, 1.0])))
    >>> low = best_rank(f, torch.tensor([1.5, 2.0]), 1)
    >>> (low.B @ low.A).round(decimals=4).tolist(), round(low.error, 4)
    ([[1.5, 0.0], [0.0, 0.0]], 0.5547)
    """
    if k < 1:
        raise ValueError(f"the rank of a LoRA must be at least 1, got {k}")
    S = factors.S.float().cpu()
    e = S * (z.float().cpu() - 1)
    order = e.abs().argsort(descending=True, stable=True)
    kept, rest = order[:k], order[k:]
    root = e[kept].abs().sqrt()
    A = torch.zeros(k, factors.in_features)
    B = torch.zeros(factors.out_features, k)
    A[: len(kept)] = root[:, None] * factors.V.float().cpu()[:, kept].t()
    B[:, : len(kept)] = factors.U.float().cpu()[:, kept] * (root * e[kept].sign())
    whole = float(e.double().norm())
    error = float(e[rest].double().norm()) / whole if whole else 0.0
    norm = float(S.double().norm())
    return Low(A, B, error, whole / norm if norm else 0.0)


def lora_of(
    weights: Weights,
    expert: t2k.Expert,
    k: int,
    *,
    allow_mismatch: bool = False,
    tick: Callable[[str], None] | None = None,
) -> dict[str, Low]:
    """{layer: its best rank-k LoRA}. Raises ValueError for an expert of another model."""
    found: dict[str, Low] = {}
    for layer, z in expert.z.items():
        weight = weights.read(layer)
        check_belongs(layer, expert, weight, allow_mismatch)
        # In fp32: rounded to bf16 the columns of U and V are orthonormal to 3e-3 only.
        factors = weights.factors(layer, weight, dtype=torch.float32)
        whole = torch.cat([z, torch.ones(factors.rank - z.shape[0])])
        found[layer] = best_rank(factors, whole, k)
        if tick is not None:
            tick(layer)
    return found


def write_lora(
    lows: Mapping[str, Low], weights: Weights, k: int, base_model: str | None, folder: Path
) -> None:
    """Write PEFT's adapter_config.json and adapter_model.safetensors into ``folder``."""
    tensors: dict[str, Tensor] = {}
    for layer, low in lows.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = low.A.contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = low.B.contiguous()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": k,
        # lora_alpha / r scales B·A; ours is to scale.
        "lora_alpha": k,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": target_modules(lows, weights),
        "fan_in_fan_out": all(weights.by_layer[layer].transposed for layer in lows),
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def target_modules(layers: Mapping[str, object], weights: Weights) -> list[str]:
    """The layers as PEFT and serving engines want them named: by last names ("up_proj") where the
    expert has every matrix of that name, else in full.
    """
    chosen = {weights.by_layer[layer].name for layer in layers}
    matrices = {
        name.removesuffix(".weight")
        for name, (_, _, shape) in weights.checkpoint.tensors.items()
        if name.endswith(".weight") and len(shape) > 1
    }
    named: dict[str, None] = {}
    for layer in layers:
        leaf = layer.rpartition(".")[2]
        alike = {name for name in matrices if name.rpartition(".")[2] == leaf}
        named[leaf if alike <= chosen else layer] = None
    return list(named)
