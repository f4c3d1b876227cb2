"""Which form of the CUDA decode kernels a call takes, and the counters of the cooperative one.

The forms are those of csrc/cuda/svf_cuda.h:

    fma           two launches, plain multiply-adds; any dtype, size and alignment
    mma           two launches, tensor cores
    mma-pdl       the same, the second launch overlapping the first (sm_90 and later)
    mma-coop      the same in one cooperative launch

The tensor-core forms give the same bits as each other, not as fma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import NamedTuple

import torch
from torch import Tensor

from ..quantized import is_eight_bit

CODES = {"fma": 0, "mma": 1, "mma-pdl": 2, "mma-coop": 3}
FORMS = tuple(CODES)

# How much a block of a tensor-core form computes at a time: rows of the factor x tokens. "auto"
# goes by the number of tokens. The tile changes the speed, never a bit.
TILE_CODES = {"auto": 0} | {
    name: code
    for code, name in enumerate(
        ("16x8", "32x8", "64x8", "32x32", "64x32", "32x64", "48x64"), start=1
    )
}

# Above this library matrix products are assumed to win, because the factors are read from L2 once
# for every tile of tokens. Not measured on a GPU.
MAX_TOKENS = 128
# The tensor-core kernel counts rows and columns in 32 bits.
_MAX_SIZE = 1 << 30


class Rule(NamedTuple):
    """``form`` and ``tile`` for at most so many tokens and elements of U and V together."""

    tokens: int
    elements: float
    form: str
    tile: str = "auto"


class Form(NamedTuple):
    """What a call takes."""

    name: str
    tile: str = "auto"


# The first rule that holds decides. None of the forms has been measured on a GPU, so the plainest
# one does everything. benchmarks/bench_svf.py --forms times them all.
RULES: tuple[Rule, ...] = (Rule(MAX_TOKENS, float("inf"), "fma"),)


class _Switch:
    """Of the process, like the backend's (dispatch.py)."""

    form: Form | None = None


def tiles(tokens: int) -> tuple[str, ...]:
    """The tiles made for so many tokens: those with the fewest columns that hold them."""
    columns = {name: int(name.split("x")[1]) for name in TILE_CODES if name != "auto"}
    fit = min((c for c in columns.values() if c >= tokens), default=max(columns.values()))
    return tuple(name for name, c in columns.items() if c == fit)


@contextmanager
def form(name: str, tile: str = "auto") -> Iterator[None]:
    """Inside, the CUDA backend takes this form, with this tile, or raises."""
    if name not in CODES:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {name!r}.")
    if tile not in TILE_CODES:
        raise ValueError(f"tile must be one of {', '.join(TILE_CODES)}, got {tile!r}.")
    before, _Switch.form = _Switch.form, Form(name, tile)
    try:
        yield
    finally:
        _Switch.form = before


def asked() -> Form | None:
    """The form that was asked for by name, if any."""
    return _Switch.form


def unfit(x: Tensor, U: Tensor, V: Tensor) -> str | None:
    """Why no tensor-core form can run this call, or None; see ``unfit_group``."""
    return unfit_group(x, (U,), V)


def unfit_group(x: Tensor, Us: Sequence[Tensor], V: Tensor) -> str | None:
    """Why no tensor-core form can run these layers that share x, or None.

    Decided by dtypes and the factors alone: x is copied where its alignment does not fit, so that
    the bits of a row do not depend on where it lies in memory.
    """
    if x.dtype is torch.float32 or (is_eight_bit(V.dtype) and x.dtype is not torch.bfloat16):
        return f"no tensor-core form has a kernel for x in {x.dtype} with factors in {V.dtype}"
    chunk = 16 if is_eight_bit(V.dtype) else 8
    n, ranks = V.shape
    for U in Us:
        m, r = U.shape
        if n % chunk or r % chunk:
            return f"in_features {n} and rank {r} must be multiples of {chunk}"
        if max(n, m, ranks) >= _MAX_SIZE:
            return f"a size of {max(n, m, ranks)} is beyond {_MAX_SIZE}"
        if U.data_ptr() % 16 or V.data_ptr() % 16:
            return "U and V must lie on 16 bytes"
    return None


def refused(x: Tensor, Us: Sequence[Tensor], V: Tensor) -> str | None:
    """Why the form that was asked for by name cannot run this call, or None."""
    if _Switch.form is None or _Switch.form.name == "fma":
        return None
    reason = unfit_group(x, Us, V)
    return reason and f"form {_Switch.form.name!r} was asked for: {reason}"


