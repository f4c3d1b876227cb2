"""Cards in Markdown: what an expert is, where it belongs and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2kernels.files import atomic_path
from t2runtime.describe import by_kind, most_moved
from t2runtime.loading import SMALL_NAME

_SHOWN = ("task", "data", "reward", "tags", "licence", "license", "options",
          "config")  # fmt: skip
_NO_LICENCE = "not stated; an expert is of use with its base model only, whose licence applies"


def write_card(expert: t2k.Expert, path: str | Path) -> Path:
    """Write the card of the expert in file ``path`` beside it, as NAME.md; returns where.

    An older card is replaced, whole or not at all. Raises SaveError where it cannot be written.
    """
    path = Path(path)
    card = path.with_suffix(".md")
    with atomic_path(card) as temporary:
        temporary.write_text(card_text(expert, path.name), encoding="utf-8")
    return card


def export_card(expert: t2k.Expert, path: Path, what: str) -> None:
    """Write the README.md of an export: ``what`` it is, of which mixture on which base."""
    facts = expert.metadata
    lines = [
        *_front(expert),
        f"# {_line(expert.description) or 'Export of an SVF expert'}",
        "",
        f"Written by `t2 export`: {what}.",
        "",
        f"- base model: {_code(expert.base_model or 'not stated')}",
        f"- mixture: {_line(facts.get('mixture', ''))} (form {_line(facts.get('form', ''))})",
        f"- layers changed: {len(expert.z)}",
        "- licence: that of the base model and of the experts",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def card_text(expert: t2k.Expert, file: str) -> str:
    """The card of the expert saved under the name ``file``.

    Of ``expert.metadata`` the keys task, data, reward, tags, licence, options and config have
    places of their own; everything else is listed under "Metrics and facts". A number with
    ``<name>_interval`` or a mapping with "accuracy" and "interval" is shown with its interval.
    """
    facts = expert.metadata
    values = sum(z.numel() for z in expert.z.values())
    lines = [
        *_front(expert),
        f"# {_line(Path(file).stem)}",
        "",
        _line(expert.description) or "An SVF expert.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {_code(expert.base_model or 'not stated')} |",
        f"| belongs to | {len(expert.fingerprints)} weights by fingerprint, of {len(expert.z)} "
        "layers |",
        f"| size | {values:,} values of z (1 = base), fp32 |",
        *(
            f"| {key} | {_cell(facts[key])} |"
            for key in ("task", "data", "reward")
            if facts.get(key) is not None
        ),
        f"| licence | {_cell(_licence(facts) or _NO_LICENCE)} |",
        "",
    ]
    rest = _flat({k: v for k, v in facts.items() if k not in _SHOWN and v is not None})
    if rest:
        lines += ["## Metrics and facts", "", "| | |", "|---|---|", *_rows(rest), ""]
    lines += _statistics(expert)
    settings = facts.get("config")
    if isinstance(options := facts.get("options"), Mapping):
        settings = {**options, **settings} if isinstance(settings, Mapping) else options
    if settings is not None:
        text = json.dumps(settings, indent=1, ensure_ascii=False).replace("`", "'")
        lines += ["## Settings", "", "```json", text, "```", ""]
    return "\n".join([*lines, *_use(expert, file)])


def _front(expert: t2k.Expert) -> list[str]:
    """The YAML head that model hubs read; JSON strings are YAML strings."""
    tags = expert.metadata.get("tags")
    tags = [str(tag) for tag in tags] if isinstance(tags, list) else ["transformer-squared", "svf"]
    lines = ["---", "library_name: t2kernels"]
    if expert.base_model:
        lines.append(f"base_model: {json.dumps(expert.base_model)}")
    if licence := _licence(expert.metadata):
        lines.append(f"license: {json.dumps(licence)}")
    return [*lines, f"tags: {json.dumps(tags)}", "---", ""]


def _licence(facts: Mapping[str, Any]) -> str:
    return str(facts.get("licence") or facts.get("license") or "")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings inside, but those of an accuracy and its interval, as entries of their own."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping) and "accuracy" not in value:
            flat |= _flat(value, f"{prefix}{key} ")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _rows(facts: Mapping[str, Any]) -> list[str]:
    rows = []
    for key, value in facts.items():
        if key.endswith("_interval") and key.removesuffix("_interval") in facts:
            continue
        interval = facts.get(f"{key}_interval")
        if isinstance(value, Mapping) and "accuracy" in value:
            interval, value = value.get("interval"), value["accuracy"]
        text = f"{value:.4g}" if isinstance(value, float) else _cell(value)
        if isinstance(interval, (list, tuple)) and len(interval) == 2:
            text += f" (95 % interval {interval[0]:.4g} to {interval[1]:.4g})"
        rows.append(f"| {_cell(key.replace('_', ' '))} | {text} |")
    return rows


def _statistics(expert: t2k.Expert) -> list[str]:
    lines = [
        "## z by kind of layer", "",
        "| kind | layers | values | mean | std | min | max | share of movement |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for kind, f in by_kind(expert).items():
        lines.append(
            f"| {_cell(kind)} | {f['layers']} | {f['values']:,} | {f['mean']:.4f} | {f['std']:.4f} "
            f"| {f['min']:.4f} | {f['max']:.4f} | {100 * f['share']:.1f} % |"
        )
    moved = ", ".join(f"{_code(layer)} {value:.4f}" for layer, value in most_moved(expert).items())
    return [*lines, "", f"Moved most, by √mean((z − 1)²): {moved}.", ""]


def _use(expert: t2k.Expert, file: str) -> list[str]:
    targets = sorted({layer.rpartition(".")[2] for layer in expert.z})
    base = json.dumps(expert.base_model or "the base model's folder")
    load = ["from transformers import AutoModelForCausalLM", "",
            f"model = AutoModelForCausalLM.from_pretrained({base})"]  # fmt: skip
    if expert.base_model == SMALL_NAME:  # is in the package, under no such name anywhere else
        load = ["from t2runtime.loading import load", "", 'model, tokenizer = load("small")']
    return [
        "## Use",
        "",
        "```python",
        "import t2kernels as t2k",
        *load,
        f"t2k.convert(model, targets={json.dumps(targets)})",
        "bank = t2k.ExpertBank(model)",
        f'bank.add("expert", t2k.Expert.load({json.dumps(file)}))',
        'with bank.use("expert"):  # or {"expert": 0.7}, or one entry per request',
        "    ...",
        "```",
        "",
    ]


def _line(text: object) -> str:
    """On one line, and no Markdown that the text did not mean."""
    plain = " ".join(str(text).split())
    for sign in "\\`*_<>[]#":
        plain = plain.replace(sign, "\\" + sign)
    return plain


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _line(text).replace("|", "\\|")


def _code(text: object) -> str:
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "/") + "`"
