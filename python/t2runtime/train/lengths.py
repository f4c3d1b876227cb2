"""Problems that do not fit into the model's context: left out and counted, or an error, before the
first step.

A problem fits if its prompt and `max_new_tokens` do, and in next-token training its target with
the end token as well. Nothing is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from t2runtime.prompts import context_length, prompt_ids, turn_end
from t2runtime.tasks import Problem, Source, Split
from t2runtime.train.config import Config

logger = logging.getLogger(__name__)
#: More draws that may be asked for to get one's fill of problems that fit.
_DRAWS = 8


class Fitting:
    """A source without the problems that do not fit; equal to it where all do.

    `left_out` counts the different prompts left out so far, by split.
    """

    def __init__(self, source: Source, model: Any, tokenizer: Any, cfg: Config) -> None:
        self.source, self._tokenizer, self._cfg = source, tokenizer, cfg
        self.name, self.max_new_tokens = source.name, source.max_new_tokens
        self._model, self._context = model, context_length(model)
        self._end = len(turn_end(model, tokenizer, cfg.chat))
        self._fits: dict[Problem, bool] = {}
        self._long: dict[str, set[str]] = {}

    @property
    def left_out(self) -> dict[str, int]:
        """How many prompts, by split; splits with none are not in it."""
        return {split: len(prompts) for split, prompts in self._long.items()}

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        """As the source's; where some do not fit, more are asked for in their place."""
        asked = count
        drawn = first = self.source(asked, split, seed)
        kept = self._kept(drawn, split)
        for _ in range(_DRAWS):
            if len(kept) >= count or len(drawn) < asked:
                break
            asked += len(drawn) - len(kept)
            drawn = self.source(asked, split, seed)
            kept = self._kept(drawn, split)
        if not kept:
            self._refuse(first, split)
        return kept[:count]

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """The source's."""
        return self.source.grade(problems, completions)

    def _kept(self, problems: Sequence[Problem], split: Split) -> list[Problem]:
        fresh = [problem for problem in dict.fromkeys(problems) if problem not in self._fits]
        for problem in fresh:
            self._fits[problem] = self.length(problem, split) <= (self._context or 0)
        long = {p.prompt for p in problems if not self._fits[p]}
        known = self._long.get(split, set())
        if long - known:
            if self._cfg.long_prompts == "error":
                self._refuse(problems, split)
            self._long[split] = known | long
            logger.warning(
                "%s: %d different %s prompts left out so far: with their answers they do not fit "
                "into the model's context of %d tokens (long_prompts, --long-prompts: 'error' "
                "refuses them)",
                self.name, len(self._long[split]), split, self._context,
            )  # fmt: skip
        return [problem for problem in problems if self._fits[problem]]

    def length(self, problem: Problem, split: Split) -> int:
        """Tokens that the problem needs."""
        return self._prompt(problem) + self._answer(problem, split)

    def _prompt(self, problem: Problem) -> int:
        return len(prompt_ids(self._tokenizer, problem.prompt, self._cfg.chat))

    def _answer(self, problem: Problem, split: Split) -> int:
        new = self._cfg.max_new_tokens or 1
        if split != "train" or self._cfg.objective != "next-token":
            return new
        ids = self._tokenizer(problem.target, add_special_tokens=False, verbose=False)["input_ids"]
        return len(ids) + self._end

    def _refuse(self, problems: Sequence[Problem], split: Split) -> None:
        """Raise for those that do not fit."""
        long = [row for row, problem in enumerate(problems) if not self._fits[problem]]
        if not long:
            return
        first = problems[long[0]]
        skip = self._cfg.long_prompts == "skip"
        way = "" if skip else ", or leave such problems out (long_prompts='skip', --long-prompts)"
        raise ValueError(
            f"{len(long)} of {len(problems)} {split} problems of task {self.name!r} do not fit: "
            f"prompt {long[0]} has {self._prompt(first)} tokens and {self._answer(first, split)} "
            f"new ones are asked for (max_new_tokens, or its text to learn), the model's context "
            f"holds {self._context}. Shorten the prompts, lower max_new_tokens{way}"
        )


def fitting(source: Source, model: Any, tokenizer: Any, cfg: Config) -> Source:
    """The source without what does not fit; itself where the model's context has no known end.

    All training and validation problems are looked at now, where the source can tell how many it
    has (`size`); of others those of the first step.
    """
    if isinstance(source, Fitting) or context_length(model) is None:
        return source
    fits = Fitting(source, model, tokenizer, cfg)
    size = getattr(source, "size", None)
    splits: tuple[tuple[Split, int], ...] = (
        ("train", cfg.prompts), ("validation", cfg.validation_problems)
    )  # fmt: skip
    for split, few in splits:
        fits(few if size is None else max(1, size(split)), split, cfg.seed)
    return fits


def whole(source: Source) -> Source:
    """The source with what does not fit."""
    return source.source if isinstance(source, Fitting) else source
