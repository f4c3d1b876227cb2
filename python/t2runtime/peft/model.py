"""The tuner: which layers, whose base weights, mixtures of adapters, adapters by row."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import peft.mapping
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import t2kernels as t2k

from .config import SVFConfig, SVFType, now
from .layer import SVFTunerLinear
from .rows import BASE, AdapterRows

#: Forms of ``add_weighted_adapter``, see ``t2kernels.mix``; "linear" is PEFT's word for the first.
COMBINATIONS = ("deviation", "linear", "paper", "paper-normalised", "authors")


def register() -> None:
    """Make SVF known to PEFT. A second call changes nothing."""
    key = SVFType.SVF
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = SVFConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = SVFModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = SVFModel.prefix


class SVFModel(BaseTuner):
    """A model whose linear layers have SVF adapters; made by ``peft.get_peft_model``."""

    prefix = "svf_"
    tuner_layer_cls = SVFTunerLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # -- making adapters -----------------------------------------------------------------------

    def _prepare_adapter_config(
        self, peft_config: SVFConfig, model_config: dict[str, Any]
    ) -> SVFConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add the adapter to all layers that its configuration names, or to none.

        Raises ValueError where the adapter was trained on another base model, before anything is
        changed, unless inside ``loading(allow_mismatch=True)``.
        """
        # A copy: fingerprints belong to this adapter, and a configuration may be used again.
        config = copy.deepcopy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        folder = config.decomposition or now().decomposition
        self._store = None if folder is None else t2k.FactorStore(folder)
        if self._store is not None and config.rank is None:
            config.rank = self._store.manifest["settings"].get("rank")
        self._hashes: dict[str, str] = {}
        if config.fingerprints and not now().allow_mismatch:
            self._check_base(model, config)
        self._marks: dict[str, str] = {}
        config.fingerprints = self._marks
        # Silent unless stderr is a terminal; layers that are decomposed already do not count.
        self._bar = tqdm(desc="decompose", unit="layer", disable=None)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self._withdraw(model, adapter_name)
            self.peft_config.pop(adapter_name, None)
            raise
        finally:
            self._bar.close()
            del self._bar, self._store, self._hashes, self._marks

    def _check_base(self, model: nn.Module, config: SVFConfig) -> None:
        """Raises unless every layer of the adapter is there with the weight it was trained on."""
        base = config.base_model_name_or_path
        trained_on = f" ({base})" if base else ""
        remedy = (
            "Load the base model that the adapter was trained on, or use it all the same inside "
            "`with t2runtime.peft.loading(allow_mismatch=True):`."
        )
        for name, expected in (config.fingerprints or {}).items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"this SVF adapter was made for another base model{trained_on}: it has layer "
                    f"{name!r}, which {type(model).__name__} lacks. {remedy}"
                ) from None
            found = self._fingerprint(name, module)
            if found != expected:
                raise ValueError(
                    f"this SVF adapter was trained on another base model{trained_on}: the weight "
                    f"of layer {name!r} has fingerprint {found}, the adapter expects {expected}. "
                    f"{remedy}"
                )

    def _fingerprint(self, name: str, module: nn.Module) -> str:
        """Hash of a layer's base weight, made once per adapter."""
        if isinstance(module, SVFTunerLinear):
            return module.fingerprint
        if name not in self._hashes:
            self._hashes[name] = t2k.fingerprint(_weight(module, name))
        return self._hashes[name]

    def _create_and_replace(
        self,
        peft_config: SVFConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SVFTunerLinear):
            layer = target
            needed = layer.full if peft_config.rank is None else min(peft_config.rank, layer.full)
            if layer.rank < needed:
                layer.set_factors(self._factors(layer.base_weight(), current_key, peft_config))
            layer.update_layer(adapter_name, peft_config)
        else:
            weight = _weight(target, current_key, parent)
            mark = self._fingerprint(current_key, target)
            layer = SVFTunerLinear(target, self._factors(weight, current_key, peft_config), mark)
            layer.update_layer(adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        self._marks[current_key] = layer.fingerprint

    def _factors(self, weight: torch.Tensor, name: str, config: SVFConfig) -> t2k.SVDFactors:
        """The factors of ``weight`` (out, in): from the store, or made here."""
        full = min(weight.shape)
        rank = full if config.rank is None else min(config.rank, full)
        try:
            if self._store is None:
                self._bar.set_postfix_str(name)
                self._bar.update()
                return t2k.decompose(weight, rank=rank, precision=config.precision)
            key = self._store.find(name, weight) or name
            self._store.verify(key, weight)
            factors = self._store.load(key, device=weight.device, dtype=weight.dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"SVF adapter, layer {name!r}: {error}") from error
        if factors.rank < rank:
            raise ValueError(
                f"SVF adapter, layer {name!r}: {rank} components are asked for, the decomposition "
                f"at {self._store.path} has {factors.rank}. Set rank={factors.rank}."
            )
        return t2k.SVDFactors(factors.U[:, :rank].contiguous(), factors.S[:rank],
                              factors.V[:, :rank])  # fmt: skip

    def _withdraw(self, model: nn.Module, adapter_name: str) -> None:
        """Take back what a failed injection has done."""
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, SVFTunerLinear):
                continue
            if adapter_name in layer.svf_z:
                del layer.svf_z[adapter_name]
            if not layer.svf_z:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)

    # -- mixtures ------------------------------------------------------------------------------

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "deviation",
    ) -> None:
        """Add an adapter that is a mixture of others, of their effective multipliers z_k.

        "deviation" (also "linear", as PEFT calls the sum of ΔW): z = 1 + Σ w_k (z_k − 1), so a
        weight of 0.5 is half-way from the base model. "paper": Σ w_k z_k; "paper-normalised": that
        over Σ w_k; "authors": that with the nuclear norm of W. An adapter that lacks a layer has
        z = 1 there. The new adapter is "direct", frozen and not active; the others stay.
        """
        self._check_mixture(adapters, weights, adapter_name, combination_type)
        form = "deviation" if combination_type == "linear" else combination_type
        configs = [self.peft_config[name] for name in adapters]
        marks = {name: mark for c in configs for name, mark in (c.fingerprints or {}).items()}
        ranks = [c.rank for c in configs]
        self.peft_config[adapter_name] = replace(
            configs[0],
            target_modules=sorted(marks),
            exclude_modules=None, layers_to_transform=None, layers_pattern=None,
            rank=None if None in ranks else max(ranks), parametrisation="direct",
            init_weights=True, fingerprints=marks,
        )  # fmt: skip
        self.inject_adapter(self.model, adapter_name)
        try:
            self._write_mixture(adapters, weights, adapter_name, form)
        except BaseException:
            self._withdraw(self.model, adapter_name)
            self.peft_config.pop(adapter_name)
            raise

    def _write_mixture(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, form: str
    ) -> None:
        """Write the mixture into z of every layer of the adapter.

        Mixed on the CPU, where a mixture that divides by 0 is found and refused.
        """
        alpha = torch.tensor([list(weights)], dtype=torch.float32)
        for layer in self.modules():
            if isinstance(layer, SVFTunerLinear) and adapter_name in layer.svf_z:
                ones = torch.ones(layer.rank)
                Z = [layer.multiplier(a).cpu() if a in layer.svf_z else ones for a in adapters]
                z = t2k.mix(torch.stack(Z), alpha, form, layer.factors.S.float().cpu())[0]
                target: torch.Tensor = layer.svf_z[adapter_name].weight  # type: ignore[assignment]
                target.copy_(z[: target.shape[0]])

    def _check_mixture(
        self, adapters: Sequence[str], weights: Sequence[float], name: str, combination: str
    ) -> None:
        if combination not in COMBINATIONS:
            raise ValueError(
                f"add_weighted_adapter: combination_type must be one of {COMBINATIONS}, got "
                f"{combination!r}."
            )
        if name in self.peft_config:
            raise ValueError(
                f"add_weighted_adapter: there is an adapter {name!r} already; delete it or choose "
                "another name."
            )
        if not adapters or len(adapters) != len(weights):
            raise ValueError(
                "add_weighted_adapter: one weight per adapter and at least one adapter, got "
                f"{len(adapters)} adapters and {len(weights)} weights."
            )
        for adapter in adapters:
            if adapter not in self.peft_config:
                raise ValueError(
                    f"add_weighted_adapter: no adapter named {adapter!r}; there are "
                    f"{sorted(self.peft_config)}."
                )
            if self.peft_config[adapter].modules_to_save:
                raise ValueError(
                    f"add_weighted_adapter: {adapter!r} has modules_to_save, whose weights have no "
                    "mixture."
                )
        if not all(map(math.isfinite, weights)):
            raise ValueError(
                f"add_weighted_adapter: weights must be finite numbers, got {list(weights)}."
            )

    # -- adapters by row -----------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's entry for ``adapter_names`` of forward and generate."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "adapter_names cannot be used in training mode; call eval() first. To train, "
                "choose the adapter with set_adapter."
            )
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(
                f"adapter_names must be a list with one name per row, got {type(names).__name__}."
            )
        unknown = sorted({n for n in names if n != BASE and n not in self.peft_config})
        if unknown:
            raise ValueError(
                f"adapter_names: there is no adapter {', '.join(map(repr, unknown))}; there are "
                f"{sorted(self.peft_config)} and {BASE!r}."
            )
        repeats = _repeats(kwargs, getattr(self.model, "generation_config", None))
        rows = AdapterRows(names, repeats)
        repeated = [name for name in names for _ in range(repeats)]
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, SVFTunerLinear):
                    hook = partial(_pass_names, names=rows)
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    hook = partial(_pass_names, names=repeated)
                else:
                    continue
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pass_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: object
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _repeats(kwargs: dict[str, Any], default: object) -> int:
    """How often generate repeats each row: beams or return sequences."""
    config = kwargs.get("generation_config") or default
    counts = [1]
    for name in ("num_beams", "num_return_sequences"):
        value = kwargs.get(name) or getattr(config, name, None)
        if isinstance(value, int):
            counts.append(value)
    return max(counts)


def _weight(module: nn.Module, name: str, parent: nn.Module | None = None) -> torch.Tensor:
    """The weight (out, in) of a layer that can have an SVF adapter; TypeError names the reason."""
    reason = None
    if isinstance(module, t2k.SVFLinear):
        reason = "is an SVF layer already; call t2kernels.revert(model) first"
    elif isinstance(module, BaseTunerLayer):
        reason = "has an adapter of another method; call merge_and_unload() first"
    elif isinstance(parent, nn.MultiheadAttention):
        reason = "is read by nn.MultiheadAttention without being called; name it in exclude_modules"
    elif not isinstance(module, (nn.Linear, Conv1D)):
        reason = f"is a {type(module).__name__}; SVF adapts nn.Linear and transformers' Conv1D"
    elif not module.weight.is_floating_point():
        reason = f"has a weight of {module.weight.dtype}; load the model without quantisation"
    elif module.weight.is_meta:
        reason = "has its weight on the meta device; load or bring it back from offloading first"
    if reason is not None:
        raise TypeError(f"SVF adapter: layer {name!r} {reason}.")
    weight: torch.Tensor = module.weight.detach()  # type: ignore[assignment,operator]
    return weight.t() if isinstance(module, Conv1D) else weight
