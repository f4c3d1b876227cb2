"""`t2 quality` and what it measures with."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import t2kernels as t2k
from t2runtime.cli import main
from t2runtime.quality import (
    Text,
    answered,
    compare_texts,
    drift,
    new_tokens_that_fit,
    own_texts,
    resampled,
    windows,
)
from t2runtime.tasks import SKILLS, Problem, problems


class Table(torch.nn.Module):
    """A language model of one table: the logits behind each token."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.device = logits, logits.device

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        assert attention_mask.shape == input_ids.shape and not use_cache
        return SimpleNamespace(logits=self.logits[input_ids])


TEXTS = [Text([1, 4, 2, 3], 1, 2), Text([0, 3, 3, 1, 2, 4, 0], 3, 3), Text([2, 1], 1, 1)]


def test_sums_are_those_of_the_definitions() -> None:
    torch.manual_seed(0)
    first = Table(torch.randn(5, 5))
    second = Table(first.logits + 0.3 * torch.randn(5, 5))
    sums = compare_texts(first, second, TEXTS, rows=2)
    for i, text in enumerate(TEXTS):
        before, right = text.ids[text.scored - 1 : -1], torch.tensor(text.ids[text.scored :])
        p, q = first.logits[before].double(), second.logits[before].double()
        assert sums.tokens[i] == len(right)
        torch.testing.assert_close(sums.nll[i], F.cross_entropy(p, right, reduction="sum"))
        torch.testing.assert_close(sums.nll_changed[i], F.cross_entropy(q, right, reduction="sum"))
        kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)
        torch.testing.assert_close(sums.kl[i], kl)
        assert sums.same[i] == (p.argmax(-1) == q.argmax(-1)).sum()
    facts = sums.facts()
    nll, changed = (float(v.sum() / sums.tokens.sum()) for v in (sums.nll, sums.nll_changed))
    assert facts["perplexity_original"]["value"] == pytest.approx(math.exp(nll))
    assert facts["perplexity"]["value"] == pytest.approx(math.exp(changed))
    assert facts["perplexity_change"]["value"] == pytest.approx(math.exp(changed - nll) - 1)
    for estimate in facts.values():
        assert estimate["low"] <= estimate["value"] <= estimate["high"]


def test_a_model_differs_from_itself_in_nothing() -> None:
    model = Table(torch.randn(5, 5))
    facts = compare_texts(model, model, TEXTS, rows=3).facts()
    assert set(facts["kl"].values()) == set(facts["perplexity_change"].values()) == {0.0}
    assert set(facts["same_next_token"].values()) == {1.0}


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = Table(torch.full((5, 5), float("nan")))
    with pytest.raises(RuntimeError, match="not finite"):
        compare_texts(model, model, TEXTS, rows=3)


def test_intervals_cover_as_often_as_they_say() -> None:
    """Means of 40 texts of unequal length; with 100 trials 95 % is 87 to 100 of them."""
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for trial in range(100):
        weight = torch.randint(5, 50, (40,), generator=generator)
        mean = 1 + 0.3 * torch.randn(40, generator=generator)  # tokens of a text hang together
        found = resampled(mean * weight, weight, seed=trial)
        covered += found["low"] <= 1 <= found["high"]
    assert 85 <= covered < 100


def test_drift_of_continuations() -> None:
    before = [[1, 2, 3, 4], [5, 6], [7, 8, 9], [1]]
    found = drift(before, [[1, 2, 3, 4], [5, 7], [7, 8], [2, 3]])
    assert found["prompts"] == 4 and found["first_difference"] == 1  # of 1, 2, 0
    assert found["same_text"]["value"] == 0.25
    assert found["same_tokens"]["value"] == (4 + 1 + 2 + 0) / (4 + 2 + 3 + 2)
    same = drift(before, before)
    assert same["first_difference"] is None and same["same_tokens"]["value"] == 1


def test_windows_of_a_file(small: Any, tmp_path: Path) -> None:
    _, tokenizer = small
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 20)
    rows = windows(tokenizer, path, 21, 100)
    assert len(rows) == 10 and {len(row.ids) for row in rows} == {21}
    assert {row.ids[0] for row in rows} == {tokenizer.bos_token_id}
    assert all((row.scored, row.prompt) == (1, 10) for row in rows)
    few = windows(tokenizer, path, 21, 3)
    assert [row.ids for row in few] == [rows[i].ids for i in (0, 3, 6)]
    path.write_text("abc")
    with pytest.raises(ValueError, match="too few for two rows of 21"):
        windows(tokenizer, path, 21, 3)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text in UTF-8"):
        windows(tokenizer, path, 21, 3)


