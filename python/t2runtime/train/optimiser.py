"""The optimiser, its learning rate as a function of the step, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t2runtime.train.config import Config


def make(cfg: Config, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or Adam over `parameters`."""
    kind = torch.optim.AdamW if cfg.optimiser == "adamw" else torch.optim.Adam
    return kind(parameters, cfg.lr, weight_decay=cfg.weight_decay)


def learning_rate(cfg: Config, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, or half a cosine down to 0.

    >>> cfg = Config(steps=5, warmup=1, lr=1.0)
    >>> [round(learning_rate(cfg, step), 3) for step in range(5)]
    [1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup) / (cfg.steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))


def advance(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """One step at `rate`; the gradients are freed."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def state_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the optimiser's state; "3.exp_avg" is that of its parameter 3."""
    state = optimiser.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().cpu().clone()
        for index, entry in state.items()
        for name, value in entry.items()
    }


def load_state(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take up what `state_tensors` gave, bit for bit."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
