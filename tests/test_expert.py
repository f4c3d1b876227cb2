"""Experts: files, algebra, fit."""

import errno
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import t2kernels as t2k
from t2kernels import files


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    t2k.convert(model)
    return model


def random_expert(model, seed=0):
    gen = torch.Generator().manual_seed(seed)
    layers = t2k.svf_layers(model)
    return t2k.Expert(
        {n: 1 + torch.randn(layer.rank, generator=gen) for n, layer in layers.items()},
        {n: layer.fingerprint for n, layer in layers.items()},
    )


def test_a_file_holds_everything(tmp_path):
    model = make_model()
    with torch.no_grad():
        model[0].z.mul_(1.5)
    expert = t2k.Expert.from_model(model, description="adds", metadata={"reward": [1, -1]})
    expert.base_model = "tiny"
    expert.save(tmp_path / "a.safetensors")
    again = t2k.Expert.load(tmp_path / "a.safetensors")
    assert again.z.keys() == expert.z.keys()
    assert all(torch.equal(again.z[n], expert.z[n]) for n in expert.z)
    assert (again.fingerprints, again.base_model) == (expert.fingerprints, "tiny")
    assert (again.description, again.metadata) == ("adds", {"reward": [1, -1]})


@pytest.mark.parametrize("parametrisation", ["direct", "sigmoid-normalised"])
def test_apply_to_and_from_model_are_inverse(parametrisation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    t2k.convert(model, parametrisation=parametrisation)
    S = model[0].factors.S
    z = torch.rand(5) + 0.5
    z = z * S.sum() / (S * z).sum()  # what sigmoid-normalised can express
    t2k.Expert({"0": z}).apply_to(model)
    torch.testing.assert_close(t2k.Expert.from_model(model).z["0"], z)


def test_apply_to_refuses_what_a_sigmoid_cannot_be():
    model = nn.Sequential(nn.Linear(3, 3))
    t2k.convert(model, parametrisation="sigmoid-normalised")
    with pytest.raises(ValueError, match="≤ 0"):
        t2k.Expert({"0": torch.tensor([1.0, -1.0, 1.0])}).apply_to(model)


def test_algebra_is_the_mixture():
    model = make_model()
    a, b = random_expert(model, 1), random_expert(model, 2)
    both = 0.7 * a + b * 0.3
    bank = t2k.ExpertBank(model)
    for name, expert in (("a", a), ("b", b), ("both", both)):
        bank.add(name, expert)
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        with bank.use("both"):
            one = model(x)
        with bank.use({"a": 0.7, "b": 0.3}):
            torch.testing.assert_close(model(x), one)
    for name in a.z:
        torch.testing.assert_close((a - a).z[name], torch.ones_like(a.z[name]))


def test_sum_and_division():
    model = make_model()
    a, b = random_expert(model, 1), random_expert(model, 2)
    mean = sum([a, b]) / 2
    for name, z in mean.z.items():
        torch.testing.assert_close(z, (a.z[name] + b.z[name]) / 2)
    for wrong in (lambda: a + 1, lambda: 1 + a, lambda: a / b, lambda: a / True):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ZeroDivisionError):
        a / 0


def test_a_tensor_of_no_dimensions_is_a_factor():
    """From both sides, of any real dtype; alpha that is learned belongs into `bank.use`."""
    a = random_expert(make_model(), 1)
    half = torch.tensor(0.5, requires_grad=True)
    for made in (half * a, a * half, a / torch.tensor(2), torch.tensor(0.5).bfloat16() * a):
        for name, z in made.z.items():
            torch.testing.assert_close(z, (0.5 * a).z[name])
    for wrong in (torch.tensor([0.5]), torch.tensor(True), torch.tensor(1j)):
        for call in (lambda: a * wrong, lambda: wrong * a, lambda: a / wrong):  # noqa: B023
            with pytest.raises(TypeError, match="a factor must be a number or a real"):
                call()


