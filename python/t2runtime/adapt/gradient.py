"""Alpha by backpropagation through the per-request kernel: several starts are the rows of one
batch, and each climbs the log-likelihood of the shots' right answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2runtime.adapt.cem import Best, SearchResult
from t2runtime.adapt.shots import Batches, log_likelihood
from t2runtime.tasks import Problem

if TYPE_CHECKING:
    from t2runtime.adapt.fewshot import Space

#: A row goes forward and back.
FORWARDS_PER_STEP = 2
_LR = 0.05
_STARTS = 8
#: More steps than this change nothing on a few shots.
_MOST_STEPS = 200


def gradient_ascent(
    model: Any,
    tokenizer: Any,
    space: Space,
    shots: Sequence[Problem],
    score: Callable[[Tensor], Tensor],
    *,
    budget: int,
    restarts: int = _STARTS,
    lr: float = _LR,
    low: float = 0.0,
    high: float = 1.0,
    l1: float = 0.0,
    l2: float = 0.0,
    seed: int = 0,
    batches: Batches | None = None,
    chat: str = "auto",
) -> tuple[SearchResult, int]:
    """Maximise mean_s log p(answer_s | prompt_s; alpha) − l1·Σ|alpha| − l2·Σalpha² by Adam.

    The starts are 1/K for every expert, then the space's landmarks (the base, all experts, each
    alone), then uniform draws: of four starts or more one is always drawn. So up to four experts
    all have a start of eight; of more, the seed chooses the four that start alone. After each step
    alpha is clamped to [low, high]. The best point of each start (by the objective) is scored
    as every search scores its members, and the best of those and of the base is returned.

    Returns (result, forwards of the climb); those of the scoring are counted by `score`. Raises
    ValueError where the budget does not allow one step.
    """
    if restarts < 1 or not lr > 0:
        raise ValueError(f"restarts must be at least 1 and lr above 0, got {restarts} and {lr}")
    steps = steps_of(budget, len(shots), restarts=restarts, l1=l1, l2=l2)
    parameter = _starts(space, restarts, low, high, seed).to(model.device).requires_grad_()
    optimiser = torch.optim.Adam([parameter], lr)
    top = torch.full((restarts,), -float("inf"), device=model.device)
    best = parameter.detach().clone()
    batches = batches or Batches()
    for _ in range(steps):
        value, slope = _climb(model, tokenizer, space, shots, parameter, batches, chat)
        with torch.no_grad():
            value -= l1 * parameter.abs().sum(1) + l2 * parameter.square().sum(1)
            better = value > top
            best[better], top = parameter[better], torch.maximum(top, value)
            parameter.grad = l1 * parameter.sign() + 2 * l2 * parameter - slope
            optimiser.step()
            parameter.clamp_(low, high)
    members = torch.cat([best.cpu(), torch.zeros(1, space.size)])
    found = Best()
    found.rank(members, score(members))
    return found.result(), steps * FORWARDS_PER_STEP * len(shots) * restarts


def steps_of(budget: int, shots: int, *, restarts: int = _STARTS, l1: float, l2: float) -> int:
    """How many steps a budget of forwards allows; ValueError for none, and for bad l1 and l2."""
    for name, weight in (("l1", l1), ("l2", l2)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least 0, got {weight}")
    last = FORWARDS_PER_STEP * shots * (restarts + 1)  # the scoring at the end, with the base
    step = FORWARDS_PER_STEP * shots * restarts
    if budget < last + step:
        raise ValueError(
            f"budget must be at least {last + step} forwards, one step of {restarts} starts x "
            f"{shots} shots and their scores, got {budget}. Raise it or take fewer shots"
        )
    return min(_MOST_STEPS, (budget - last) // step)


def _climb(
    model: Any, tokenizer: Any, space: Space, shots: Sequence[Problem], members: Tensor,
    batches: Batches, chat: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean log-likelihood (members,) and its gradient (members, size)."""
    value = members.new_zeros(len(members))
    slope = torch.zeros_like(members)
    for part, few in batches.parts(len(members), len(shots)):
        some = members.detach()[part].requires_grad_()
        asked = list(shots[few]) * len(some)
        with space.bank.use(space.alpha(some)):  # backward must run inside
            likely = log_likelihood(model, tokenizer, asked, chat).view(len(some), -1)
            # Rows are independent, so the gradient of the sum is that of each member's own.
            (own,) = torch.autograd.grad(likely.sum() / len(shots), [some])
        value[part] += likely.detach().sum(1) / len(shots)
        slope[part] += own
    if not bool(torch.isfinite(slope).all()):
        raise RuntimeError(
            "the gradient of alpha is not finite: an expert has diverged, or the weights overflow "
            "in this dtype"
        )
    return value, slope


def _starts(space: Space, restarts: int, low: float, high: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    even = torch.full((1, space.size), 1.0 / len(space.names))
    # One start is drawn, where there is room beside 1/K, the base and all experts.
    most = restarts - 1 - (restarts > 3)
    fixed = torch.cat([even, space.landmarks(most, seed)])
    drawn = torch.rand(restarts - len(fixed), space.size, generator=generator)
    return torch.cat([fixed, low + (high - low) * drawn]).clamp(low, high)
