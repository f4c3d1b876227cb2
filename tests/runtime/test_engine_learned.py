"""The engine's strategies beyond the paper: a router network, and a record of past performance."""

from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.adapt.mixtures import hashes
from t2runtime.adapt.prompt import classify
from t2runtime.adapt.record import Record
from t2runtime.adapt.router import Router
from t2runtime.engine import Transformer2

QUESTIONS = [tasks.problems(name, 1, "test")[0].prompt for name in tasks.CATEGORIES]


def random_bank(model: Any, names: tuple[str, ...], size: float = 0.3) -> t2k.ExpertBank:
    generator = torch.Generator().manual_seed(0)
    here = t2k.Expert.from_model(model)
    bank = t2k.ExpertBank(model)
    for name in names:
        z = {n: 1 + size * torch.randn(v.shape, generator=generator) for n, v in here.z.items()}
        bank.add(name, t2k.Expert(z, here.fingerprints))
    return bank


@pytest.fixture
def bank(small: Any) -> t2k.ExpertBank:
    return random_bank(small[0], ("add", "max", "sorter"))


@pytest.fixture
def router(small: Any, bank: t2k.ExpertBank, tmp_path: Path) -> Path:
    """An untrained one that gives every question weights of its own; over two of the experts."""
    torch.manual_seed(0)
    made = Router(hashes(bank, ["max", "add"]), small[0].config.hidden_size, 8)
    torch.nn.init.normal_(made.second.weight, std=3.0)
    made.save(tmp_path / "router.safetensors")
    return tmp_path / "router.safetensors"


def test_the_router_gives_each_request_its_weights(
    small: Any, bank: t2k.ExpertBank, router: Path
) -> None:
    model, tokenizer = small
    t2 = Transformer2(model, tokenizer, bank, router=router)
    outputs = t2.generate(QUESTIONS, "router", max_new_tokens=6)
    alpha = Router.load(router).alpha(model, tokenizer, QUESTIONS)
    for output, row in zip(outputs, alpha.tolist(), strict=True):
        assert output.mixture == pytest.approx(dict(zip(["max", "add"], row, strict=True)))
        assert output.category is output.probabilities is None and output.error is None
        assert output.pass1_seconds > 0 and output.pass2_seconds > 0
    assert len({str(output.mixture) for output in outputs}) == len(QUESTIONS)
    given = t2.generate(QUESTIONS, [output.mixture for output in outputs], max_new_tokens=6)
    assert [output.text for output in given] == [output.text for output in outputs]
    with bank.use("sorter"):  # pass 1 runs on the base, whatever is in force around it
        inside = t2.dispatch(QUESTIONS, "router")
    assert [output.mixture for output in inside] == [output.mixture for output in outputs]
    assert all(output.text == "" and output.pass2_seconds == 0 for output in inside)


def test_the_router_in_any_company(small: Any, bank: t2k.ExpertBank, router: Path) -> None:
    """Batch-invariant: weights and text to the last bit; a bad request fails alone."""
    t2 = Transformer2(*small, bank, router=Router.load(router))
    with t2k.batch_invariant():
        mixed = t2.generate([*QUESTIONS, "1" * 50 + "=", "1" * 80], "router", max_new_tokens=6)
        assert [bool(output.error) for output in mixed] == [False] * 7 + [True]
        for question, output in zip(QUESTIONS, mixed):
            (alone,) = t2.generate([question], "router", max_new_tokens=6)
            assert (alone.text, alone.mixture) == (output.text, output.mixture)


def test_a_router_that_overflows_fails_its_requests(small: Any, bank: t2k.ExpertBank) -> None:
    made = Router(hashes(bank, ["add"]), small[0].config.hidden_size)
    made.mean.fill_(float("inf"))
    t2 = Transformer2(*small, bank, router=made)
    (output,) = t2.generate(["1+1="], "router", max_new_tokens=2)
    assert output.error is not None and "must be a finite number" in output.error


def test_the_record_speaks_for_an_expert(small: Any, bank: t2k.ExpertBank, tmp_path: Path) -> None:
    """By the category that pass 1 names: under the classifier where there is one, else the base."""
    model, tokenizer = small
    marks = hashes(bank, ["add", "max"])
    counts = {"add": {"max": (9, 10), "base": (1, 10)}, "other": {"max": (9, 9)}}
    Record(marks, counts).save(tmp_path / "record.json")
    for classifier in (None, "sorter"):
        t2 = Transformer2(model, tokenizer, bank, classifier=classifier,
                          record=tmp_path / "record.json")  # fmt: skip
        outputs = t2.generate(QUESTIONS, "record", max_new_tokens=2)
        said = classify(model, tokenizer, bank, t2.categories, QUESTIONS, classifier)
        assert [o.category for o in outputs] == [verdict.category for verdict in said]
        for output in outputs:
            assert output.mixture == ("max" if output.category == "add" else None)
            assert output.probabilities is not None
    base = Transformer2(model, tokenizer, bank, record=Record(marks, counts))
    named = {output.category for output in base.dispatch(QUESTIONS, "record")}
    assert {"add", "other"} <= named, "the rule above was tested both ways"


def test_one_number_of_new_tokens_each(small: Any, bank: t2k.ExpertBank) -> None:
    t2 = Transformer2(*small, bank)
    some = t2.generate(QUESTIONS[:3], None, max_new_tokens=[1, 4, 2])
    for question, most, output in zip(QUESTIONS, (1, 4, 2), some):
        assert output.text == t2.generate([question], None, max_new_tokens=most)[0].text
    with pytest.raises(ValueError, match="one for each of 3 prompts; got 2"):
        t2.generate(QUESTIONS[:3], None, max_new_tokens=[1, 2])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        t2.generate(QUESTIONS[:2], None, max_new_tokens=0)


def test_bad_files(small: Any, bank: t2k.ExpertBank, router: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    Record(hashes(bank, ["add"])).save(record)
    t2 = Transformer2(*small, bank)
    for name in ("router", "record"):
        with pytest.raises(ValueError, match=f"strategy '{name}' needs one"):
            t2.generate(["1+1="], name)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            Transformer2(*small, bank, **{name: tmp_path / "none"})  # type: ignore[arg-type]
    both = Transformer2(*small, bank, router=router, record=record)
    bank.add("add", bank["max"], overwrite=True)
    with pytest.raises(ValueError, match="trained for another expert 'add'"):
        both.generate(["1+1="], "router")
    with pytest.raises(ValueError, match="record was made for another expert 'add'"):
        both.generate(["1+1="], "record")
    lone = Transformer2(*small, random_bank(small[0], ("max",)), router=router, record=record)
    with pytest.raises(ValueError, match="router was trained for another|router needs expert"):
        lone.generate(["1+1="], "router")
    with pytest.raises(ValueError, match="the record needs expert 'add', the bank has max"):
        lone.generate(["1+1="], "record")
    for path, name in ((router, "router"), (record, "record")):
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(t2k.CorruptFileError, match="truncated"):
            Transformer2(*small, bank, **{name: path})  # type: ignore[arg-type]
