"""From an SVF adapter of PEFT to ``t2kernels.Expert`` and back: the same z under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import t2kernels as t2k

from .config import SVFConfig, loading
from .layer import SVFTunerLinear


def _root(model: nn.Module) -> nn.Module:
    """The model that the adapters are in: what get_peft_model was called with."""
    if isinstance(model, peft.PeftModel):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model  # type: ignore[return-value]


def tuner_layers(model: nn.Module) -> dict[str, SVFTunerLinear]:
    """The SVF tuner layers by the names that they have in the base model.

    ``model`` is a PeftModel, or a transformers model with adapters of its own.
    """
    return {n: m for n, m in _root(model).named_modules() if isinstance(m, SVFTunerLinear)}


@torch.no_grad()
def to_expert(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    description: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> t2k.Expert:
    """The adapter as an expert: effective multipliers, fingerprints, the base model's name.

    Raises ValueError where the model has no such adapter, or where it also saves whole modules,
    which an expert cannot hold.
    """
    layers = {n: m for n, m in tuner_layers(model).items() if adapter_name in m.svf_z}
    if not layers:
        raise ValueError(
            f"to_expert: {type(model).__name__} has no SVF adapter named {adapter_name!r}."
        )
    config: SVFConfig = model.peft_config[adapter_name]  # type: ignore[assignment,index]
    if config.modules_to_save:
        raise ValueError(
            f"to_expert: {adapter_name!r} has modules_to_save = {sorted(config.modules_to_save)}, "
            "which an expert cannot hold. Keep it as a PEFT adapter."
        )
    z = {}
    for name, layer in layers.items():
        own: torch.Tensor = layer.svf_z[adapter_name].weight  # type: ignore[assignment]
        z[name] = layer.multiplier(adapter_name)[: own.shape[0]]
    model_config = getattr(_root(model), "config", None)
    trained_on = config.base_model_name_or_path or getattr(model_config, "_name_or_path", None)
    marks = {n: layer.fingerprint for n, layer in layers.items()}
    return t2k.Expert(z, marks, trained_on or None, description, dict(metadata or {}))


@torch.no_grad()
def from_expert(
    model: nn.Module,
    expert: t2k.Expert,
    adapter_name: str = "default",
    *,
    allow_mismatch: bool = False,
    **options: Any,
) -> peft.PeftModel:
    """The expert as a "direct" adapter of ``model``, a base model or a PeftModel with others.

    Args:
        allow_mismatch: accept another base model with layers of the same names and sizes.
        options: further fields of SVFConfig, such as task_type="CAUSAL_LM" or decomposition.

    Raises ValueError where the expert is of another model, before anything is changed.
    """
    config = SVFConfig(
        target_modules=sorted(expert.z),
        rank=_common_rank(model, expert),
        fingerprints=dict(expert.fingerprints) or None,
        **options,
    )
    with loading(allow_mismatch=allow_mismatch):
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter_name, config)
            wrapped = model
        else:
            wrapped = peft.get_peft_model(model, config, adapter_name)
    layers = {n: m for n, m in tuner_layers(wrapped).items() if adapter_name in m.svf_z}
    for name, z in expert.fitted(layers, allow_mismatch=allow_mismatch).items():
        target: torch.Tensor = layers[name].svf_z[adapter_name].weight  # type: ignore[assignment]
        target.copy_(z[: target.shape[0]])
    return wrapped


def _common_rank(model: nn.Module, expert: t2k.Expert) -> int | None:
    """k where the expert has min(k, full) values for every layer and fewer than all for some."""
    largest, cut = max(z.shape[0] for z in expert.z.values()), False
    root = _root(model)
    for name, z in expert.z.items():
        try:
            module = root.get_submodule(name)
        except AttributeError:
            base = f" ({expert.base_model})" if expert.base_model else ""
            raise ValueError(
                f"from_expert: the expert has layer {name!r}, which {type(root).__name__} lacks. "
                f"It was made for another model{base}."
            ) from None
        weight = getattr(module, "weight", None)
        full = min(weight.shape) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else 0
        if z.shape[0] > full:
            raise ValueError(
                f"from_expert: the expert has {z.shape[0]} values for layer {name!r}, whose weight "
                f"has {full} singular values. It was made for another model."
            )
        cut = cut or z.shape[0] < full
        if z.shape[0] != min(largest, full):
            return None
    return largest if cut else None
