"""The bank on a small module: what every routing means, and every way to get it wrong."""

import threading

import pytest
import torch
from torch import nn

import t2kernels as t2k


class Tiny(nn.Module):
    """Two linear layers with a nonlinearity, rows on the first axis."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Tiny().eval()
    t2k.convert(model)
    return model


@pytest.fixture
def bank(model):
    bank = t2k.ExpertBank(model)
    gen = torch.Generator().manual_seed(1)
    for name in ("math", "code"):
        z = {n: 1 + 0.5 * torch.randn(8, generator=gen) for n in bank.layers}
        bank.add(name, t2k.Expert(z))
    return bank


def rebuilt(model, mixture, form=None):
    """The model with W' = U diag(σ⊙z) Vᵀ built by hand, in fp64; z by layer."""
    plain = Tiny().double()
    for name, layer in t2k.svf_layers(model).items():
        f = layer.factors
        W = f.U.double() @ torch.diag(f.S.double() * mixture[name].double()) @ f.V.double().T
        getattr(plain, name).weight.data = W
        getattr(plain, name).bias.data = layer.bias.double()
    return plain


def z_of(bank, weights):
    return {
        n: 1 + sum((w * (bank[e].z[n] - 1) for e, w in weights.items()), torch.zeros(8))
        for n in bank.layers
    }


MIXTURES = [{"math": 1.0}, {"math": 0.5}, {"math": 0.7, "code": 0.3}, {"math": 1, "code": 1}]


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
def test_uniform(model, bank, weights):
    x = torch.randn(3, 5, 8)
    expected = rebuilt(model, z_of(bank, weights))(x.double())
    with torch.no_grad(), bank.use(weights):
        torch.testing.assert_close(model(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_every_row_its_own_mixture_and_beams_repeat_rows(model, bank):
    x = torch.randn(4, 5, 8)
    routing = ["math", None, {"math": 0.7, "code": 0.3}, {"code": 0.0}]
    with torch.no_grad():
        base = model(x)
        with bank.use(routing):
            mixed = model(x)
            twice = model(x.repeat_interleave(2, 0))
        for row, entry in enumerate(routing):
            with bank.use(entry):
                torch.testing.assert_close(model(x[row : row + 1])[0], mixed[row])
    torch.testing.assert_close(mixed[1], base[1])
    torch.testing.assert_close(twice, mixed.repeat_interleave(2, 0))


def test_where_no_row_has_an_expert_the_output_is_bit_exact(model, bank):
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        base = model(x)
        for routing in (None, [None, None], {}, {"math": 0.0}, torch.zeros(2, 2)):
            with bank.use(routing):
                assert torch.equal(model(x), base)


def test_base_rows_can_use_the_stored_weight(model, bank):
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        base = model(x)
        with bank.use(["math", None], base_rows="stored"):
            y = model(x)
        with bank.use(["math", None]):
            torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(y[1], base[1], rtol=1e-6, atol=1e-6)


def test_own_z_rests_inside_use_and_works_outside(model, bank):
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        base = model(x)
        model.up.z.mul_(2.0)
        own = model(x)
        expected = rebuilt(model, {"up": torch.full((8,), 2.0), "down": torch.ones(8)})(x.double())
        torch.testing.assert_close(own.double(), expected, atol=1e-5, rtol=1e-5)
        with bank.use(None):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), own)


