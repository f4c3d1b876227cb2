"""The settings of a training run, checked when made and saved beside its metrics."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import t2kernels as t2k
from t2runtime import rewards


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; saved beside its metrics."""

    steps: int = 60
    prompts: int = 32
    samples: int = 8
    max_new_tokens: int = 8
    temperature: float = 1.0
    baseline: Literal["leave-one-out", "none"] = "leave-one-out"
    length_norm: bool = False
    kl: float = 0.02
    lr: float = 2e-2
    clip: float = 1.0
    rollout: Literal["merged", "factorised"] = "merged"
    validate_every: int = 20
    stop_at: float | None = None
    validation_problems: int = 128
    rows_per_backward: int = 256
    extract: str = "text"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "samples", "max_new_tokens", "validate_every",
                     "validation_problems", "rows_per_backward"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "lr", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive, finite number, got {value}")
        if not (math.isfinite(self.kl) and self.kl >= 0):
            raise ValueError(f"kl must be a finite number, at least 0, got {self.kl}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.baseline not in ("leave-one-out", "none"):
            raise ValueError(f"baseline must be 'leave-one-out' or 'none', got {self.baseline!r}")
        if self.baseline == "leave-one-out" and self.samples < 2:
            raise ValueError(
                "baseline 'leave-one-out' needs samples >= 2, got 1; use baseline='none'"
            )
        if self.rollout not in ("merged", "factorised"):
            raise ValueError(f"rollout must be 'merged' or 'factorised', got {self.rollout!r}")
        if self.extract not in rewards.EXTRACTORS:
            known = ", ".join(rewards.EXTRACTORS)
            raise ValueError(f"extract must be one of {known}, got {self.extract!r}")


def open_run(out: Path | None, cfg: Config) -> Path | None:
    """Write config.json, start metrics.jsonl afresh and return its path."""
    if out is None:
        return None
    out.mkdir(parents=True, exist_ok=True)
    facts = {**asdict(cfg), "versions": {"torch": torch.__version__, "t2kernels": t2k.__version__}}
    (out / "config.json").write_text(json.dumps(facts, indent=1) + "\n")
    metrics = out / "metrics.jsonl"
    metrics.write_text("")
    return metrics
