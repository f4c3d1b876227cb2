"""`t2 inspect FILE`: what an expert file or a factor store holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import t2kernels as t2k


def run(args: argparse.Namespace) -> dict[str, Any]:
    """A folder is read as a factor store, a file as an expert."""
    path = Path(args.file)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {args.file}")
    return _store(path) if path.is_dir() else _expert(path)


def _expert(path: Path) -> dict[str, Any]:
    expert = t2k.Expert.load(path)
    layers = {
        name: {
            "rank": z.numel(),
            "mean": float(z.mean()),
            "std": float(z.std(unbiased=False)),
            "min": float(z.min()),
            "max": float(z.max()),
            "fingerprint": expert.fingerprints.get(name),
        }
        for name, z in expert.z.items()
    }
    return {
        "kind": "expert",
        "base_model": expert.base_model,
        "description": expert.description,
        "metadata": expert.metadata,
        "values": sum(layer["rank"] for layer in layers.values()),
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


def _store_table(layers: dict[str, Any]) -> list[str]:
    """One row per weight; the errors to three digits."""
    rows = [("layer", "shape", "rank", "dtype", "rel. error", "as stored", "fingerprint")]
    for name, layer in layers.items():
        reached = layer["accuracy"]
        errors = (f"{reached[k]:.2e}" for k in ("relative_error", "relative_error_stored"))
        shape = "x".join(map(str, layer["shape"]))
        mark = str(layer["fingerprint"])
        rows.append((name, shape, str(layer["rank"]), layer["dtype"], *errors, mark))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def show(result: dict[str, Any]) -> str:
    """A header, then one line per layer."""
    lines = [f"{result['kind']}, {len(result['layers'])} layers"]
    if result["kind"] == "expert":
        lines[0] += f", {result['values']:,} values of z (1 = base)"
        lines += [f"base model   {result['base_model']}", f"description  {result['description']}"]
        for key, value in result["metadata"].items():
            lines.append(f"{key:12s} {value}")
    else:
        lines[0] += "" if result["complete"] else ", UNFINISHED: run the decomposition again"
        lines.append(f"made from    {result['source']}")
    if result["kind"] != "expert":
        return "\n".join([*lines, *_store_table(result["layers"])])
    width = max(map(len, result["layers"]), default=0)
    for name, layer in result["layers"].items():
        facts = "  ".join(
            f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in layer.items()
        )
        lines.append(f"  {name:{width}s}  {facts}")
    return "\n".join(lines)
