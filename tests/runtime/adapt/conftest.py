"""A tiny model whose experts do something, and shots that one of them answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.generation import complete
from t2runtime.tasks import Problem

NEW = 3


@pytest.fixture
def bank(tiny: Any) -> t2k.ExpertBank:
    """Experts "a" and "b" of the tiny model, far enough from the base to change its answers."""
    bank = t2k.ExpertBank(tiny)
    here = t2k.Expert.from_model(tiny)
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        z = {n: 1 + torch.randn(v.shape, generator=generator) for n, v in here.z.items()}
        bank.add(name, t2k.Expert(z, here.fingerprints))
    return bank


@pytest.fixture
def shots(bank: t2k.ExpertBank, tokenizer: Any) -> list[Problem]:
    """Questions whose right answers are what both experts at full weight say."""
    prompts = ["12+34=", "flip 123=", "big 98=", "56+7="]
    with bank.use({"a": 1.0, "b": 1.0}):
        texts = complete(bank.model, tokenizer, prompts, NEW).texts
    return [Problem(p, t.strip() or "7", "x") for p, t in zip(prompts, texts, strict=True)]
