"""Mixtures that a search has found: one JSON file a task, reloaded by the task's name.

A file names its experts and holds a hash of each, so that it cannot be used with others of the
same name.
"""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import t2kernels as t2k
from t2kernels.files import check_name
from t2runtime.adapt.shots import marks_in
from t2runtime.adapt.stored import mapping, read_stored, text, whole_number, write_stored

KIND, VERSION = "mixture", 1
_LARGEST = torch.finfo(torch.float32).max

#: {expert: weight}, or {layer: {expert: weight}}.
Weights = Mapping[str, float] | Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class TaskMixture:
    """The mixture of a task, for the experts whose hashes it names.

    Attributes:
        task: the name it is reloaded by.
        weights: {expert: weight}, or {layer: {expert: weight}} where every layer has its own.
        experts: {expert: `expert_hash`} of every expert that took part in the search.
        method: what found it, and `seed` with which seed.
        budget: forwards of one sequence that the search used.
        score: what it reached on the shots: {"accuracy": ..., "log_likelihood": ...}.
        facts: anything else JSON can hold; "questions" are the marks of the shots.

    Raises ValueError or TypeError for a value that is none of these.
    """

    task: str
    weights: Weights
    experts: Mapping[str, str]
    method: str = "cem"
    seed: int = 0
    budget: int = 0
    score: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.task, "task")
        mapping(self.experts, "experts", "{expert: hash}")
        if not self.experts:
            raise ValueError("experts must name the experts of the search and their hashes")
        for name, mark in self.experts.items():
            text(mark, f"the hash of expert {name!r:.80}")
        self._check_weights()
        text(self.method, "method")
        whole_number(self.seed, "seed")
        whole_number(self.budget, "budget")
        if self.budget < 0:
            raise ValueError(f"budget must be at least 0, got {self.budget}")
        mapping(self.score, "score", "{name: number}")
        for name, value in self.score.items():
            if not is_weight(value):
                raise ValueError(f"score[{name!r:.80}] must be a finite number, got {value!r:.80}")
        mapping(self.facts, "facts", "{name: value}")
        marks_in(self.facts)

    def _check_weights(self) -> None:
        mapping(self.weights, "weights", "{expert: weight} or {layer: {expert: weight}}")
        kinds = {isinstance(value, Mapping) for value in self.weights.values()}
        if len(kinds) > 1:
            raise TypeError(
                "weights must be {expert: weight} or {layer: {expert: weight}}, not both"
            )
        for where, row in self.rows().items():
            for name, weight in row.items():
                if name not in self.experts:
                    raise ValueError(
                        f"weights{where} name expert {name!r}, the search had "
                        f"{', '.join(self.experts)}"
                    )
                if not is_weight(weight):
                    raise ValueError(
                        f"weights{where}: the weight of {name!r} must be a finite number, got "
                        f"{weight!r:.80} (fp32 holds up to {_LARGEST:.1e})"
                    )

    @property
    def per_layer(self) -> bool:
        """Whether every layer has weights of its own."""
        return any(isinstance(value, Mapping) for value in self.weights.values())

    def questions(self) -> tuple[str, ...]:
        """The marks of the shots (`shots.question_mark`), which no score may count; () where no
        search was made. ValueError where there was one and the marks are not known.
        """
        marks = marks_in(self.facts)
        if self.budget and marks is None:
            raise ValueError(
                f"the mixture of task {self.task!r} does not say which questions were its shots, "
                "so that they cannot be kept out of a score. Find it again with `t2 adapt`"
            )
        return marks or ()

    def rows(self) -> dict[str, Mapping[str, float]]:
        """The rows of weights, by what an error calls them."""
        if self.per_layer:
            return {f"[{k!r}]": v for k, v in self.weights.items()}  # type: ignore[misc]
        return {"": self.weights}  # type: ignore[dict-item]

    def check(self, bank: t2k.ExpertBank, hashed: Hashes | None = None) -> None:
        """Raise ValueError unless the bank has these experts, the same by hash, and these layers.

        Experts of weight 0 everywhere need not be there. hashed: what many checks of one call
        share, so that an expert's values are hashed once for all of them.
        """
        used = {name for row in self.rows().values() for name, weight in row.items() if weight}
        needed = {name: mark for name, mark in self.experts.items() if name in used}
        whose = f"the mixture of task {self.task!r}"
        check_experts(hashed or Hashes(bank), needed, whose, made="found", again="search again")
        if self.per_layer:
            missing = [name for name in self.weights if name not in bank.layers]
            if missing:
                raise ValueError(
                    f"the mixture of task {self.task!r} has weights for {len(missing)} layers that "
                    f"the model lacks, first {missing[0]!r}. Convert the layers of then."
                )

    def alpha(self, bank: t2k.ExpertBank, *, per_layer: bool = False) -> Tensor:
        """A row of what `bank.use` takes: (K,) over bank.names; or (L, K) where the mixture, or
        `per_layer`, says so. fp32; layers without weights are the base. Checks first.
        """
        self.check(bank)
        return self.checked_alpha(bank, per_layer=per_layer)

    def checked_alpha(self, bank: t2k.ExpertBank, *, per_layer: bool = False) -> Tensor:
        """As `alpha`, for whoever has called `check`: hashing experts takes longer than this."""
        if not self.per_layer:
            alpha = alpha_row(self.rows()[""], bank)
            return alpha.repeat(len(bank.layers), 1) if per_layer else alpha
        base = torch.zeros(len(bank.names))
        return torch.stack([
            alpha_row(self.weights[layer], bank) if layer in self.weights else base  # type: ignore[arg-type]
            for layer in bank.layers
        ])  # fmt: skip


