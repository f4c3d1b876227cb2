"""Visual questions answered by experts: trained on them, or on text alone and put into the language
model that answers them.

Three ways to an expert of each skill, each by the package's own trainer with a wrong answer worth
−0.1, as in the paper:
  visual   REINFORCE on visual questions, on the language model inside the LLaVA;
  text     on questions about drawings described in words, on a copy of that language model alone;
  before   the same on the language model as it was before it saw images. As in the paper, where
           experts of Llama 3 are put into a LLaVA: the weights have moved since, the singular
           vectors are those of other weights, and so the fit is not checked.
The vision tower and the projector are never adapted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime.adapt.fewshot import search
from t2runtime.evaluate import Score, evaluate, facts
from t2runtime.tasks import EXACT, Problem, Source
from t2runtime.train import small_model, train
from t2runtime.vision.easy_vqa import KINDS, SKILLS, Described, EasyVQA
from t2runtime.vision.gallery import Gallery, PictureTokenizer
from t2runtime.vision.llava import (
    TOKENS,
    Recipe,
    base,
    convert_language,
    for_vision,
    language_part,
)

WAYS = ("visual", "text", "before")
WRONG_REWARD = -0.1
NEW_TOKENS = 2


@dataclass(frozen=True)
class Settings:
    """How much is trained and asked. problems: of each kind, at most."""

    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    steps: int = 30
    prompts: int = 16
    lr: float = 5e-2
    problems: int = 200
    shots: int = 10
    population: int = 16
    generations: int = 5


class Setting:
    """The base, made or taken from `folder`/base, with its images and all that prompts need."""

    def __init__(self, data: EasyVQA, folder: Path, recipe: Recipe) -> None:
        self.data = data
        self.before, self.model, self.text_tokenizer = base(folder / "base", data, recipe)
        self.inside = language_part(self.model)
        for model in (self.before, self.inside):
            t2k.convert(model, progress=False)
        convert_language(self.model)
        gallery = Gallery(self.model, data.images, TOKENS)
        self.tokenizer = PictureTokenizer(self.text_tokenizer, gallery)
        self.bank = t2k.ExpertBank(self.model)

    def train(self, way: str, kind: str, settings: Settings, out: Path) -> t2k.Expert:
        """One expert under the names of the LLaVA's layers; resumed in `out` where it was begun."""
        cfg = small_model(
            seed=settings.seed, steps=settings.steps, prompts=settings.prompts, lr=settings.lr,
            wrong_reward=WRONG_REWARD, validate_every=10, validation_problems=128,
        )  # fmt: skip
        if way == "visual":
            return self._run(self.model, self.tokenizer, self.data.source(kind), cfg, out)
        model = self.inside if way == "text" else self.before
        return for_vision(self._run(model, self.text_tokenizer, Described(kind), cfg, out))

    def _run(self, model: Any, tokenizer: Any, source: Source, cfg: Any, out: Path) -> t2k.Expert:
        expert: t2k.Expert = train(model, tokenizer, source, cfg, out, resume=True)
        return replace(expert, description=f"{source.name} questions")

    def test(self, kind: str, settings: Settings) -> list[Problem]:
        """Questions on images of the test split."""
        return self.data.source(kind)(settings.problems, "test", settings.seed)

    def score(self, routing: Any, problems: Sequence[Problem]) -> Score:
        """Greedy answers under one mixture for all, or a list with one for each problem."""
        if not isinstance(routing, list):
            with self.bank.use(routing):
                return self._score(problems)
        right, rows = 0, 256
        for first in range(0, len(problems), rows):
            part = problems[first : first + rows]
            with self.bank.use(routing[first : first + rows]):
                right += self._score(part).right
        return Score(right, len(problems))

    def _score(self, problems: Sequence[Problem]) -> Score:
        return evaluate(self.model, self.tokenizer, EXACT, problems, NEW_TOKENS)


def measure(data: EasyVQA, folder: Path, settings: Settings) -> dict[str, Any]:
    """One seed of experts on the base of `settings.recipe`, everything kept in `folder`."""
    begin = time.process_time()
    setting = Setting(data, folder, settings.recipe)
    tests = {kind: setting.test(kind, settings) for kind in KINDS}
    row: dict[str, Any] = {"seed": settings.seed, "alone": {}, "mixed": {}}
    row["base"] = {kind: facts(setting.score(None, tests[kind])) for kind in KINDS}
    row["in words"] = {
        kind: facts(
            evaluate(setting.inside, setting.text_tokenizer, EXACT,
                     Described(kind)(settings.problems, "test", settings.seed), NEW_TOKENS)
        )
        for kind in KINDS
    }  # fmt: skip
    everything = [problem for kind in KINDS for problem in tests[kind]]
    for way in WAYS:
        for name in setting.bank.names:
            setting.bank.remove(name)
        for kind in SKILLS:
            out = folder / f"seed{settings.seed}" / f"{way}-{kind}"
            expert = setting.train(way, kind, settings, out)
            setting.bank.add(kind, expert, allow_mismatch=way == "before")
        row["alone"][way] = {
            skill: {kind: facts(setting.score(skill, tests[kind])) for kind in KINDS}
            for skill in SKILLS
        }
        row["mixed"][way] = _mixed(setting, everything, settings)
    return {**row, "processor_seconds": time.process_time() - begin}


def _mixed(setting: Setting, problems: Sequence[Problem], settings: Settings) -> dict[str, Any]:
    """All kinds of questions together: the base, all experts at once, the right one for each
    question in one batch, and one mixture found from a few shots of the validation images.
    """
    names = setting.bank.names
    right = [p.category if p.category in names else None for p in problems]
    found = search(
        setting.model, setting.tokenizer, setting.bank, names, shots(setting.data, settings),
        NEW_TOKENS, population=settings.population, generations=settings.generations,
        seed=settings.seed,
    )  # fmt: skip
    return {
        "base": facts(setting.score(None, problems)),
        "all at once": facts(setting.score(dict.fromkeys(names, 1.0), problems)),
        "each its own": facts(setting.score(right, problems)),
        "few-shot": facts(setting.score(found.mixture, problems)) | {"mixture": found.mixture},
    }


def shots(data: EasyVQA, settings: Settings) -> list[Problem]:
    """Labelled visual questions of all kinds in turn, on images of the validation split."""
    each = -(-settings.shots // len(KINDS))
    held = [data.source(kind)(each, "validation", settings.seed) for kind in KINDS]
    return [problem for some in zip(*held, strict=True) for problem in some][: settings.shots]


def table(row: Mapping[str, Any]) -> str:
    """A seed's row for people, in percent."""
    lines = [f"{'':22}" + "".join(f"{kind:>12}" for kind in KINDS)]

    def line(name: str, reached: Mapping[str, Any]) -> str:
        return f"{name:22}" + "".join(f"{100 * reached[k]['accuracy']:12.1f}" for k in KINDS)

    lines += [line("base", row["base"]), line("base, in words", row["in words"])]
    for way in WAYS:
        lines += [line(f"{way}: {skill}", row["alone"][way][skill]) for skill in SKILLS]
    lines.append("all kinds together")
    for way in WAYS:
        shown = (f"{k} {100 * v['accuracy']:.1f}" for k, v in row["mixed"][way].items())
        lines.append(f"{way:22}" + ", ".join(shown))
    return "\n".join(lines)