@pytest.mark.parametrize("form", ["deviation", "paper", "paper-normalised", "authors"])
def test_named_mixture_forms(model, bank, form):
    x, alpha = torch.randn(1, 5, 8), torch.tensor([[0.6, 0.9]])
    z = {
        n: t2k.mix(
            torch.stack([bank["math"].z[n], bank["code"].z[n]]), alpha, form, layer.factors.S
        )[0]
        for n, layer in t2k.svf_layers(model).items()
    }
    expected = rebuilt(model, z)(x.double())
    with torch.no_grad():
        for routing in ({"math": 0.6, "code": 0.9}, [{"code": 0.9, "math": 0.6}], alpha):
            with bank.use(routing, mixture=form):
                torch.testing.assert_close(model(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("form", ["deviation", "authors"])
def test_gradients_reach_alpha(model, bank, per_layer, form):
    x = torch.randn(3, 5, 8)
    shape = (3, 2, 2) if per_layer else (3, 2)
    alpha = torch.rand(shape, requires_grad=True)
    with bank.use(alpha, mixture=form):
        model(x).square().sum().backward()

    def loss(a):
        total = 0.0
        for row in range(3):
            z = {}
            for index, (n, layer) in enumerate(t2k.svf_layers(model).items()):
                Z = torch.stack([bank[e].z[n] for e in bank.names]).double()
                weights = a[row, index] if per_layer else a[row]
                z[n] = t2k.mix(Z, weights[None], form, layer.factors.S.double())[0]
            y = x[row].double()
            for n, layer in t2k.svf_layers(model).items():
                f = layer.factors
                h = (y @ f.V.double()) * (f.S.double() * z[n])
                y = h @ f.U.double().T + layer.bias.double()
                y = torch.tanh(y) if n == "up" else y
            total = total + y.square().sum()
        return total

    exact = alpha.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(loss(exact), exact)
    torch.testing.assert_close(alpha.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_constant_alpha_is_the_named_mixture(model, bank):
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        with bank.use([{"math": 0.25, "code": 0.5}, "code"]):
            expected = model(x)
        alpha = torch.tensor([[0.25, 0.5], [0.0, 1.0]])
        for a in (alpha, alpha[:, None, :].expand(2, 2, 2)):
            with bank.use(a):
                assert torch.equal(model(x), expected)


def test_explicit_slot_for_packed_tokens(model, bank):
    x = torch.randn(1, 6, 8)  # three requests packed into one row
    slot = torch.tensor([0, 0, 1, 1, 1, -1], dtype=torch.int32)
    with torch.no_grad():
        with bank.use(["math", "code"], slot=slot):
            packed, flat = model(x), model(x[0])
        assert torch.equal(packed[0], flat)
        for columns, entry in ((slice(0, 2), "math"), (slice(2, 5), "code"), (slice(5, 6), None)):
            with bank.use(entry):
                torch.testing.assert_close(model(x[:, columns]), packed[:, columns])


def test_two_dimensional_inputs_are_never_guessed(model, bank):
    x = torch.randn(4, 8)
    with torch.no_grad():
        with (
            bank.use(["math", "code"]),
            pytest.raises(ValueError, match=r"row_order='batch'.*slot"),
        ):
            model(x)
        with bank.use(["math", "code"], row_order="batch"):
            y = model(x)
        with bank.use(["math", "code"]):
            assert torch.equal(model(x[:, None])[:, 0], y)


def test_nesting_restores_the_outer_routing(model, bank):
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), bank.use(["math", "code"]):
        outer = model(x)
        with bank.use(["code", {"math": 0.5}]):
            assert not torch.equal(model(x), outer)
        assert torch.equal(model(x), outer)


def test_an_exception_inside_use_restores_the_base(model, bank):
    x = torch.randn(2, 5, 8)
    base = model(x)
    with pytest.raises(ZeroDivisionError), bank.use("math"):
        raise ZeroDivisionError
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge_are_bit_exact_after_many_cycles(dtype):
    torch.manual_seed(0)
    model = Tiny().to(dtype).eval()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    t2k.convert(model)
    bank = t2k.ExpertBank(model)
    bank.add("a", t2k.Expert({n: 1 + torch.randn(8) for n in bank.layers}))
    x = torch.randn(2, 5, 8).to(dtype)
    with torch.no_grad():
        base = model(x)
        with bank.use("a"):
            routed = model(x)
        for _ in range(50):
            bank.merge("a")
            bank.merge({"a": 0.5})
            bank.merge("a")
            merged = model(x)
            bank.unmerge()
        assert torch.equal(model(x), base)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(merged, routed, atol=tolerance, rtol=tolerance)
    assert all(torch.equal(model.state_dict()[n], p) for n, p in before.items())
    bank.merge("a")
    t2k.revert(model)
    assert all(torch.equal(model.state_dict()[n], p) for n, p in before.items())


def test_adding_an_expert_leaves_other_requests_bits_alone(model, bank):
    x = torch.randn(3, 5, 8)
    routing = ["math", {"math": 0.2, "code": 0.4}, None]
    with torch.no_grad():
        with bank.use(routing):
            before = model(x)
        bank.add("new", t2k.Expert({"up": torch.rand(8)}))
        with bank.use(routing):
            assert torch.equal(model(x), before)


def test_batch_invariant_base_rows(model, bank):
    x = torch.randn(3, 5, 8)
    with torch.no_grad(), t2k.batch_invariant():
        with bank.use(["math", None, "code"]):
            mixed = model(x)
        for row, entry in enumerate(["math", None, "code"]):
            with bank.use(entry):
                assert torch.equal(model(x[row : row + 1])[0], mixed[row])


def test_backward_under_another_routing_raises(model, bank):
    x = torch.randn(2, 5, 8, requires_grad=True)
    with bank.use(["math", "code"]):
        y = model(x).sum()
        y.backward(retain_graph=True)  # the forward's own routing
    with pytest.raises(RuntimeError, match="another routing"):
        y.backward(retain_graph=True)
    with bank.use(["code", "math"]), pytest.raises(RuntimeError, match="another routing|modified"):
        y.backward()


def test_another_thread_cannot_route_the_same_model(model, bank):
    errors = []

    def enter():
        try:
            with bank.use("code"):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with bank.use("math"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert "another thread" in errors[0]


@pytest.mark.parametrize(
    ("routing", "error", "message"),
    [
        ("maht", KeyError, "Did you mean 'math'"),
        (["math", "nope"], KeyError, "no expert named 'nope'"),
        ([], ValueError, "empty list"),
        ({"math": float("nan")}, ValueError, "weight of 'math'"),
        ({"math": "1"}, TypeError, "must be a number"),
        ([["math"]], TypeError, "entry must be"),
        (3, TypeError, "routing must be"),
        (torch.ones(2, 3), ValueError, r"\(B, K\) = \(B, 2\)"),
        (torch.ones(2, 5, 2), ValueError, r"\(B, 2, 2\)"),
        (torch.ones(2, 2).int(), ValueError, "float tensor"),
        (torch.full((1, 2), float("inf")), ValueError, "finite"),
    ],
)
def test_bad_routing_is_named(bank, routing, error, message):
    with pytest.raises(error, match=message), bank.use(routing):
        pass


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"mixture": "mean"}, "mixture must be one of"),
        ({"row_order": "rows"}, "row_order must be one of"),
        ({"base_rows": "w"}, "base_rows must be one of"),
        ({"slot": torch.tensor([0, 2], dtype=torch.int32)}, r"slot must lie in \[-1, 1\)"),
        ({"slot": torch.tensor([0, 0])}, "int32"),
    ],
)
def test_bad_options_are_named(bank, option, message):
    with pytest.raises((ValueError, TypeError), match=message), bank.use(["math"], **option):
        pass