def test_own_texts_are_seeded_and_leave_the_seed_alone(small: Any) -> None:
    model, tokenizer = small
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = own_texts(model, tokenizer, 12, 5, rows=2, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert len(first) == 5 and all(1 < len(text.ids) <= 12 for text in first)
    assert first == own_texts(model, tokenizer, 12, 5, rows=2, seed=1)
    assert first != own_texts(model, tokenizer, 12, 5, rows=2, seed=2)
    nameless = SimpleNamespace(bos_token_id=None)
    with pytest.raises(ValueError, match="no start token to sample texts from"):
        own_texts(model, nameless, 12, 5, rows=2, seed=1)


def test_answers_are_scored_behind_their_questions(small: Any) -> None:
    model, tokenizer = small
    asked = problems("add", 3, "test")
    for text, problem in zip(answered(model, tokenizer, asked), asked, strict=True):
        assert tokenizer.decode(text.ids[1 : text.scored]) == problem.prompt
        assert tokenizer.decode(text.ids[text.scored : -1]) == problem.answer
        assert text.ids[-1] == tokenizer.eos_token_id and text.prompt == text.scored
    assert new_tokens_that_fit(model, [Text([1] * 9, 1, 60)], 20) == 4
    long = Problem("say " + "a" * 60 + "=", "a" * 60, "other")
    assert answered(model, tokenizer, [*asked, long]) == answered(model, tokenizer, asked)
    with pytest.raises(ValueError, match="1 of 3 problems .* context of 64 tokens"):
        answered(model, tokenizer, [asked[0], long, long])


@pytest.fixture
def expert(small: Any, tmp_path: Path) -> Path:
    model, _ = small
    here = t2k.Expert.from_model(model)
    z = {name: 0.5 * torch.ones_like(value) for name, value in here.z.items()}
    path = tmp_path / "half.safetensors"
    t2k.Expert(z, here.fingerprints, here.base_model).save(path)
    return path


def test_the_command(small: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", "small", "--limit", "60", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == "answers of " + " + ".join(SKILLS) and result["texts"] == 60
    assert (result["dtype"], result["layers"], result["expert"]) == ("float32", 28, None)
    rows = result["rows"]
    assert list(rows) == ["factors", "bfloat16", *t2k.FACTOR_KINDS]
    kl = {name: row["kl"]["value"] for name, row in rows.items()}
    assert kl["factors"] < 1e-9 < kl["int8"] < kl["fp8"] < 0.01 and 1e-9 < kl["bfloat16"] < 1e-3
    assert rows["factors"]["same_text"]["value"] == 1
    assert rows["fp8"]["same_next_token"]["value"] > 0.95


def test_under_an_expert(small: Any, expert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quality", "small", "--task", "add", "--limit", "20", "--kinds", "fp8"]
    words += ["--max-new-tokens", "4", "--expert", str(expert)]
    assert main([*words, "--json"]) == 0
    under = json.loads(capsys.readouterr().out)
    assert list(under["rows"]) == ["bfloat16", "fp8"]  # the original is in factors already
    assert 1e-7 < under["rows"]["fp8"]["kl"]["value"] < 0.05
    plain = [*words[:-2], "--dtype", "bfloat16"]
    assert main([*plain, "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert list(without["rows"]) == ["factors", "fp8"]
    assert (
        without["rows"]["fp8"]["perplexity_original"]["value"]
        < under["rows"]["fp8"]["perplexity_original"]["value"] / 1.2
    ), "the expert was not in force"
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "under" in out and "20 texts (answers of add)" in out and "up to 4 tokens" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kinds", "int4"], "--kinds must be of int8, fp8; got 'int4'"),
        (["--text", "a.txt", "--task", "add"], "exclude each other"),
        (["--limit", "1"], "--limit must be at least 2"),
        (["--rows", "0"], "--rows must be at least 1"),
        (["--task", "story:animal"], "no text to score"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
    ids=str,
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", "small", *words]) == 2
    assert message in capsys.readouterr().err
