"""Every family: identity, one expert, a mixture per row, gradients of alpha, merging, reverting."""

from __future__ import annotations

import copy

import pytest
import torch

import t2kernels as t2k


def _converted(zoo, family, **options):
    base = zoo.build(family)
    model = copy.deepcopy(base)
    return base, model, t2k.convert(model, progress=False, **options)


def test_conversion_changes_nothing_and_reverts_bit_exact(zoo, family):
    base, model, report = _converted(zoo, family)
    inputs = zoo.inputs(family)
    with torch.no_grad():
        expected = zoo.outputs(base, inputs)
        assert torch.equal(zoo.outputs(model, inputs), expected)

    names = [c.name for c in report.converted]
    assert set(model.state_dict()) == set(base.state_dict()) | {f"{n}.z" for n in names}
    assert all(model.state_dict()[f"{n}.z"].dtype == torch.float32 for n in names)
    for key, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
        assert model.state_dict()[key].dtype == value.dtype

    t2k.revert(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    with torch.no_grad():
        assert torch.equal(zoo.outputs(model, inputs), expected)
    for key, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_identity_is_bit_exact_in_half_precision(zoo, name, dtype):
    base = zoo.build(name, dtype)
    model = copy.deepcopy(base)
    t2k.convert(model, progress=False)
    assert {t.dtype for k, t in model.state_dict().items() if not k.endswith(".z")} == {dtype}
    with torch.no_grad():
        assert torch.equal(
            zoo.outputs(model, zoo.inputs(name)), zoo.outputs(base, zoo.inputs(name))
        )


def test_one_expert_equals_rebuilt_weights(zoo, family):
    base, model, _ = _converted(zoo, family)
    bank = zoo.bank(model, "math", "code")
    inputs = zoo.inputs(family)

    def run(m):
        dtype = next(m.parameters()).dtype
        return zoo.outputs(
            m, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        )

    half = {n: 1 + 0.5 * (z - 1) for n, z in bank["math"].z.items()}
    both = {n: z + 0.25 * (bank["code"].z[n] - 1) for n, z in half.items()}
    for routing, z in (
        ("math", bank["math"].z),
        ({"math": 0.5}, half),
        ({"math": 0.5, "code": 0.25}, both),
    ):
        with torch.no_grad(), bank.use(routing):
            actual = run(model)
        zoo.assert_like_rebuilt(actual, base, model, z, run)
        with torch.no_grad():
            assert not zoo.close(actual, run(base), 1e-2), "the expert changes nothing"


def test_a_mixed_batch_is_each_request_alone(zoo, family):
    base, model, _ = _converted(zoo, family)
    bank = zoo.bank(model, "math", "code")
    inputs = zoo.inputs(family, rows=4)
    routing = ["math", None, {"math": 0.7, "code": 0.3}, "code"]
    order = zoo.ROW_ORDER.get(family)
    with torch.no_grad():
        with bank.use(routing, row_order=order):
            mixed = zoo.outputs(model, inputs)
        for i, request in enumerate(routing):
            row = {k: v[i : i + 1] for k, v in inputs.items()}
            with bank.use(request):
                alone = zoo.outputs(model, row)
            assert zoo.close(mixed[i], alone[0]), f"row {i}"
        base_row = zoo.outputs(base, {k: v[1:2] for k, v in inputs.items()})[0]
        assert zoo.close(mixed[1], base_row)
        with bank.use([None, None, {"math": 0.0}, {}]):
            assert torch.equal(zoo.outputs(model, inputs), zoo.outputs(base, inputs))
        with bank.use(routing, row_order=order, base_rows="stored"):
            stored = zoo.outputs(model, inputs)
        assert zoo.close(stored, mixed)


@pytest.mark.parametrize("name", ["bert", "vit", "qwen2_moe"])
def test_two_dimensional_inputs_are_never_guessed(zoo, name):
    _, model, _ = _converted(zoo, name)
    bank = zoo.bank(model, "math")
    with (
        torch.no_grad(),
        bank.use(["math", None, "math"]),
        pytest.raises(ValueError, match=r"row_order='batch'.*row_order='flat'.*slot="),
    ):
        zoo.outputs(model, zoo.inputs(name))
    wrong = "flat" if zoo.ROW_ORDER[name] == "batch" else "batch"
    if name != "qwen2_moe":  # there 21 tokens are 3 requests x 7: a declaration is believed
        with (
            torch.no_grad(),
            bank.use(["math", None, "math"], row_order=wrong),
            pytest.raises(ValueError, match="row_order='flat' expects"),
        ):
            zoo.outputs(model, zoo.inputs(name))


def test_a_bank_may_declare_its_row_order(zoo):
    """For each `use` that does not say its own."""
    _, model, _ = _converted(zoo, "qwen2_moe")
    inputs, routing = zoo.inputs("qwen2_moe"), ["math", None, "code"]
    bank = zoo.bank(model, "math", "code")
    with torch.no_grad():
        with bank.use(routing, row_order="flat"):
            expected = zoo.outputs(model, inputs)
        bank.row_order = "flat"
        with bank.use(routing):
            assert torch.equal(zoo.outputs(model, inputs), expected)
        bank.row_order = "batch"
        with bank.use(routing, row_order="flat"):
            assert torch.equal(zoo.outputs(model, inputs), expected)
    bank = t2k.ExpertBank(model, row_order="rows")
    with pytest.raises(ValueError, match="row_order must be one of .* got 'rows'"), bank.use(None):
        pass


def test_explicit_slots_equal_rows(zoo):
    _, model, _ = _converted(zoo, "qwen2_moe")
    bank = zoo.bank(model, "math", "code")
    inputs = zoo.inputs("qwen2_moe")
    slot = torch.arange(3, dtype=torch.int32).repeat_interleave(7)
    with torch.no_grad():
        with bank.use(["math", None, "code"], row_order="flat"):
            rows = zoo.outputs(model, inputs)
        with bank.use(["math", None, "code"], slot=slot):
            assert torch.equal(zoo.outputs(model, inputs), rows)
        slot[slot == 0] = -1
        with bank.use(["math", None, "code"], slot=slot):
            based = zoo.outputs(model, inputs)
        with bank.use([None, None, "code"], row_order="flat"):
            assert zoo.close(based, zoo.outputs(model, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen2_moe"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_gradient_of_alpha_is_that_of_rebuilt_weights(zoo, name, per_layer):
    base, model, _ = _converted(zoo, name)
    bank = zoo.bank(model, "math", "code")
    inputs = zoo.inputs(name, rows=2, length=5)
    shape = (2, len(bank.layers), 2) if per_layer else (2, 2)
    gen = torch.Generator().manual_seed(5)
    alpha = torch.rand(shape, generator=gen).requires_grad_()
    with torch.no_grad():
        probe = torch.randn(zoo.outputs(base, inputs).shape, generator=gen)
    with bank.use(alpha, row_order=zoo.ROW_ORDER.get(name)):
        (zoo.outputs(model, inputs) * probe).sum().backward()

    # The truth: per request a model with rebuilt weights in fp64, differentiated by autograd.
    truth = alpha.detach().double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        weights = {}
        for i, (layer_name, layer) in enumerate(t2k.svf_layers(model).items()):
            a = truth[b, i] if per_layer else truth[b]
            f = layer.factors
            z = 1 + sum(a[k] * (bank[e].z[layer_name].double() - 1) for k, e in enumerate(bank))
            delta = (f.U.double() * (f.S.double() * (z - 1))) @ f.V.double().t()
            w = base.get_submodule(layer_name).weight.detach().double()
            weights[f"{layer_name}.weight"] = w + (delta.t() if layer.transposed else delta)
        wide = copy.deepcopy(base).double()
        row = {k: v[b : b + 1] for k, v in inputs.items()}
        out = torch.func.functional_call(wide, weights, kwargs=row)
        value = (
            out.logits
            if hasattr(out, "logits")
            else torch.cat([out.last_hidden_state.flatten(1), out.pooler_output], 1)
        )
        loss = loss + (value * probe[b : b + 1].double()).sum()
    loss.backward()
    error = (alpha.grad - truth.grad).abs().max() / truth.grad.abs().max()
    assert error < 2e-4, f"relative error {error:.2e}"


@pytest.mark.parametrize("mixture", ["deviation", "paper", "paper-normalised", "authors"])
def test_a_list_and_alpha_agree_in_every_mixture(zoo, mixture):
    _, model, _ = _converted(zoo, "llama")
    bank = zoo.bank(model, "math", "code")
    inputs = zoo.inputs("llama", rows=2)
    alpha = torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    routing = [{"math": 0.5, "code": 0.25}, {"code": 1.0}]
    with torch.no_grad():
        with bank.use(routing, mixture=mixture):
            listed = zoo.outputs(model, inputs)
        with bank.use(alpha, mixture=mixture):
            assert zoo.close(zoo.outputs(model, inputs), listed)
        per_layer = alpha.unsqueeze(1).expand(2, len(bank.layers), 2)
        with bank.use(per_layer, mixture=mixture):
            assert zoo.close(zoo.outputs(model, inputs), listed)
    with bank.use(alpha.requires_grad_(), mixture=mixture):
        assert zoo.close(zoo.outputs(model, inputs), listed)


@pytest.mark.parametrize("name", ["bert", "vit", "qwen2_moe"])
def test_one_row_of_alpha_needs_no_row_order(zoo, name):
    """With a single request nothing is to be guessed, whatever the shape of an input."""
    _, model, _ = _converted(zoo, name)
    bank = zoo.bank(model, "math", "code")
    inputs = zoo.inputs(name)
    alpha = torch.tensor([[0.5, 0.25]])
    with torch.no_grad():
        with bank.use({"math": 0.5, "code": 0.25}):
            expected = zoo.outputs(model, inputs)
        with bank.use(alpha):
            assert zoo.close(zoo.outputs(model, inputs), expected)
    with bank.use(alpha.requires_grad_()):
        out = zoo.outputs(model, inputs)
        assert zoo.close(out, expected)
        out.square().sum().backward()
    assert alpha.grad.abs().min() > 0


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_expert_tensors_of_a_mixture_of_experts_are_reported_by_name(zoo, name):
    base, _, report = _converted(zoo, name)
    tensors = [n for n, p in base.named_parameters() if p.dim() == 3]
    assert tensors
    for tensor in tensors:
        assert "expert tensor" in report.skipped[tensor]
        assert tensor in str(report)
    assert not any(".mlp.gate" in c.name for c in report.converted), "a router was converted"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "vit"])
def test_a_model_without_experts_reports_no_expert_tensor(zoo, name):
    """Class tokens, position tables and convolutions have three axes as well."""
    _, _, report = _converted(zoo, name)
    assert not [r for r in report.skipped.values() if "expert tensor" in r]


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2"])
def test_a_tied_output_head_is_left_alone(zoo, name):
    base, model, report = _converted(zoo, name)
    assert base.lm_head.weight is base.get_input_embeddings().weight
    assert "tied" in report.skipped["lm_head"]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="tied"):
        t2k.convert(zoo.build(name), ["lm_head"], progress=False)


def test_an_untied_output_head_is_converted_only_by_name(zoo):
    _, _, report = _converted(zoo, "llama")
    assert "head" in report.skipped["lm_head"]
    _, _, report = _converted(zoo, "llama", targets=["lm_head"])
    assert [c.name for c in report.converted] == ["lm_head"]


def test_stories260k(zoo, stories):
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(stories).eval()
    model = copy.deepcopy(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(
        ["Once upon a time", "One day, a big dog", "Lily"],
        return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False,
    )  # fmt: skip
    report = t2k.convert(model, progress=False)
    assert len(report.converted) == 35 and report.trainable == 1920
    with torch.no_grad():
        expected = base(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
        bank = zoo.bank(model, "math", "code")
        with bank.use("math"):
            actual = model(**batch).logits
        zoo.assert_like_rebuilt(actual, base, model, bank["math"].z, lambda m: m(**batch).logits)
        with bank.use(["math", None, {"math": 0.7, "code": 0.3}]):
            mixed = model.generate(**batch, max_new_tokens=12, do_sample=False)
        plain = base.generate(**batch, max_new_tokens=12, do_sample=False)
        assert torch.equal(mixed[1], plain[1])
        assert not torch.equal(mixed[0], plain[0])
    t2k.revert(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
