"""The model of the whole-model benchmarks: a Llama of any size with known singular vectors.

Decomposing the weights of an 8B model takes minutes. Here W = U·diag(σ)·Vᵀ is built from factors
that are orthonormal from the start: rows of one orthogonal matrix per size, in another order and
with other signs for every weight, which takes no time and leaves columns orthonormal.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import torch
from shapes import Shape
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import t2kernels as t2k


@dataclass(frozen=True)
class Size:
    """The numbers of a Llama that decide its cost."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    def linears(self) -> dict[str, Shape]:
        """The linear layers of one block by the last part of their names."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": Shape(self.hidden, self.hidden),
            "k_proj": Shape(self.hidden, kv),
            "v_proj": Shape(self.hidden, kv),
            "o_proj": Shape(self.hidden, self.hidden),
            "gate_proj": Shape(self.hidden, self.intermediate),
            "up_proj": Shape(self.hidden, self.intermediate),
            "down_proj": Shape(self.intermediate, self.hidden),
        }

    @property
    def label(self) -> str:
        """What goals ask for: they are about one size alone."""
        return "8B" if self == EIGHT_B else "other"


EIGHT_B = Size(32, 4096, 14336, 32, 8, 128256)
QUICK = Size(2, 64, 160, 4, 2, 256)


def add_size(parser: argparse.ArgumentParser) -> None:
    """--quick and one option for each number of ``Size``; the default is Llama-3-8B's shape."""
    parser.add_argument("--quick", action="store_true", help="a tiny model, to rehearse on a CPU")
    for name in Size.__dataclass_fields__:
        default = getattr(EIGHT_B, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"({default})")


def size_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Size:
    """The size that the command line asks for, checked."""
    base = QUICK if args.quick else EIGHT_B
    given = {name: getattr(args, name) for name in Size.__dataclass_fields__}
    size = Size(**{k: getattr(base, k) if v is None else v for k, v in given.items()})
    if min(vars(size).values()) < 1:
        parser.error(f"every number of the model must be at least 1, got {size}")
    if size.hidden % (2 * size.heads) or size.heads % size.kv_heads:
        parser.error(
            f"--hidden must be a multiple of twice --heads, --heads of --kv-heads; got {size}"
        )
    return size


class Orthonormal:
    """Matrices with orthonormal columns: one per size is made, then its rows are put into another
    order and its columns get other signs, which takes no time and leaves them orthonormal."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = device
        self._made: dict[tuple[int, int], Tensor] = {}

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self._generator, device=self._device)

    def draw(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) fp32, rows >= columns."""
        if (rows, columns) not in self._made:
            self._made[rows, columns] = torch.linalg.qr(self.randn(rows, columns)).Q
        order = torch.randperm(rows, generator=self._generator, device=self._device)
        return self._made[rows, columns][order] * self.randn(columns).sign()

    def factors(self, shape: Shape, dtype: torch.dtype) -> t2k.SVDFactors:
        """U (m, r), σ falling from 1 to 0.05, V (n, r)."""
        r = shape.rank
        U = self.draw(shape.out_features, r).to(dtype)
        Vh = self.draw(shape.in_features, r).t().to(dtype).contiguous()
        return t2k.SVDFactors(U, torch.linspace(1, 0.05, r, device=self._device), Vh.t())


Factors = dict[str, t2k.SVDFactors] | dict[str, t2k.QuantizedFactors]


def make_model(
    size: Size, dtype: torch.dtype, device: torch.device, positions: int, seed: int = 0
) -> tuple[Any, dict[str, t2k.SVDFactors]]:
    """A Llama on ``device`` and the factors of all its linear layers but the head."""
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden,
        intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=positions, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = model.eval().requires_grad_(False)
    source, factors = Orthonormal(device, seed), {}
    for name, linear in model.named_modules():
        shape = size.linears().get(name.rpartition(".")[2])
        if shape is None:
            continue
        f = factors[name] = source.factors(shape, dtype)
        with torch.no_grad():
            linear.weight.copy_((f.U * f.S.to(dtype)) @ f.V.t())
    return model, factors


def quantized(factors: dict[str, t2k.SVDFactors], kind: str) -> Factors:
    """The same factors in 8 bits."""
    return {name: t2k.quantize(f, kind) for name, f in factors.items()}


def converted(model: Any, factors: Factors, targets: str) -> Any:
    """A second model on the same weights, with SVF layers made from these factors."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    t2k.convert(twin, targets, decomposition=factors, progress=False)
    return twin


def add_experts(model: Any, count: int, seed: int = 0) -> t2k.ExpertBank:
    """A bank of random experts: z within 0.3 of 1."""
    bank, generator = t2k.ExpertBank(model), torch.Generator().manual_seed(seed)
    ranks = {name: layer.rank for name, layer in t2k.svf_layers(model).items()}
    for index in range(count):
        z = {n: 1 + 0.3 * (2 * torch.rand(r, generator=generator) - 1) for n, r in ranks.items()}
        bank.add(f"e{index}", t2k.Expert(z))
    return bank


def mixtures(bank: t2k.ExpertBank, requests: int) -> list[dict[str, float]]:
    """One mixture of all experts for every request, no two alike."""
    names = bank.names
    return [
        {name: 0.1 + 0.9 * (0.618034 * (row + 1) * (k + 1) % 1) for k, name in enumerate(names)}
        for row in range(requests)
    ]
