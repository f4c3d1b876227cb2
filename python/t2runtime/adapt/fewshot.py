"""Pass 1 by few shots: the cross-entropy method finds one weight per expert on a few labelled
prompts.

The whole population is one batch: member p and shot s make a row, and the row's mixture is member
p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2runtime.adapt.cem import CEMResult, cross_entropy_method
from t2runtime.generation import answer_log_probs, complete, forced
from t2runtime.tasks import EXACT, Grader, Problem


@dataclass(frozen=True)
class FewShot:
    """A found mixture {expert: weight}, and the search that found it."""

    mixture: dict[str, float]
    search: CEMResult


def without_shots(problems: Sequence[Problem], shots: Sequence[Problem]) -> list[Problem]:
    """The problems that were not used as shots: only these may be in a reported score."""
    used = {shot.prompt for shot in shots}
    return [problem for problem in problems if problem.prompt not in used]


@torch.no_grad()
def score_members(
    model: Any,
    tokenizer: Any,
    bank: Any,
    names: Sequence[str],
    shots: Sequence[Problem],
    members: Tensor,
    max_new_tokens: int,
    grader: Grader = EXACT,
) -> Tensor:
    """(members, 2): accuracy on the shots, then the mean log-likelihood of the right answers
    (breaks ties).
    """
    alpha = torch.zeros(len(members), len(bank.names))
    alpha[:, [bank.names.index(name) for name in names]] = members
    rows = alpha.repeat_interleave(len(shots), 0).to(model.device)
    prompts = [shot.prompt for shot in shots] * len(members)
    answers = [shot.answer for shot in shots] * len(members)
    with bank.use(rows):
        texts = complete(model, tokenizer, prompts, max_new_tokens).texts
        given = forced(tokenizer, prompts, answers, model)
        log_probs = answer_log_probs(model, given)
    right = grader.grade(list(shots) * len(members), texts)
    chosen = log_probs.gather(-1, given.new_ids[..., None])[..., 0] * given.sampled
    likelihood = chosen.sum(1).view(len(members), len(shots)).mean(1)
    accuracy = torch.tensor(right, dtype=torch.float64).view(len(members), len(shots)).mean(1)
    return torch.stack([accuracy, likelihood.double().cpu()], 1)


def search(
    model: Any,
    tokenizer: Any,
    bank: Any,
    names: Sequence[str],
    shots: Sequence[Problem],
    max_new_tokens: int,
    *,
    population: int = 32,
    elites: int = 6,
    generations: int = 10,
    grader: Grader = EXACT,
    seed: int = 0,
) -> FewShot:
    """Search alpha in [0, 1]^K, so that every expert at full weight at once is within reach.

    `names` are the experts of the bank that may take part. NOTE(paper): the first generation also
    holds the base, each expert alone and all of them at full weight, which few random members
    would come near.
    """
    if not shots:
        raise ValueError("shots must hold at least one labelled problem, got none")
    missing = [name for name in names if name not in bank.names]
    if missing or not names:
        raise ValueError(
            f"names must be experts of the bank ({', '.join(bank.names) or 'empty'}), "
            f"got {', '.join(missing) or 'none'}"
        )
    size = len(names)
    landmarks = torch.cat([torch.zeros(1, size), torch.eye(size), torch.ones(1, size)])
    found = cross_entropy_method(
        lambda members: score_members(
            model, tokenizer, bank, names, shots, members, max_new_tokens, grader
        ),
        size,
        population=population,
        elites=elites,
        generations=generations,
        start=landmarks[: population - 1],
        seed=seed,
    )
    mixture = dict(zip(names, found.best.tolist(), strict=True))
    return FewShot({name: weight for name, weight in mixture.items() if weight > 0}, found)
