"""Found mixtures as files: there and back, by the task's name, and never for other experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.adapt import mixtures as mixtures_module
from t2runtime.adapt.mixtures import (
    Hashes,
    TaskMixture,
    hashes,
    load_mixture,
    load_mixtures,
    save_mixture,
)


@pytest.fixture
def bank(tiny: Any) -> t2k.ExpertBank:
    bank = t2k.ExpertBank(tiny)
    here = t2k.Expert.from_model(tiny)
    for index, name in enumerate(("a", "b")):
        z = {n: v + 0.1 * (index + 1) for n, v in here.z.items()}
        bank.add(name, t2k.Expert(z, here.fingerprints))
    return bank


def test_there_and_back_by_name(bank: t2k.ExpertBank, tmp_path: Path) -> None:
    saved = TaskMixture("sums", {"b": 0.5}, hashes(bank), "cma-es", 3, 640, {"accuracy": 0.75})
    path = save_mixture(tmp_path / "found", saved)
    assert path == tmp_path / "found" / "sums.json"
    again = load_mixture(tmp_path / "found", "sums")
    assert again == load_mixture(path) == load_mixtures(tmp_path / "found")["sums"] == saved
    assert again.alpha(bank).tolist() == [0.0, 0.5]
    assert again.alpha(bank, per_layer=True).shape == (len(bank.layers), 2)


def test_a_layer_may_have_weights_of_its_own(bank: t2k.ExpertBank, tmp_path: Path) -> None:
    weights = {bank.layers[1]: {"a": 1.0, "b": -0.5}}
    path = save_mixture(tmp_path / "x.json", TaskMixture("x", weights, hashes(bank)))
    alpha = load_mixture(path).alpha(bank)
    assert alpha.shape == (len(bank.layers), 2)
    assert alpha[1].tolist() == [1.0, -0.5] and not alpha[0].any()
    with bank.use(alpha[None]), torch.no_grad():
        bank.model(input_ids=torch.ones(1, 2, dtype=torch.long))
    other = TaskMixture("x", {"nowhere": {"a": 1.0}}, hashes(bank))
    with pytest.raises(ValueError, match="layers that the model lacks, first 'nowhere'"):
        other.alpha(bank)


def test_other_experts_are_refused(bank: t2k.ExpertBank) -> None:
    mixture = TaskMixture("sums", {"a": 1.0, "b": 0.0}, hashes(bank))
    bank.remove("b")
    assert mixture.alpha(bank).tolist() == [1.0], "an expert of weight 0 is not missed"
    changed = bank["a"] * 1.01
    bank.add("a", changed, overwrite=True)
    with pytest.raises(ValueError, match="found for another expert 'a'"):
        mixture.alpha(bank)
    bank.remove("a")
    with pytest.raises(ValueError, match="needs expert 'a', the bank has none"):
        mixture.alpha(bank)
    with pytest.raises(ValueError, match="expert 'a' left the bank after the mixture was checked"):
        mixture.checked_alpha(bank)


def test_all_that_differ_are_named_at_once(bank: t2k.ExpertBank) -> None:
    mixture = TaskMixture("sums", {"a": 1.0, "b": 1.0}, hashes(bank))
    for name in ("a", "b"):
        bank.add(name, bank[name] * 1.01, overwrite=True)
    with pytest.raises(ValueError, match="found for other experts 'a', 'b' .hash of 'a' "):
        mixture.check(bank)
    for name in ("a", "b"):
        bank.remove(name)
    with pytest.raises(ValueError, match="needs experts 'a', 'b', the bank has none"):
        mixture.check(bank)


def test_an_expert_is_hashed_once_and_again_when_it_is_replaced(
    bank: t2k.ExpertBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = TaskMixture("sums", {"a": 1.0, "b": 1.0}, hashes(bank))
    made: list[t2k.Expert] = []
    whole = mixtures_module.expert_hash
    monkeypatch.setattr(mixtures_module, "expert_hash", lambda e: made.append(e) or whole(e))
    hashed = Hashes(bank)
    for _ in range(3):
        mixture.check(bank, hashed)
    assert made == [bank["a"], bank["b"]]
    bank.add("a", bank["a"] * 1.01, overwrite=True)
    with pytest.raises(ValueError, match="found for another expert 'a'"):
        mixture.check(bank, hashed)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"c": 1.0}, "name expert 'c'"),
        ({"a": float("nan")}, "finite number, got nan"),
        ({"a": "1"}, "finite number, got '1'"),
        ({"a": True}, "finite number, got True"),
        ({"a": -1e39}, "finite number, got -1e[+]39 .fp32 holds up to 3.4e[+]38"),
        ({"a": 1.0, "up": {"a": 1.0}}, "not both"),
        ([1.0], "must be a mapping"),
    ],
)
def test_bad_weights(weights: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        TaskMixture("sums", weights, {"a": "0"})


def test_damaged_files(bank: t2k.ExpertBank, tmp_path: Path) -> None:
    path = save_mixture(tmp_path, TaskMixture("sums", {"a": 1.0}, hashes(bank)))
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(t2k.CorruptFileError, match="truncated or damaged"):
        load_mixture(path)
    for change in ({"weights": {"z": 1}}, {"surplus": 1}, {"task": "../up"}, {"kind": "store"}):
        path.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(t2k.CorruptFileError):
            load_mixture(path)
    without = {k: v for k, v in json.loads(text).items() if k not in ("experts", "digest")}
    path.write_text(json.dumps(without))
    with pytest.raises(t2k.CorruptFileError, match="not a whole mixture"):
        load_mixture(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no mixture of task 'sums' in .* it has none"):
        load_mixture(tmp_path, "sums")
    with pytest.raises(FileNotFoundError, match="no mixtures"):
        load_mixtures(tmp_path)
    with pytest.raises(ValueError, match="task must consist of"):
        load_mixture(tmp_path, "../sums")
