"""Shots never count in a score, and leaks are seen."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import transformers

import t2kernels as t2k
from t2runtime.adapt import shots as shots_module
from t2runtime.adapt.shots import (
    answer_and_score,
    draw_shots,
    encode_shots,
    held_out,
    is_marked,
    leaked,
    log_likelihood,
    question_mark,
    question_marks,
    same_question,
)
from t2runtime.generation import answer_log_probs, complete, forced
from t2runtime.sources import source
from t2runtime.tasks import Problem

NEW = 3


def test_a_leak_is_seen_through_spaces_and_case() -> None:
    problems = [Problem(p, "1", "x") for p in ("one =", "Two  =", "three =")]
    shots = [Problem(" two =\n", "2", "x"), Problem("four =", "2", "x")]
    assert leaked(problems, shots) == [1]
    assert held_out(problems, shots) == ([problems[0], problems[2]], 1)
    with pytest.raises(ValueError, match="1 of 3 problems to be scored are shots, first 'Two  ='"):
        held_out(problems, shots, "error")
    with pytest.raises(ValueError, match="all of 1 are shots"):
        held_out(problems[1:2], shots)
    with pytest.raises(ValueError, match="on_leak must be"):
        held_out(problems, shots, "ignore")  # type: ignore[arg-type]


SAME = [
    ("What is 2+2?", "What is 2+2"),
    ("What is 2+2?", " \u201cwhat is  2+2 ?\u201d "),
    ("What is 2+2?", "\uff37hat is 2\uff0b2\uff1f"),
    ("What's 5 \u2212 2?", "what\u2019s 5 - 2..."),
    ("Say 'x'.", "say 'x'"),
    ("the \ufb01rst one", "The first one:"),
    ("re\u0301sume\u0301?", "r\u00e9sum\u00e9"),
    ("''2+2=''", "2+2="),
]
DIFFERENT = [
    ("2-2", "2+2"),
    ("What is 2-2?", "What is 2+2?"),
    ("What is 2\u00b2?", "What is 22?"),
    ("What is 1\u00bd?", "What is 11/2?"),
    ("H\u2082O", "H2O"),
    ("What is 3!", "What is 3"),
    ("2+2=", "2+2"),
    ("1.5", "15"),
    ("-2", "2"),
    ("What is f'?", "What is f?"),
    ("a, b", "a b"),
    ("(2)", "2"),
    ("?", "."),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_question_in_two_forms(one: str, other: str) -> None:
    first, second = (Problem(text, "1", "x") for text in (one, other))
    assert same_question(first) == same_question(second)
    assert leaked([first], [second]) == [0] and is_marked(first, {question_mark(second)})


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_two_questions_stay_two(one: str, other: str) -> None:
    first, second = (Problem(text, "1", "x") for text in (one, other))
    assert leaked([first], [second]) == [] and not is_marked(first, {question_mark(second)})


def test_marks_of_older_files_are_known() -> None:
    """As files had them before: the prompt in small letters with single spaces, hashed."""
    older = {hashlib.sha256(b"what is 2+2?").hexdigest()[:16]}
    assert is_marked(Problem(" What is  2+2?", "", "x"), older)
    assert not is_marked(Problem("What is 2-2?", "", "x"), older)
    assert question_mark(Problem("What is 2+2?", "", "x")) not in older
    assert question_marks([Problem(p, "", "x") for p in ("a?", "b", "a")]) == tuple(
        question_mark(Problem(p, "", "x")) for p in "ab"
    )


def test_log_likelihood_is_that_of_the_answer_and_its_end(
    bank: t2k.ExpertBank, tokenizer: Any, shots: list[Problem]
) -> None:
    with torch.no_grad():
        found = log_likelihood(bank.model, tokenizer, shots)
        for shot, value in zip(shots, found, strict=True):
            given = forced(tokenizer, [shot.prompt], [shot.answer], bank.model)
            table = answer_log_probs(bank.model, given)[0]
            alone = table.gather(-1, given.new_ids[0][:, None]).sum()
            assert float(value) == pytest.approx(float(alone), abs=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_answers_and_scores_are_those_of_two_calls(
    bank: t2k.ExpertBank, tokenizer: Any, shots: list[Problem], cached: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With prompts of different lengths, answers too, and a mixture of its own for each row."""
    problems = [Problem("1=", "2", "x"), *shots, Problem("flip 12345=", "54321", "x")]
    if not cached:
        monkeypatch.setattr(shots_module, "_croppable", lambda model: None)
    calls: list[int] = []
    hook = bank.model.register_forward_pre_hook(lambda *_: calls.append(1))
    alpha = torch.rand(len(problems), 2, generator=torch.Generator().manual_seed(1))
    with bank.use(alpha), torch.no_grad():
        given = encode_shots(bank.model, tokenizer, problems)
        texts, found = answer_and_score(bank.model, tokenizer, given, NEW)
        assert len(calls) == NEW + 1
        prompts = [problem.prompt for problem in problems]
        assert texts == complete(bank.model, tokenizer, prompts, NEW).texts
        want = log_likelihood(bank.model, tokenizer, problems)
    hook.remove()
    assert torch.allclose(found, want, atol=1e-4)