def test_batch_that_does_not_fit_is_named(model, bank):
    with (
        torch.no_grad(),
        bank.use(["math", "code"]),
        pytest.raises(ValueError, match="2 requests.*3"),
    ):
        model(torch.randn(3, 5, 8))


def test_slot_that_does_not_fit_is_named(model, bank):
    slot = torch.zeros(7, dtype=torch.int32)
    with torch.no_grad(), bank.use("math", slot=slot), pytest.raises(ValueError, match="7 tokens"):
        model(torch.randn(1, 5, 8))


def test_members(model, bank):
    assert bank.names == ["math", "code"]
    assert bank.layers == ["up", "down"]
    assert (len(bank), "math" in bank, "nope" in bank) == (2, True, False)
    expert = bank["math"]
    with pytest.raises(ValueError, match="'math' already"):
        bank.add("math", expert)
    bank.add("math", 0.5 * expert, overwrite=True)
    bank.remove("code")
    assert list(bank) == ["math"]
    with pytest.raises(KeyError):
        bank.remove("code")
    with pytest.raises(TypeError, match="Expert.load"):
        bank.add("file", "math.safetensors")


def test_states_that_exclude_each_other(model, bank):
    with bank.use("math"):
        with pytest.raises(RuntimeError, match="leave the"):
            bank.merge("code")
        with pytest.raises(RuntimeError, match="leave the"):
            t2k.revert(model)
    bank.merge("math")
    with pytest.raises(RuntimeError, match="unmerge"), bank.use("code"):
        pass
    with pytest.raises(RuntimeError, match="unmerge"):
        t2k.trainable(model)
    with pytest.raises(TypeError, match="one expert for all rows"):
        bank.merge(["math", "code"])
    bank.unmerge()
    t2k.revert(model)
    with pytest.raises(RuntimeError, match="new ExpertBank"), bank.use("math"):
        pass


def test_prefetch_wants_names(bank):
    with pytest.raises(TypeError, match=r"prefetch: names must be a list, got 3"):
        bank.prefetch(3)


def test_a_bank_needs_a_converted_model():
    with pytest.raises(ValueError, match=r"t2kernels.convert\(model\)"):
        t2k.ExpertBank(Tiny())


def test_explain_names_form_backend_and_reason(model, bank):
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert t2k.explain(model.up, x).form == "base"
        with bank.use(["math", None]):
            said = t2k.explain(model.up, x)
        assert (said.form, said.backend) == ("factorised", "native")
        assert "own mixture" in said.why
        bank.merge("math")
        assert t2k.explain(model.up, x).form == "merged"
        bank.unmerge()
    with pytest.raises(TypeError, match="SVFLinear"):
        t2k.explain(nn.Linear(2, 2), x)


def test_one_plan_serves_inference_mode_and_gradients(model, bank):
    x = torch.randn(2, 1, 8)
    with bank.use(["math", None]):
        with torch.inference_mode():
            model(x)
        model(x.requires_grad_()).sum().backward()
    with torch.inference_mode(), bank.use(["code", None]), torch.inference_mode(False):
        model(torch.randn(2, 1, 8, requires_grad=True)).sum().backward()


def test_a_folder_is_loaded_whole_or_not_at_all(bank, tmp_path):
    bank["math"].save(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(t2k.CorruptFileError):
        bank.load(tmp_path)
    assert bank.names == ["math", "code"]
