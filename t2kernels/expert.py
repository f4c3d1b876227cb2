"""An expert: one effective multiplier z per layer, with the model it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .convert import converted_layers
from .diagonal import PARAMETRISATIONS
from .files import CorruptFileError, load_tensors, save_tensors

_KIND, _VERSION = "expert", 1


def _check_layer_name(name: object) -> None:
    """A layer's name is a key in a file, never part of a path; it must not look like one."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"Expert: a layer name must be a non-empty str, got {name!r}.")
    if any(c in "/\\" or not c.isprintable() for c in name) or ".." in name:
        raise ValueError(
            f"Expert: layer name {name!r} must not contain '/', '\\\\', '..' or control characters."
        )


def _number(value: object) -> float | None:
    """A real number, or that of a tensor (); TypeError for other tensors, else None."""
    if isinstance(value, Tensor):
        if value.dim() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(
                "Expert: a factor must be a number or a real tensor (), got a tensor "
                f"{tuple(value.shape)} {value.dtype}."
            )
        return float(value.detach())
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if real else None  # type: ignore[arg-type]


@dataclass(eq=False)
class Expert:
    """z per layer (paper, section 3.1), 1 = base, whatever parametrisation it was trained in.

    Attributes:
        z: {layer name: (r,) fp32 tensor on the CPU}; layers that are missing stay at the base.
        fingerprints: {layer name: hash of the base weight}, checked before an expert is used.
        base_model: name or path of the base model, for people.
        description: one line on what the expert is for, for people and for a runtime's prompts.
        metadata: anything JSON can hold (task, data, reward, metrics).

    Experts form a vector space of deviations from the base: ``0.7 * math + 0.3 * code`` has
    z = 1 + 0.7·(z_math − 1) + 0.3·(z_code − 1), the mixture {"math": 0.7, "code": 0.3}. A factor
    may be a tensor of no dimensions; no gradient goes back to it (alpha of ``bank.use`` has one).

    >>> import torch
    >>> half = 0.5 * Expert({"up": torch.tensor([3.0, 1.0])})
    >>> half.z["up"]
    tensor([2., 1.])
    """

    z: dict[str, Tensor]
    fingerprints: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    description: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.z, Mapping) or not self.z:
            raise ValueError("Expert: z must be a non-empty {layer name: tensor (r,)}.")
        clean: dict[str, Tensor] = {}
        for name, z in self.z.items():
            _check_layer_name(name)
            if not isinstance(z, Tensor) or z.dim() != 1 or not z.is_floating_point():
                got = f"{tuple(z.shape)} {z.dtype}" if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"Expert: z[{name!r}] must be a float tensor (r,), got {got}.")
            z = z.detach().float().cpu().clone()
            if not bool(torch.isfinite(z).all()):
                raise ValueError(f"Expert: z[{name!r}] must be finite; training has diverged.")
            clean[name] = z
        self.z = clean

    @classmethod
    @torch.no_grad()
    def from_model(
        cls, model: nn.Module, *, description: str = "", metadata: Mapping[str, Any] | None = None
    ) -> Expert:
        """The layers' own z as they are now, as effective multipliers."""
        layers = converted_layers(model)
        config = getattr(model, "config", None)
        return cls(
            {name: layer.multiplier for name, layer in layers.items()},
            {name: layer.fingerprint for name, layer in layers.items()},
            getattr(config, "_name_or_path", None) or None,
            description,
            dict(metadata or {}),
        )

    @torch.no_grad()
    def apply_to(self, model: nn.Module, *, allow_mismatch: bool = False) -> None:
        """Write the expert into the layers' own z, to go on training from it or to use it alone.

        Layers that the expert does not have go to the base. With "sigmoid-normalised" layers the
        multipliers must be positive, since a sigmoid is.
        """
        layers = converted_layers(model)
        new = self.fitted(layers, allow_mismatch=allow_mismatch)
        for name, z in new.items():
            if layers[name].parametrisation == PARAMETRISATIONS[1] and bool((z <= 0).any()):
                raise ValueError(
                    f"Expert.apply_to: z[{name!r}] has values ≤ 0, which 'sigmoid-normalised' "
                    "cannot express. Convert the model with parametrisation='direct'."
                )
            if layers[name].parametrisation == PARAMETRISATIONS[1]:
                S = layers[name].factors.S.cpu()
                norm = float((S * z).sum() / S.sum())
                if abs(norm - 1) > 1e-3:
                    raise ValueError(
                        f"Expert.apply_to: z[{name!r}] changes the nuclear norm of its weight by a "
                        f"factor of {norm:.4f}, which 'sigmoid-normalised' cannot express. Convert "
                        "the model with parametrisation='direct'."
                    )
        for name, layer in layers.items():
            if name not in new:
                layer.z.fill_(1.0)
                continue
            z = new[name]
            if layer.parametrisation == PARAMETRISATIONS[1]:
                # Any common scale gives the same z_eff; this one keeps the sigmoids in the middle.
                layer.z.copy_(torch.logit(0.5 * z / z.max()))
            else:
                layer.z.copy_(z)
        for layer in layers.values():
            layer.rests()  # a compiler goes by this look at z

    def fitted(
        self, layers: Mapping[str, nn.Module], *, allow_mismatch: bool = False
    ) -> dict[str, Tensor]:
        """z for each layer of ``layers`` that the expert has, checked and padded to its rank.

        An expert of k components fits the full-rank layer of the same weight: the others stay 1.
        ``allow_mismatch`` accepts another base weight and missing layers, never another size.
        """
        missing = [name for name in self.z if name not in layers]
        if missing and not (allow_mismatch and len(missing) < len(self.z)):
            raise ValueError(
                f"this expert has {len(missing)} of {len(self.z)} layers that the model lacks, "
                f"first {missing[0]!r}. It was made for another model"
                f"{f' ({self.base_model})' if self.base_model else ''} or other targets; "
                "convert the same layers, or pass allow_mismatch=True to leave them out."
            )
        out: dict[str, Tensor] = {}
        for name, z in self.z.items():
            if name not in layers:
                continue
            layer = layers[name]
            same = self.fingerprints.get(name) == layer.fingerprint
            if name in self.fingerprints and not same and not allow_mismatch:
                raise ValueError(
                    f"this expert was trained on another base weight of layer {name!r} "
                    f"(fingerprint {self.fingerprints[name]}, the model has {layer.fingerprint}"
                    f"{f'; base model {self.base_model}' if self.base_model else ''}). Load that "
                    "model, or pass allow_mismatch=True to use it all the same."
                )
            rank = int(layer.rank)  # type: ignore[arg-type]
            if z.shape[0] > rank or (z.shape[0] < rank and not same):
                remedy = " truncated(model) cuts it and reports the error's bound." if same else ""
                raise ValueError(
                    f"this expert has {z.shape[0]} values for layer {name!r}, which has rank "
                    f"{rank}. It was made for another model or rank.{remedy}"
                )
            out[name] = torch.cat([z, torch.ones(rank - z.shape[0], device=z.device)])
        return out

    @torch.no_grad()
    def truncated(self, model: nn.Module) -> Truncation:
        """This expert cut to the components that the model's layers keep, and what that costs.

        For a model converted with ``rank=k``: there W′ = W + U_k·diag(σ_k⊙(z_k − 1))·V_kᵀ, so a
        component i ≥ k that the expert scales stays as it is in W, and
        ‖W′ − W′_k‖₂ = max_{i ≥ k} |σ_i (z_i − 1)| ≤ σ_k max_{i ≥ k} |z_i − 1|,
        σ_k being the smallest value kept. Layers of the expert's own rank are left as they are.

        Raises:
            ValueError: the expert is of another model or of another base weight.
        """
        layers = converted_layers(model)
        cut, bounds = {}, {}
        for name, z in self.z.items():
            layer = layers.get(name)
            rank = z.shape[0] if layer is None else int(layer.rank)
            cut[name], bounds[name] = z[:rank], 0.0
            if layer is not None and rank < z.shape[0]:
                if self.fingerprints.get(name) != layer.fingerprint:
                    raise ValueError(
                        f"Expert.truncated: z[{name!r}] has {z.shape[0]} values of another base "
                        f"weight, or of one unknown; the model's layer keeps {rank} of its own. "
                        "Load the model that the expert was trained on."
                    )
                S = layer.factors.S.cpu()
                share = float(S.min() / S.max()) if float(S.max()) else 0.0
                bounds[name] = share * float((z[rank:] - 1).abs().max())
        expert = Expert(
            cut, dict(self.fingerprints), self.base_model, self.description, dict(self.metadata)
        )
        expert.fitted(layers)
        return Truncation(expert, bounds)

    def save(self, path: str | Path) -> None:
        """One safetensors file, written whole or not at all (an old file stays on any error)."""
        save_tensors(
            path,
            self.z,
            {
                "kind": _KIND,
                "version": _VERSION,
                "base_model": self.base_model,
                "description": self.description,
                "fingerprints": self.fingerprints,
                "metadata": self.metadata,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Expert:
        """The expert that ``save`` wrote; truncated, damaged and foreign files are errors."""
        tensors, meta = load_tensors(path, kind=_KIND, version=_VERSION)
        try:
            fingerprints, metadata = dict(meta["fingerprints"]), dict(meta["metadata"])
            description, base_model = str(meta["description"]), meta["base_model"]
            return cls(tensors, fingerprints, base_model, description, metadata)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{path} is not a whole expert: {error}") from error

    # -- the vector space of deviations --------------------------------------------------------

    def __mul__(self, factor: float | Tensor) -> Expert:
        number = _number(factor)
        if number is None:
            return NotImplemented
        return self._derived({n: 1 + number * (z - 1) for n, z in self.z.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Expert:
        number = _number(divisor)
        return NotImplemented if number is None else self * (1 / number)

    def __neg__(self) -> Expert:
        return self * -1.0

    def __add__(self, other: Expert) -> Expert:
        if not isinstance(other, Expert):
            return NotImplemented
        for name in self.fingerprints.keys() & other.fingerprints.keys():
            if self.fingerprints[name] != other.fingerprints[name]:
                raise ValueError(
                    f"cannot add experts of different base weights: layer {name!r} has "
                    f"fingerprints {self.fingerprints[name]} and {other.fingerprints[name]}."
                )
        z = dict(self.z)
        for name, b in other.z.items():
            if name in z and z[name].shape != b.shape:
                raise ValueError(
                    f"cannot add experts of different ranks: layer {name!r} has "
                    f"{z[name].shape[0]} and {b.shape[0]} values."
                )
            z[name] = z[name] + (b - 1) if name in z else b
        return self._derived(z, {**other.fingerprints, **self.fingerprints})

    def __radd__(self, other: object) -> Expert:
        return self if other == 0 else NotImplemented  # what sum() begins with

    def __sub__(self, other: Expert) -> Expert:
        return self + (-other) if isinstance(other, Expert) else NotImplemented

    def _derived(self, z: dict[str, Tensor], fingerprints: dict[str, str] | None = None) -> Expert:
        return Expert(z, dict(fingerprints or self.fingerprints), self.base_model)

    def __repr__(self) -> str:
        values = torch.cat(list(self.z.values()))
        return (
            f"Expert({len(self.z)} layers, {values.numel():,} values, "
            f"|z - 1| mean {float((values - 1).abs().mean()):.4f}, "
            f"base_model={self.base_model!r}, description={self.description!r})"
        )


class Truncation(NamedTuple):
    """``expert``: with as many components per layer as the model keeps. ``bounds``: for each layer
    an upper bound on ‖W′ − W′_k‖₂ / ‖W‖₂, that is on the error of its output relative to
    ‖W‖₂·‖x‖; 0 where the cut is exact. Errors of several layers add up downstream."""

    expert: Expert
    bounds: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest bound."""
        return max(self.bounds.values())