def is_weight(value: Any) -> bool:
    """Whether it is a number that a mixture can have: finite, also as fp32.

    >>> [is_weight(value) for value in (0.5, -2, True, "1", float("nan"), 1e39)]
    [True, True, False, False, False, False]
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and bool(abs(value) <= _LARGEST)


def alpha_row(weights: Mapping[str, float], bank: t2k.ExpertBank) -> Tensor:
    """{expert: weight} as (K,) fp32 over bank.names; ValueError for an expert that is not there."""
    absent = [name for name, weight in weights.items() if weight and name not in bank]
    if absent:
        raise ValueError(f"{_quoted('expert', absent)} left the bank after the mixture was checked")
    return torch.tensor([float(weights.get(name, 0.0)) for name in bank.names])


def expert_hash(expert: t2k.Expert) -> str:
    """A hash of an expert's values and of the base weights it belongs to.

    >>> a, b = (t2k.Expert({"up": torch.tensor([z])}) for z in (1.0, 2.0))
    >>> expert_hash(a) == expert_hash(a), expert_hash(a) == expert_hash(b)
    (True, False)
    """
    digest = hashlib.sha256()
    for layer in sorted(expert.z):
        digest.update(f"{layer}\0{expert.fingerprints.get(layer, '')}\0".encode())
        digest.update(expert.z[layer].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def hashes(bank: t2k.ExpertBank, names: list[str] | None = None) -> dict[str, str]:
    """{expert: hash} of these experts of the bank (default: all)."""
    return {name: expert_hash(bank[name]) for name in (bank.names if names is None else names)}


class Hashes:
    """The hashes of a bank's experts, each computed when it is first asked for.

    One is made for a call and shared by all checks of it. It holds the experts that it has looked
    at: where the bank has another of the same name by now, that one is hashed anew.
    """

    def __init__(self, bank: t2k.ExpertBank) -> None:
        self.bank = bank
        self._known: dict[str, tuple[t2k.Expert, str]] = {}

    def __getitem__(self, name: str) -> str:
        expert = self.bank[name]
        if name not in self._known or self._known[name][0] is not expert:
            self._known[name] = (expert, expert_hash(expert))
        return self._known[name][1]


def check_experts(
    hashed: Hashes, experts: Mapping[str, str], whose: str, *, made: str, again: str
) -> None:
    """ValueError, naming all that are not, unless the bank has these experts, {name: hash}, the
    same by hash.

    For the message: whose experts they are, how that was `made`, what to do `again`.
    """
    there = hashed.bank
    missing = [name for name in experts if name not in there]
    if missing:
        raise ValueError(
            f"{whose} needs {_quoted('expert', missing)}, the bank has "
            f"{', '.join(there.names) or 'none'}. Add what is missing under this name."
        )
    wrong = [name for name, mark in experts.items() if hashed[name] != mark]
    if wrong:
        marks = ", ".join(f"{name!r} {experts[name]}, the bank's {hashed[name]}" for name in wrong)
        raise ValueError(
            f"{whose} was {made} for {_quoted('another expert', wrong, 'other experts')} (hash of "
            f"{marks}). Load what it was {made} for, or {again}."
        )


def _quoted(one: str, names: Sequence[str], several: str | None = None) -> str:
    """Names as an error says them.

    >>> _quoted("expert", ["a"]), _quoted("expert", ["a", "b"])
    ("expert 'a'", "experts 'a', 'b'")
    """
    word = one if len(names) == 1 else several or f"{one}s"
    return f"{word} {', '.join(map(repr, names))}"


def mixture_path(folder: str | Path, task: str) -> Path:
    """Where a folder of mixtures holds that of a task: TASK.json."""
    return Path(folder) / f"{check_name(task, 'task')}.json"


def save_mixture(path: str | Path, mixture: TaskMixture) -> Path:
    """Write a mixture, whole or not at all: to `path` itself where it ends in .json, else into the
    folder `path` (made if need be) under the task's name. Returns where.
    """
    path = Path(path)
    if path.suffix != ".json":
        path.mkdir(parents=True, exist_ok=True)
        path = mixture_path(path, mixture.task)
    write_stored(path, KIND, VERSION, _plain(mixture))
    return path


def load_mixture(path: str | Path, task: str | None = None) -> TaskMixture:
    """The mixture in the file `path`, or, with `task`, in the folder `path` under that name.

    Raises FileNotFoundError (naming the tasks that are there), and CorruptFileError for a file
    that is truncated, damaged or of another kind. One without a checksum, as written by hand, is
    read, and the log warns; `save_mixture(path, load_mixture(path))` gives it one.
    """
    path = Path(path)
    if task is not None:
        folder, path = path, mixture_path(path, task)
        if not path.exists():
            there = sorted(p.stem for p in folder.glob("*.json")) if folder.is_dir() else []
            raise FileNotFoundError(
                f"no mixture of task {task!r} in {folder}; it has {', '.join(there) or 'none'}. "
                "Find one with `t2 adapt`."
            )
    facts = read_stored(
        path, KIND, VERSION, required=("task", "weights", "experts"),
        optional=("method", "seed", "budget", "score", "facts"),
    )  # fmt: skip
    try:
        return TaskMixture(**facts)
    except (TypeError, ValueError, RecursionError) as error:
        raise t2k.CorruptFileError(f"{path} is not a whole mixture: {error}.") from error


def load_mixtures(folder: str | Path) -> dict[str, TaskMixture]:
    """{task: mixture} of every *.json in a folder; ValueError where a task is there twice."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of mixtures {folder} does not exist.")
    found: dict[str, TaskMixture] = {}
    for path in sorted(folder.glob("*.json")):
        mixture = load_mixture(path)
        if mixture.task in found:
            raise ValueError(f"{folder} has two mixtures of task {mixture.task!r}; remove one.")
        found[mixture.task] = mixture
    if not found:
        raise FileNotFoundError(f"no mixtures (*.json) in {folder}. Find some with `t2 adapt`.")
    return found


def _plain(mixture: TaskMixture) -> dict[str, Any]:
    weights = {
        key: dict(value) if isinstance(value, Mapping) else float(value)
        for key, value in mixture.weights.items()
    }
    return {
        "task": mixture.task,
        "weights": weights,
        "experts": dict(mixture.experts),
        "method": mixture.method,
        "seed": mixture.seed,
        "budget": mixture.budget,
        "score": dict(mixture.score),
        "facts": dict(mixture.facts),
    }
