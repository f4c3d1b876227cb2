"""Experts on models that see: an image classifier, and a language model inside a small LLaVA that
gets experts trained on text alone.

The data are the folders sklearn_digits and easy_vqa of the context's data.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2runtime.claims.claim import Claim
from t2runtime.claims.units import Context
from t2runtime.evidence.ledger import Row
from t2runtime.vision import digits, vqa
from t2runtime.vision.easy_vqa import SKILLS, EasyVQA

DIGITS, VQA = "vision-digits", "vision-vqa"


def _folder(context: Context, name: str) -> Path:
    if context.data is None:
        raise ValueError("the vision units need --data, a folder of data sets")
    return Path(context.data) / name


def measure_digits(seed: int, context: Context) -> dict[str, Any]:
    """See `digits.measure`."""
    images = digits.read(_folder(context, "sklearn_digits"))
    given = context.settings
    return digits.measure(
        images, digits.Settings(seed, given["base_steps"], given["steps"], given["rows"])
    )


def measure_vqa(seed: int, context: Context) -> dict[str, Any]:
    """See `vqa.measure`; the base is made by the first seed and serves all."""
    data = EasyVQA.read(_folder(context, "easy_vqa"))
    own = ("steps", "prompts", "problems", "shots", "population", "generations")
    settings = vqa.Settings(seed, **{name: context.settings[name] for name in own})
    return vqa.measure(data, context.out / "vision", settings)


def _own(way: str) -> Callable[[Row], float]:
    """Experts on questions of their own kind less the base, mean of the kinds, in points."""
    return lambda row: statistics.fmean(
        100 * (row["alone"][way][skill][skill]["accuracy"] - row["base"][skill]["accuracy"])
        for skill in SKILLS
    )


def _mixed(way: str, first: str, second: str = "base") -> Callable[[Row], float]:
    """First less second on all kinds together, in points."""
    return lambda row: (
        100 * (row["mixed"][way][first]["accuracy"] - row["mixed"][way][second]["accuracy"])
    )


def _domains(first: str, second: str) -> Callable[[Row], float]:
    """First less second, mean of the domains, in points."""
    return lambda row: statistics.fmean(
        100 * (row[domain][first]["accuracy"] - row[domain][second]["accuracy"])
        for domain in digits.DOMAINS
    )


_BASE = (
    "a LLaVA of 0.5 M parameters whose right procedure is a minority in its training text; "
    "easy-VQA, held-out images."
)
_BEFORE = (
    "Experts trained on text alone, on the language model before it saw images (as Llama 3 for "
    "LLaVA-NeXT), not on the language part inside the LLaVA."
)
_GAIN = "difference in greedy accuracy on visual questions of the expert's kind, mean of 3, points"
_ALL = "difference in greedy accuracy on visual questions of four kinds together, points"
_VIT = "mean of three domains of 8 x 8 digits, as many steps each; the paper adapts no classifier."

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "An expert trained on visual questions beats the base", "figure on TextVQA", _GAIN, _BASE,
        VQA, _own("visual"), low=0,
    ),
    Claim(
        "Experts trained before the model saw images help on visual questions", "OKVQA", _GAIN,
        f"{_BASE} {_BEFORE}",
        VQA, _own("before"), low=0,
    ),
    Claim(
        "Experts trained on text inside the LLaVA help on visual questions", "not tested", _GAIN,
        f"{_BASE} Trained on text alone, on the language part inside the LLaVA.",
        VQA, _own("text"), low=0,
    ),
    Claim(
        "A few-shot mixture of experts trained before it saw images beats the base", "OKVQA", _ALL,
        f"{_BASE} {_BEFORE} Ten labelled visual questions.",
        VQA, _mixed("before", "few-shot"), low=0,
    ),
    Claim(
        "Each question under its kind's expert from before images beats one mixture for all",
        "not tested", _ALL, f"{_BASE} {_BEFORE}",
        VQA, _mixed("before", "each its own", "few-shot"), low=0,
    ),
    Claim(
        "SVF adapts an image classifier", "not tested",
        "difference in accuracy, SVF less base, points", _VIT, DIGITS, _domains("svf", "base"),
        low=0,
    ),
    Claim(
        "On it SVF beats LoRA", "not tested", "difference in accuracy, SVF less LoRA, points",
        _VIT, DIGITS, _domains("svf", "lora"), low=0,
    ),
)  # fmt: skip


def section(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Tables of means over seeds."""
    lines: list[str] = []
    if rows.get(DIGITS):
        lines += _digits_table(rows[DIGITS])
    if rows.get(VQA):
        lines += _vqa_table(rows[VQA])
    return ["## Models that see", "", *lines] if lines else []


def _digits_table(rows: Sequence[Row]) -> list[str]:
    """Accuracy by domain and method."""
    names = ("base", *digits.METHODS)
    lines = [
        f"A ViT on digits, accuracy in %, mean of {len(rows)} seeds:", "",
        f"| digits | {' | '.join(names)} | rows of all domains in one batch, SVF |",
        "|---" * (len(names) + 2) + "|",
    ]  # fmt: skip
    for domain in digits.DOMAINS:
        reached = [_mean(row[domain][name] for row in rows) for name in names]
        reached.append(_mean(row["one batch"][domain] for row in rows))
        lines.append(f"| {domain} | {' | '.join(reached)} |")
    return [*lines, ""]


def _vqa_table(rows: Sequence[Row]) -> list[str]:
    """Accuracy by kind of question and by way of training."""
    lines = [
        f"Visual questions, accuracy in %, mean of {len(rows)} seeds; experts on their own kind:",
        "", f"| | {' | '.join(SKILLS)} |", "|---" * (len(SKILLS) + 1) + "|",
        f"| base | {' | '.join(_mean(r['base'][s] for r in rows) for s in SKILLS)} |",
    ]  # fmt: skip
    for way in vqa.WAYS:
        own = (_mean(row["alone"][way][skill][skill] for row in rows) for skill in SKILLS)
        lines.append(f"| {way} | {' | '.join(own)} |")
    forms = list(rows[0]["mixed"][vqa.WAYS[0]])
    lines += ["", "All kinds together:", "", f"| | {' | '.join(forms)} |"]
    lines.append("|---" * (len(forms) + 1) + "|")
    for way in vqa.WAYS:
        own = (_mean(row["mixed"][way][form] for row in rows) for form in forms)
        lines.append(f"| {way} | {' | '.join(own)} |")
    return [*lines, ""]


def _mean(reached: Any) -> str:
    return f"{100 * statistics.fmean(one['accuracy'] for one in reached):.1f}"
