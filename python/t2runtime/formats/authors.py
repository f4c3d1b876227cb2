"""Experts of the paper authors' public code, read without running anything that is in them.

Three layouts, told apart by their keys; r = min(out, in) of each matrix of the MLPs:
  policy      ``policy_params.pt``, a state dict: learnable_params_module_list.0, .1, ... (r,);
              positions count the MLP matrices in the order of the model's own state dict;
  parameters  ``learnable_params.pt``, {"model.layers.0.mlp.gate_proj.weight": (r,), ...};
  few-shot    a ``policy_params.pt`` of their search for a mixture: adaptive_weights (K, 1) or
              (K, matrices) and weights_<k>_k_model_layers_0_mlp_gate_proj_weight (r,).

What they compute from a parameter p: a mask q = bf16(sigmoid(p))·max_mult and
W′ = U·diag(σ⊙q)·Vᵀ·Σσ/Σ(σ⊙q), so z = q·Σσ/Σ(σ⊙q) here. Their few-shot search leaves the sigmoid
out and mixes the p themselves: q = Σ_k α_k p_k. That factor Σσ/Σ(σ⊙q) cancels every common scale
of q, so the search's own normalisation of α does not matter.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: What q is made of: sigmoid(p) rounded to bf16 as their code does, sigmoid(p), or p itself.
MASKS = ("bf16-sigmoid", "sigmoid", "none")
LAYOUTS = ("policy", "parameters", "few-shot")
_POSITION = re.compile(r"learnable_params_module_list\.(\d+)")
_MIXED = re.compile(r"weights_(\d+)_k_(.+)")
# 1.9 million values, an expert of a 70B model, take 4 MB.
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Parameters:
    """What a file holds: p by position ("policy") or by weight name; with "few-shot" the names
    have "_" for "." and the p are mixed already.
    """

    layout: str
    by_position: list[Tensor]
    by_name: dict[str, Tensor]


def read(path: Path) -> Parameters:
    """The parameters in a file of the public code.

    Only plain tensors are unpickled (``weights_only``). Raises FileNotFoundError, and ValueError
    for a truncated file, one with code in it, and any other content, by name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    content = _load(path)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} must hold a mapping of tensors, got {_kind(content)}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path} must map names to tensors only, got {_kind(value)} under {name!r}. It is "
                "no expert of the public code."
            )
    names = list(content)
    if all(n.endswith((".U", ".S", ".V")) for n in names):
        raise ValueError(
            f"{path} is the public code's decomposition of a whole model (.U, .S, .V), not an "
            "expert. `t2 decompose` makes ours from the checkpoint itself."
        )
    if any(_POSITION.fullmatch(n) for n in names):
        return Parameters("policy", _positional(path, content), {})
    if "adaptive_weights" in content:
        return Parameters("few-shot", [], _mixed(path, content))
    if all("mlp" in n for n in names):
        return Parameters("parameters", [], {n: _vector(path, n, v) for n, v in content.items()})
    odd = next(n for n in names if "mlp" not in n)
    raise ValueError(
        f"{path} is no expert of the public code: {odd!r} {tuple(content[odd].shape)} is neither "
        "a learnable_params_module_list.N nor the name of an MLP weight"
    )


def multiplier(p: Tensor, S: Tensor, mask: str = "bf16-sigmoid", max_mult: float = 1.0) -> Tensor:
    """z (r,) fp32, in our sense: U·diag(σ⊙z)·Vᵀ is the W′ of the public code.

    Args:
        p: (r,) parameter as stored. S: (r,) singular values.
        mask: see ``MASKS``.
        max_mult: of their settings; cancels but for its rounding.

    >>> import torch
    >>> multiplier(torch.zeros(2), torch.tensor([2.0, 1.0]))
    tensor([1., 1.])
    """
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
    if mask == "bf16-sigmoid":
        # In these steps and dtypes, as they do it.
        q = (torch.sigmoid(p).to(torch.bfloat16) * max_mult).double()
    else:
        q = (torch.sigmoid(p.double()) if mask == "sigmoid" else p.double()) * max_mult
    total = (S.double() * q).sum()
    if not (bool(torch.isfinite(total)) and float(total) != 0):
        raise ValueError(
            f"the mask of this weight has Σ(σ⊙q) = {float(total)}, by which their formula divides"
        )
    return (q * (S.double().sum() / total)).float()


