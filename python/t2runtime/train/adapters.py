"""What is trained, behind one seam: an SVF expert, or LoRA, DoRA and IA3 of PEFT.

The loop asks an adapter for its parameters, for the base model beside it (the reference, without a
second copy), for weights to sample from, and for copies of its state. It knows nothing else of it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import t2kernels as t2k

_NAME = "t2-training"
#: IA3 scales the input of a block's last MLP layer, and the output of any other (its paper's rule).
_FEEDFORWARD = ("down_proj", "fc2", "fc_out", "w2", "wo", "lin2", "linear2", "dense_4h_to_h")
METHODS = ("svf", "lora", "dora", "ia3")


class Adapter(Protocol):
    """The seam. State travels as {name: CPU tensor} under the names of `parameters`."""

    method: str

    def start(self, recompute: bool) -> None:
        """At the base, with gradients on. `recompute`: x·V again in backward, where that means
        something.
        """

    def stop(self) -> None:
        """At the base, with gradients off."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves, by name."""

    def base(self) -> AbstractContextManager[None]:
        """Inside, the model is the base; no gradient may be pending."""

    def rollout(self, form: str) -> AbstractContextManager[None]:
        """Inside, the model has the present state: merged into the weights, or factorised."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with before it is taken up, in plain values: `method`, the
        names of its `layers`, a checksum of their base `weights`, and what else says how it is made
        (`rank`, `parametrisation`). Saved in config.json.
        """

    def moved(self) -> dict[str, float]:
        """Per layer, the root mean square of what training has changed."""

    def trained(self, metadata: Mapping[str, Any]) -> Any:
        """The present state as what is kept, with `.metadata`, `.description` and `.save(path)`."""

    def using(self, trained: Any) -> AbstractContextManager[None]:
        """Inside, the model is under what `trained` gave."""


def snapshot(adapter: Adapter) -> dict[str, Tensor]:
    """A copy of the adapter's state."""
    return {name: p.detach().cpu().clone() for name, p in adapter.parameters().items()}


