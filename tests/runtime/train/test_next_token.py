import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import t2kernels as t2k
from t2runtime.generation import forced
from t2runtime.sources import source
from t2runtime.tasks import Generated, Problem
from t2runtime.tasks.files import FileSource
from t2runtime.tasks.stories import Stories
from t2runtime.train import SVF, Config, small_model, train
from t2runtime.train.next_token import learnt, next_token


def test_the_loss_is_that_of_answer_and_end(tiny: Any, tokenizer: Any) -> None:
    """Row by row, without padding, by torch's own loss."""
    source = Generated("add")
    cfg = small_model(objective="next-token", prompts=6, kl=0.0, rows_per_backward=4)
    t2k.trainable(tiny)
    facts = next_token(tiny, tokenizer, SVF(tiny), source, cfg, 3)
    total, count = 0.0, 0
    for problem in source(6, "train", 3):
        prompt = tokenizer(problem.prompt)["input_ids"]
        answer = [*tokenizer(problem.answer, add_special_tokens=False)["input_ids"], 2]
        with torch.no_grad():
            logits = tiny(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert facts["loss"] == pytest.approx(total / count, rel=1e-5)
    assert facts["new_tokens"] == pytest.approx(count / 6) and facts["kl"] == 0
    assert all(layer.z.grad is not None for layer in t2k.svf_layers(tiny).values())


def test_it_learns(tiny: Any, tokenizer: Any, letter: Any, chance: Any) -> None:
    before = chance(tiny, letter.letter)
    cfg = small_model(
        objective="next-token", steps=8, prompts=4, lr=0.1, validate_every=4,
        validation_problems=4, kl=0.01,
    )  # fmt: skip
    lines: list[dict[str, Any]] = []
    expert = train(tiny, tokenizer, letter, cfg, log=lines.append)
    bank = t2k.ExpertBank(tiny)
    bank.add("letter", expert)
    with bank.use("letter"):
        assert chance(tiny, letter.letter) > 2 * before
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "sampled_accuracy" not in lines[0], "nothing was sampled"


def test_both_objectives_improve_the_small_model(small: Any) -> None:
    """A few steps from the shipped model's 0.2 on reversal."""
    model, tokenizer = small
    for objective, changes in (
        ("reinforce", {"steps": 8, "prompts": 16}),
        ("next-token", {"steps": 8, "prompts": 64, "kl": 0.0}),
    ):
        cfg: Config = small_model(
            objective=objective, validate_every=4, validation_problems=64, **changes
        )
        expert = train(model, tokenizer, Generated("reverse"), cfg)
        gain = expert.metadata["validation"] - expert.metadata["base_validation"]
        assert gain > 0.05, objective


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "gsm8k": (
        {"question": "Tom has 2 + 3 eggs?", "answer": "He has 2 + 3 = <<2+3=5>>5.\n#### 5"},
        "He has 2 + 3 = 5.\n#### 5",
    ),
    "math": (
        {"problem": "1/2 + 1/4?", "solution": r"It is $\boxed{\frac{3}{4}}$."},
        r"It is $\boxed{\frac{3}{4}}$.",
    ),
    "mbpp": (
        {"task_id": 601, "text": "Add.", "code": "def add(a, b):\r\n    return a + b\r\n",
         "test_list": ["assert add(1, 2) == 3"]},
        "```python\ndef add(a, b):\n    return a + b\n```",
    ),
    "humaneval": (
        {"task_id": "x", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f): pass",
         "canonical_solution": "    return x\n"},
        "    return x",
    ),
    "arc-easy": (
        {"question": "Which flies?", "choices": {"label": ["1", "2"], "text": ["stone", "bird"]},
         "answerKey": "2"},
        "B",
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", list(ROWS))
def test_what_is_learnt_is_a_right_answer(task: str, tmp_path: Path) -> None:
    """The data's worked solution, not the key that grading compares with."""
    row, expected = ROWS[task]
    split = "test" if task == "humaneval" else "train"
    (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    made = source(task, data=tmp_path)
    # One training row may be drawn for validation, by its checksum.
    problem = next(iter(p for s in ("train", "validation", "test") for p in _rows(made, s)))
    assert learnt(made, problem) == expected
    if task in ("gsm8k", "math"):
        assert made.grade([problem], [problem.target]) == [True]


def test_both_halves_of_a_pro_row(tmp_path: Path) -> None:
    """Published as bodies under the `def` lines of the problems."""
    row = {
        "raw_problem": "# Add.\ndef add(a, b):", "raw_solution": "    return a + b",
        "new_problem": "# Add three.\ndef add3(a, b, c):",
        "new_solution": "    return add(add(a, b), c)", "test_code": "assert add3(1, 2, 3) == 6",
    }  # fmt: skip
    (tmp_path / "mbpp_pro.jsonl").write_text(json.dumps(row) + "\n")
    made = source("mbpp", data=tmp_path / "mbpp_pro.jsonl")
    problem = next(p for s in ("train", "validation", "test") for p in _rows(made, s))
    program = learnt(made, problem).removeprefix("```python\n").removesuffix("```")
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["add3"](1, 2, 3) == 6


def _rows(made: Any, split: Any) -> list[Problem]:
    return made(1, split, 0) if made.size(split) else []


def test_the_trainer_takes_the_solution(
    tiny: Any, tokenizer: Any, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def spy(tokenizer: Any, prompts: Any, answers: Any, *rest: Any) -> Any:
        given.append(answers)
        return forced(tokenizer, prompts, answers, *rest)

    class Worked(letters):  # type: ignore[misc]
        def __call__(self, count: int, split: Any, seed: int) -> list[Problem]:
            return [Problem("1+1=", "2", "sum", solution="1+1 is 2")] * count

    monkeypatch.setattr("t2runtime.train.next_token.forced", spy)
    t2k.trainable(tiny)
    cfg = small_model(objective="next-token", prompts=2, kl=0.0)
    next_token(tiny, tokenizer, SVF(tiny), Worked("2"), cfg, 0)
    assert given == [["1+1 is 2"] * 2]


def test_nothing_to_learn_is_refused(tiny: Any, tokenizer: Any) -> None:
    """Stories are graded by a property; a reference may be missing from the data."""
    cfg = small_model(objective="next-token", steps=2, prompts=2, validation_problems=2,
                      max_new_tokens=2)  # fmt: skip
    with pytest.raises(ValueError, match=r"'next-token' needs a text to learn .*'story:animal'"):
        train(tiny, tokenizer, Stories("animal"), cfg)


def test_one_row_without_a_text_is_found_before_the_first_step(
    tiny: Any, tokenizer: Any, tmp_path: Path
) -> None:
    problems = [Problem(f"{i}+1=", "x", "own", solution="" if i == 7 else "ab") for i in range(9)]
    made = FileSource("own", 2, {"train": problems, "validation": [Problem("1=", "1", "own")]})
    cfg = small_model(objective="next-token", prompts=1, validation_problems=1)
    with pytest.raises(ValueError, match=r"'next-token' needs a text .*'7\+1='"):
        train(tiny, tokenizer, made, cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_long_prompt_and_a_long_answer_in_one_batch(
    tiny: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Both fit into the context of 64 tokens, if not on top of each other."""
    problems = [
        Problem("1" * 55, "ab", "own"), Problem("2+1=", "x", "own", solution="ab" * 25)
    ] * 4  # fmt: skip
    held_out = [Problem("1=", "1", "own")]
    made = FileSource("own", 2, {"train": problems, "validation": held_out})
    cfg = small_model(objective="next-token", prompts=4, steps=3, validation_problems=1)
    lines: list[Any] = []
    expert = train(tiny, tokenizer, made, cfg, tmp_path / "run", lines.append)
    assert len(lines) == 3 and "left_out" not in expert.metadata
    assert all(line["new_tokens"] > 3 and line["grad_norm"] > 0 for line in lines)
