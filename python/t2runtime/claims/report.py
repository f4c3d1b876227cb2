"""From rows to claims.json, claims.md and pictures."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from t2kernels.files import atomic_path
from t2runtime.claims import training
from t2runtime.claims.claim import NOT_MEASURED, VERDICTS, judge
from t2runtime.claims.units import KINDS
from t2runtime.evidence.ledger import Row

_DIGITS = 4
_WIDTH = 116
_MADE = (
    "Made by `make claims` ({facts}); {seeds} seeds where the table says no less, experts trained "
    "anew under each, one thread a unit. Models of a million parameters or less, tasks to match: "
    "what is confirmed here is confirmed at this size, what is not may still hold at the paper's."
)
_RULE = (
    "A claim puts a number into a range. With the number's 95 % Student interval over seeds it is "
    "**confirmed** where the whole interval lies in the range, **not confirmed** where it lies "
    "outside, else **undecided**. Of all claims {counts}."
)
_PARTS = ("environment", "seeds", "settings", "lacking", "evidence", "rows")


def read_evidence(path: Path) -> dict[str, Any]:
    """{question: its answer} of an evidence.json; ValueError for another file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        seeds = min(line["seeds"] for line in data["arms"])
        kept = ("difference", "interval")
        return {
            found["question"]: {**{k: found[k] for k in kept}, "seeds": seeds}
            for found in data["answers"]
        }
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--evidence must be an evidence.json made by `make evidence`, got {path} ({error!r})"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """What `write` was given, rounded; ValueError for another file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {part: data[part] for part in _PARTS}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"--report-only takes claims.json files made by `make claims`, got {path} ({error!r})"
        ) from error


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results as one: the rows and settings of a kind of unit are those of the
    last that has it; the evidence is the last there is.
    """
    rows: dict[str, list[Row]] = {}
    one: dict[str, Any] = {"environment": {}, "settings": {}, "lacking": {}, "evidence": {}}
    for result in results:
        own: dict[str, list[Row]] = {}
        for row in result["rows"]:
            own.setdefault(row["unit"], []).append(row)
        rows |= own
        for part in one:
            one[part] = {**one[part], **result[part]}
    one["lacking"] = {name: lacks for name, lacks in one["lacking"].items() if name not in rows}
    seeds = max(result["seeds"] for result in results)
    return {**one, "seeds": seeds, "rows": [row for each in rows.values() for row in each]}


def modules() -> list[Any]:
    """The modules that make claims, in the order of the report."""
    names = dict.fromkeys(kind.module for kind in KINDS.values())
    return [training, *map(import_module, names)]


def write(out: Path, result: Mapping[str, Any]) -> None:
    """claims.json, claims.md, and pictures where matplotlib is installed."""
    result = _rounded({part: result[part] for part in _PARTS})
    rows: dict[str, list[Row]] = {}
    for row in result["rows"]:
        rows.setdefault(row["unit"], []).append(row)
    made = modules()
    judged = [judge(c, rows, result["evidence"]) for module in made for c in module.CLAIMS]
    pictures: dict[str, str] = {}
    for module in made:
        if hasattr(module, "draw"):
            pictures |= module.draw(rows, out)
    more = [module.section(rows) for module in made if hasattr(module, "section")]
    head = {k: v for k, v in result.items() if k != "rows"} | {"claims": _rounded(judged)}
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result["rows"])
    _save(out / "claims.json", f'{text},\n "rows": [\n{lines}\n ]\n}}\n')
    _save(out / "claims.md", _markdown(result, judged, pictures, more))


def _save(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Floats to four significant digits: more would be noise, and files are committed."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def _markdown(
    result: Mapping[str, Any], judged: list[dict[str, Any]], pictures: Mapping[str, str],
    more: list[list[str]],
) -> str:  # fmt: skip
    facts = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    counts = ", ".join(f"{sum(f['verdict'] == v for f in judged)} are {v}" for v in VERDICTS)
    parts = [
        "# Claims of the paper, tried here", "",
        _wrapped(_MADE.format(facts=facts, seeds=result["seeds"])), "",
        _wrapped(_RULE.format(counts=counts)), "",
        "| claim | paper | measured here | range | mean | 95 % | seeds | outcome |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    parts += [_line(found) for found in judged]
    parts += ["", "What differs from the paper, and what measures it:", ""]
    same: dict[tuple[str, str], list[str]] = {}
    for found in judged:
        same.setdefault((found["differs"], found["command"]), []).append(found["claim"])
    parts += [
        _wrapped(f"- *{'; '.join(them)}*: {differs} `{how}`")
        for (differs, how), them in same.items()
    ]
    for name, lacks in result["lacking"].items():
        parts += ["", f"Not run: `{name}`, it needs {lacks} (see the Makefile)."]
    for lines in more:
        parts += ["", *map(_wrapped, lines)] if lines else []
    for file, shows in pictures.items():
        parts += ["", f"![{shows}]({file})"]
    return "\n".join(parts) + "\n"


def _wrapped(text: str) -> str:
    """In lines of the documents' length, rows of tables as they are; words stay whole."""
    return text if text.startswith("|") else textwrap.fill(
        text, _WIDTH, subsequent_indent="  " if text.startswith("- ") else "",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _line(found: Mapping[str, Any]) -> str:
    if found["verdict"] == NOT_MEASURED:
        numbers = "– | – | –"
    else:
        low, high = found["interval"]
        seeds = found["seeds"] or "–"
        numbers = f"{found['mean']:+.3g} | {low:+.3g} to {high:+.3g} | {seeds}"
    return (
        f"| {found['claim']} | {found['paper']} | {found['number']} | {found['expected']} | "
        f"{numbers} | {found['verdict']} |"
    )
