"""Mixtures that a search has found: one JSON file a task, reloaded by the task's name.

A file names its experts and holds a hash of each, so that it cannot be used with others of the
same name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import t2kernels as t2k
from t2kernels.files import check_name, read_json, write_json

KIND, VERSION = "mixture", 1

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
        if not self.experts:
            raise ValueError("experts must name the experts of the search and their hashes")
        if not isinstance(self.weights, Mapping):
            raise TypeError(f"weights must be a mapping, got {type(self.weights).__name__}")
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
                number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
                if not number or not math.isfinite(weight):
                    raise ValueError(
                        f"weights{where}: the weight of {name!r} must be a finite number, "
                        f"got {weight!r}"
                    )

    @property
    def per_layer(self) -> bool:
        """Whether every layer has weights of its own."""
        return any(isinstance(value, Mapping) for value in self.weights.values())

    def questions(self) -> tuple[str, ...]:
        """The marks of the shots (`shots.question_mark`), which no score may count; () where no
        search was made. ValueError where there was one and the marks are not known.
        """
        if self.budget and "questions" not in self.facts:
            raise ValueError(
                f"the mixture of task {self.task!r} does not say which questions were its shots, "
                "so that they cannot be kept out of a score. Find it again with `t2 adapt`"
            )
        return tuple(map(str, self.facts.get("questions", ())))

    def rows(self) -> dict[str, Mapping[str, float]]:
        """The rows of weights, by what an error calls them."""
        if self.per_layer:
            return {f"[{k!r}]": v for k, v in self.weights.items()}  # type: ignore[misc]
        return {"": self.weights}  # type: ignore[dict-item]

    def check(self, bank: t2k.ExpertBank) -> None:
        """Raise ValueError unless the bank has these experts, the same by hash, and these layers.

        Experts of weight 0 everywhere need not be there.
        """
        used = {name for row in self.rows().values() for name, weight in row.items() if weight}
        needed = {name: mark for name, mark in self.experts.items() if name in used}
        whose = f"the mixture of task {self.task!r}"
        check_experts(bank, needed, whose, made="found", again="search again")
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
        if not self.per_layer:
            alpha = alpha_row(self.rows()[""], bank)
            return alpha.repeat(len(bank.layers), 1) if per_layer else alpha
        base = torch.zeros(len(bank.names))
        return torch.stack([
            alpha_row(self.weights[layer], bank) if layer in self.weights else base  # type: ignore[arg-type]
            for layer in bank.layers
        ])  # fmt: skip


def alpha_row(weights: Mapping[str, float], bank: t2k.ExpertBank) -> Tensor:
    """{expert: weight} as (K,) fp32 over bank.names."""
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


def check_experts(
    bank: t2k.ExpertBank, experts: Mapping[str, str], whose: str, *, made: str, again: str
) -> None:
    """ValueError unless the bank has these experts, {name: hash}, the same by hash.

    For the message: whose experts they are, how that was `made`, what to do `again`.
    """
    for name, want in experts.items():
        if name not in bank:
            raise ValueError(
                f"{whose} needs expert {name!r}, the bank has "
                f"{', '.join(bank.names) or 'none'}. Add it under this name."
            )
        found = expert_hash(bank[name])
        if found != want:
            raise ValueError(
                f"{whose} was {made} for another expert {name!r} (hash {want}, the bank's has "
                f"{found}). Load the expert of then, or {again}."
            )


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
    write_json(path, {"kind": KIND, "version": VERSION, **_plain(mixture)})
    return path


def load_mixture(path: str | Path, task: str | None = None) -> TaskMixture:
    """The mixture in the file `path`, or, with `task`, in the folder `path` under that name.

    Raises FileNotFoundError (naming the tasks that are there), and CorruptFileError for a file
    that is truncated, damaged or of another kind.
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
    facts = read_json(path, kind=KIND, version=VERSION)
    try:
        return TaskMixture(**{k: v for k, v in facts.items() if k not in ("kind", "version")})
    except (TypeError, ValueError) as error:
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
