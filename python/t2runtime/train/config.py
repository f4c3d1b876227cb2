"""The settings of a training run, checked when made and saved beside its metrics.

Two recipes: the paper's, which are the defaults of `Config`, and `small_model` for the model that
comes with the package. What departs from the paper is listed in `reinforce.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

_CHOICES = {
    "objective": ("reinforce", "next-token"),
    "baseline": ("leave-one-out", "none"),
    "kl_estimator": ("exact", "k3"),
    "optimiser": ("adamw", "adam"),
    "schedule": ("cosine", "constant"),
    "rollout": ("merged", "factorised"),
    "chat": ("auto", "on", "off"),
    "long_prompts": ("skip", "error"),
}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run, with the paper's recipe as defaults; saved beside its metrics.

    objective: "reinforce", or "next-token" for supervised training on answer and end token, which
        takes `prompts` answers a step and leaves the fields of sampling and reward unused.
    steps, prompts, samples: at most so many steps, of so many prompts, so often answered each.
    max_new_tokens: length of an answer; None for what the task says (`Source.max_new_tokens`).
    temperature: of the samples, and of the log-probabilities that are trained; of the base's too.
    wrong_reward: reward of a wrong answer; a right one gets 1.
    baseline: "none", or "leave-one-out": the mean reward of the prompt's other samples.
    length_norm: loss and KL averaged over the tokens of an answer instead of summed.
    kl, kl_estimator: coefficient of KL(expert || base), and how it is had: "exact" by a sum over
        the vocabulary at every visited state, or "k3" from the sampled ids alone.
    optimiser, lr, schedule, warmup, weight_decay, clip: see `optimiser.py`; warmup counts steps,
        clip is of the gradient's norm. Decay would pull z to 0 while the base is at 1, hence 0.
    rollout: "merged" writes z into W for sampling (fast, keeps a copy of W), "factorised" does not.
    recompute, gradient_checkpointing: less memory for more time: x·V of each layer, or all of a
        block, once more in backward.
    rows_per_rollout, rows_per_backward: so many answers in memory at once. The rows of a rollout
        decide which random numbers a sample gets.
    validate_every, validation_problems, patience, stop_at: the best by greedy accuracy on the
        validation split is kept; training ends after `patience` validations without a better one
        (None: never), or at the accuracy `stop_at`.
    checkpoint_every: steps from one checkpoint to the next, where a run has a folder.
    chat: "auto" puts prompts into the tokenizer's chat template where it has one, "on" demands
        one, "off" leaves prompts as they are.
    long_prompts: "skip" leaves problems out that do not fit into the model's context with their
        answers, and counts them in the log, config.json and the expert's metadata; "error" refuses
        them. Looked for before the first step.
    seed: of prompts and samples. Equal seeds give equal bits on one machine and thread count.
    """

    objective: Literal["reinforce", "next-token"] = "reinforce"
    steps: int = 200
    prompts: int = 256
    samples: int = 1
    max_new_tokens: int | None = None
    temperature: float = 1.0
    wrong_reward: float = -1.0
    baseline: Literal["leave-one-out", "none"] = "none"
    length_norm: bool = False
    kl: float = 0.1
    kl_estimator: Literal["exact", "k3"] = "exact"
    optimiser: Literal["adamw", "adam"] = "adamw"
    lr: float = 2e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1e-3
    rollout: Literal["merged", "factorised"] = "merged"
    recompute: bool = False
    gradient_checkpointing: bool = False
    rows_per_rollout: int = 64
    rows_per_backward: int = 16
    validate_every: int = 10
    validation_problems: int = 128
    patience: int | None = 5
    stop_at: float | None = None
    checkpoint_every: int = 10
    chat: Literal["auto", "on", "off"] = "auto"
    long_prompts: Literal["skip", "error"] = "skip"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                known = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} must be {known}, got {getattr(self, name)!r}")
        if self.objective == "reinforce" and self.baseline != "none" and self.samples < 2:
            raise ValueError(
                "baseline 'leave-one-out' needs samples >= 2, got 1; use baseline='none'"
            )
        if self.objective == "next-token" and self.kl > 0 and self.kl_estimator == "k3":
            raise ValueError(
                "kl_estimator 'k3' needs sampled answers, objective 'next-token' has given ones; "
                "use kl_estimator='exact' or kl=0"
            )

    def differences(self, other: Config) -> list[str]:
        """Where two settings differ, in words.

        >>> Config(steps=3).differences(Config(steps=4))
        ['steps 3, not 4']
        """
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name} {mine!r}, not {its!r}" for name, mine, its in pairs if mine != its]


def paper(**changes: Any) -> Config:
    """The paper's recipe, which `Config` has as defaults.

    NOTE(paper): the number of steps, the rhythm of validation and the patience are not in it.

    >>> paper(steps=50).lr
    0.002
    """
    return Config(**changes)


def small_model(**changes: Any) -> Config:
    """What trains the package's small model in seconds: many samples, a baseline, large steps.

    >>> small_model(seed=1).samples
    8
    """
    recipe: dict[str, Any] = {
        "steps": 60, "prompts": 32, "samples": 8, "baseline": "leave-one-out", "kl": 0.02,
        "optimiser": "adam", "lr": 2e-2, "schedule": "constant", "clip": 1.0,
        "rows_per_rollout": 256, "rows_per_backward": 256, "validate_every": 20, "patience": None,
    }  # fmt: skip
    return Config(**{**recipe, **changes})


#: The recipes by the names that the command line gives them.
RECIPES = {"paper": paper, "small": small_model}


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")


def _check_numbers(cfg: Config) -> None:
    for name in ("steps", "prompts", "samples", "rows_per_rollout", "rows_per_backward",
                 "validate_every", "validation_problems", "checkpoint_every"):  # fmt: skip
        _whole(name, getattr(cfg, name), 1)
    for name in ("max_new_tokens", "patience"):
        if getattr(cfg, name) is not None:
            _whole(name, getattr(cfg, name), 1)
    for name in ("warmup", "seed"):
        _whole(name, getattr(cfg, name), 0)
    for name in ("temperature", "lr", "clip"):
        value = getattr(cfg, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive, finite number, got {value}")
    for name in ("kl", "weight_decay"):
        value = getattr(cfg, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number, at least 0, got {value}")
    if not (math.isfinite(cfg.wrong_reward) and cfg.wrong_reward < 1):
        raise ValueError(
            "wrong_reward must be finite and below 1, the reward of a right answer, "
            f"got {cfg.wrong_reward}"
        )
    if cfg.stop_at is not None and not 0 < cfg.stop_at <= 1:
        raise ValueError(f"stop_at must be an accuracy above 0 and up to 1, got {cfg.stop_at}")
    if cfg.warmup >= cfg.steps:
        raise ValueError(f"warmup must be below steps, got {cfg.warmup} of {cfg.steps}")
