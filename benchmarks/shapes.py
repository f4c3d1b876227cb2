"""What is measured: the registry of layer shapes, token counts, slots and dtypes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from t2kernels import FACTOR_KINDS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# With 8-bit factors the activations stay in bf16, and so do the baselines beside them.
ALL_DTYPES = (*DTYPES, *FACTOR_KINDS)
# In the order of measuring: a run that reaches its time limit loses the last.
_DTYPES = ("bf16", "fp32", "int8", "fp8", "fp16")

# Small batches one by one, since that is where kernels change; then powers of two.
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 512, 2048, 8192)
TOKENS_QUICK = (1, 4, 8, 16, 64, 512)
TOKENS_GPU = (1, 4, 16, 32, 64, 128, 512, 2048, 8192)
DECODE_TOKENS = 128
# Above, only the baselines that goals refer to take part, and on a CPU ours by policy alone.
MANY_TOKENS = 1024

# Distinct diagonals (experts) among the requests of a batch: one, some, many.
SLOTS = {"cpu": (1, 4, 16, 64), "cuda": (1, 64, 128)}


@dataclass(frozen=True, order=True)
class Shape:
    """A linear layer; the weight is (out_features, in_features)."""

    in_features: int
    out_features: int

    @property
    def rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def square(self) -> bool:
        return self.in_features == self.out_features

    def __str__(self) -> str:
        return f"{self.in_features}x{self.out_features}"


CPU_SHAPES = (Shape(2048, 2048), Shape(4096, 4096), Shape(2048, 8192), Shape(8192, 2048))
# An 8B model: q and o, MLP up and down, k and v. And one small square.
GPU_SHAPES = (
    Shape(4096, 4096),
    Shape(4096, 14336),
    Shape(14336, 4096),
    Shape(4096, 1024),
    Shape(2048, 2048),
)
QUICK_SHAPES = (Shape(2048, 2048),)

# Token counts that only some shapes are measured at, so that a full run on two cores ends.
_LARGE_ON_CPU = {2048: (Shape(2048, 2048), Shape(2048, 8192)), 8192: (Shape(2048, 2048),)}
# CPUs without fp16 arithmetic emulate it, ten times as slow: (most tokens, and on small layers).
_SLOW_ON_CPU = {"fp16": (64, 512)}
_SMALL = Shape(2048, 2048)


@dataclass(frozen=True)
class Case:
    """One line-up: every contestant runs on the same layer, dtype and number of tokens."""

    shape: Shape
    dtype: str
    tokens: int

    @property
    def activations(self) -> torch.dtype:
        return DTYPES.get(self.dtype, torch.bfloat16)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape} T={self.tokens}"


def grid(
    device: str,
    quick: bool,
    shapes: tuple[Shape, ...] | None = None,
    dtypes: tuple[str, ...] | None = None,
    tokens: tuple[int, ...] | None = None,
) -> list[Case]:
    """All cases of a run, grouped by shape and dtype (they share weights).

    What the caller names is taken as it is; the thinning of large cases on a CPU applies to the
    defaults only.
    """
    on_cpu = device == "cpu"
    all_shapes = QUICK_SHAPES if quick else CPU_SHAPES if on_cpu else GPU_SHAPES
    all_dtypes = _DTYPES[:3] if quick else _DTYPES
    all_tokens = TOKENS_QUICK if quick else TOKENS if on_cpu else TOKENS_GPU
    cases = []
    for shape in shapes or all_shapes:
        for dtype in dtypes or all_dtypes:
            for count in tokens or all_tokens:
                large = shape not in _LARGE_ON_CPU.get(count, (shape,))
                slow = count > _SLOW_ON_CPU.get(dtype, (count, count))[shape == _SMALL]
                if on_cpu and tokens is None and (large or slow):
                    continue
                cases.append(Case(shape, dtype, count))
    return cases


def parse_shape(text: str) -> Shape:
    """ "4096x14336" is a layer with 4096 inputs and 14336 outputs."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(
            f"a shape is INxOUT with two positive numbers, such as 4096x14336; got {text!r}"
        )
    return Shape(int(parts[0]), int(parts[1]))


def parse_tokens(text: str) -> int:
    """A positive number of tokens."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"a token count is a positive number, got {text!r}")
    return int(text)