def by_weight(params: Parameters, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """{weight name of the model: p}, checked against all its "mlp" tensors.

    shapes: {name: shape} of the model's state dict where "mlp" is in the name, in its order.
    Raises ValueError where the number, the names or the shapes do not agree.
    """
    odd = [n for n, s in shapes.items() if len(s) != 2 or not n.endswith(".weight")]
    if odd or not shapes:
        raise ValueError(
            f"the public code cannot have trained this model: {odd[0]!r} {shapes[odd[0]]} of its "
            "MLPs is not a matrix" if odd else "the model has no weights with 'mlp' in their names"
        )  # fmt: skip
    if params.layout == "policy":
        if len(params.by_position) != len(shapes):
            raise ValueError(
                f"the file has parameters for {len(params.by_position)} matrices, the model has "
                f"{len(shapes)} in its MLPs. It was made for another model."
            )
        found = dict(zip(shapes, params.by_position, strict=True))
    else:
        spelt = {n.replace(".", "_") if params.layout == "few-shot" else n: n for n in shapes}
        missing = [n for key, n in spelt.items() if key not in params.by_name]
        surplus = [key for key in params.by_name if key not in spelt]
        if missing or surplus:
            raise ValueError(
                f"the file lacks {len(missing)} of the model's {len(shapes)} MLP matrices"
                f"{f' (first {missing[0]!r})' if missing else ''} and has {len(surplus)} that the "
                f"model lacks{f' (first {surplus[0]!r})' if surplus else ''}. It was made for "
                "another model, or is not whole."
            )
        found = {n: params.by_name[key] for key, n in spelt.items()}
    for name, p in found.items():
        if p.shape[0] != min(shapes[name]):
            raise ValueError(
                f"the file has {p.shape[0]} values for {name!r} {tuple(shapes[name])}, which has "
                f"{min(shapes[name])} singular values. It was made for another model."
            )
    return found


def _load(path: Path) -> Any:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, an expert of a 70B model some 4 million. Is it the "
            "decomposition of a whole model? `t2 decompose` makes that from the checkpoint."
        )
    try:
        with warnings.catch_warnings():
            # Of another pickle protocol: what follows from it comes as an error below.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {foreign[1]}" if foreign else str(error).splitlines()[0]
        raise ValueError(
            f"{path} holds more than plain tensors, or is damaged ({what}). Nothing in it was "
            "run. Save the tensors alone, as the public code does."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, IndexError,
            AttributeError, AssertionError, zipfile.BadZipFile) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read: {reason}. It is truncated, damaged or no file of torch.save. "
            "Copy it again."
        ) from None


def _positional(path: Path, content: Mapping[str, Tensor]) -> list[Tensor]:
    odd = [n for n in content if not _POSITION.fullmatch(n)]
    if odd:
        raise ValueError(f"{path}: {odd[0]!r} does not belong into a policy of the public code")
    order = {int(n.rpartition(".")[2]): n for n in content}
    if sorted(order) != list(range(len(content))):
        gap = next(i for i in range(len(content) + 1) if i not in order)
        raise ValueError(f"{path} lacks learnable_params_module_list.{gap}: it is not whole")
    return [_vector(path, order[i], content[order[i]]) for i in range(len(content))]


def _mixed(path: Path, content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Σ_k α_k p_k for each weight, in the dtype of the p, as their search deploys it."""
    alpha = content["adaptive_weights"]
    members: dict[str, dict[int, Tensor]] = {}
    for name, value in content.items():
        if name == "adaptive_weights":
            continue
        found = _MIXED.fullmatch(name)
        if found is None:
            raise ValueError(f"{path}: {name!r} does not belong into a search of the public code")
        members.setdefault(found[2], {})[int(found[1])] = _vector(path, name, value)
    wide = alpha.dim() == 2 and alpha.shape[1] in (1, len(members))
    if not (wide and members and alpha.is_floating_point()):
        raise ValueError(
            f"{path}: adaptive_weights must be (K, 1) or (K, {len(members)}), got "
            f"{tuple(alpha.shape)}"
        )
    mixed: dict[str, Tensor] = {}
    for column, (name, experts) in enumerate(members.items()):
        if sorted(experts) != list(range(alpha.shape[0])):
            raise ValueError(
                f"{path} has {len(experts)} of {alpha.shape[0]} experts for {name!r}: it is not "
                "whole"
            )
        if len({p.shape for p in experts.values()}) > 1:
            raise ValueError(f"{path}: the experts of {name!r} differ in length")
        share = alpha[:, column if alpha.shape[1] > 1 else 0]
        total = experts[0] * share[0]
        for k in range(1, alpha.shape[0]):
            total = total + experts[k] * share[k]
        mixed[name] = total
    return mixed


def _vector(path: Path, name: str, value: Tensor) -> Tensor:
    if value.dim() != 1 or not value.is_floating_point() or value.numel() == 0:
        raise ValueError(
            f"{path}: {name!r} must be a float vector, got {tuple(value.shape)} {value.dtype}"
        )
    value = value.detach()
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{path}: {name!r} holds inf or NaN; that training had diverged")
    return value


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
