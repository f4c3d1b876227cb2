"""Every form of the layer that a user could run instead of ours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import Contestant
from layers import LORA_RANK
from lineup import Basis, Skipped, three_op
from shapes import DECODE_TOKENS, MANY_TOKENS
from torch import Tensor

logger = logging.getLogger("bench_svf")


def baselines(b: Basis) -> Iterator[Contestant | Skipped]:
    """The plain layer, three operations, rebuilt W' and LoRA, each where it makes sense."""
    yield b.contestant(
        "dense", 1, lambda i: F.linear(b.x, b.layer.sets[i].weight), b.truth.dense, b.dense_cost()
    )
    yield from _three_op(b)
    if b.T <= MANY_TOKENS:
        yield _rebuilt(b)
        yield from _compiled(b)
        yield from _grouped_lora(b)
        yield from _peft(b)


def _three_op_call(b: Basis, function: Callable[..., Tensor], slots: int) -> Any:
    x, sets, one, D = b.x, b.layer.sets, b.d16[0], b.d16
    if slots == 1:
        return lambda i: function(x, sets[i].factors.U, sets[i].factors.V, one)
    slot = b.layer.slot(b.T, slots).long()
    return lambda i: function(x, sets[i].factors.U, sets[i].factors.V, D[slot])


def _three_op(b: Basis) -> Iterator[Contestant]:
    width = b.x.element_size()
    for slots in (1, b.many):
        call, formula = _three_op_call(b, three_op, slots), partial(b.truth.svf, slots)
        yield b.contestant("three-op", slots, call, formula, b.svf_cost(slots, width))
        if slots == 1 and b.on_gpu:  # what Python's launches cost
            cost = b.svf_cost(slots, width)
            yield b.contestant("three-op eager", slots, call, formula, cost, capture=False)


def _compiled(b: Basis) -> Iterator[Contestant | Skipped]:
    name = "three-op compiled"
    if not b.options.compile:
        yield Skipped(name, "--no-compile")
        return
    function = compiled_three_op(b.layer.device.type)
    if isinstance(function, str):
        yield Skipped(name, function)
        return
    yield b.contestant(
        name, 1, _three_op_call(b, function, 1), partial(b.truth.svf, 1),
        b.svf_cost(1, b.x.element_size()),
    )  # fmt: skip


def _rebuilt(b: Basis) -> Contestant | Skipped:
    x, sets, d, s = b.x, b.layer.sets, b.d16[0], b.layer.shape
    size, weight = x.element_size(), s.in_features * s.out_features

    def call(i: int) -> Tensor:
        U, _, V = sets[i].factors
        return F.linear(x, (U * d) @ V.T)

    # U and V are read, W' is written and read.
    moved = (s.rank * (s.in_features + s.out_features) + 2 * weight) * size + b.io()
    work = 2 * weight * (s.rank + b.T)
    slow = (str(s), b.case.dtype, "rebuilt W'") in b.options.too_slow
    if slow or work / b.options.gflops / 1e9 > b.options.longest_call_s:
        return Skipped("rebuilt W'", "one call takes more than a second")
    return b.contestant("rebuilt W'", 1, call, partial(b.truth.svf, 1), (moved, work))


def _grouped_lora(b: Basis) -> Iterator[Contestant | Skipped]:
    """Rank-16 LoRA with a batched product: one adapter for all, and as many as there are slots."""
    for slots in (1, b.many):
        groups = min(slots, b.T)
        if b.T % groups or (groups == 1 and slots > 1):
            yield Skipped("LoRA bmm", "needs a batch that falls into equal groups of tokens")
            continue
        cost, formula = b.dense_cost(LORA_RANK, groups), partial(b.truth.lora, groups)
        yield b.contestant("LoRA bmm", slots, _lora_bmm(b, groups), formula, cost)
        if groups == b.T > 1:
            yield b.contestant("LoRA gathered", slots, _lora_gathered(b), formula, cost)
            yield b.contestant("LoRA masked", slots, _lora_masked(b), formula, cost)


