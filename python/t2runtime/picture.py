"""The picture of an expert: its z as a heat map, layer by layer, and their distribution."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import t2kernels as t2k
from t2kernels.files import atomic_path
from t2runtime.describe import in_order, kind_of

#: Columns of the heat map; longer z are averaged into so many parts.
COLUMNS = 256


def squeeze(z: Tensor, columns: int = COLUMNS) -> Tensor:
    """z (r,) in ``columns`` values: means over neighbours, or each value repeated.

    >>> import torch
    >>> squeeze(torch.tensor([1.0, 3.0, 5.0, 7.0]), 2)
    tensor([2., 6.])
    """
    return torch.nn.functional.adaptive_avg_pool1d(z[None], columns)[0]


def draw(experts: Mapping[str, t2k.Expert], path: Path) -> None:
    """One row of panels per expert, to ``path`` (its ending says the format).

    Raises ImportError without matplotlib, ValueError for a format that it does not know.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"pictures need matplotlib: pip install 't2kernels[plot]' ({error})"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = path.suffix.removeprefix(".").lower()
    layers = max(len(expert.z) for expert in experts.values())
    height = min(14.0, 2.5 + 0.16 * layers)
    figure, axes = pyplot.subplots(
        len(experts), 2, figsize=(14, height * len(experts)), constrained_layout=True,
        squeeze=False, width_ratios=(2, 1),
    )  # fmt: skip
    try:
        if kinds not in figure.canvas.get_supported_filetypes():
            raise ValueError(f"--plot must end in .png, .svg or .pdf, got {path.name!r}")
        for (heat, spread), (name, expert) in zip(axes, experts.items(), strict=True):
            _heat(figure, heat, name, expert)
            _spread(spread, expert)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=120, format=kinds)
    finally:
        pyplot.close(figure)


def _heat(figure: Any, axis: Any, name: str, expert: t2k.Expert) -> None:
    layers = in_order(expert.z)
    rows = torch.stack([squeeze(expert.z[layer]) for layer in layers])
    # Symmetric about 1, so that white is the base in every picture.
    reach = max(float((rows - 1).abs().max()), 1e-6)
    image = axis.imshow(
        rows.numpy(), aspect="auto", cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach,
        interpolation="nearest", extent=(0, 1, len(rows), 0),
    )  # fmt: skip
    step = max(1, len(rows) // 48)
    axis.set_yticks([i + 0.5 for i in range(0, len(rows), step)], layers[::step])
    axis.tick_params(axis="y", labelsize=6)
    axis.set_xlabel("singular values, the largest at the left")
    axis.set_title(f"{name}: z per layer (white = base)")
    figure.colorbar(image, ax=axis, shrink=0.8)


def _spread(axis: Any, expert: t2k.Expert) -> None:
    groups: dict[str, list[Tensor]] = {}
    for layer in in_order(expert.z):
        groups.setdefault(kind_of(layer), []).append(expert.z[layer])
    low = min(float(z.min()) for z in expert.z.values())
    high = max(float(z.max()) for z in expert.z.values())
    room = 0.02 * (high - low) or 0.01
    bins = torch.linspace(low - room, high + room, 61).tolist()
    for kind, members in groups.items():
        axis.hist(torch.cat(members).tolist(), bins=bins, histtype="step", label=kind)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    axis.set_xlabel("z (1 = base)")
    axis.set_ylabel("number of values")
    axis.set_title("distribution of z")
    axis.legend(fontsize=7)