def test_a_long_prompt_and_a_long_answer_are_scored_together(tokenizer: Any) -> None:
    """Each fits into a table of 64 positions, the longest prompt above the longest answer not."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    problems = [Problem("1" * 57, "12345", "x"), Problem("1+1=", "2" * 58, "x")]
    texts, found = answer_and_score(model, tokenizer, encode_shots(model, tokenizer, problems), 6)
    for problem, text, value in zip(problems, texts, found, strict=True):
        assert text == complete(model, tokenizer, [problem.prompt], 6).texts[0]
        with torch.no_grad():
            assert torch.allclose(value, log_likelihood(model, tokenizer, [problem])[0], atol=1e-3)


def test_members_answer_the_same_shots_in_turn(
    bank: t2k.ExpertBank, tokenizer: Any, shots: list[Problem]
) -> None:
    """Rows of member m are those of a call under member m alone, for some of the shots, too."""
    alpha = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.3, 0.9]])
    given = encode_shots(bank.model, tokenizer, shots)
    for part in (given, given.rows(slice(1, 3))):
        with bank.use(alpha):
            texts, found = answer_and_score(bank.model, tokenizer, part, NEW, members=3)
        rows = len(part.texts)
        for member in range(3):
            with bank.use(alpha[member : member + 1]):
                own, likely = answer_and_score(bank.model, tokenizer, part, NEW)
            mine = slice(member * rows, (member + 1) * rows)
            assert texts[mine] == own
            assert torch.allclose(found[mine], likely, atol=1e-4)


class Few:
    """Three different questions, drawn again and again."""

    name, max_new_tokens = "few", 4

    def __call__(self, count: int, split: str, seed: int) -> list[Problem]:
        return [Problem(f"{index % 3}=", "1", "x") for index in range(count)]

    def grade(self, problems: Any, completions: Any) -> list[bool]:
        return [False for _ in problems]


def test_shots_are_drawn_once_each_and_a_lack_is_told(
    caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    assert [shot.prompt for shot in draw_shots(Few(), 3, "train", 0)] == ["0=", "1=", "2="]
    assert not caplog.records
    assert len(draw_shots(Few(), 5, "train", 0)) == 3
    assert caplog.records[0].getMessage() == (
        "task 'few': 5 shots asked for, 3 found in the train split"
    )
    caplog.clear()
    lines = [f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(40)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:4] if split == "test" else lines))
    own = source(str(tmp_path))
    caplog.clear()
    assert len(draw_shots(own, 50, "test", 0)) == 4
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith("4 found in the test split"), "which is a file of its own"
    (tmp_path / "validation.jsonl").unlink()
    (tmp_path / "test.jsonl").write_text(lines[0])
    cut = source(str(tmp_path))
    assert cut.cut == {"train", "validation"}  # type: ignore[attr-defined]
    (tmp_path / "train.jsonl").rename(tmp_path / "own.jsonl")
    one = source(str(tmp_path / "own.jsonl"))
    assert one.cut == {"train", "validation", "test"}  # type: ignore[attr-defined]
