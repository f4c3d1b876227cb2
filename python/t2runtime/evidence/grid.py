"""What is compared: arms, which differ in one thing each, and the questions that pair them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from t2runtime.tasks.stories import PREFIX, PROPERTIES

#: Learning rates are chosen on validation with this seed, which no comparison uses.
TUNING_SEED = 1000
SKILLS = ("add", "reverse")
STORY_TASKS = tuple(PREFIX + name for name in PROPERTIES)


@dataclass(frozen=True)
class Run:
    """One training run and its test: everything that decides the row it gives."""

    arm: str
    task: str
    seed: int
    method: str = "svf"
    targets: str = "all-linear"
    parametrisation: str = "direct"
    settings: tuple[tuple[str, Any], ...] = ()
    model: str = "small"

    @property
    def key(self) -> str:
        """The run in one line: the same key, the same run."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def command(self) -> list[str]:
        """What makes its row; see `ledger.Job`."""
        return ["t2runtime.evidence.work", self.key]

    @property
    def named(self) -> dict[str, Any]:
        """What its row says of the run itself."""
        lr = dict(self.settings)["lr"]
        return {"arm": self.arm, "task": self.task, "seed": self.seed, "lr": lr}

    def with_settings(self, **more: Any) -> Run:
        """The same with other fields of `train.Config`."""
        return replace(self, settings=tuple(sorted({**dict(self.settings), **more}.items())))


@dataclass(frozen=True)
class Arm:
    """A way to train. `rates` are the learning rates to choose from; () takes those of `like`."""

    name: str
    rates: tuple[float, ...] = ()
    like: str = "svf"
    method: str = "svf"
    targets: str = "all-linear"
    parametrisation: str = "direct"
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, task: str, seed: int, lr: float) -> Run:
        """One run of this arm."""
        plain = Run(self.name, task, seed, self.method, self.targets, self.parametrisation)
        return plain.with_settings(**self.settings, lr=lr)


# As many answers a step as the 32 prompts with 8 samples of reinforcement.
_NEXT_TOKEN = {"objective": "next-token", "prompts": 256, "samples": 1, "baseline": "none"}
# Wide enough that the best lies inside.
_SVF_RATES, _LOW_RATES = (5e-3, 2e-2, 5e-2, 1.5e-1), (2e-4, 1e-3, 5e-3, 2e-2)

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("svf", _SVF_RATES),
        Arm("lora", _LOW_RATES, method="lora"),
        Arm("dora", _LOW_RATES, method="dora"),
        Arm("ia3", _SVF_RATES, method="ia3"),
        Arm("svf, next-token", _SVF_RATES, settings=_NEXT_TOKEN),
        Arm("lora, next-token", _LOW_RATES, method="lora", settings=_NEXT_TOKEN),
        Arm("svf, MLP", targets="mlp"),
        Arm("svf, attention", targets="attention"),
        Arm("svf, sigmoid-normalised", (2e-2, 1e-1, 3e-1), parametrisation="sigmoid-normalised"),
        Arm("svf, no KL", settings={"kl": 0.0}),
        Arm("svf, KL 0.1", settings={"kl": 0.1}),
    )
}


@dataclass(frozen=True)
class Question:
    """Whether `first` reaches a higher accuracy than `second`, and what the paper says."""

    text: str
    first: str
    second: str
    paper: str


QUESTIONS = (
    Question("SVF against LoRA, by reinforcement", "svf", "lora", "SVF is better"),
    Question("SVF against DoRA, by reinforcement", "svf", "dora", "not tested"),
    Question("SVF against IA3, by reinforcement", "svf", "ia3", "not tested"),
    Question("SVF by reinforcement against next-token", "svf", "svf, next-token", "RL is better"),
    Question(
        "LoRA by reinforcement against next-token", "lora", "lora, next-token",
        "next-token is better",
    ),
    Question("MLP against attention", "svf, MLP", "svf, attention", "MLP is better"),
    Question("All linears against MLP alone", "svf", "svf, MLP", "a little better"),
    Question("Direct z against sigmoid-normalised", "svf", "svf, sigmoid-normalised", "not tested"),
    Question("KL 0.02 against none", "svf", "svf, no KL", "KL stabilises"),
    Question("KL 0.02 against 0.1", "svf", "svf, KL 0.1", "0.1 to 0.3 for large models"),
)  # fmt: skip


def tuning() -> Iterator[Run]:
    """The runs that learning rates are chosen by: one task, one seed, every rate of every arm."""
    for arm in ARMS.values():
        for lr in arm.rates:
            yield arm.run(SKILLS[0], TUNING_SEED, lr)


def comparisons(
    rates: dict[str, float], seeds: Sequence[int], tasks: Sequence[str] = SKILLS
) -> Iterator[Run]:
    """All runs of the questions, a seed at a time, so that a part of them is of use too."""
    for seed in seeds:
        for task in tasks:
            for arm in ARMS.values():
                yield arm.run(task, seed, rates[arm.name if arm.rates else arm.like])


def stories(model: str, seeds: Sequence[int]) -> Iterator[Run]:
    """Three properties of stories with SVF on all linears of a model that tells stories."""
    for seed in seeds:
        for task in STORY_TASKS:
            run = Run("svf", task, seed, model=model)
            yield run.with_settings(lr=5e-2, max_new_tokens=48, prompts=16, steps=40)