def choose(x: Tensor, U: Tensor, V: Tensor, batch_invariant: bool) -> Form:
    """The form of this call. One that was asked for and cannot run the call is an error.

    In batch-invariant mode the number of tokens has no say: forms may differ in their bits.
    """
    return choose_group(x, (U,), V, batch_invariant)


def choose_group(x: Tensor, Us: Sequence[Tensor], V: Tensor, batch_invariant: bool) -> Form:
    """The same for layers that share x: one form for all of them, by what they hold together."""
    elements = V.numel() + sum(U.numel() for U in Us)
    tokens = MAX_TOKENS if batch_invariant else x.shape[0]
    wanted = _Switch.form or _by_rule(elements, tokens)
    reason = None if wanted.name == "fma" else unfit_group(x, Us, V)
    if reason is None:
        return wanted
    if _Switch.form is not None:
        raise RuntimeError(
            f"form {wanted.name!r} of backend 'cuda' was asked for and cannot run this call: "
            f"{reason}. Leave the form to the policy."
        )
    return Form("fma")


def _by_rule(elements: int, tokens: int) -> Form:
    for rule in RULES:
        if tokens <= rule.tokens and elements <= rule.elements:
            return Form(rule.form, rule.tile)
    return Form("fma")


class Barriers:
    """Counters for the barrier of the cooperative form: zeroed once, left at zero by every launch.

    Launches that may run at the same time must not share counters. Calls on one stream run one
    after another and share those of the stream. A captured call keeps counters of its own: its
    graph may be replayed on any stream, though never beside itself. Whoever captures inside
    ``noted`` can give them back; those of other captures are kept for ever.
    """

    # Two 32-bit counters each; 512 KiB a device. A model of 224 layers with a graph for each of
    # eight batch sizes captures 1792 calls.
    CAPACITY = 1 << 16

    def __init__(self) -> None:
        self._lock = Lock()
        self._pools: dict[int, Tensor] = {}
        self._used: dict[int, int] = {}
        self._of_stream: dict[tuple[int, int], int] = {}
        self._free: dict[int, list[int]] = {}
        self._noting: dict[int, list[tuple[int, int]]] = {}  # by thread
        self._given_back: list[tuple[list[tuple[int, int]], Callable[[], None]]] = []

    @contextmanager
    def noted(self) -> Iterator[list[tuple[int, int]]]:
        """Inside, calls that this thread captures note their counters, for ``give_back``."""
        self._take_back()
        me = get_ident()
        mine: list[tuple[int, int]] = []
        before = self._noting.get(me)
        self._noting[me] = mine
        try:
            yield mine
        finally:
            del self._noting[me]
            if before is not None:
                self._noting[me] = before

    def give_back(self, counters: list[tuple[int, int]], wait: Callable[[], None]) -> None:
        """The graphs that hold these are gone. The next ``noted`` calls ``wait``, which returns
        when their last replays have run, and uses the counters again."""
        self._given_back.append((counters, wait))  # no lock: called by the garbage collector, too

    def _take_back(self) -> None:
        while self._given_back:
            counters, wait = self._given_back.pop()
            wait()
            with self._lock:
                for index, place in counters:
                    self._free.setdefault(index, []).append(place)

    def address(self, device: torch.device, index: int, stream: int, capturing: bool) -> int:
        """Address of the counters for a launch on this stream of this device."""
        with self._lock:
            pool = self._pools.get(index)
            if pool is None:
                if capturing:
                    raise RuntimeError(
                        "form 'mma-coop': its counters must exist before a capture; run the call "
                        "once outside of the graph, as a warm-up."
                    )
                pool = torch.zeros(self.CAPACITY, 2, dtype=torch.int32, device=device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # once: the other streams must see the zeros
                self._pools[index], self._used[index] = pool, 0
            place = None if capturing else self._of_stream.get((index, stream))
            if place is None:
                place = self._next(index)
                if not capturing:
                    self._of_stream[index, stream] = place
                elif get_ident() in self._noting:
                    self._noting[get_ident()].append((index, place))
            return pool.data_ptr() + place * pool.stride(0) * pool.element_size()

    def _next(self, index: int) -> int:
        if self._free.get(index):
            return self._free[index].pop()
        place = self._used[index]
        if place == self.CAPACITY:
            raise RuntimeError(
                f"form 'mma-coop': all {self.CAPACITY} counters of device {index} are taken by "
                "captured calls. Capture fewer graphs, close() those of StepGraphs that are not "
                "needed any more, or use form 'mma-pdl'."
            )
        self._used[index] = place + 1
        return place


barriers = Barriers()
