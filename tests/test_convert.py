"""convert and revert: what is replaced, what is left alone and why, and nothing half-done."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import t2kernels as t2k


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q_proj", "v_proj")})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 16), "down_proj": nn.Linear(16, 8)})

    def forward(self, x):
        a = self.self_attn["v_proj"](x) * torch.sigmoid(self.self_attn["q_proj"](x))
        return x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](a)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 8),
        ("mlp", 4),
        ("attention", 4),
        ("q_proj", 2),
        (["q_proj", "up_proj"], 4),
        (["layers.1.mlp.up_proj"], 1),
        (r"layers\.0\..*", 4),
    ],
)
def test_targets(model, targets, count):
    with torch.no_grad():
        before = model(IDS)
        report = t2k.convert(model, targets)
        assert len(report.converted) == len(t2k.svf_layers(model)) == count
        assert torch.equal(model(IDS), before)
    assert report.trainable == 8 * count
    assert "tied" in report.skipped["lm_head"]
    assert f"{count} layers converted" in str(report)


def test_exclude(model):
    report = t2k.convert(model, "all-linear", exclude=["q_proj"])
    assert len(report.converted) == 6


def test_state_dict_has_the_bases_keys_and_one_fp32_z_per_layer(model):
    before = dict(model.state_dict())
    t2k.convert(model)
    after = dict(model.state_dict())
    assert {k for k in after if k not in before} == {f"{n}.z" for n in t2k.svf_layers(model)}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(after[k].dtype == torch.float32 for k in after if k.endswith(".z"))


def test_revert_gives_the_same_modules_back(model):
    modules = dict(model.named_modules())
    t2k.convert(model)
    t2k.revert(model)
    assert dict(model.named_modules()) == modules
    assert not model._forward_pre_hooks
    assert not hasattr(model, "_t2_route")
    t2k.convert(model)  # and once more


def test_trainable_turns_on_z_and_nothing_else(model):
    t2k.convert(model, "mlp")
    parameters = t2k.trainable(model)
    assert len(parameters) == 4
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    model(IDS).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in parameters)
    t2k.trainable(model)  # again, with z already on
    t2k.revert(model)
    assert all(p.requires_grad for p in model.parameters())


def test_conversion_is_quiet_about_gradients(model):
    t2k.convert(model)
    assert not any(layer.z.requires_grad for layer in t2k.svf_layers(model).values())


def test_failure_in_the_middle_changes_nothing(model):
    with torch.no_grad():
        model.layers[1].mlp["down_proj"].weight[0, 0] = float("nan")
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="inf or NaN"):
        t2k.convert(model)
    assert dict(model.named_modules()) == modules
    assert not model._forward_pre_hooks


def test_expert_tensors_are_reported_by_name(model):
    model.layers[0].experts = nn.ParameterDict({"gate_up": nn.Parameter(torch.randn(4, 8, 16))})
    report = t2k.convert(model)
    assert "expert tensor (4, 8, 16)" in report.skipped["layers.0.experts.gate_up"]


def test_given_factors_are_used_and_checked(model):
    factors = {
        n: t2k.decompose(m.weight.detach())
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
    }
    t2k.convert(model, "mlp", decomposition=factors, rank=4)
    assert all(layer.rank == 4 for layer in t2k.svf_layers(model).values())
    t2k.revert(model)
    del factors["layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"no entry for layer 'layers.1.mlp.up_proj'"):
        t2k.convert(model, "mlp", decomposition=factors)


def test_a_folder_of_factors_is_used_and_verified(model, tmp_path):
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    t2k.decompose_checkpoint(tmp_path / "model.safetensors", tmp_path / "f", progress=False)
    with torch.no_grad():
        before = model(IDS)
        t2k.convert(model, "mlp", decomposition=tmp_path / "f", rank=3)
        assert torch.equal(model(IDS), before)
        assert {layer.rank for layer in t2k.svf_layers(model).values()} == {3}
        t2k.revert(model)
        model.layers[0].mlp["up_proj"].weight.mul_(2)
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj"):
        t2k.convert(model, "mlp", decomposition=str(tmp_path / "f"))


@pytest.mark.parametrize("kind", t2k.FACTOR_KINDS)
@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"keep_weight": False}], ids=str)
def test_eight_bit_factors(model, kind, options):
    with torch.no_grad():
        exact = model(IDS)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    t2k.convert(model, "mlp", factors=kind, **options)
    layers = t2k.svf_layers(model)
    for layer in layers.values():
        assert isinstance(layer.factors, t2k.QuantizedFactors) and layer.factors.kind == kind
        assert str(t2k.FACTOR_KINDS[kind]) in repr(layer)
    dropped = "keep_weight" in options
    bank = t2k.ExpertBank(model)
    bank.add("one", t2k.Expert({n: torch.ones(layer.rank) for n, layer in layers.items()}))
    bank.add("two", t2k.Expert({n: torch.full((layer.rank,), 2.0) for n, layer in layers.items()}))
    room = 0.05 if kind == "int8" else 0.1
    close = {"atol": room, "rtol": room}
    with torch.no_grad():
        base = model(IDS)
        assert torch.equal(base, exact) != dropped  # without W the base is what the factors say
        torch.testing.assert_close(base, exact, **close)
        with bank.use("one"):
            torch.testing.assert_close(model(IDS), exact, **close)
        with bank.use("two"):
            moved = model(IDS)
            why = t2k.explain(layers["layers.0.mlp.up_proj"], torch.zeros(2, 5, 8)).why
            assert f"U and V are held in {kind}" in why
        assert (moved - exact).abs().max() > 0.1, "the expert does nothing: no test"
        bank.merge("two")
        torch.testing.assert_close(model(IDS), moved, **close)
        bank.unmerge()
        assert torch.equal(model(IDS), base)
        t2k.revert(model)
    assert all(torch.equal(p, weights[n]) != (dropped and "mlp" in n and "weight" in n)
               for n, p in model.named_parameters())  # fmt: skip


def test_eight_bit_factors_of_a_decomposition(model, tmp_path):
    """A folder holds the weight's dtype and serves both kinds; a mapping may hold either."""
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    t2k.decompose_checkpoint(tmp_path / "model.safetensors", tmp_path / "f", progress=False)
    given = {}
    for kind in t2k.FACTOR_KINDS:
        t2k.convert(model, "mlp", decomposition=tmp_path / "f", factors=kind)
        given = {name: layer.factors for name, layer in t2k.svf_layers(model).items()}
        assert {f.kind for f in given.values()} == {kind}
        t2k.revert(model)
        t2k.convert(model, "mlp", decomposition=given, factors=kind)
        assert {layer.factors.kind for layer in t2k.svf_layers(model).values()} == {kind}
        t2k.revert(model)
    with pytest.raises(ValueError, match=f"has {kind} factors for layer .*'int8' was asked for"):
        t2k.convert(model, "mlp", decomposition=given, factors="int8")
    with pytest.raises(ValueError, match="rank cannot cut 8-bit factors"):
        t2k.convert(model, "mlp", decomposition=given, rank=2)
    assert not t2k.svf_layers(model)