def test_algebra_refuses_other_base_weights():
    a, b = random_expert(make_model(0)), random_expert(make_model(1))
    with pytest.raises(ValueError, match="different base weights"):
        a + b
    with pytest.raises(TypeError):
        a * "0.5"


def test_an_expert_of_another_base_weight_needs_an_override():
    bank = t2k.ExpertBank(make_model(1))
    expert = random_expert(make_model(0))
    with pytest.raises(ValueError, match=r"another base weight.*allow_mismatch=True"):
        bank.add("a", expert)
    bank.add("a", expert, allow_mismatch=True)


def test_an_expert_of_another_model_or_rank_is_refused():
    model = make_model()
    bank = t2k.ExpertBank(model)
    with pytest.raises(ValueError, match="first 'decoder'.*another model"):
        bank.add("a", t2k.Expert({"decoder": torch.ones(3)}))
    with pytest.raises(ValueError, match="9 values for layer '0', which has rank 5"):
        bank.add("a", t2k.Expert({"0": torch.ones(9)}), allow_mismatch=True)
    with pytest.raises(ValueError, match="3 values for layer '0'"):
        bank.add("a", t2k.Expert({"0": torch.ones(3)}))


def test_an_expert_of_k_components_fits_the_full_rank():
    model = make_model()
    z = torch.tensor([2.0, 0.5])
    expert = t2k.Expert({"0": z}, {"0": model[0].fingerprint})
    bank = t2k.ExpertBank(model)
    bank.add("top", expert)
    f, x = model[0].factors, torch.randn(3, 1, 6)
    W = model[0].weight + f.U[:, :2] @ torch.diag(f.S[:2] * (z - 1)) @ f.V[:, :2].T
    with torch.no_grad(), bank.use("top"):
        torch.testing.assert_close(model[0](x), x @ W.T + model[0].bias)


@pytest.mark.parametrize(
    "bad", [{}, {"a": torch.ones(2, 2)}, {"a": torch.ones(2).int()}, {"a": [1]}]
)
def test_bad_z_is_refused(bad):
    with pytest.raises(ValueError, match="z"):
        t2k.Expert(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_expert_is_refused(value):
    with pytest.raises(ValueError, match="finite"):
        t2k.Expert({"a": torch.tensor([1.0, value])})


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a\\b", "..", "/etc/passwd", "x\0"])
def test_names_cannot_leave_the_folder(name):
    model = make_model()
    bank = t2k.ExpertBank(model)
    with pytest.raises(ValueError, match="expert name"):
        bank.add(name, random_expert(model))
    with pytest.raises(ValueError, match="layer name"):
        t2k.Expert({name: torch.ones(2)})


def test_damaged_files_say_so(tmp_path):
    path = tmp_path / "a.safetensors"
    t2k.Expert({"up": torch.rand(100)}).save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 50, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(t2k.CorruptFileError, match="a.safetensors"):
            t2k.Expert.load(path)
    path.write_bytes(b"\x80\x04pickle" + bytes(100))
    with pytest.raises(t2k.CorruptFileError):
        t2k.Expert.load(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        t2k.Expert.load(tmp_path / "missing.safetensors")
    files.save_tensors(path, {"up": torch.ones(2)}, {"kind": "expert", "version": 1})
    with pytest.raises(t2k.CorruptFileError, match="not a whole expert"):
        t2k.Expert.load(path)


def test_one_flipped_bit_anywhere_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    expert = t2k.Expert({"up": torch.rand(4)}, {"up": "ab"}, "tiny", "adds", {"n": [1, 0.1, "ü"]})
    expert.save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            again = t2k.Expert.load(path)
        except t2k.CorruptFileError as error:
            assert str(path) in str(error)
        else:  # the name of the checksum itself, or white space
            assert torch.equal(again.z["up"], expert.z["up"]), place
            assert (again.fingerprints, again.base_model) == (expert.fingerprints, "tiny"), place
            assert (again.description, again.metadata) == ("adds", {"n": [1, 0.1, "ü"]}), place
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 0x10]) + whole[-2:])
    with pytest.raises(t2k.CorruptFileError, match=r"damaged.*checksum.*Copy or make it again"):
        t2k.Expert.load(path)


