"""One layer under pytest-benchmark: `pytest tests/benchmarks --benchmark-only` shows times.

`make test` runs each case once with --benchmark-disable. Nothing here asserts a time: a shared
machine would fail it. Results are checked, so that nobody compares times of wrong outputs.
"""

from __future__ import annotations

import pytest
import torch

import t2kernels as t2k
from t2kernels.testing import relative_error

SIZE = 512
FORMS = (
    "dense",
    "three-op",
    "rebuilt",
    "ours",
    "ours 64 slots",
    "ours int8",
    "ours fp8",
    "ours delta",
)


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    factors = t2k.decompose(weight)
    z = 1 + 0.1 * torch.randn(64, SIZE, generator=generator)
    return weight, factors, t2k.decompose(weight, rank=64), factors.S * z


@pytest.mark.parametrize("tokens", [1, 16, 128])
@pytest.mark.parametrize("form", FORMS)
def test_forward(benchmark, layer, form, tokens):
    weight, factors, few, D = layer
    x = torch.randn(tokens, SIZE, generator=torch.Generator().manual_seed(1))
    d, U, V = D[0], factors.U, factors.V
    slot = torch.arange(tokens, dtype=torch.int32) % 64
    int8, fp8 = t2k.quantize(factors), t2k.quantize(factors, "fp8")
    calls = {
        "dense": lambda: x @ weight.T,
        "three-op": lambda: ((x @ V) * d) @ U.T,
        "rebuilt": lambda: x @ ((U * d) @ V.T).T,
        "ours": lambda: t2k.svf_linear(x, factors, d),
        "ours 64 slots": lambda: t2k.svf_linear(x, factors, D, slot),
        "ours int8": lambda: t2k.svf_linear(x, int8, d),
        "ours fp8": lambda: t2k.svf_linear(x, fp8, d),
        "ours delta": lambda: t2k.svf_delta_linear(x, weight, few, d[:64]),
    }
    X, U64, V64, D64 = x.double(), U.double(), V.double(), D.double()
    exact = {"dense": X @ weight.double().T, "ours 64 slots": ((X @ V64) * D64[slot]) @ U64.T}
    exact["ours delta"] = exact["dense"] + ((X @ few.V.double()) * (D64[0, :64] - few.S)) @ (
        few.U.double().T
    )
    truth = exact.get(form, ((X @ V64) * D64[0]) @ U64.T)
    with torch.no_grad():
        y = benchmark(calls[form])
    assert relative_error(y, truth) < {"ours int8": 2e-2, "ours fp8": 4e-2}.get(form, 1e-5)


@pytest.mark.parametrize("form", ["three-op", "rebuilt", "ours"])
def test_training_step(benchmark, layer, form):
    factors = layer[1]
    x = torch.randn(64, SIZE, generator=torch.Generator().manual_seed(1), requires_grad=True)
    z = torch.ones(SIZE, requires_grad=True)
    forms = {
        "three-op": lambda d: ((x @ factors.V) * d) @ factors.U.T,
        "rebuilt": lambda d: x @ ((factors.U * d) @ factors.V.T).T,
        "ours": lambda d: t2k.svf_linear(x, factors, d),
    }

    def step():
        x.grad = z.grad = None
        forms[form](factors.S * z).square().sum().backward()
        return z.grad

    dz = benchmark(step)
    X = x.detach().double()
    H, G = X @ factors.V.double(), 2 * X @ t2k.reconstruct(factors).double().T
    truth = factors.S.double() * (H * (G @ factors.U.double())).sum(0)
    assert relative_error(dz, truth) < 1e-5