def test_inference_mode_conversion_can_be_trained_later(model):
    with torch.inference_mode():
        t2k.convert(model)
        bank = t2k.ExpertBank(model)
        bank.add("a", t2k.Expert({n: torch.rand(8) for n in bank.layers}))
        with bank.use("a"):
            model(IDS)
    with bank.use("a"):
        model(IDS)
    t2k.trainable(model)
    model(IDS).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "mpl"}, "Did you mean.*mlp"),
        ({"targets": ["q_porj"]}, "Did you mean.*q_proj"),
        ({"targets": ["lm_head"]}, "tied"),
        ({"rank": 0}, "rank must be a positive integer"),
        ({"rank": 4, "keep_weight": False}, "keep_weight=False needs the full rank"),
        ({"parametrisation": "sigmoid"}, "parametrisation must be"),
        ({"precision": "fp16"}, "precision"),
        ({"factors": "folder"}, "goes into decomposition="),
    ],
)
def test_bad_options_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        t2k.convert(model, **options)
    assert not t2k.svf_layers(model)


def test_converting_twice_is_named(model):
    t2k.convert(model)
    with pytest.raises(ValueError, match=r"t2kernels.revert\(model\)"):
        t2k.convert(model)
    t2k.revert(model)
    with pytest.raises(ValueError, match="no SVF layers"):
        t2k.revert(model)


def test_weights_of_converted_layers_are_frozen_until_revert(model):
    t2k.convert(model, "mlp")
    assert not any(layer.weight.requires_grad for layer in t2k.svf_layers(model).values())
    assert model.embed_tokens.weight.requires_grad
    t2k.revert(model)
    assert all(p.requires_grad for p in model.parameters())


def test_layers_that_a_fast_path_reads_are_left_alone():
    model = nn.Sequential(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 16)
    ).eval()
    report = t2k.convert(model)
    assert [c.name for c in report.converted] == ["1"]
    assert "without calling the layer" in report.skipped["0.linear1"]


class Clamped(nn.Linear):
    """What a subclass may do: not what nn.Linear does."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


def test_a_linear_with_a_forward_of_its_own_is_named():
    model = nn.Sequential(nn.Linear(4, 4), Clamped(4, 4))
    report = t2k.convert(model)
    assert [c.name for c in report.converted] == ["0"]
    assert report.skipped["1"] == "Clamped is an nn.Linear with a forward of its own"
    with pytest.raises(ValueError, match="1: Clamped is an nn.Linear with a forward"):
        t2k.convert(nn.Sequential(nn.ReLU(), Clamped(4, 4)))


def test_weights_that_a_scan_reads_are_left_alone():
    """Mamba multiplies by dt_proj.weight; its fused kernels take those of out_proj and x_proj."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=33, hidden_size=16, num_hidden_layers=1, state_size=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    report = t2k.convert(model)
    assert [c.name.rpartition(".")[2] for c in report.converted] == ["in_proj"]
    assert "without calling the layer" in report.skipped["backbone.layers.0.mixer.dt_proj"]
    bank = t2k.ExpertBank(model)
    ((name, layer),) = t2k.svf_layers(model).items()
    z = torch.linspace(0, 2, layer.rank)
    bank.add("a", t2k.Expert({name: z}, {name: layer.fingerprint}))
    ids = torch.arange(3, 11)[None]
    told = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), bank.use("a"):
        used, text = model(ids).logits, model.generate(ids, **told)
    bank.merge("a")
    with torch.no_grad():
        torch.testing.assert_close(used, model(ids).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(text, model.generate(ids, **told))
    bank.unmerge()
    with torch.no_grad():
        states = model(ids, use_cache=True).cache_params
    with torch.no_grad(), bank.use("a"), pytest.raises(RuntimeError, match="under other experts"):
        model(ids[:, -1:], cache_params=states)
