"""Which layers of a module ``convert`` replaces, and why it leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .nn.quantized_layers import quantized_kind
from .nn.replaced import is_conv1d, weight_of
from .targets import check_targets, classify, listed, match

# Layers of a Mamba mixer (the module that has A_log and D): on a GPU the fused scan takes the
# weights of all three, elsewhere that of dt_proj.
_READ_BY_SCANS = ("x_proj", "dt_proj", "out_proj")


def _is_linear(module: nn.Module) -> bool:
    """Whether the module computes what nn.Linear or Conv1D does."""
    return type(module).forward is nn.Linear.forward or is_conv1d(module)


def _is_strange_linear(module: nn.Module) -> bool:
    """A kind of nn.Linear with a forward of its own: never converted, but named."""
    return isinstance(module, nn.Linear) and isinstance(module.weight, torch.Tensor)


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # a model without a head may say so this way
        head = None
    return head if isinstance(head, nn.Module) else None


def _reason_to_skip(
    name: str,
    module: nn.Module,
    parent: nn.Module,
    head: nn.Module | None,
    owners: Mapping[int, list[str]],
) -> str | None:
    """Why a linear layer that the targets name is left alone, or None."""
    weight = weight_of(module)
    if "weight" not in module._parameters:
        return "its weight is computed (a parametrisation, pruning), not stored"
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return f"{type(parent).__name__} reads this weight without calling the layer"
    mamba = hasattr(parent, "A_log") and hasattr(parent, "D")
    if mamba and name.rpartition(".")[2] in _READ_BY_SCANS:
        return f"the scan of {type(parent).__name__} may read this weight without calling the layer"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object itself (accelerate's device hooks do that)"
    if any(part.startswith("lora_") for part in name.split(".")):
        return "part of a LoRA adapter"
    if len(owners[id(weight)]) > 1:
        others = [o for o in owners[id(weight)] if o != f"{name}.weight"]
        return f"its weight is tied to {', '.join(others)}"
    if module is head and classify(name) != "head":
        return "output head"
    if quantized_kind(module) is not None:
        return None
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, of no quantised layer that is known here"
    if weight.numel() == 0:
        return f"its weight is empty, shape {tuple(weight.shape)}"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads this weight without calling the layer"
    if not _is_linear(module):
        return f"{type(module).__name__} is an nn.Linear with a forward of its own"
    return None


def check_module(model: object) -> None:
    """TypeError unless it is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got {type(model).__name__}. Load it first, with "
            "AutoModelForCausalLM.from_pretrained(path) for example."
        )


def select(
    model: nn.Module,
    targets: str | Iterable[str] = "all-linear",
    *,
    exclude: str | Iterable[str] | None = None,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """({name: layer that ``convert`` would replace}, {name: why it would be left alone}).

    Changes nothing, reads no values: works on a model without weights (meta device) too.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> chosen, skipped = select(model, ["0"])
    >>> list(chosen), skipped
    (['0'], {'1': 'not among the targets'})
    """
    check_module(model)
    linears = {
        n: m for n, m in model.named_modules() if n and (_is_linear(m) or _is_strange_linear(m))
    }
    if not linears:
        raise ValueError(
            f"model ({type(model).__name__}) holds no nn.Linear or Conv1D layers. For a "
            "single layer use SVFLinear.from_linear(layer)."
        )
    targets = listed("targets", targets)
    exclude = None if exclude is None else listed("exclude", exclude)
    check_targets(linears, targets)
    if exclude is not None:
        check_targets(linears, exclude)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    head = _output_head(model)
    skipped: dict[str, str] = {}
    chosen: dict[str, nn.Module] = {}
    for name, module in linears.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        reason = _reason_to_skip(name, module, parent, head, owners)
        if not match(name, targets, exclude):
            kind = classify(name)
            other = f"a {kind} by its name" if kind in ("head", "router") else None
            skipped[name] = reason or other or "not among the targets"
            continue
        if reason is None:
            chosen[name] = module
        else:
            skipped[name] = reason
    return chosen, skipped
