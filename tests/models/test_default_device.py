"""What torch makes new tensors on by default (``torch.set_default_device``) changes nothing.

The meta device stands for any other than the model's: a tensor that followed the default would
have no memory.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import t2kernels as t2k


def answers(default: AbstractContextManager[Any]) -> list[Tensor]:
    """Results and gradients of a small model in every way of routing, made inside ``default``."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24))
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(3, 2, 24, generator=generator)
    z = {name: 0.5 + torch.rand(16, generator=generator) for name in "02"}
    alpha = torch.rand(3, 2, generator=generator).requires_grad_()
    mixed = ["a", None, {"a": 0.3, "b": 0.7}]
    out = []
    with default:
        t2k.convert(model, progress=False)
        bank = t2k.ExpertBank(model)
        bank.add("a", t2k.Expert(z))
        bank.add("b", t2k.Expert({name: 2 - value for name, value in z.items()}))
        with bank.use(mixed):
            own = x.clone().requires_grad_()
            model(own).sum().backward()
            out.append(own.grad)
        with bank.use(alpha):
            model(x).sum().backward()
            out.append(alpha.grad)
        with torch.no_grad():
            with bank.use(mixed):
                out.append(model(x))
            with t2k.batch_invariant(), bank.use("a"):
                out.append(model(x))
            slots = bank.slots(4, batch=3)
            slots.admit(0, "a")
            slots.admit(2, {"a": 0.3, "b": 0.7})
            slots.assign([0, None, 2])
            with slots.use(3):
                out.append(model(x))
            bank.merge("a")
            out.append(model(x))
            bank.unmerge()
            hosted = t2k.ExpertBank(model, dtype=torch.bfloat16, host=True, cache=2)
            hosted.add("a", bank["a"])
            hosted.prefetch(["a"])
            with hosted.use("a"):
                out.append(model(x))
    return [value.detach() for value in out if value is not None]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_default_device_changes_nothing(backend: str) -> None:
    with t2k.backend(backend):
        expected = answers(contextlib.nullcontext())
        got = answers(torch.device("meta"))
    assert len(expected) == 7
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)
