"""torch.compile(fullgraph=True): one graph per form, none for a new routing of the same form."""

from __future__ import annotations

import pytest
import torch

import t2kernels as t2k

CompileCounter = pytest.importorskip("torch._dynamo.testing").CompileCounter


@pytest.fixture
def setup(zoo):
    torch._dynamo.reset()
    model = zoo.build("llama")
    t2k.convert(model, progress=False)
    yield model, zoo.bank(model, "math", "code"), zoo.inputs("llama")
    torch._dynamo.reset()


@pytest.mark.parametrize("rank", [None, 4])
def test_one_graph_per_form(zoo, setup, rank):
    model, bank, inputs = setup
    if rank is not None:
        t2k.revert(model)
        t2k.convert(model, rank=rank, progress=False)
        bank = zoo.bank(model, "math", "code")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    with torch.no_grad():
        for routing in (
            None, [None, None, None],
            ["math", None, "code"], ["code", "code", None], [{"math": 0.2}, "math", {"code": 0.4}],
            "math", "code", {"math": 0.3, "code": 0.1},
            ["code", None, None], None,
        ):  # fmt: skip
            with bank.use(routing):
                got, expected = compiled(**inputs).logits, model(**inputs).logits
            assert zoo.close(got, expected), routing
            graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2, 2, 3, 3, 3, 3, 3]


def test_more_requests_than_the_arena_first_held(zoo, setup):
    model, bank, _ = setup
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = zoo.inputs("llama", rows=20, length=3)
    with torch.no_grad():
        for step in (0.01, 0.02, 0.03):
            with bank.use([{"math": step * i} for i in range(1, 21)]):
                assert zoo.close(compiled(**inputs).logits, model(**inputs).logits)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["rows", "alpha", "rows of beams"])
def test_one_graph_for_all_batch_sizes(zoo, setup, kind):
    """The first size makes a graph of its own, the second one for all sizes, as without SVF."""
    model, bank, _ = setup
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    with torch.no_grad():
        for requests in (3, 4, 5, 7, 12):
            routing = ["math"] + [None] * (requests - 2) + ["code"]
            if kind == "alpha":
                routing = torch.rand(requests, 2)
            rows = requests * (2 if kind == "rows of beams" else 1)
            inputs = zoo.inputs("llama", rows=rows, length=5)
            with bank.use(routing):
                assert zoo.close(compiled(**inputs).logits, model(**inputs).logits)
            graphs.append(counter.frame_count)
    assert graphs[1:] == [graphs[1]] * 4 and graphs[1] <= 2, graphs


def test_gradients_of_z_and_alpha(zoo, setup):
    model, bank, inputs = setup
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    alpha = torch.rand(3, 2).requires_grad_()
    grads = []
    for run in (model, compiled):
        alpha.grad = None
        with bank.use(alpha):
            run(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append(alpha.grad)
    assert zoo.close(*grads, 1e-4)
    t2k.trainable(model)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append(torch.cat([m.z.grad for m in t2k.svf_layers(model).values()]))
    assert zoo.close(*grads, 1e-4)


def test_a_compiled_model_sees_z_however_it_came(zoo, setup):
    """A compiler cannot look at values; what writes z must tell it."""
    model, _, inputs = setup

    def check(what):
        with torch.no_grad():
            got = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
            assert zoo.close(got, model(**inputs).logits), what

    base = t2k.Expert.from_model(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    zoo.expert(model, 3).apply_to(model)
    check("apply_to")
    model.load_state_dict(state)
    check("load_state_dict, to the base")
    optimiser = torch.optim.SGD(t2k.trainable(model), 0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        optimiser.zero_grad()
        compiled(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimiser.step()
        check("training")
    for layer in t2k.svf_layers(model).values():
        layer.z.requires_grad_(False)
    check("frozen after training")
    base.apply_to(model)
    check("apply_to, to the base")


def test_inductor_runs_a_layer(zoo):
    """One small stack through the default backend: what users get from torch.compile(model)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    stack = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 16))
    t2k.convert(stack, progress=False)
    bank = zoo.bank(stack, "math", "code")
    x = torch.randn(3, 2, 16)
    compiled = torch.compile(stack, fullgraph=True)
    with torch.no_grad(), bank.use(["math", None, "code"]):
        expected = stack(x)
        try:
            got = compiled(x)
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"inductor has no working compiler here: {str(error)[:80]}")
    assert zoo.close(got, expected)
    torch._dynamo.reset()
