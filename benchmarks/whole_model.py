"""A whole model in one form: which weights and kernels, one call of it, and whether it is right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import llama
import torch
from harness import GATE_FLOOR, Refused
from torch import Tensor
from transformers import StaticCache

import t2kernels as t2k
from t2kernels.testing import relative_error

EXPERTS = 4
_FAR = 0.05  # more than two layers in bf16 or under 8-bit factors lose to rounding
SLACK = 80  # steps that a cache has room for: a timer's warm-up and one run of its graph


@dataclass(frozen=True)
class Form:
    """One way to run the model; ``setting`` is what it is compared within."""

    targets: str | None  # None: the dense model
    factors: str = "bf16"
    backend: str | None = None
    setting: str = "graph"

    @property
    def name(self) -> str:
        if self.targets is None:
            return "dense"
        return f"{self.targets} {self.factors} {self.backend or 'policy'}"


class Models:
    """The dense model and its twins, which share its weights and their own factors."""

    def __init__(self, size: llama.Size, device: torch.device, positions: int) -> None:
        self.device, self.size = device, size
        self.dense, factors = llama.make_model(size, torch.bfloat16, device, positions)
        self._factors: dict[str, llama.Factors] = {"bf16": factors}
        self._banks: dict[tuple[str, str], t2k.ExpertBank] = {}

    def factors(self, kind: str) -> Any:
        if kind not in self._factors:
            self._factors[kind] = llama.quantized(self._factors["bf16"], kind)
        return self._factors[kind]

    def bank(self, targets: str, kind: str) -> t2k.ExpertBank:
        """The experts of a twin, which is ``bank.model``."""
        if (targets, kind) not in self._banks:
            twin = llama.converted(self.dense, self.factors(kind), targets)
            self._banks[targets, kind] = llama.add_experts(twin, EXPERTS)
        return self._banks[targets, kind]


class Stage:
    """One call of the model over and over: a step of decode, or a prefill, from an empty place in
    the cache. ``before`` puts the cache back to where the stage begins."""

    def __init__(self, model: Any, requests: int, start: int, new: int) -> None:
        config, device = model.config, model.device
        self.model, self.start = model, start
        self.slots: t2k.Slots | None = None
        length = -(-(start + new + SLACK) // 64) * 64  # a mask of another length would be copied
        self.cache = StaticCache(config=config, max_cache_len=length)
        head = config.hidden_size // config.num_attention_heads
        self.cache.early_initialization(
            requests, config.num_key_value_heads, head, model.dtype, device
        )
        generator = torch.Generator().manual_seed(4)
        ids = torch.randint(3, config.vocab_size, (requests, start + new), generator=generator)
        self.ids = ids.to(device)
        place = torch.arange(start, start + new, device=device)
        self.position_ids = place.expand(requests, -1)
        # Ready-made, since a mask that the model makes itself may look at values of the GPU.
        seen = torch.arange(length, device=device)[None] <= place[:, None]
        self.mask = seen.expand(requests, 1, new, length)

    def before(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)

    def fill(self) -> None:
        """The keys and values of the tokens before the stage."""
        if not self.start:
            return
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()
        past = torch.arange(self.start, device=self.ids.device)
        length = self.mask.shape[-1]
        seen = torch.arange(length, device=self.ids.device)[None] <= past[:, None]
        self.model(
            input_ids=self.ids[:, : self.start], position_ids=past.expand(len(self.ids), -1),
            attention_mask=seen.expand(len(self.ids), 1, self.start, length),
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What changes from one call to the next."""
        return {"input_ids": self.ids[:, self.start :], "position_ids": self.position_ids}

    def run(self, model: Any = None) -> Tensor:
        """The last position's logits (requests, vocabulary)."""
        return self.step(model, **self.inputs)

    def step(self, model: Any = None, **inputs: Tensor) -> Tensor:
        """The same for other inputs of the same shape."""
        logits: Tensor = (self.model if model is None else model)(
            **inputs, attention_mask=self.mask, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
        return logits[:, -1]

    def graphs(self) -> t2k.StepGraphs:
        """The stage as a server has it: a call copies its inputs and replays a graph."""
        if self.slots is None:
            raise RuntimeError("the dense model has no slots to serve from")
        return t2k.StepGraphs(self.step, self.inputs, batches=(len(self.ids),), slots=self.slots)


@contextmanager
def within(backend: str | None, stage: Stage) -> Iterator[None]:
    """The backend by force where one is named, and the cache at the stage's beginning."""
    stage.before()
    with nullcontext() if backend is None else t2k.backend(backend):
        yield


def truth(
    models: Models, form: Form, bank: t2k.ExpertBank, ids: Tensor, row: int, z: dict[str, float]
) -> Tensor:
    """The last logits (1, vocabulary) of one request through rebuilt W', in wide precision."""
    wide = torch.float64 if models.device.type == "cpu" else torch.float32
    model = copy.deepcopy(models.dense).to(wide)
    for name in bank.layers:
        f = models.factors(form.factors)[name]
        f = t2k.dequantize(f) if isinstance(f, t2k.QuantizedFactors) else f
        scale = 1 + sum(a * (bank[e].z[name].to(f.S) - 1) for e, a in z.items())
        W = (f.U.to(wide) * (f.S * scale).to(wide)) @ f.V.to(wide).t()
        model.get_submodule(name).weight.copy_(W)
    logits: Tensor = model(input_ids=ids[row : row + 1], use_cache=False, logits_to_keep=1).logits
    return logits[:, -1]


@contextmanager
def routed(bank: t2k.ExpertBank, wanted: list[dict[str, float]]) -> Iterator[t2k.Slots]:
    """Every request's mixture in a slot of its own, as a server has them; a captured step reads
    the slots at addresses that stay."""
    slots = bank.slots(len(wanted), batch=len(wanted))
    for slot, mixture in enumerate(wanted):
        slots.admit(slot, mixture)
    slots.assign(list(range(len(wanted))))
    with slots.use():
        yield slots


def truth_rows(requests: int) -> list[tuple[int, int]]:
    """The rows that are compared, each with the request whose mixture it is under."""
    return [(row, row) for row in sorted({0, requests // 2, requests - 1})]


def gate(models: Models, form: Form, requests: int, start: int, new: int) -> float:
    """The error of a small model in this form over some requests; Refused beyond twice that of
    plain torch operations."""
    if form.targets is None:
        return 0.0
    bank = models.bank(form.targets, form.factors)
    wanted = llama.mixtures(bank, requests)
    places = truth_rows(requests)
    rows = [row for row, _ in places]
    found: dict[str | None, Tensor] = {}
    stage = Stage(bank.model, requests, start, new)
    for backend in (form.backend, "torch"):
        with routed(bank, wanted):
            with nullcontext() if backend is None else t2k.backend("torch"):
                stage.fill()
            with within(backend, stage):
                found[backend] = stage.run()[rows].clone()
    want = torch.cat(
        [truth(models, form, bank, stage.ids, row, wanted[whose]) for row, whose in places]
    )
    error = relative_error(found[form.backend], want)
    # Both would be far away under a routing that gives requests each other's mixtures.
    limit = min(2 * relative_error(found["torch"], want) + GATE_FLOOR, _FAR)
    if not error <= limit:
        raise Refused(f"{form.name}: relative error {error:.2e} of the logits, allowed {limit:.2e}")
    return error
