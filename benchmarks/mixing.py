"""Mixing experts into the arena: one request admitted, and a whole batch, out of few and many."""

from __future__ import annotations

from typing import Any

import torch
from ceilings import Bandwidth
from harness import GATE_FLOOR, Contestant, Refused, make_timer, measure
from torch import Tensor

import t2kernels as t2k
from t2kernels.ops.mixing import mix_rows
from t2kernels.testing import relative_error

SLOTS = 64
# (resident experts, dtype of their table): a handful, exact, and as many as a service may hold.
TABLES = ((6, torch.float32), (10_000, torch.bfloat16))
_WIDTH = 720_896  # singular values of all linear layers of Llama-3-8B
_QUICK_WIDTH = 512
_SETS = 8  # other experts in each call


class Mixing:
    """A table of random experts, the arena, and what every call mixes."""

    def __init__(
        self, experts: int, dtype: torch.dtype, requests: int, each: int, device: torch.device,
        width: int,
    ) -> None:  # fmt: skip
        generator = torch.Generator(device).manual_seed(0)

        def rand(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator, device=device)

        self.S = 0.1 + rand(width)
        self.Z = torch.empty(experts, width, dtype=dtype, device=device)
        for row in self.Z:  # one at a time: the table may be most of the memory
            row.copy_(0.6 * rand(width) + (0.7 if dtype == torch.float32 else -0.3))
        self.out = torch.zeros(SLOTS, width, device=device)
        self.alpha = rand(requests, each)
        picks = [torch.randperm(experts, generator=generator, device=device) for _ in range(_SETS)]
        self.indices = [
            p.repeat(-(-requests * each // experts))[: requests * each].view(requests, each).int()
            for p in picks
        ]
        first = SLOTS // 2 if requests == 1 else 0
        self.rows = torch.arange(first, first + requests, dtype=torch.int32, device=device)
        element = self.Z.element_size()
        # Experts are read, σ and the rows that are written count once.
        self.bytes = width * (min(requests * each, experts) * element + 4 + 4 * requests)

    def call(self, i: int) -> Tensor:
        mix_rows(self.out, self.S, self.Z, self.alpha, indices=self.indices[i], rows=self.rows)
        return self.out

    def gate(self, name: str) -> float:
        """The error of the rows that were written; Refused where another one changed a bit."""
        self.out.fill_(7.0)
        self.call(0)
        written = self.rows.long()
        rest = torch.ones(SLOTS, dtype=torch.bool, device=self.out.device)
        rest[written] = False
        if not bool((self.out[rest] == 7.0).all()):
            raise Refused(f"{name}: a row of the arena changed that was not to be written")
        deviation = self.Z[self.indices[0].long().flatten()].double()
        if self.Z.dtype == torch.float32:
            deviation -= 1
        deviation = deviation.view(*self.alpha.shape, -1)
        want = self.S.double() * (1 + (self.alpha.double()[..., None] * deviation).sum(1))
        error = relative_error(self.out[written], want)
        if not error <= GATE_FLOOR:
            raise Refused(f"{name}: relative error {error:.1e}, allowed {GATE_FLOOR:.1e}")
        return error


def measure_mixing(device: torch.device, quick: bool, seconds: float) -> list[dict[str, Any]]:
    """A row for every table, number of requests and backend that can mix here."""
    width = _QUICK_WIDTH if quick else _WIDTH
    rows: list[dict[str, Any]] = []
    bandwidth = Bandwidth(device, torch.get_num_threads())
    for experts, dtype in TABLES:
        for requests, each in ((1, 1), (1, 6), (SLOTS, 6)):
            mixing = Mixing(experts, dtype, requests, each, device, width)
            rows += _measure_one(mixing, bandwidth, device, seconds)
            del mixing
    return rows


def _measure_one(
    mixing: Mixing, bandwidth: Bandwidth, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    entered: list[tuple[dict[str, Any], Contestant]] = []
    (requests, each), experts = mixing.alpha.shape, len(mixing.Z)
    for backend in t2k.BACKENDS:
        if backend == "reference":
            continue
        row: dict[str, Any] = {
            "part": "mix", "name": backend, "experts": experts, "requests": requests, "each": each,
            "table": str(mixing.Z.dtype).removeprefix("torch."), "bytes": mixing.bytes,
        }  # fmt: skip
        rows.append(row)

        def within(backend: str = backend) -> Any:
            return t2k.backend(backend)

        try:
            with within():
                row["error"] = mixing.gate(f"mix, {backend}")
        except Refused as refusal:
            row["refused"] = str(refusal)
        except RuntimeError as error:
            if "cannot mix" not in str(error):
                raise
            row["absent"] = str(error)
        else:
            own = Contestant(backend, requests, mixing.call, _no_formula, mixing.bytes, 0, within)
            entered.append((row, own))
    gbs = sorted(bandwidth.sample((mixing.Z[0], mixing.S)) for _ in range(5))[2]
    samples = measure([c for _, c in entered], make_timer(device, _SETS), seconds=seconds)
    for index, (row, _) in enumerate(entered):
        own = samples[index]
        row.update(time_us=own.median * 1e6, p20_us=own.quantile(0.2) * 1e6)
        row.update(p80_us=own.quantile(0.8) * 1e6, timing=own.timing)
        row["percent_of_floor"] = 100 * mixing.bytes / gbs / 1e9 / own.median
    return rows


def _no_formula(rows: Tensor, double: bool) -> Tensor:
    raise Refused("mixing is checked by the arena")
