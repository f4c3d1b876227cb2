"""Pass 1 by few shots: a search finds the weights of experts on a few labelled prompts.

The whole population is one batch: member p and shot s make a row, and the rows of member p are
computed under its mixture, each group of rows under its own.

A forward is one row of a batch: a shot answered under a member is one, its right answer's
likelihood another, and a row of backpropagation a third. A search states its budget of forwards
before it starts and never goes beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import t2kernels as t2k
from t2runtime.adapt.cem import SearchResult, check_elites
from t2runtime.adapt.cem import check as check_members
from t2runtime.adapt.gradient import gradient_ascent, steps_of
from t2runtime.adapt.mixtures import TaskMixture, Weights, hashes
from t2runtime.adapt.search import SEARCHES, black_box, check_cma_es
from t2runtime.adapt.shots import (
    Batches,
    answer_and_score,
    check_shots,
    encode_shots,
    question_mark,
    without_shots,
)
from t2runtime.tasks import EXACT, Grader, Problem
from t2runtime.verdicts import is_right, verdicts_of

Per = Literal["expert", "layer"]
METHODS = (*SEARCHES, "gradient")
#: A shot under a member is answered once, and its right answer is scored once.
FORWARDS_PER_SHOT = 2

__all__ = [
    "METHODS", "FewShot", "Space", "check_shots", "score_members", "search", "without_shots",
]  # fmt: skip


@dataclass(frozen=True)
class Space:
    """What is searched: one weight per expert, or one per expert and layer (matrix).

    names: experts of the bank. A member is a vector (size,).
    """

    bank: t2k.ExpertBank
    names: tuple[str, ...]
    per: Per = "expert"

    def __post_init__(self) -> None:
        if self.per not in ("expert", "layer"):
            raise ValueError(f"per must be 'expert' or 'layer', got {self.per!r}")
        if not len(self.bank):
            raise ValueError("the bank is empty: add the experts that may be mixed first")
        missing = [name for name in self.names if name not in self.bank]
        if missing or not self.names:
            raise ValueError(
                f"names must be experts of the bank ({', '.join(self.bank.names)}), "
                f"got {', '.join(missing) or 'none'}"
            )
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names must be distinct, got {', '.join(self.names)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(K,), or (L, K), of a member; K counts `names`."""
        layers = (len(self.bank.layers),) if self.per == "layer" else ()
        return (*layers, len(self.names))

    @property
    def size(self) -> int:
        """Numbers in a member."""
        return torch.Size(self.shape).numel()

    def alpha(self, members: Tensor) -> Tensor:
        """(members, size) -> alpha over all experts of the bank, for `bank.use`; differentiable."""
        if members.dim() != 2 or members.shape[1] != self.size:
            raise ValueError(
                f"members must have shape (members, {self.size}), got {tuple(members.shape)}"
            )
        if not bool(torch.isfinite(members.detach()).all()):
            raise ValueError("members must be finite")
        rows = members.reshape(-1, *self.shape)
        index = torch.tensor([self.bank.names.index(name) for name in self.names])
        whole = rows.new_zeros(*rows.shape[:-1], len(self.bank.names))
        return whole.index_copy(-1, index.to(rows.device), rows)

    def landmarks(self, most: int | None = None, seed: int = 0) -> Tensor:
        """The base, all experts at full weight, and each expert alone: (2 + K, size); `most` of
        them at most, where the seed says which experts stand alone.
        """
        count = len(self.names)
        alone = torch.eye(count)
        if most is not None and most < 2 + count:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            alone = alone[order[: max(0, most - 2)].sort().values]
        rows = torch.cat([torch.zeros(1, count), torch.ones(1, count), alone])[:most]
        return rows if self.per == "expert" else rows.repeat(1, len(self.bank.layers))

    def weights(self, member: Tensor) -> Weights:
        """A member as {expert: weight} or {layer: {expert: weight}}; weights of 0 are left out."""
        if self.per == "expert":
            return _named(self.names, member)
        rows = member.reshape(self.shape)
        return {n: _named(self.names, row) for n, row in zip(self.bank.layers, rows, strict=True)}


def _named(names: Sequence[str], row: Tensor) -> dict[str, float]:
    return {name: w for name, w in zip(names, row.tolist(), strict=True) if w != 0}


@dataclass(frozen=True)
class FewShot:
    """Found weights, {expert: weight} or {layer: {expert: weight}}, and the search that found them.

    `forwards` were used of the `budget`; `score` is (accuracy on the shots, mean log-likelihood of
    their right answers); `questions` are the marks of the shots (`question_mark`).
    """

    weights: Weights
    search: SearchResult
    space: Space
    method: str
    seed: int
    forwards: int
    budget: int
    questions: tuple[str, ...]

    @property
    def mixture(self) -> dict[str, float]:
        """{expert: weight}; ValueError where every layer has its own, see `alpha`."""
        if self.space.per != "expert":
            raise ValueError("every layer has weights of its own: use alpha, or weights")
        return dict(self.weights)  # type: ignore[arg-type]

    @property
    def alpha(self) -> Tensor:
        """(K,) or (L, K) over all experts of the bank."""
        return self.space.alpha(self.search.best[None])[0]

    def saved(self, task: str, **facts: Any) -> TaskMixture:
        """As `save_mixture` takes it, tied to these very experts."""
        accuracy, likelihood = self.search.score
        experts = hashes(self.space.bank, list(self.space.names))
        score = {"accuracy": accuracy, "log_likelihood": likelihood}
        return TaskMixture(
            task, self.weights, experts, self.method, self.seed, self.forwards, score,
            {"questions": list(self.questions), **facts},
        )  # fmt: skip


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
    *,
    per: Per = "expert",
    batches: Batches | None = None,
    chat: str = "auto",
) -> Tensor:
    """(members, 2): accuracy on the shots, then the mean log-likelihood of the right answers
    (breaks ties). members: (members, K), with per="layer" (members, L * K), over `names`.
    """
    alpha = Space(bank, tuple(names), per).alpha(members.to(model.device))
    encoded = encode_shots(model, tokenizer, shots, chat)

    def work(part: slice, few: slice) -> Tensor:
        group = alpha[part]
        asked = list(shots[few]) * len(group)
        with bank.use(group):  # a member's rows follow each other
            texts, likely = answer_and_score(
                model, tokenizer, encoded.rows(few), max_new_tokens, len(group)
            )
        right = torch.tensor([is_right(v) for v in verdicts_of(grader, asked, texts)])
        scores = torch.stack([right.double(), likely.double().cpu()], 1)
        return scores.view(len(group), -1, 2)

    found = (batches or Batches()).run(len(members), len(shots), work)
    return found.mean(1)


