"""The delta form on quantised layers of a GPU, where torchao or bitsandbytes is installed."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import nn

import t2kernels as t2k

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
KINDS = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Linear8bitLt", "Linear4bit")


def quantised(kind: str) -> nn.Module:
    library = "bitsandbytes" if kind.startswith("Linear") else "torchao"
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (extra 'quantized')")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256)).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "torchao":
            from torchao import quantization

            model.cuda()
            quantization.quantize_(model, getattr(quantization, kind)())
            return model
        import bitsandbytes as bnb

        options = {"compute_dtype": torch.bfloat16} if kind == "Linear4bit" else {}
        options |= {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
        for i in (0, 2):
            old = model[i]
            new = getattr(bnb.nn, kind)(old.in_features, old.out_features, **options)
            new.load_state_dict(old.state_dict())
            model[i] = new
        return model.cuda()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_gradients_and_the_base_back(kind: str) -> None:
    base = quantised(kind).eval()
    model = copy.deepcopy(base)
    t2k.convert(model, rank=32, progress=False)
    bank = t2k.ExpertBank(model)
    z = {n: torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.5 for n in bank.layers}
    bank.add("a", t2k.Expert(z))
    x = torch.randn(4, 3, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
        with bank.use(["a", None, {"a": 0.5}, None]):
            y = model(x)
        assert torch.equal(y[[1, 3]], base(x)[[1, 3]])
        layer, f = model[0], model[0].factors
        U, S, V = (t.double() for t in f)
        change = S * (z["0"].to(S) - 1)
        with bank.use("a"):
            got = layer(x).double() - base[0](x).double()
        want = ((x.double() @ V) * change) @ U.t()
        # Two outputs in bf16 are subtracted here.
        assert (got - want).norm() <= 0.02 * base[0](x).double().norm()
    parameters = t2k.trainable(model)
    x.requires_grad_()
    model(x).float().square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in parameters)
    assert x.grad is not None and bool(x.grad.any())
    with pytest.raises(RuntimeError, match="merge: the weight is quantised"):
        bank.merge("a")
    t2k.revert(model)
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
