"""What is made once from the weights keeps its bits where torch.autocast is on."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import t2kernels as t2k
from t2kernels.lapack import no_autocast
from t2kernels.nn import merging
from t2kernels.nn.replaced import check_belongs


def weight(m: int = 24, n: int = 40, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(dtype)


def expert(r: int = 24) -> torch.Tensor:
    return 1 + 0.1 * torch.randn(r, generator=torch.Generator().manual_seed(1))


def factors(dtype: torch.dtype = torch.float32) -> t2k.SVDFactors:
    with torch.autocast("cpu", enabled=False):
        return t2k.decompose(weight(dtype=dtype))


def model(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    with torch.autocast("cpu", enabled=False):
        model = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 24)).to(dtype)
        for i, p in enumerate(model.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        t2k.convert(model, **options)
        return model


def merged(dtype: torch.dtype = torch.float32, **options) -> list[torch.Tensor]:
    m = model(dtype, **options)
    bank = t2k.ExpertBank(m)
    bank.add("a", t2k.Expert({name: expert() for name in bank.layers}))
    bank.merge("a")
    return [layer.weight.detach().clone() for layer in t2k.svf_layers(m).values()]


def rebuilt(**options) -> list[torch.Tensor]:
    """The weight that a layer without one gives back, and saves."""
    m = model(keep_weight=False, **options)
    given = [layer.stored_weight() for layer in t2k.svf_layers(m).values()]
    t2k.revert(m)
    return [*given, *m.state_dict().values()]


def mixed(form: str) -> list[torch.Tensor]:
    S, Z = factors().S, torch.stack([expert(), expert().flip(0)])
    return [t2k.mix(Z, torch.tensor([[0.6, 0.4]]), form, S), t2k.effective_diagonal(S, Z[0])]


def truncated() -> list[torch.Tensor]:
    m = model(rank=8)
    marks = {name: layer.fingerprint for name, layer in t2k.svf_layers(m).items()}
    cut = t2k.Expert(dict.fromkeys(marks, expert()), marks).truncated(m)
    return [*cut.expert.z.values(), torch.tensor([*cut.bounds.values()])]


def belongs() -> list[torch.Tensor]:
    """Passes with little room for error: 16 bits would need fifty times as much."""
    check_belongs(weight(), factors(), room=1e-4)
    return []


def accuracy(precision: str) -> list[torch.Tensor]:
    a = t2k.accuracy(weight(), factors(), precision=precision)
    return [torch.tensor([a.relative_error, a.orthogonality_u, a.orthogonality_v])]


def gradient() -> list[torch.Tensor]:
    d = factors().S.clone().requires_grad_()
    w = t2k.reconstruct(factors(), d)
    with torch.autocast("cpu", enabled=False):
        w.backward(torch.ones_like(w))
    return [w.detach(), d.grad]


ACTIONS: dict[str, Callable[[], object]] = {
    "merge fp32": merged,
    "merge fp64": lambda: merged(torch.float64),
    "merge bf16": lambda: merged(torch.bfloat16),
    "merge fp16": lambda: merged(torch.float16),
    "merge without W": lambda: merged(keep_weight=False),
    "merge int8": lambda: merged(factors="int8"),
    "rebuilt": rebuilt,
    "rebuilt from int8": lambda: rebuilt(factors="int8"),
    "decompose": lambda: t2k.decompose(weight()),
    "decompose bf16": lambda: t2k.decompose(weight(dtype=torch.bfloat16)),
    "decompose fp64": lambda: t2k.decompose(weight(), precision="fp64"),
    "decompose gram": lambda: t2k.decompose(weight(), method="gram"),
    "reconstruct": lambda: [t2k.reconstruct(factors())],
    "reconstruct bf16": lambda: [t2k.reconstruct(factors(torch.bfloat16))],
    "reconstruct with a gradient": gradient,
    "accuracy fp32": lambda: accuracy("fp32"),
    "accuracy fp64": lambda: accuracy("fp64"),
    "check_factors": lambda: t2k.check_factors(factors()) or [],
    "quantize int8": lambda: t2k.quantize(factors())[:5],
    "quantize fp8": lambda: [t.float() for t in t2k.quantize(factors(), "fp8")[:5]],
    "dequantize": lambda: t2k.dequantize(t2k.quantize(factors())),
    "mix deviation": lambda: mixed("deviation"),
    "mix as the authors": lambda: mixed("authors"),
    "truncated": truncated,
    "check_belongs": belongs,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("action", ACTIONS)
def test_bits_are_those_without_autocast(action: str, dtype: torch.dtype) -> None:
    expected = list(ACTIONS[action]())
    with torch.autocast("cpu", dtype):
        found = list(ACTIONS[action]())
        assert torch.is_autocast_enabled("cpu"), "the caller's autocast was turned off"
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_narrow_product_keeps_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 16-bit product of a GPU, of fp16 where autocast says bf16 and the other way round."""
    monkeypatch.setattr(merging, "_multiplies_fast", lambda target: True)
    for dtype, other in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        expected = merged(dtype)
        with torch.autocast("cpu", other):
            found = merged(dtype)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.filterwarnings("ignore:User provided device_type:UserWarning")
def test_every_device_has_its_own_autocast() -> None:
    for kind in ("cpu", "cuda", "meta"):
        with no_autocast(torch.device(kind)):
            assert kind == "meta" or not torch.is_autocast_enabled(kind)