def check_search(
    method: str,
    shots: int,
    size: int | None = None,
    *,
    per: str = "expert",
    population: int = 32,
    elites: int = 6,
    generations: int = 10,
    budget: int | None = None,
    rows_per_batch: int | None = None,
    low: float = 0.0,
    high: float = 1.0,
    l1: float = 0.0,
    l2: float = 0.0,
) -> int:
    """The budget of `search` with these settings and so many shots; before any work it raises what
    a search would: ValueError for settings that cannot be, ImportError for a missing package.

    size: weights in a member, None where that is not known yet.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if per not in ("expert", "layer"):
        raise ValueError(f"per must be 'expert' or 'layer', got {per!r}")
    if shots < 1:
        raise ValueError("shots must hold at least one labelled problem, got none")
    if not low <= 0 < 1 <= high:
        raise ValueError(f"low..high must hold 0 (the base) and 1, got {low}..{high}")
    check_members(1 if size is None else size, population, generations, low, high, None)
    Batches(rows_per_batch)
    each = FORWARDS_PER_SHOT * shots * population
    budget = each * generations if budget is None else budget
    if method == "gradient":
        steps_of(budget, shots, l1=l1, l2=l2)
        return budget
    if l1 or l2:
        raise ValueError(f"l1 and l2 are for method='gradient', got them with {method!r}")
    if method == "cem":
        check_elites(elites, population)
    elif method == "cma-es":
        check_cma_es(2 if size is None else size, population)
    if budget < each:
        raise ValueError(
            f"budget must be at least {each} forwards, one generation of {population} members "
            f"x {shots} shots x {FORWARDS_PER_SHOT}, got {budget}. "
            "Raise it or lower the population"
        )
    return budget


def search(
    model: Any,
    tokenizer: Any,
    bank: Any,
    names: Sequence[str],
    shots: Sequence[Problem],
    max_new_tokens: int,
    *,
    method: str = "cem",
    per: Per = "expert",
    population: int = 32,
    elites: int = 6,
    generations: int = 10,
    budget: int | None = None,
    rows_per_batch: int | None = None,
    low: float = 0.0,
    high: float = 1.0,
    l1: float = 0.0,
    l2: float = 0.0,
    grader: Grader = EXACT,
    seed: int = 0,
    chat: str = "auto",
) -> FewShot:
    """Search alpha in [low, high], which must hold 0 and 1, so that the base and every expert at
    full weight at once are within reach.

    method: "cem", "cma-es" (package cmaes), "random", or "gradient" (see `gradient_ascent`), all
    from the same landmarks (of more experts than they have starts for, the seed chooses those that
    start alone). names: the experts of the bank that may take part. budget: forwards at
    most (default: what `generations` of `population` take); it decides the generations, or the
    steps of the gradient. rows_per_batch: default all rows at once. l1, l2: for the gradient, which
    they draw to 0. NOTE(paper): the first generation also holds the base, each expert alone and all
    of them at full weight, which few random members would come near.

    Raises ValueError for no shots, unknown names, an empty bank, a range without 0 and 1, and a
    budget that does not suffice for one generation.
    """
    check_shots(shots)
    space = Space(bank, tuple(names), per)
    budget = check_search(
        method, len(shots), space.size, per=per, population=population, elites=elites,
        generations=generations, budget=budget, rows_per_batch=rows_per_batch, low=low, high=high,
        l1=l1, l2=l2,
    )  # fmt: skip
    marks = tuple(map(question_mark, shots))
    batches = Batches(rows_per_batch)
    forwards = 0

    def score(members: Tensor) -> Tensor:
        nonlocal forwards
        forwards += FORWARDS_PER_SHOT * len(shots) * len(members)
        return score_members(
            model, tokenizer, bank, names, shots, members, max_new_tokens, grader, per=per,
            batches=batches, chat=chat,
        )  # fmt: skip

    if method == "gradient":
        found, used = gradient_ascent(
            model, tokenizer, space, shots, score, budget=budget, low=low, high=high, l1=l1, l2=l2,
            seed=seed, batches=batches, chat=chat,
        )  # fmt: skip
        return FewShot(
            space.weights(found.best), found, space, method, seed, forwards + used, budget, marks
        )
    each = FORWARDS_PER_SHOT * len(shots) * population
    own: dict[str, Any] = {"elites": elites} if method == "cem" else {}
    found = black_box(
        method, score, space.size, population=population, generations=budget // each, low=low,
        high=high, mean=1 / len(names) if method == "cem" else None,
        start=space.landmarks(population - 1, seed), seed=seed, **own,
    )  # fmt: skip
    return FewShot(space.weights(found.best), found, space, method, seed, forwards, budget, marks)