def test_files_without_a_checksum_are_read(tmp_path):
    """Those of earlier releases."""
    path = tmp_path / "a.safetensors"
    facts = {"kind": "expert", "version": 1, "base_model": None, "description": "old"}
    facts |= {"fingerprints": {}, "metadata": {}}
    save_file({"up": torch.ones(3)}, str(path), metadata={"t2k": json.dumps(facts)})
    assert t2k.Expert.load(path).description == "old"


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    t2k.Expert({"up": torch.ones(2)}).save(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(t2k.SaveError, match="No space left"):
        t2k.Expert({"up": torch.zeros(2)}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_bank_saves_and_loads_a_folder(tmp_path):
    model = make_model()
    bank = t2k.ExpertBank(model)
    bank.add("math", random_expert(model, 1))
    bank.add("code", random_expert(model, 2))
    bank.save(tmp_path / "experts")
    again = t2k.ExpertBank(model)
    assert again.load(tmp_path / "experts") == ["code", "math"]
    assert all(torch.equal(again["math"].z[n], bank["math"].z[n]) for n in bank.layers)
    assert not list((tmp_path / "experts").glob("*.json"))
    assert json.loads(json.dumps(again.names)) == ["code", "math"]
    with pytest.raises(FileNotFoundError):
        again.load(tmp_path / "nothing")


def low_rank_copy(rank):
    """The model of ``make_model`` with ``rank`` components on top of its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    t2k.convert(model, rank=rank)
    return model


def test_a_cut_expert_says_what_the_cut_may_cost():
    full, low = make_model(), low_rank_copy(2)
    expert = random_expert(full)
    with pytest.raises(ValueError, match=r"truncated\(model\)"):
        t2k.ExpertBank(low).add("a", expert)
    cut, bounds = expert.truncated(low)
    t2k.ExpertBank(low).add("a", cut)
    cut.apply_to(low)
    for name, layer in t2k.svf_layers(full).items():
        f, z = layer.factors, expert.z[name]
        left_out = (f.S[2:] * (z[2:] - 1)).abs().max() / f.S[0]
        assert 0 < left_out <= bounds[name]
        assert bounds[name] == pytest.approx(float(f.S[1] / f.S[0] * (z[2:] - 1).abs().max()))
        # Outputs, too: of any input, and of those that the left out components answer.
        wide = f.U @ torch.diag(f.S * z) @ f.V.T
        x = torch.randn(100, layer.in_features)
        x = torch.cat([x, f.V[:, 2:].T])
        y = t2k.svf_layers(low)[name](x) - layer.bias
        error = (y - x @ wide.T).norm(dim=1) / (f.S[0] * x.norm(dim=1))
        assert 0 < error.max() <= bounds[name] * 1.001
    assert expert.truncated(low).worst == max(bounds.values())


def test_a_cut_of_what_was_never_trained_is_exact():
    low = low_rank_copy(3)
    expert = random_expert(make_model())
    for z in expert.z.values():
        z[3:] = 1
    assert expert.truncated(low).bounds == {"0": 0.0, "1": 0.0}
    own = t2k.Expert.from_model(low)
    assert own.truncated(low).bounds == {"0": 0.0, "1": 0.0}


def test_only_components_of_the_same_weight_are_cut():
    expert, low = random_expert(make_model(seed=1)), low_rank_copy(2)
    with pytest.raises(ValueError, match="another base weight"):
        expert.truncated(low)
    with pytest.raises(ValueError, match="another base weight"):
        t2k.Expert(expert.z).truncated(low)
