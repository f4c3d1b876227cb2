"""Any nn.Module to the same module with SVF layers, and back, with a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .nn.factored import Factors
from .nn.group import Group
from .nn.linear import SVFLinear
from .nn.quantized_base import QuantizedBaseLinear
from .nn.quantized_layers import dequantized, quantized_kind
from .nn.replaced import is_conv1d, weight_of
from .nn.routing import Route
from .ops.layout import MAX_MEMBERS
from .quantized import QuantizedFactors, check_kind, quantize
from .selection import check_module, select
from .store import FactorStore
from .svd import SVDFactors
from .targets import classify, sharing


@dataclass(frozen=True)
class Converted:
    """One layer that was replaced."""

    name: str
    in_features: int
    out_features: int
    rank: int


@dataclass
class ConversionReport:
    """What ``convert`` did: ``converted`` layers, ``skipped`` names with the reason, and ``groups``
    of layers that share their input, computed in one call where the policy says so."""

    converted: list[Converted] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    trainable: int = 0
    groups: list[tuple[str, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{len(self.converted)} layers converted, {self.trainable:,} singular values; "
            f"{len(self.skipped)} skipped"
        ]
        lines += [
            f"  + {c.name} ({c.out_features}x{c.in_features}, rank {c.rank})"
            for c in self.converted
        ]
        lines += [f"  = {', '.join(names)} share x" for names in self.groups]
        lines += [f"  - {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def svf_layers(model: nn.Module) -> dict[str, SVFLinear]:
    """The SVF layers of ``model`` by name, in the model's order."""
    check_module(model)
    return {name: m for name, m in model.named_modules() if isinstance(m, SVFLinear)}


def converted_layers(model: nn.Module) -> dict[str, SVFLinear]:
    """As ``svf_layers``; raises when there are none."""
    layers, kind = svf_layers(model), type(model).__name__
    if not layers:
        raise ValueError(f"model ({kind}) has no SVF layers; call t2kernels.convert(model) first.")
    if "_t2_route" not in model.__dict__:
        raise ValueError(
            f"model ({kind}) is not the module that t2kernels.convert was called "
            "with, but one around it. Pass that one: model.module of DistributedDataParallel, "
            "model._orig_mod of torch.compile."
        )
    return layers


def _report_tensors(model: nn.Module, report: ConversionReport) -> None:
    """Name the 3-D expert tensors of mixture-of-experts blocks, which no linear scan finds."""
    kernels = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        for p in module.parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        # Class tokens and tables of positions have three axes too, the first of length 1.
        stack = parameter.dim() == 3 and min(parameter.shape) > 1
        if stack and id(parameter) not in kernels and classify(name) != "embedding":
            report.skipped[name] = (
                f"expert tensor {tuple(parameter.shape)}: a stack of matrices inside one "
                "parameter, not a layer; not converted by this version"
            )


