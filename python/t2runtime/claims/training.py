"""Claims about training, answered by the rows of `make evidence`."""

from __future__ import annotations

from t2runtime.claims.claim import Claim

_POINTS = "difference in greedy accuracy, points, paired by task and seed"
_DIFFERS = (
    "a model of 0.9 M parameters, two generated skills, learning rates chosen for each method on "
    "validation; the paper has one run of 7 to 70 B models on GSM8K, MBPP-Pro and ARC-Easy."
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "SVF by reinforcement beats LoRA", "table 1", _POINTS,
        f"{_DIFFERS} Here LoRA has the same rewards and budget.",
        low=0, evidence="SVF against LoRA, by reinforcement",
    ),
    Claim(
        "Reinforcement beats next-token training for SVF", "ablations", _POINTS, _DIFFERS,
        low=0, evidence="SVF by reinforcement against next-token",
    ),
    Claim(
        "Next-token training beats reinforcement for LoRA", "ablations", _POINTS,
        f"{_DIFFERS} The number is reinforcement less next-token.",
        high=0, evidence="LoRA by reinforcement against next-token",
    ),
    Claim(
        "SVF of MLPs beats SVF of attention", "ablations", _POINTS, _DIFFERS,
        low=0, evidence="MLP against attention",
    ),
    Claim(
        "SVF of both beats SVF of MLPs alone", "ablations", _POINTS, _DIFFERS,
        low=0, evidence="All linears against MLP alone",
    ),
)  # fmt: skip