@torch.no_grad()
def restore(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Put a copied state back."""
    for name, parameter in adapter.parameters().items():
        parameter.copy_(state[name])


class SVF:
    """The layers' own z of a converted model."""

    method = "svf"

    def __init__(self, model: Any) -> None:
        self._model, self._layers = model, t2k.svf_layers(model)
        self._bank = t2k.ExpertBank(model)
        self._recompute = {name: layer.recompute for name, layer in self._layers.items()}

    def start(self, recompute: bool) -> None:
        """z = 1; in "sigmoid-normalised" layers, too, a constant z is the base."""
        t2k.trainable(self._model)
        self._reset()
        for name, layer in self._layers.items():
            layer.recompute = recompute or self._recompute[name]

    def stop(self) -> None:
        """z = 1, frozen."""
        self._reset()
        for name, layer in self._layers.items():
            layer.z.requires_grad_(False)
            layer.z.grad = None
            layer.recompute = self._recompute[name]

    @torch.no_grad()
    def _reset(self) -> None:
        for layer in self._layers.values():
            layer.z.fill_(1.0)

    def parameters(self) -> dict[str, nn.Parameter]:
        """z per layer."""
        return {name: layer.z for name, layer in self._layers.items()}

    def base(self) -> AbstractContextManager[None]:
        """The stored weights, bit-exact."""
        context: AbstractContextManager[None] = self._bank.use(None)
        return context

    @contextmanager
    def rollout(self, form: str) -> Iterator[None]:
        """Merging keeps a copy of the adapted weights for the length of the block."""
        if form == "factorised":
            yield
            return
        self._bank.add(_NAME, t2k.Expert.from_model(self._model), overwrite=True)
        self._bank.merge(_NAME)
        try:
            yield
        finally:
            self._bank.unmerge()
            self._bank.remove(_NAME)

    def identity(self) -> dict[str, Any]:
        """Layers, their ranks, parametrisation and base weights."""
        layers = self._layers
        return {
            "method": self.method,
            "layers": list(layers),
            "rank": sorted({layer.rank for layer in layers.values()}),
            "parametrisation": sorted({layer.parametrisation for layer in layers.values()}),
            "weights": _digest([layer.fingerprint for layer in layers.values()]),
        }

    @torch.no_grad()
    def moved(self) -> dict[str, float]:
        """Of z_eff − 1."""
        return {n: _rms(layer.multiplier - 1) for n, layer in self._layers.items()}

    def trained(self, metadata: Mapping[str, Any]) -> Any:
        """A `t2k.Expert`."""
        return t2k.Expert.from_model(self._model, metadata=metadata)

    @contextmanager
    def using(self, trained: Any) -> Iterator[None]:
        """Factorised."""
        self._bank.add(_NAME, trained, overwrite=True)
        try:
            with self._bank.use(_NAME):
                yield
        finally:
            self._bank.remove(_NAME)


class Peft:
    """LoRA, DoRA or IA3 on the layers that SVF would take, through PEFT.

    PEFT replaces the layers inside `model`, which stays the module to call; `peft_model` is its
    wrapper, whose `save_pretrained` writes the usual folder.
    """

    def __init__(
        self,
        model: Any,
        method: str,
        targets: str | list[str] = "all-linear",
        *,
        rank: int = 16,
        seed: int = 0,
    ) -> None:
        if method not in METHODS[1:]:
            raise ValueError(f"method must be one of {', '.join(METHODS[1:])}, got {method!r}")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        try:
            import peft
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as error:
            raise ImportError(
                f"method {method!r} needs peft: pip install 't2kernels[peft]' ({error})"
            ) from error
        names = list(t2k.select(model, targets)[0])
        config: Any
        if method == "ia3":
            ends = [name for name in names if name.rpartition(".")[2] in _FEEDFORWARD]
            config = peft.IA3Config(target_modules=names, feedforward_modules=ends)
        else:
            config = peft.LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules=names, use_dora=method == "dora"
            )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT asks by a name that transformers has deprecated.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            torch.manual_seed(seed)
            self.peft_model = peft.get_peft_model(model, config)
        self.method, self._facts = method, dict[str, Any](layers=names)
        if method != "ia3":  # which has none
            self._facts["rank"] = [rank]
        self._tuned = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._start = snapshot(self)
        self._fingerprint = _digest([t2k.fingerprint(w) for w in self._weights() if w.dim() == 2])
        self.stop()

    def _weights(self) -> list[Tensor]:
        """Base weights, and biases, of the tuned layers."""
        return [p for layer in self._tuned for p in layer.get_base_layer().parameters()]

    def start(self, recompute: bool) -> None:
        """As PEFT initialised it, which is the base."""
        restore(self, self._start)
        for parameter in self.peft_model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

    def stop(self) -> None:
        """As initialised, frozen."""
        restore(self, self._start)
        for parameter in self.parameters().values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """PEFT's own parameters."""
        prefix = self.peft_model.base_model.prefix
        return {n: p for n, p in self.peft_model.named_parameters() if prefix in n}

    @contextmanager
    def base(self) -> Iterator[None]:
        """The stored weights; PEFT turns its layers off."""
        wants = {name: p.requires_grad for name, p in self.parameters().items()}
        try:
            with self.peft_model.disable_adapter():
                yield
        finally:
            # PEFT turns every gradient on when it comes back.
            for name, parameter in self.parameters().items():
                parameter.requires_grad_(wants[name])

    @contextmanager
    def rollout(self, form: str) -> Iterator[None]:
        """PEFT unmerges by subtraction, which drifts: here the very weights come back."""
        if form == "factorised":
            yield
            return
        kept = [(weight, weight.data) for weight in self._weights()]
        self.peft_model.merge_adapter(safe_merge=True)
        try:
            yield
        finally:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Unmerge result can be inaccurate")
                self.peft_model.unmerge_adapter()
            for weight, data in kept:
                weight.data = data

    def identity(self) -> dict[str, Any]:
        """Method, rank, layers and their base weights."""
        return {"method": self.method, **self._facts, "weights": self._fingerprint}

    @torch.no_grad()
    def moved(self) -> dict[str, float]:
        """Of each tensor's distance from its start."""
        start = self._start
        return {n: _rms(p.cpu() - start[n]) for n, p in self.parameters().items()}

    def trained(self, metadata: Mapping[str, Any]) -> PeftWeights:
        """The present weights."""
        return PeftWeights(self, snapshot(self), dict(metadata))

    @contextmanager
    def using(self, trained: Any) -> Iterator[None]:
        """Factorised, as PEFT computes."""
        before = snapshot(self)
        restore(self, trained.state)
        try:
            yield
        finally:
            restore(self, before)


class PeftWeights:
    """Trained weights of a PEFT adapter; `save` writes PEFT's own folder."""

    def __init__(self, adapter: Peft, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self.adapter, self.state, self.metadata, self.description = adapter, state, metadata, ""

    def save(self, path: str | Path) -> None:
        """PEFT's folder (safetensors), with training.json beside the weights."""
        folder = Path(path)
        with self.adapter.using(self):
            self.adapter.peft_model.save_pretrained(str(folder))
        facts = {"description": self.description, **self.metadata}
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def _rms(change: Tensor) -> float:
    return float(change.float().square().mean().sqrt())


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
