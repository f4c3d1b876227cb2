"""What two runs must share for one to go on where the other stopped."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.adapt.classifier import CategorySource
from t2runtime.adapt.prompt import Categories
from t2runtime.sources import source
from t2runtime.tasks import Problem
from t2runtime.train import Config, Peft, train
from t2runtime.train.identity import differences, identity_of


def changed(cfg: Config, **changes: Any) -> Config:
    return Config(**{**vars(cfg), **changes})


@pytest.fixture
def resume(
    tiny: Any, tokenizer: Any, letters: Any, quick: Config, tmp_path: Path
) -> Callable[..., Any]:
    """Take up the finished run of one step of the letter a."""
    cfg = changed(quick, steps=1)
    train(tiny, tokenizer, letters("a"), cfg, tmp_path)

    def refused(match: str, problems: Any = None, cfg: Config = cfg, adapter: Any = None) -> None:
        problems = problems or letters("a")
        with pytest.raises(ValueError, match=f"cannot resume .*{match}"):
            train(tiny, tokenizer, problems, cfg, tmp_path, resume=True, adapter=adapter)

    return refused


def test_settings_and_problems(resume: Any, letters: Any, quick: Config) -> None:
    resume("lr 0.1, not 0.2; seed 0, not 1", cfg=changed(quick, steps=1, lr=0.2, seed=1))
    resume("task 'letter', not 'other'", letters("a", name="other"))
    resume("other training problems; other validation problems; letter 'a', not 'b'", letters("b"))

    class Other(letters):  # type: ignore[misc]
        def __call__(self, count: int, split: Any, seed: int) -> list[Problem]:
            prompt = "2+2=" if split == "train" else "1+1="
            return [Problem(prompt, "a", "letter")] * count

    resume("other training problems; another reward, or another way", Other("a"))


def test_rewards(resume: Any, letters: Any) -> None:
    resume("grade_one ", letters("a", lambda p, text: text != p.answer))

    class Inverted(letters):  # type: ignore[misc]
        def grade(self, problems: Any, completions: Any) -> list[bool]:
            return [not right for right in super().grade(problems, completions)]

    resume("another reward, .*the code of the source", Inverted("a"))


def test_weights_and_layers(resume: Any, tiny: Any) -> None:
    t2k.revert(tiny)
    t2k.convert(tiny, "mlp", progress=False)
    resume("other layers of the model; another model")
    t2k.revert(tiny)
    t2k.convert(tiny, parametrisation="sigmoid-normalised", progress=False)
    resume(r"parametrisation \['direct'\], not \['sigmoid-normalised'\]")
    t2k.revert(tiny)
    t2k.convert(tiny, rank=4, progress=False)
    resume(r"rank \[32\], not \[4\]")
    t2k.revert(tiny)
    tiny.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    t2k.convert(tiny, progress=False)
    resume("another model")
    t2k.revert(tiny)
    pytest.importorskip("peft")
    resume("method 'svf', not 'lora'", adapter=Peft(tiny, "lora", rank=2))


def test_dtype_and_threads(resume: Any, tiny: Any, tokenizer: Any) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        resume(f"threads {threads}, not {threads + 1}")
    finally:
        torch.set_num_threads(threads)
    tiny.to(torch.bfloat16)
    resume("dtype 'float32', not 'bfloat16'")


def write(path: Path, count: int, answer: str = "x") -> Path:
    rows = [{"prompt": f"{i}?", "answer": f"{answer}{i}"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


class Anywhere:
    """As much of a model as an identity asks for."""

    device, dtype = torch.device("cpu"), torch.float32


def identity(problems: Any) -> dict[str, Any]:
    adapter = {"method": "svf", "layers": ["a"], "weights": "0"}
    drawn = problems(4, "train", 0)
    return identity_of(Config(), problems, drawn, drawn, adapter, Anywhere())


def test_data_and_extraction_by_name(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", 40))
    before = identity(source(path))
    assert differences(before, identity(source(path))) == []
    (said,) = differences(before, identity(source(path, extract="label")))
    assert "grader ByAnswer(extract=t2runtime.rewards.text" in said and "rewards.label" in said
    rows = (tmp_path / "a.jsonl").read_text().splitlines()
    drawn = {p.prompt for p in source(path)(4, "train", 0)}
    last = next(i for i, row in enumerate(rows) if json.loads(row)["prompt"] not in drawn)
    rows[last] = rows[last].replace("x", "y")
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert any(said.startswith("data '") for said in differences(before, identity(source(path))))


def test_categories_are_their_sources(tmp_path: Path) -> None:
    names = Categories(("one", "two"))

    def made(answer: str) -> CategorySource:
        parts = {n: source(str(write(tmp_path / f"{n}.jsonl", 40, answer))) for n in ("one", "two")}
        return CategorySource(parts, names)

    before = identity(made("x"))
    assert differences(before, identity(made("x"))) == []
    assert any("one data" in said for said in differences(before, identity(made("y"))))


OWN = """
import re, sys
from t2runtime.tasks import Problem
from t2runtime.train.identity import identity_of
from t2runtime.train import Config
import torch
LIMIT = 3
def helper(text): return text in {"a", "b", "c", "d"}
class Own:
    name, max_new_tokens = "own", 2
    def __init__(self):
        self.cache, self.words, self._scale = {}, re.compile("a+"), 0.5
    def __call__(self, count, split, seed): return [Problem("1", "a", "own")] * count
    def grade(self, problems, completions): return [helper(t) for t in completions]
class Anywhere: device, dtype = torch.device("cpu"), torch.float32
own = Own()
own.cache["seen"] = id(own)
torch.set_num_threads(1)
print(identity_of(Config(), own, own(1, "train", 0), own(1, "validation", 0), {}, Anywhere()))
"""


def test_the_same_in_every_process() -> None:
    """Hash seeds and addresses leave no trace; a helper of the reward counts."""
    said = []
    for text in (OWN, OWN, OWN.replace('"d"}', '"e"}'), OWN.replace("0.5", "0.25")):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(eval(done.stdout))
    assert said[0] == said[1]
    assert differences(said[0], said[2])[0].startswith("another reward")
    assert differences(said[0], said[3]) == ["scale 0.5, not 0.25"]


def test_a_source_may_say_itself_what_counts(
    tiny: Any, tokenizer: Any, letters: Any, quick: Config, tmp_path: Path
) -> None:
    class Counting(letters):  # type: ignore[misc]
        calls = 0

        def grade(self, problems: Any, completions: Any) -> list[bool]:
            self.calls += 1
            return super().grade(problems, completions)

        @property
        def identity(self) -> dict[str, Any]:
            return {"version": self.version}

    problems = Counting("a")
    problems.version = 1
    cfg = changed(quick, steps=1)
    train(tiny, tokenizer, problems, cfg, tmp_path)
    train(tiny, tokenizer, problems, cfg, tmp_path, resume=True)
    problems.version = 2
    with pytest.raises(ValueError, match="version 1, not 2"):
        train(tiny, tokenizer, problems, cfg, tmp_path, resume=True)