@torch.inference_mode(mode=False)  # inference tensors could never be trained on
def convert(
    model: nn.Module,
    targets: str | Iterable[str] = "all-linear",
    *,
    exclude: str | Iterable[str] | None = None,
    rank: int | None = None,
    factors: str | None = None,
    decomposition: str | Path | FactorStore | Mapping[str, Factors] | None = None,
    keep_weight: bool = True,
    parametrisation: str = "direct",
    precision: str = "fp32",
    recompute: bool = False,
    groups: bool = True,
    progress: bool = True,
) -> ConversionReport:
    """Replace linear layers of ``model`` by ``SVFLinear``, in place.

    The model computes what it did, bit for bit, until an expert is used. Its state dict keeps the
    base's keys and gains one fp32 z per layer. The weights of converted layers are frozen: their
    factors would not follow. ``revert`` undoes all of it.

    Args:
        model: any nn.Module with nn.Linear or transformers' Conv1D layers.
        targets: "all-linear", "mlp", "attention", layer names or their suffixes, or a regex that
            must match the whole name. Tied and output-head layers are left alone.
        exclude: suffixes or a regex of layers to leave alone.
        rank: keep k components per layer and use the delta form; None keeps all. Layers quantised
            by torchao or bitsandbytes need it: k components ride on the quantised weight.
        factors: "int8" or "fp8" holds U and V in 8 bits with a scale per column (weight-only, see
            ``quantize``); None in the weight's dtype.
        decomposition: a folder written by ``t2 decompose`` (or a FactorStore, or a mapping from
            layer names to factors) instead of decomposing here; the base weight must be the same.
            For a quantised layer it may be the weight before it was quantised, whose experts then
            fit; without it, what the quantised weight stands for is decomposed.
        keep_weight: False drops every W. Saves memory; the base is then exact to rounding only.
        parametrisation: of the layers' own z: "direct" or "sigmoid-normalised".
        precision: of the decomposition, "fp32" or "fp64".
        recompute: compute xV again in backward instead of keeping it.
        groups: let layers that get the same x (q, k, v; gate, up) be one call, of the same bits,
            where the policy says so; their V become parts of one buffer. See ``nn/group.py``.
        progress: a progress bar on a terminal.

    Returns:
        A report: what was converted, what was skipped and why. Print it.

    Raises:
        ValueError: nothing matches, the model is converted already, or factors do not fit.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> print(convert(model, ["0"]))
    1 layers converted, 4 singular values; 1 skipped
      + 0 (8x4, rank 4)
      - 2: not among the targets
    """
    if svf_layers(model):
        raise ValueError("model has SVF layers already. Call t2kernels.revert(model) first.")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer or None, got {rank!r}.")
    if not isinstance(groups, bool):
        raise TypeError(f"groups must be True or False, got {type(groups).__name__}.")
    if factors is not None:
        check_kind(factors, "factors", " A folder of `t2 decompose` goes into decomposition=.")
    if rank is not None and not keep_weight:
        raise ValueError(
            "keep_weight=False needs the full rank: U_k·Σ_k·V_kᵀ is not W. Drop one of the two."
        )
    if not isinstance(decomposition, (str, Path, FactorStore, Mapping, type(None))):
        raise TypeError(
            "decomposition must be a folder of `t2 decompose`, a FactorStore, {layer: factors} or "
            f"None, got {type(decomposition).__name__}."
        )
    chosen, skipped = select(model, targets, exclude=exclude)
    report = ConversionReport(skipped=skipped)
    for name in [name for name, module in chosen.items() if weight_of(module).is_meta]:
        del chosen[name]
        report.skipped[name] = "its weight is on the meta device; load the checkpoint first"
    if not chosen:
        raise ValueError(
            "convert: no layer that the targets name can be converted:"
            + "".join(f"\n  {n}: {r}" for n, r in list(report.skipped.items())[:20])
        )
    kinds = {name: kind for name, m in chosen.items() if (kind := quantized_kind(m)) is not None}
    if kinds and rank is None:
        name, kind = next(iter(kinds.items()))
        raise ValueError(
            f"convert: {len(kinds)} layers are quantised ({name!r}: {kind}), so components ride on "
            "the quantised weight and all of them would take more memory than it saves. Pass "
            "rank=k (the least of in and out features keeps all), or exclude these layers."
        )
    source = FactorStore(decomposition) if isinstance(decomposition, (str, Path)) else decomposition
    layers: dict[str, SVFLinear] = {}
    bar = tqdm(chosen.items(), desc="decompose", unit="layer", disable=None if progress else True)
    for name, module in bar:
        bar.set_postfix_str(name)
        layers[name] = _make_layer(
            name, module, source, rank, factors, keep_weight, parametrisation, precision,
            recompute,
        )  # fmt: skip
    if groups:
        report.groups = _tie(layers)
    # All decompositions are done: from here nothing can fail half-way.
    _install(model, layers)
    for name, layer in layers.items():
        report.converted.append(Converted(name, layer.in_features, layer.out_features, layer.rank))
        report.trainable += layer.rank
    _report_tensors(model, report)
    return report


