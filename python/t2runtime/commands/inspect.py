"""`t2 inspect FILE ...`: what expert files, a factor store or an adapter of PEFT hold, in numbers
and, of experts, as a picture.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime.describe import by_kind, cosines, in_order, most_moved, summary
from t2runtime.formats.saved import adapter_facts, kind_of, refuse


def run(args: argparse.Namespace) -> dict[str, Any]:
    """A file is read as an expert, a folder as what it holds; several experts are compared."""
    paths = [Path(file) for file in args.file]
    folders = [(path, kind) for path in paths if (kind := kind_of(path)) != "expert"]
    if folders:
        path, kind = folders[0]
        if len(paths) > 1 or args.plot:
            raise ValueError(f"{path} is a folder ({kind}); only experts are compared and drawn")
        if kind not in ("factor store", "adapter"):
            raise refuse(path, "an expert file, a factor store or the folder of an adapter of PEFT")
        return _store(path) if kind == "factor store" else _adapter(path)
    experts = _named(paths)
    result = _expert(next(iter(experts.values())))
    if len(experts) > 1:
        between = cosines(experts)
        result = {
            "kind": "experts",
            "experts": {name: _expert(expert) for name, expert in experts.items()},
            "cosines": {name: dict(zip(experts, row)) for name, row in zip(experts, between)},
        }
    if args.plot:
        from t2runtime.picture import draw

        draw(experts, Path(args.plot))
        result["plot"] = args.plot
    return result


def _named(paths: list[Path]) -> dict[str, t2k.Expert]:
    """The experts under the names of their files, or under their paths where names repeat."""
    stems = [path.stem for path in paths]
    named = [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths)]
    if len(set(named)) < len(named):
        raise ValueError("the same file is given twice")
    return {name: t2k.Expert.load(path) for name, path in zip(named, paths, strict=True)}


def _expert(expert: t2k.Expert) -> dict[str, Any]:
    layers = {
        name: {**summary(expert.z[name]), "fingerprint": expert.fingerprints.get(name)}
        for name in in_order(expert.z)
    }
    return {
        "kind": "expert",
        "base_model": expert.base_model,
        "description": expert.description,
        "metadata": expert.metadata,
        "values": sum(layer["rank"] for layer in layers.values()),
        "kinds": by_kind(expert),
        "most_moved": most_moved(expert),
        "layers": layers,
    }


def _store(path: Path) -> dict[str, Any]:
    store = t2k.FactorStore(path, partial=True)
    keys = ("shape", "rank", "dtype", "fingerprint", "accuracy")
    return {
        "kind": "factor store",
        "source": store.manifest["source"],
        "complete": store.manifest["complete"],
        "layers": {name: {key: store.info(name)[key] for key in keys} for name in store.names},
    }


def _adapter(path: Path) -> dict[str, Any]:
    facts = adapter_facts(path)
    values = sum(math.prod(tensor["shape"]) for tensor in facts["tensors"].values())
    return {"kind": "adapter", "values": values, **facts}


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _store_table(layers: dict[str, Any]) -> list[str]:
    """One row per weight; the errors to three digits."""
    rows = [("layer", "shape", "rank", "dtype", "rel. error", "as stored", "fingerprint")]
    for name, layer in layers.items():
        reached = layer["accuracy"]
        errors = (f"{reached[k]:.2e}" for k in ("relative_error", "relative_error_stored"))
        shape = "x".join(map(str, layer["shape"]))
        mark = str(layer["fingerprint"])
        rows.append((name, shape, str(layer["rank"]), layer["dtype"], *errors, mark))
    return _table(rows)


def _kind_table(kinds: dict[str, Any]) -> list[str]:
    """One row per kind of layer."""
    numbers = ("mean", "std", "min", "max", "moved")
    rows: list[tuple[str, ...]] = [("kind", "layers", "values", *numbers, "share of movement")]
    for kind, f in kinds.items():
        facts = (f"{f[key]:.4f}" for key in numbers)
        share = f"{100 * f['share']:.1f} %"
        rows.append((kind, str(f["layers"]), f"{f['values']:,}", *facts, share))
    return _table(rows)


def show(result: dict[str, Any]) -> str:
    """A header, then one line per layer; of several experts one line each and their cosines."""
    if result["kind"] == "experts":
        lines = _show_several(result)
    elif result["kind"] == "expert":
        lines = _show_expert(result)
    elif result["kind"] == "adapter":
        lines = _show_adapter(result)
    else:
        lines = [f"{result['kind']}, {len(result['layers'])} layers"]
        lines[0] += "" if result["complete"] else ", UNFINISHED: run the decomposition again"
        lines.append(f"made from    {result['source']}")
        lines += _store_table(result["layers"])
    if "plot" in result:
        lines.append(f"plot in {result['plot']}")
    return "\n".join(lines)


def _show_expert(result: dict[str, Any]) -> list[str]:
    lines = [
        f"expert, {len(result['layers'])} layers, {result['values']:,} values of z (1 = base)",
        f"base model   {result['base_model']}",
        f"description  {result['description']}",
    ]
    for key, value in result["metadata"].items():
        lines.append(f"{key:12s} {value}")
    lines += _kind_table(result["kinds"])
    moved = ", ".join(f"{layer} {value:.4f}" for layer, value in result["most_moved"].items())
    lines.append(f"moved most   {moved}  (root mean square of z - 1)")
    width = max(map(len, result["layers"]), default=0)
    for name, layer in result["layers"].items():
        facts = "  ".join(
            f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in layer.items()
        )
        lines.append(f"  {name:{width}s}  {facts}")
    return lines


def _show_adapter(result: dict[str, Any]) -> list[str]:
    rank = f", rank {result['rank']}" if result["rank"] else ""
    lines = [
        f"{result['method']}{rank}, an adapter of PEFT, no expert: {len(result['tensors'])} "
        f"tensors, {result['values']:,} values; t2 eval scores it, peft.PeftModel loads it",
        f"base model   {result['base_model']}",
        *(f"{key:12s} {value}" for key, value in result["training"].items()),
    ]
    rows: list[tuple[str, ...]] = [("tensor", "shape", "root mean square")]
    for name, tensor in result["tensors"].items():
        rows.append((name, "x".join(map(str, tensor["shape"])), f"{tensor['rms']:.4f}"))
    return [*lines, *_table(rows)]


def _show_several(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, expert in result["experts"].items():
        lines.append(f"{name}: {len(expert['layers'])} layers, {expert['values']:,} values of z")
        lines += _kind_table(expert["kinds"])
    lines.append("cosine of the deviations z - 1")
    rows: list[tuple[str, ...]] = [("", *result["cosines"])]
    for name, row in result["cosines"].items():
        rows.append((name, *("-" if v is None else f"{v:.4f}" for v in row.values())))
    return [*lines, *_table(rows)]
