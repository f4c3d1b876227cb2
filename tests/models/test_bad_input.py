"""What a stranger gets wrong: each error names the argument, what was expected, what came and what
to do, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import t2kernels as t2k


@pytest.fixture
def setup(zoo):
    model = zoo.build("llama")
    t2k.convert(model, progress=False)
    return model, zoo.bank(model, "math", "code")


def test_an_expert_of_another_architecture(zoo, setup):
    _, bank = setup
    other = zoo.build("gpt2")
    t2k.convert(other, progress=False)
    with pytest.raises(ValueError, match=r"8 of 8 layers that the model lacks.*another model"):
        bank.add("gpt2", zoo.expert(other, 0))
    with pytest.raises(ValueError, match="another model"):  # no override for nothing in common
        bank.add("gpt2", zoo.expert(other, 0), allow_mismatch=True)
    assert bank.names == ["math", "code"]


def test_an_expert_of_other_base_weights(zoo, setup):
    model, bank = setup
    other = zoo.build("llama", seed=1)
    t2k.convert(other, progress=False)
    expert = zoo.expert(other, 0)
    with pytest.raises(ValueError, match=r"another base weight.*allow_mismatch=True"):
        bank.add("other", expert)
    with pytest.raises(ValueError, match="another base weight"):
        expert.apply_to(model)
    bank.add("other", expert, allow_mismatch=True)
    with bank.use("other"), torch.no_grad():
        model(**zoo.inputs("llama"))


def test_an_expert_of_the_wrong_size(setup):
    model, bank = setup
    name = bank.layers[0]
    for size in (31, 33):
        wrong = t2k.Expert({name: torch.ones(size)})
        for override in (False, True):
            with pytest.raises(ValueError, match=rf"{size} values for layer '{name}'.*rank 32"):
                bank.add("wrong", wrong, allow_mismatch=override)
        with pytest.raises(ValueError, match="rank 32"):
            wrong.apply_to(model)


def test_an_expert_of_other_targets(zoo, setup):
    """Fewer layers than the model: the others stay at the base. More: an error that says so."""
    _, bank = setup
    only = zoo.build("llama")
    t2k.convert(only, "mlp", progress=False)
    bank.add("mlp", zoo.expert(only, 0))
    with pytest.raises(ValueError, match=r"8 of 14 layers.*other targets"):
        t2k.ExpertBank(only).add("math", bank["math"])
    t2k.ExpertBank(only).add("math", bank["math"], allow_mismatch=True)


def test_names(zoo, setup):
    model, bank = setup
    with pytest.raises(ValueError, match=r"'math' already.*overwrite=True"):
        bank.add("math", zoo.expert(model, 0))
    with pytest.raises(KeyError, match=r"'maths'.*\['math', 'code'\].*Did you mean 'math'"):
        bank.use("maths").__enter__()
    with pytest.raises(KeyError, match="nothing"):
        bank.merge("nothing")
    with pytest.raises(KeyError, match="nothing"):
        bank.remove("nothing")
    for trick in ("../up", "/etc/passwd", "a/b", "a\\b", "..", ".hidden", "", "con", "a\0b", "é"):
        with pytest.raises(ValueError, match="expert name"):
            bank.add(trick, zoo.expert(model, 0))
    with pytest.raises(TypeError, match=r"got str.*Expert\.load"):
        bank.add("path", "math.safetensors")
    assert bank.names == ["math", "code"]


@pytest.mark.parametrize(
    ("routing", "error", "message"),
    [
        (3, TypeError, "a name, a {name: weight}, None, a list"),
        (["math", 3], TypeError, "must be a name, a {name: weight} or None, got int"),
        ([], ValueError, "empty list"),
        ({"math": "1"}, TypeError, "weight of 'math' must be a number, got '1'"),
        ({"math": float("nan")}, ValueError, "weight of 'math' is nan"),
        (torch.ones(3), ValueError, r"\(B, K\) = \(B, 2\).*got \(3,\)"),
        (torch.ones(3, 3), ValueError, r"\(B, K\) = \(B, 2\).*got \(3, 3\)"),
        (torch.ones(3, 2, 2), ValueError, r"\(B, L, K\) = \(B, 14, 2\).*got \(3, 2, 2\)"),
        (torch.ones(3, 2, dtype=torch.int64), ValueError, "float tensor.*int64"),
        (torch.ones(0, 2), ValueError, "at least one row"),
        (torch.full((3, 2), float("inf")), ValueError, "alpha must be finite"),
        (["math", None], ValueError, r"2 requests.*batch of 3"),
        (torch.ones(2, 2), ValueError, r"2 requests.*batch of 3"),
    ],
)
def test_routing(zoo, setup, routing, error, message):
    model, bank = setup
    with pytest.raises(error, match=message), bank.use(routing):
        model(**zoo.inputs("llama"))
    with bank.use("math"), torch.no_grad():  # and nothing is left behind
        model(**zoo.inputs("llama"))


@pytest.mark.parametrize(
    ("slot", "error", "message"),
    [
        (torch.zeros(21, dtype=torch.int64), TypeError, r"slot must be \(tokens,\) int32.*int64"),
        (torch.zeros(3, 7, dtype=torch.int32), TypeError, r"slot must be \(tokens,\) int32"),
        (torch.full((21,), 3, dtype=torch.int32), ValueError, r"\[-1, 3\)"),
        (torch.full((21,), -2, dtype=torch.int32), ValueError, r"\[-1, 3\)"),
        (torch.zeros(20, dtype=torch.int32), ValueError, "slot names 20 tokens.*21 tokens"),
    ],
)
def test_slots(zoo, setup, slot, error, message):
    model, bank = setup
    with pytest.raises(error, match=message), bank.use(["math", None, "code"], slot=slot):
        model(**zoo.inputs("llama"))


def test_a_first_axis_that_is_not_the_batch_is_never_guessed(zoo):
    """Four images of two requests: one has one, the other three. 4 is divisible by 2."""

    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids, pixel_values):
            return self.text(input_ids), self.vision(pixel_values)

    model = Seeing()
    t2k.convert(model, progress=False)
    bank = zoo.bank(model, "math", "code")
    x = {"input_ids": torch.randn(2, 3, 8), "pixel_values": torch.randn(4, 5, 8)}
    with torch.no_grad():
        with (
            bank.use(["math", "code"]),
            pytest.raises(ValueError, match=r"batch of 2.*Exclude.*row_order='batch'"),
        ):
            model(**x)
        with bank.use(["math", "code"], row_order="batch"):
            _, seen = model(**x)
        with bank.use("math"):
            assert zoo.close(model(**x)[1][:2], seen[:2])
        with bank.use("code"):
            assert zoo.close(model(**x)[1][2:], seen[2:])

    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, input_ids):
            return self.inner(input_ids.transpose(0, 1))

    model = TokensFirst()
    t2k.convert(model, progress=False)
    bank = zoo.bank(model, "math", "code")
    with bank.use(["math", "code"]), pytest.raises(ValueError, match="first axis is not the batch"):
        model(input_ids=torch.randn(2, 4, 8))


def test_states_that_exclude_each_other(zoo, setup):
    model, bank = setup
    with pytest.raises(ValueError, match=r"SVF layers already.*revert"):
        t2k.convert(model)
    with bank.use("math"):
        with pytest.raises(RuntimeError, match="leave the `with"):
            bank.merge("math")
        with pytest.raises(RuntimeError, match="leave the `with"):
            t2k.revert(model)
    with pytest.raises(TypeError, match="one expert for all rows"):
        bank.merge(["math", None])
    bank.merge("math")
    with pytest.raises(RuntimeError, match=r"bank\.unmerge\(\)"):
        bank.use("math").__enter__()
    with pytest.raises(RuntimeError, match=r"bank\.unmerge\(\)"):
        t2k.trainable(model)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"bank\.unmerge\(\) before loading"):
        model.load_state_dict(state)
    t2k.revert(model)
    with pytest.raises(RuntimeError, match="make a new ExpertBank"):
        bank.use("math").__enter__()
    for call in (t2k.revert, t2k.trainable, t2k.ExpertBank, t2k.Expert.from_model):
        with pytest.raises(ValueError, match=r"no SVF layers.*t2kernels\.convert"):
            call(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_prj"]}, "'q_prj' matches none.*Did you mean.*q_proj"),
        ({"targets": []}, "targets must not be empty"),
        ({"exclude": ["nothing"]}, "'nothing' matches none"),
        ({"rank": 0}, "rank must be a positive integer"),
        ({"rank": 2.5}, "rank must be a positive integer"),
        ({"parametrisation": "sigmoid"}, "parametrisation must be one of"),
        ({"precision": "fp8"}, "precision"),
        ({"factors": "int4"}, "factors must be"),
        ({"decomposition": {}}, "no entry for layer"),
    ],
    ids=str,
)
def test_conversion(zoo, options, message):
    model = zoo.build("llama")
    with pytest.raises(ValueError, match=message):
        t2k.convert(model, progress=False, **options)
    assert not t2k.svf_layers(model)
    assert not hasattr(model, "_t2_route")


def test_models_without_layers_to_convert():
    with pytest.raises(ValueError, match=r"SVFLinear\.from_linear"):
        t2k.convert(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"holds no nn\.Linear"):
        t2k.convert(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_other_weights_under_the_factors(zoo, setup):
    model, _ = setup
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = zoo.build("llama", seed=1).state_dict()
    with pytest.raises(RuntimeError, match=r"load the checkpoint before t2kernels\.convert"):
        model.load_state_dict(other, strict=False)
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, before["model.layers.0.mlp.up_proj.weight"])


def test_an_expert_that_a_sigmoid_cannot_express(zoo):
    model = zoo.build("llama")
    t2k.convert(model, parametrisation="sigmoid-normalised", progress=False)
    layers = t2k.svf_layers(model)
    loud = t2k.Expert({n: torch.full((m.rank,), 3.0) for n, m in layers.items()})
    with pytest.raises(ValueError, match=r"nuclear norm.*3\.0.*parametrisation='direct'"):
        loud.apply_to(model)
    applied = max(float((m.multiplier - 1).detach().abs().max()) for m in layers.values())
    assert applied < 1e-5, "half was applied"


def test_wrong_inputs_to_a_layer(setup):
    model, bank = setup
    layer = model.model.layers[0].mlp.up_proj
    with bank.use("math"):
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 32\), got \(2, 31\)"):
            layer(torch.randn(2, 31))
        with pytest.raises(TypeError, match=r"x must be torch\.float32.*got torch\.float64"):
            layer(torch.randn(2, 32).double())


def test_a_model_around_the_converted_one(zoo, setup):
    """Its layers have other names there, so that no expert would fit."""
    model, _ = setup
    for outer in (torch.compile(model, backend="eager"), nn.Sequential(model)):
        for call in (t2k.revert, t2k.trainable, t2k.ExpertBank, t2k.Expert.from_model):
            with pytest.raises(ValueError, match=r"not the module that .*convert.*_orig_mod"):
                call(outer)


def test_a_damaged_weight_names_its_layer(zoo):
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj'.*inf or NaN"):
        t2k.convert(model, progress=False)
    assert not t2k.svf_layers(model)


def test_a_part_may_be_called_by_itself_with_another_batch(zoo, setup):
    model, bank = setup
    ids = zoo.inputs("llama")["input_ids"]
    with torch.no_grad(), bank.use(["math", None, "code"]):
        one = model.model(input_ids=ids).last_hidden_state
        model(input_ids=ids)
        twice = model.model(input_ids=ids.repeat_interleave(2, 0)).last_hidden_state
    assert zoo.close(twice, one.repeat_interleave(2, 0))
