"""`t2 export MODEL --experts FILE ...`: a merged checkpoint, a LoRA adapter, or one expert."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

import t2kernels as t2k
from t2runtime.card import export_card, write_card
from t2runtime.formats.folder import check_free, new_folder
from t2runtime.formats.lora import lora_of, write_lora
from t2runtime.formats.merged import check_belongs, write_merged
from t2runtime.formats.mixture import combine
from t2runtime.formats.weights import Weights
from t2runtime.loading import DTYPES, SMALL_NAME, device_of
from t2runtime.skeleton import local_folder


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Mix the experts to one, then write it in the form asked for."""
    _check(args)
    out = Path(args.out)
    paths = [Path(file) for file in args.experts]
    experts = [t2k.Expert.load(path) for path in paths]
    mix = args.mix if args.mix else [1.0] * len(experts)
    if len(mix) != len(experts):
        raise ValueError(f"--mix must have one weight per expert, {len(experts)}, got {len(mix)}")
    if not args.as_expert:
        check_free(out)
    device = device_of(args.device)
    names = dict.fromkeys(name for expert in experts for name in expert.z)
    prints = {layer: mark for expert in experts for layer, mark in expert.fingerprints.items()}
    weights = Weights(local_folder(args.model), names, args.factors, device, fingerprints=prints)

    def sigma(layer: str, rank: int) -> Tensor:
        return weights.factors(layer, weights.read(layer), rank).S

    expert = combine(experts, mix, args.form, sigma)
    expert.base_model = SMALL_NAME if args.model == "small" else args.model
    recipe = ", ".join(f"{weight:g} × {path.stem}" for weight, path in zip(mix, paths, strict=True))
    expert.description = "; ".join(dict.fromkeys(e.description for e in experts if e.description))
    expert.metadata = {"mixture": recipe, "form": args.form}
    result = {"out": args.out, "mixture": recipe, "form": args.form, "layers": len(expert.z)}
    if args.as_expert:
        return result | _expert(args, weights, expert)
    with tqdm(total=len(expert.z), desc="export", unit="layer", disable=None) as bar:

        def tick(layer: str) -> None:
            bar.set_postfix_str(layer)
            bar.update()

        if args.lora_rank:
            return result | _lora(args, weights, expert, tick)
        return result | _merged(args, weights, expert, tick)


def _merged(args: Any, weights: Weights, expert: t2k.Expert, tick: Any) -> dict[str, Any]:
    with new_folder(Path(args.out)) as folder:
        moved = write_merged(
            weights, expert, folder, dtype=DTYPES.get(args.dtype), tick=tick,
            allow_mismatch=args.allow_mismatch,
        )  # fmt: skip
        export_card(expert, folder / "README.md", "a plain checkpoint with the expert merged in")
    return {"kind": "merged checkpoint", "change": moved}


def _lora(args: Any, weights: Weights, expert: t2k.Expert, tick: Any) -> dict[str, Any]:
    lows = lora_of(weights, expert, args.lora_rank, allow_mismatch=args.allow_mismatch, tick=tick)
    errors = {layer: low.error for layer, low in lows.items()}
    worst = max(errors, key=lambda layer: errors[layer])
    if args.max_error is not None and errors[worst] > args.max_error:
        over = sum(error > args.max_error for error in errors.values())
        raise ValueError(
            f"rank {args.lora_rank} misses W' - W by {errors[worst]:.3f} of it in {worst!r}, more "
            f"than --max-error {args.max_error:g} ({over} of {len(errors)} layers do). An expert "
            "has full rank: give a larger --lora-rank or export the merged checkpoint. Nothing "
            "was written."
        )
    with new_folder(Path(args.out)) as folder:
        write_lora(lows, weights, args.lora_rank, expert.base_model, folder)
        export_card(
            expert, folder / "README.md", f"a LoRA of rank {args.lora_rank} in PEFT's layout; "
            f"it misses W' - W by up to {errors[worst]:.3f} of it",
        )  # fmt: skip
    return {
        "kind": f"LoRA of rank {args.lora_rank}",
        "error": errors,
        "change": {layer: low.change for layer, low in lows.items()},
    }


def _expert(args: Any, weights: Weights, expert: t2k.Expert) -> dict[str, Any]:
    for layer in expert.z:
        check_belongs(layer, expert, weights.read(layer), args.allow_mismatch)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    expert.save(out)
    return {"kind": "expert", "card": str(write_card(expert, out))}


def _check(args: argparse.Namespace) -> None:
    if args.lora_rank is not None and args.lora_rank < 1:
        raise ValueError(f"--lora-rank must be at least 1, got {args.lora_rank}")
    if args.lora_rank is not None and args.as_expert:
        raise ValueError("--lora-rank and --as-expert are two forms; give one of them")
    if args.max_error is not None and args.lora_rank is None:
        raise ValueError("--max-error is the bound of a LoRA: give --lora-rank as well")
    if args.max_error is not None and not args.max_error >= 0:
        raise ValueError(f"--max-error must be a number, at least 0, got {args.max_error}")
    if args.dtype != "auto" and (args.lora_rank is not None or args.as_expert):
        raise ValueError("--dtype is for a merged checkpoint; a LoRA and an expert are fp32")
    if args.dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype must be one of auto, {', '.join(DTYPES)}, got {args.dtype!r}")
    if args.as_expert and Path(args.out).suffix != ".safetensors":
        raise ValueError(f"--out of --as-expert must end in .safetensors, got {args.out!r}")


def show(result: dict[str, Any]) -> str:
    """Where it went, and per layer what was changed and what a LoRA misses."""
    lines = [
        f"{result['kind']} of {result['mixture']} ({result['form']}), {result['layers']} layers, "
        f"in {result['out']}"
    ]
    if result["kind"] == "expert":
        return f"{lines[0]}, its card in {result['card']}"
    width = max(map(len, result["change"]))
    head = f"  {'layer':{width}s}  |W'-W|/|W|"
    lines.append(head + ("  LoRA misses" if "error" in result else ""))
    for layer, change in result["change"].items():
        missed = f"  {result['error'][layer]:11.4f}" if "error" in result else ""
        lines.append(f"  {layer:{width}s}  {change:10.2e}{missed}")
    return "\n".join(lines)
