"""Training z: gradient checkpointing, other routings at backward, optimisers, memory, DDP."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import t2kernels as t2k


def _loss(model, inputs):
    return model(**inputs, labels=inputs["input_ids"]).loss


def _z_grads(model, inputs):
    model.zero_grad()
    _loss(model, inputs).backward()
    return torch.cat([m.z.grad for m in t2k.svf_layers(model).values()])


@pytest.fixture
def model(zoo):
    model = zoo.build("llama")
    t2k.convert(model, progress=False)
    return model


@pytest.fixture
def inputs(zoo):
    return zoo.inputs("llama")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointing_gives_the_same_gradients(zoo, name, use_reentrant):
    model = zoo.build(name)
    t2k.convert(model, progress=False, recompute=name == "gpt2")
    inputs = zoo.inputs(name)
    t2k.trainable(model)
    model.train()  # checkpointing is off in eval mode; the models have no dropout
    zoo.expert(model, 4, 0.1).apply_to(model)
    plain = _z_grads(model, inputs)
    assert plain.abs().min() > 0
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:  # it needs an input that wants a gradient
        model.enable_input_require_grads()
    assert torch.equal(_z_grads(model, inputs), plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_alpha(zoo, model, inputs, use_reentrant):
    bank = zoo.bank(model, "math", "code")
    for p in model.parameters():
        p.requires_grad_(False)
    alpha = torch.rand(3, len(bank.layers), 2).requires_grad_()
    with bank.use(alpha):
        _loss(model, inputs).backward()
    plain, alpha.grad = alpha.grad, None
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with bank.use(alpha):
        _loss(model, inputs).backward()
    assert torch.equal(alpha.grad, plain)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=str)
def test_backward_under_another_routing_raises(zoo, model, inputs, checkpointing):
    bank = zoo.bank(model, "math", "code")
    t2k.trainable(model)
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    # Every routing has been used before: what was seen once is not thereby right.
    model.enable_input_require_grads()
    for routing in ("math", "code", None):
        with bank.use(routing):
            _loss(model, inputs).backward()
    _loss(model, inputs).backward()
    alpha = torch.rand(3, 2).requires_grad_()
    for made in (alpha, "math", ["math", None, "code"]):
        with bank.use(made):
            loss = _loss(model, inputs)
            with bank.use("code"), pytest.raises(RuntimeError, match="another routing"):
                loss.backward(retain_graph=True)
            with bank.use(None), pytest.raises(RuntimeError, match="another routing"):
                loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"same `with bank\.use"):
            loss.backward(retain_graph=True)
    loss = _loss(model, inputs)  # the layers' own z
    with bank.use("math"), pytest.raises(RuntimeError, match="another routing"):
        loss.backward(retain_graph=True)
    loss.backward()


def test_a_layer_may_be_checkpointed_without_its_model(zoo, model):
    from torch.utils.checkpoint import checkpoint

    layer = next(iter(t2k.svf_layers(model).values()))
    t2k.trainable(model)
    x = torch.randn(4, 32, requires_grad=True)
    layer(x).square().sum().backward()
    plain, layer.z.grad = layer.z.grad, None
    for use_reentrant in (True, False):
        fresh = copy.deepcopy(model)
        twin = next(iter(t2k.svf_layers(fresh).values()))
        checkpoint(twin, x, use_reentrant=use_reentrant).square().sum().backward()
        assert zoo.close(twin.z.grad, plain)


def test_z_gradient_against_finite_differences(zoo, inputs):
    model = zoo.build("llama", torch.float64)
    t2k.convert(model, progress=False, precision="fp64")
    t2k.trainable(model)
    zoo.expert(model, 4, 0.1).apply_to(model)
    _loss(model, inputs).backward()
    gen = torch.Generator().manual_seed(0)
    step = 2.0**-8  # z is fp32: a power of two, so that z ± step loses little
    for layer in list(t2k.svf_layers(model).values())[::3]:
        direction = torch.randn(layer.rank, generator=gen).sign()
        z = layer.z.detach().clone()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                layer.z.copy_(z + sign * step * direction)
                moved = (layer.z - z).double()
                values.append((float(_loss(model, inputs)), moved))
            layer.z.copy_(z)
        slope = (values[0][0] - values[1][0]) / (2 * step)
        assert slope == pytest.approx(float(layer.z.grad @ direction), rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("parametrisation", ["direct", "sigmoid-normalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_lowers_the_loss_and_touches_only_z(zoo, inputs, parametrisation, dtype):
    model = zoo.build("llama", dtype)
    t2k.convert(model, progress=False, parametrisation=parametrisation)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    z = t2k.trainable(model)
    assert [p for p in model.parameters() if p.requires_grad] == z
    optimiser = torch.optim.AdamW(z, lr=2e-3, weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = _loss(model, inputs)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    for key, value in model.state_dict().items():
        # One Adam step of 2e-3 is below the resolution of bf16 at 1: z must be fp32 to move.
        assert torch.equal(value, before[key]) != key.endswith(".z"), key
    expert = t2k.Expert.from_model(model)
    with torch.no_grad():
        own = model(**inputs).logits
        with t2k.ExpertBank(model).use(None):
            assert not torch.equal(model(**inputs).logits, own), "inside `use` the own z rests"
        bank = t2k.ExpertBank(model)
        bank.add("trained", expert)
        with bank.use("trained"):
            tolerance = 1e-4 if dtype == torch.float32 else 5e-2
            assert zoo.close(model(**inputs).logits, own, tolerance)


class _Sizes(TorchDispatchMode):
    """The largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"factors": "int8"},
                                     {"factors": "fp8"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("routed", [False, True])
def test_a_training_step_builds_no_matrix(options, routed):
    torch.manual_seed(0)
    n, m, tokens = 96, 128, 6
    model = torch.nn.Sequential(torch.nn.Linear(n, m), torch.nn.Tanh(), torch.nn.Linear(m, n))
    t2k.convert(model, progress=False, **options)
    bank = t2k.ExpertBank(model)
    bank.add("a", t2k.Expert({"0": torch.rand(96) + 0.5, "2": torch.rand(96) + 0.5}))
    x = torch.randn(2, tokens // 2, n)
    alpha = torch.rand(2, 1)
    z = t2k.trainable(model)
    optimiser = torch.optim.Adam(z)
    sizes = _Sizes()
    with sizes:
        if routed:
            alpha.requires_grad_()
            with bank.use(alpha):
                model(x).square().sum().backward()
        else:
            model(x).square().sum().backward()
            optimiser.step()
    assert sizes.largest >= tokens * m, "nothing was seen"
    assert sizes.largest < n * m


def test_factors_are_no_parameters_and_no_buffers(model):
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    layer = next(iter(t2k.svf_layers(model).values()))
    pointers = {t.data_ptr() for t in state.values()}
    for factor in layer.factors:
        assert factor.data_ptr() not in pointers
    assert all(n.endswith((".weight", ".bias", ".z", "inv_freq")) for n in state)


def test_distributed_data_parallel(tmp_path):
    """Two processes with half the batch each do what one process does with all of it."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    worker = Path(__file__).with_name("ddp_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(world), str(tmp_path)],
            stderr=subprocess.PIPE, text=True,
        )
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]  # fmt: skip
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            process.kill()
    one, a, b = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, one))
    assert not torch.equal(one[0], torch.ones_like(one[0]))
