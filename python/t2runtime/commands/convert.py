"""`t2 convert FILE --model MODEL --out EXPERT`: an expert of the paper authors' public code to one
of ours, or one of ours to another model of the same shapes.
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
from t2runtime.formats.transfer import Base, transfer_to
from t2runtime.formats.weights import Weights
from t2runtime.loading import SMALL_NAME, device_of
from t2runtime.skeleton import local_folder, skeleton


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the file, fit it to the model by names and shapes, save the expert and its card."""
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {args.out!r}")
    ours = Path(args.file).suffix == ".safetensors"
    _check(args, ours)
    expert, facts = _transferred(args) if ours else _authors(args, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    expert.save(out)
    return {
        "expert": str(out),
        "card": str(write_card(expert, out)),
        **facts,
        "layers": len(expert.z),
        "values": sum(v.numel() for v in expert.z.values()),
    }


def _check(args: argparse.Namespace, ours: bool) -> None:
    """Options of the other kind of file are mistakes."""
    of_theirs = {"--mask": args.mask, "--max-mult": args.max_mult, "--factors": args.factors}
    of_ours = {"--order": args.order, "--seed": args.seed}
    given = [name for name, v in (of_theirs if ours else of_ours).items() if v is not None]
    if given:
        other = "the authors' files" if ours else "a transfer of one of our .safetensors"
        raise ValueError(f"{given[0]} is for {other}, got {args.file!r} as FILE. Leave it out")


def _transferred(args: argparse.Namespace) -> tuple[t2k.Expert, dict[str, Any]]:
    """One of our experts for another model, without loading that model."""
    expert = t2k.Expert.load(args.file)
    order, seed = args.order or "sigma", args.seed or 0
    weights = Weights(local_folder(args.model, "--model"), expert.z)
    bases = {}
    for layer in tqdm(expert.z, desc="fingerprints", unit="layer", disable=None):
        weight = weights.read(layer)
        bases[layer] = Base(min(weight.shape), t2k.fingerprint(weight))
    moved = transfer_to(expert, bases, _name(args), order, seed=seed)
    moved.description = args.description or expert.description
    moved.metadata["transfer"] |= {"file": Path(args.file).name, "sha256": file_sha256(args.file)}
    return moved, {"transferred_from": expert.base_model, "order": order}


def _name(args: argparse.Namespace) -> str:
    return SMALL_NAME if args.model == "small" else str(args.model)


def _authors(args: argparse.Namespace, out: Path) -> tuple[t2k.Expert, dict[str, Any]]:
    params = authors.read(Path(args.file))
    folder = local_folder(args.model, "--model")
    device = device_of(args.device)
    state = skeleton(folder).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items() if "mlp" in name}
    found = authors.by_weight(params, shapes)
    layers = {name.removesuffix(".weight"): p for name, p in found.items()}
    weights = Weights(folder, layers, args.factors, device)
    max_mult = 1.0 if args.max_mult is None else args.max_mult
    mask = args.mask or ("none" if params.layout == "few-shot" else authors.MASKS[0])
    z, prints = {}, {}
    for layer, p in tqdm(layers.items(), desc="singular values", unit="layer", disable=None):
        weight = weights.read(layer)
        prints[layer] = t2k.fingerprint(weight)
        S = weights.factors(layer, weight, dtype=None).S.cpu()
        z[layer] = authors.multiplier(p, S, mask, max_mult)
    expert = t2k.Expert(
        z,
        prints,
        _name(args),
        args.description or f"{out.stem}, converted from the public code of Transformer²",
        {
            "converted_from": Path(args.file).name,
            "sha256": file_sha256(args.file),
            "layout": params.layout,
            "mask": mask,
            "max_mult": max_mult,
            "tags": ["transformer-squared", "svf", "converted"],
        },
    )
    return expert, {"layout": params.layout, "mask": mask}


def show(result: dict[str, Any]) -> str:
    """What was read and where it went."""
    if "order" in result:
        what = f"z of {result['transferred_from']!r} in order '{result['order']}'"
    else:
        what = f"layout '{result['layout']}', mask '{result['mask']}'"
    return (
        f"{what}: {result['layers']} layers, "
        f"{result['values']:,} values of z in {result['expert']}, its card in {result['card']}"
    )
