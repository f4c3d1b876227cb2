"""`t2 convert FILE --model MODEL --out EXPERT`: an expert of the paper authors' public code to one
of ours.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

import t2kernels as t2k
from t2kernels.files import file_sha256
from t2runtime.card import write_card
from t2runtime.formats import authors
from t2runtime.formats.weights import Weights
from t2runtime.loading import SMALL_NAME, device_of
from t2runtime.skeleton import local_folder, skeleton


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the file, fit it to the model by names and shapes, save the expert and its card."""
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {args.out!r}")
    params = authors.read(Path(args.file))
    folder = local_folder(args.model, "--model")
    device = device_of(args.device)
    state = skeleton(folder).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items() if "mlp" in name}
    found = authors.by_weight(params, shapes)
    layers = {name.removesuffix(".weight"): p for name, p in found.items()}
    weights = Weights(folder, layers, args.factors, device)
    mask = args.mask or ("none" if params.layout == "few-shot" else authors.MASKS[0])
    z, prints = {}, {}
    for layer, p in tqdm(layers.items(), desc="singular values", unit="layer", disable=None):
        weight = weights.read(layer)
        prints[layer] = t2k.fingerprint(weight)
        S = weights.factors(layer, weight, dtype=None).S.cpu()
        z[layer] = authors.multiplier(p, S, mask, args.max_mult)
    expert = t2k.Expert(
        z,
        prints,
        SMALL_NAME if args.model == "small" else args.model,
        args.description or f"{out.stem}, converted from the public code of Transformer²",
        {
            "converted_from": Path(args.file).name,
            "sha256": file_sha256(args.file),
            "layout": params.layout,
            "mask": mask,
            "max_mult": args.max_mult,
            "tags": ["transformer-squared", "svf", "converted"],
        },
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    expert.save(out)
    return {
        "expert": str(out),
        "card": str(write_card(expert, out)),
        "layout": params.layout,
        "mask": mask,
        "layers": len(z),
        "values": sum(v.numel() for v in z.values()),
    }


def show(result: dict[str, Any]) -> str:
    """What was read and where it went."""
    return (
        f"layout '{result['layout']}', mask '{result['mask']}': {result['layers']} layers, "
        f"{result['values']:,} values of z in {result['expert']}, its card in {result['card']}"
    )