def _lora_bmm(b: Basis, groups: int) -> Callable[[int], Tensor]:
    """The adapters lie in the order of their tokens, so nothing is gathered: the best case.

    The second product adds to the dense layer's output, without a pass of its own.
    """
    x, sets, lora = b.x, b.layer.sets, b.layer.lora
    grouped = x.view(groups, -1, x.shape[1])

    def call(i: int) -> Tensor:
        A, B = lora[i % len(lora)]
        low = torch.bmm(grouped, A[:groups].transpose(1, 2))
        y = F.linear(x, sets[i].weight)
        y.view(groups, -1, y.shape[1]).baddbmm_(low, B[:groups].transpose(1, 2))
        return y

    return call


def _lora_gathered(b: Basis) -> Callable[[int], Tensor]:
    """Every token's adapter is fetched from where it lies among all: what a batch of changing
    requests needs, unless it copies an adapter when a request is admitted."""
    x, sets, T = b.x, b.layer.sets, b.T
    generator = torch.Generator().manual_seed(b.layer.seed + 3)
    order = torch.randperm(T, generator=generator).to(x.device)  # where token t's adapter lies
    place = torch.empty_like(order).scatter_(0, order, torch.arange(T, device=x.device))
    lora = [(A[:T][place].contiguous(), B[:T][place].contiguous()) for A, B in b.layer.lora]

    def call(i: int) -> Tensor:
        A, B = lora[i % len(lora)]
        low = torch.bmm(x.unsqueeze(1), A[order].transpose(1, 2))
        y = F.linear(x, sets[i].weight)
        y.unsqueeze(1).baddbmm_(low, B[order].transpose(1, 2))
        return y

    return call


def _lora_masked(b: Basis) -> Callable[[int], Tensor]:
    """All tokens times all adapters as two large products, foreign adapters masked: T times the
    arithmetic, which is idle at decode, on the kernels that read memory best."""
    x, sets, T = b.x, b.layer.sets, b.T
    flat = [
        (A[:T].flatten(0, 1), B[:T].transpose(1, 2).contiguous().flatten(0, 1))
        for A, B in b.layer.lora
    ]
    own = torch.eye(T, device=x.device, dtype=x.dtype).repeat_interleave(LORA_RANK, 1)

    def call(i: int) -> Tensor:
        A, B = flat[i % len(flat)]
        return F.linear(x, sets[i].weight).addmm_(F.linear(x, A).mul_(own), B)

    return call


def _peft(b: Basis) -> Iterator[Contestant | Skipped]:
    name = "PEFT LoRA"
    module = b.layer.peft_linear() if b.options.peft else "--no-peft"
    if isinstance(module, str):
        yield Skipped(name, module)
        return
    x, sets = b.x, b.layer.sets

    def call(i: int, **routing: Any) -> Tensor:
        module.base_layer.weight.data = sets[i].weight
        return module(x, **routing)

    yield b.contestant(name, 1, call, partial(b.truth.lora, 1), b.dense_cost(LORA_RANK))
    for slots in b.slots():
        groups = min(slots, b.T)
        if groups == 1 or b.T > DECODE_TOKENS:
            continue
        names = [f"a{t * groups // b.T}" for t in range(b.T)]
        yield b.contestant(
            name, slots, partial(call, adapter_names=names), partial(b.truth.lora, groups),
            b.dense_cost(LORA_RANK, groups),
        )  # fmt: skip


@cache
def compiled_three_op(device: str) -> Any:
    """``three_op`` compiled, or the reason why there is none."""
    function = torch.compile(three_op, dynamic=True)
    try:
        ones = torch.ones(2, 2, device=device)
        function(ones, ones, ones.T, ones[0])
    except Exception as error:  # a missing compiler shows in many ways
        logger.debug("torch.compile failed", exc_info=True)
        return f"torch.compile does not work here ({type(error).__name__})"
    return function