def _make_layer(
    name: str,
    module: nn.Module,
    source: FactorStore | Mapping[str, Factors] | None,
    rank: int | None,
    kind: str | None,
    keep_weight: bool,
    parametrisation: str,
    precision: str,
    recompute: bool,
) -> SVFLinear:
    quantized = quantized_kind(module) is not None
    try:
        weight = dequantized(module) if quantized else weight_of(module)
    except ValueError as error:
        raise ValueError(f"convert: layer {name!r}: {error}") from error
    full = min(weight.shape)
    k = None if rank is None or rank >= full else rank
    given: Factors | None = None
    if isinstance(source, FactorStore):
        values = weight.detach().t() if is_conv1d(module) else weight.detach()
        # Of a quantised layer the store may hold the original: names decide, and a coarse check.
        key = source.find(name, None if quantized else values)
        if key is None:
            raise ValueError(
                f"convert: the factors at {source.path} have none for layer {name!r}. "
                "Decompose the same checkpoint with the same targets."
            )
        if not quantized:
            source.verify(key, values)
        given = source.load(key, device=weight.device, dtype=weight.dtype)
    elif source is not None:
        if name not in source:
            raise ValueError(f"convert: decomposition has no entry for layer {name!r}.")
        given = source[name]
    if given is not None and k is not None and given.S.shape[0] > k:
        if isinstance(given, QuantizedFactors):
            raise ValueError("convert: rank cannot cut 8-bit factors; cut them before quantize.")
        given = SVDFactors(given.U[:, :k], given.S[:k], given.V[:, :k])
    try:
        layer = (QuantizedBaseLinear if quantized else SVFLinear).from_linear(
            module, rank=k, factors=given, keep_weight=keep_weight,
            parametrisation=parametrisation, precision=precision, recompute=recompute,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"convert: layer {name!r}: {error}") from error
    if quantized and isinstance(source, FactorStore) and key is not None:
        layer._fingerprint = source.info(key)["fingerprint"]  # what experts of the original carry
    if kind is not None:
        _quantize_layer(name, layer, kind)
    layer.z.requires_grad_(False)
    # The very same dicts: the handles that their owners hold go on working, now and after revert.
    for attribute in _HOOKS:
        setattr(layer, attribute, getattr(module, attribute))
    return layer


def _tie(layers: Mapping[str, SVFLinear]) -> list[tuple[str, ...]]:
    """Make groups of neighbours that get the same x; returns their names."""
    made = []
    for names in sharing(layers):
        members = [layers[name] for name in names]
        widths = {(m.in_features, m._Vh.dtype, m._Vh.device) for m in members}
        plain = all(type(m) is SVFLinear and m.full_rank for m in members)
        if plain and len(widths) == 1 and len(members) <= MAX_MEMBERS:
            Group(names, members)
            made.append(names)
    return made


def _quantize_layer(name: str, layer: SVFLinear, kind: str) -> None:
    """The layer's factors as ``kind``; 8-bit factors that were given must be of it already."""
    f = layer.factors
    if isinstance(f, SVDFactors):
        layer._set_factors(quantize(f, kind))
    elif f.kind != kind:
        raise ValueError(
            f"convert: decomposition has {f.kind} factors for layer {name!r}, "
            f"factors={kind!r} was asked for. Quantize the full factors, or leave factors= out."
        )


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _install(model: nn.Module, layers: Mapping[str, SVFLinear]) -> None:
    route = Route(model)
    route.layers = tuple(layers.values())
    model._t2_route = route  # type: ignore[assignment]
    offset = 0
    for index, (name, layer) in enumerate(layers.items()):
        layer._route = (route, index, offset)
        # A base weight that an optimiser moves would leave its factors behind.
        if layer.weight is not None and layer.weight.requires_grad:
            route.frozen.append(layer.weight.requires_grad_(False))
        offset += layer.rank
        _set_module(model, name, layer)


def revert(model: nn.Module) -> None:
    """Put the layers back that ``convert`` replaced, with the base weights bit-exact.

    A merged expert is unmerged first. With ``keep_weight=False`` the weights are rebuilt from the
    factors, exact to rounding.
    """
    layers = converted_layers(model)
    if model._t2_route.plan is not None:  # type: ignore[union-attr]
        raise RuntimeError("revert: leave the `with bank.use(...)` block first.")
    for parameter in model._t2_route.frozen:  # type: ignore[union-attr]
        parameter.requires_grad_(True)
    for name, layer in layers.items():
        layer.unmerge()
        _set_module(model, name, layer.original())
    Route.remove(model)
    del model._t2_route


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Turn the layers' own z on for training and return them: the optimiser's parameters.

    Every other parameter is frozen (PEFT's manner): a weight gradient would need an m×n buffer.
    ``revert`` thaws what was frozen here.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> report = convert(model)
    >>> [tuple(z.shape) for z in trainable(model)]
    [(4,), (2,)]
    """
    layers = converted_layers(model)
    if model._t2_route.merged is not None:  # type: ignore[union-attr]
        raise RuntimeError("trainable: an expert is merged into the weights; call bank.unmerge().")
    route: Route = model._t2_route  # type: ignore[assignment]
    for parameter in model.parameters():
        if parameter.requires_grad:
            route.frozen.append(parameter.requires_grad_(False))
    for layer in layers.values():
        layer.z.requires_grad_(True)
        layer._rests_when_compiled = False
    return [layer.z for layer in layers.values()]
