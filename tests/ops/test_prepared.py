"""A prepared product asks of the kernels what ``forward`` asks of them; the CUDA ones by a fake."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import t2kernels as t2k
from t2kernels import testing
from t2kernels.ops import cuda, cuda_forms, native, prepared


@pytest.fixture
def launches(monkeypatch):
    """Every launch's numbers, on CPU tensors: the device, its stream and its kernels are fakes."""
    made = []
    monkeypatch.setattr(cuda, "_missing", None)
    monkeypatch.setattr(
        cuda, "_native", SimpleNamespace(cuda_svf_decode=lambda *numbers: made.append(numbers))
    )
    monkeypatch.setattr(cuda, "_elsewhere", lambda x: None)
    monkeypatch.setattr(cuda, "_index", lambda x: x.get_device())
    monkeypatch.setattr(cuda, "_stream", lambda x: 7)
    monkeypatch.setattr(cuda, "_barrier", lambda x, form, index, stream: int(form == "mma-coop"))
    return made


def prepared_of(i, dtype):
    return prepared.prepare(dtype, len(i.x), i.U, i.V.t(), i.d, i.base, i.slot, i.bias, i.scale)


def known(numbers):
    """A launch without the addresses of what each call allocates: y and the workspace."""
    return numbers[:11] + numbers[12:13] + numbers[14:]


@pytest.mark.parametrize("form", cuda_forms.FORMS)
@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("slots", [0, 3])
def test_the_cuda_launch_is_that_of_forward(launches, form, kind, slots):
    i = testing.make_inputs(5, 32, 48, 32, slots=slots, dtype=torch.bfloat16, factors=kind)
    with t2k.backend("cuda"), torch.no_grad(), cuda_forms.form(form):
        product = prepared_of(i, torch.bfloat16)
        assert type(product) is prepared.PreparedCuda
        for x in (i.x, i.x.view(5, 1, 32), i.x.repeat(1, 2)[:, :32]):
            y = product(x, i.slot, i.d)
            assert y.shape == (*x.shape[:-1], 48) and y.dtype == torch.bfloat16
        cuda.forward(i.x, i.U, i.V, i.d, i.base, i.slot, i.bias, i.scale)
    assert len(launches) == 4
    assert known(launches[0]) == known(launches[1]) == known(launches[3])
    assert known(launches[2])[1:] == known(launches[3])[1:]  # x was copied
    assert launches[0][-2:] == (-1, 7)


def test_another_form_and_what_cannot_run(launches):
    i = testing.make_inputs(4, 32, 48, 32, dtype=torch.bfloat16)
    with t2k.backend("cuda"), torch.no_grad():
        product = prepared_of(i, torch.bfloat16)
        codes = []
        for form in ("mma", "fma", "mma-pdl"):
            with cuda_forms.form(form):
                product(i.x, None, i.d)
                codes.append(launches[-1][-4])
        assert codes == [cuda_forms.CODES[f] for f in ("mma", "fma", "mma-pdl")]
        assert product(i.x.repeat(40, 1), None, i.d) is None  # 160 tokens
        assert product(i.x.to("meta"), None, i.d) is None
        before = len(launches)
        i.bias.data = i.bias.data.clone()
        assert product(i.x, None, i.d) is None and len(launches) == before
    assert product(i.x, None, i.d) is None  # the backend was asked for by name
    crooked = testing.make_inputs(2, 17, 9, 9)
    with t2k.backend("cuda"), torch.no_grad():
        product = prepared_of(crooked, torch.float32)
        with cuda_forms.form("mma"), pytest.raises(RuntimeError, match="form 'mma'"):
            product(crooked.x, None, crooked.d)


def test_x_off_16_bytes_is_copied_for_tensor_cores(launches):
    i = testing.make_inputs(1, 32, 48, 32, dtype=torch.bfloat16)
    x = torch.zeros(33, dtype=torch.bfloat16)[1:].view(1, 32)
    assert x.data_ptr() % 16
    with t2k.backend("cuda"), torch.no_grad():
        product = prepared_of(i, torch.bfloat16)
        for form, copied in (("fma", False), ("mma", True)):
            with cuda_forms.form(form):
                product(x, None, i.d)
            assert (launches[-1][0] != x.data_ptr()) is copied


@pytest.mark.skipif(native._MISSING is not None, reason=str(native._MISSING))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_the_native_bits_are_those_of_forward(dtype, slots, kind):
    i = testing.make_inputs(5, 24, 40, 16, slots=slots, dtype=dtype, factors=kind)
    with torch.no_grad(), testing.poisoned_empty():
        product = prepared_of(i, dtype)
        y, _ = native.forward(*i.args())
        assert torch.equal(product(i.x, i.slot, i.d), y)


@pytest.mark.skipif(native._MISSING is not None, reason=str(native._MISSING))
def test_what_the_library_multiplies_has_no_prepared_form(monkeypatch):
    i = testing.make_inputs(5, 24, 40, 16, dtype=torch.bfloat16)
    assert prepared_of(i, torch.bfloat16) is not None
    monkeypatch.setitem(native.DECODE_TOKENS, (torch.bfloat16, torch.bfloat16), 4)
    assert prepared_of(i, torch.bfloat16) is None
    with t2k.batch_invariant():
        assert prepared_of(i, torch.bfloat16) is not None


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_without_a_prepared_form(backend):
    i = testing.make_inputs(5, 24, 40, 16)
    with t2k.backend(backend):
        assert prepared_of(i, torch.float32) is None
    with pytest.raises(RuntimeError, match="cannot run this call"), t2k.backend("cuda"):
        prepared_of(i, torch.float32)
