"""Measuring: contestants take turns, medians with spread, and no number for a wrong result."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy
import torch
from torch import Tensor

from t2kernels.testing import poisoned_empty, relative_error

# Beside twice plain torch's error. Over thousands of outputs the plain error is well defined in
# every dtype, so a few units of fp32 are enough; a bf16 unit would let wrong results through.
GATE_FLOOR = 4 * torch.finfo(torch.float32).eps
# Output rows that are compared with the fp64 truth; all others must be finite.
GATE_ROWS = 16
_MIN_ROUNDS, _MAX_ROUNDS = 5, 60
# Samples of the machine's bandwidth among the rounds.
_BESIDE = 15


class Refused(RuntimeError):
    """A contestant's result is wrong, so it has no time."""


@dataclass
class Contestant:
    """One way to compute a layer's output.

    ``call(i)`` computes y (T, m) with weight set i. ``formula(rows, double)`` gives the rows
    ``rows`` of the truth (double) or of what plain torch makes of them in the contestant's dtype.
    ``bytes`` and ``flops`` are the least that the form must move and compute.
    """

    name: str
    slots: int
    call: Callable[[int], Tensor]
    formula: Callable[[Tensor, bool], Tensor]
    bytes: int
    flops: int
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    # The bits of a row must not depend on the batch: call_row(t) computes row t alone.
    call_row: Callable[[int], Tensor] | None = None
    # False: launched from Python at every call on a GPU too, as eager code is; never as a graph.
    capture: bool = True
    # Ours: outputs are poisoned before the gate, and a second call must give the same bits.
    ours: bool = False


@dataclass
class Verdict:
    """What the gate saw."""

    error: float
    limit: float
    same_bits_again: bool | None = None
    same_bits_alone: bool | None = None


@dataclass
class Samples:
    """Seconds per call, one entry per turn."""

    seconds: list[float] = field(default_factory=list)
    timing: str = "wall"

    def quantile(self, q: float) -> float:
        return float(numpy.quantile(self.seconds, q))

    @property
    def median(self) -> float:
        return self.quantile(0.5)


class Timer(Protocol):
    """How a device is timed."""

    calls_per_sample: int

    def prepare(self, contestant: Contestant) -> str:
        """Warm up; the name of the method that ``sample`` will use."""
        ...

    def sample(self, contestant: Contestant) -> float:
        """Seconds per call."""
        ...


class CpuTimer:
    """Wall clock around one call; every call meets the next weight set."""

    calls_per_sample = 1

    def __init__(self, sets: int) -> None:
        self._sets, self._turn = sets, 0

    def prepare(self, contestant: Contestant) -> str:
        self.sample(contestant)
        return "wall"

    def sample(self, contestant: Contestant) -> float:
        self._turn = (self._turn + 1) % self._sets
        with contestant.context():
            begin = time.perf_counter()
            y = contestant.call(self._turn)
            seconds = time.perf_counter() - begin
        del y
        return seconds


class CudaTimer:
    """Events around the replay of one graph that goes once through all weight sets.

    A contestant that wants no capture is timed eagerly, launch cost included ("eager"), and so is
    what cannot be captured (host reads, Python that copies lists to the device), called "events" in
    the column ``timing``.
    """

    def __init__(self, sets: int) -> None:
        self._sets = self.calls_per_sample = sets
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def _run_all(self, contestant: Contestant) -> None:
        for index in range(self._sets):
            contestant.call(index)

    def prepare(self, contestant: Contestant) -> str:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), contestant.context():
            self._run_all(contestant)
            self._run_all(contestant)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if not contestant.capture:
            return "eager"
        graph = torch.cuda.CUDAGraph()
        try:
            with contestant.context(), torch.cuda.graph(graph):
                self._run_all(contestant)
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError:
            torch.cuda.synchronize()
            return "events"
        self._graphs[id(contestant)] = graph
        return "graph"

    def sample(self, contestant: Contestant) -> float:
        graph = self._graphs.get(id(contestant))
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        with contestant.context():
            begin.record()
            if graph is None:
                self._run_all(contestant)
            else:
                graph.replay()
            end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3 / self._sets


def make_timer(device: torch.device, sets: int) -> Timer:
    """The timer for a device."""
    return CudaTimer(sets) if device.type == "cuda" else CpuTimer(sets)


def gate_rows(tokens: int) -> Tensor:
    """Indices of the rows that are compared: first, last and some between."""
    return torch.linspace(0, tokens - 1, min(tokens, GATE_ROWS)).round().long()


def check(contestant: Contestant, tokens: int) -> Verdict:
    """Compare with the fp64 truth; raise Refused beyond twice plain torch's error plus a floor."""
    rows = gate_rows(tokens)
    poison = poisoned_empty() if contestant.ours else nullcontext()
    with contestant.context(), poison:
        y = contestant.call(0)
    if not bool(torch.isfinite(y).all()):
        raise Refused(f"{contestant.name}: the output has entries that are not finite")
    truth = contestant.formula(rows, True)
    plain = contestant.formula(rows, False)
    limit = 2 * relative_error(plain, truth) + GATE_FLOOR
    verdict = Verdict(relative_error(y[rows.to(y.device)], truth), limit)
    if not verdict.error <= limit:
        raise Refused(f"{contestant.name}: relative error {verdict.error:.2e}, allowed {limit:.2e}")
    if contestant.ours:
        with contestant.context():
            verdict.same_bits_again = bool(torch.equal(contestant.call(0), y))
            if contestant.call_row is not None:
                alone = [contestant.call_row(int(t)) for t in rows]
                verdict.same_bits_alone = all(
                    torch.equal(a[0], y[int(t)]) for a, t in zip(alone, rows)
                )
    return verdict


def _takes_part(turn: int, turns: int, rounds: int) -> bool:
    """Whether one of ``turns`` turns, spread evenly over all rounds, falls on round ``turn``."""
    return (turn + 1) * turns // rounds > turn * turns // rounds


def measure(
    contestants: Sequence[Contestant],
    timer: Timer,
    *,
    seconds: float,
    seed: int = 0,
    beside: Callable[[], object] | None = None,
    failed: Callable[[int, Exception], object] | None = None,
) -> dict[int, Samples]:
    """Seconds per call of every contestant, keyed by its place in ``contestants``.

    In each round every contestant has one turn, in an order drawn anew, so that a drift of the
    machine meets all alike. A contestant gets about ``seconds`` in all, at least 5 and at most 60
    turns; the turns of slow ones are spread over the rounds. ``beside`` is called fifteen times in
    between, to measure the machine itself under the same conditions. With ``failed`` an exception
    in a contestant is told to it, and the contestant has no samples; without it is raised.
    """
    order = random.Random(seed)
    samples = {index: Samples() for index in range(len(contestants))}
    turns = {}

    def drop(index: int, error: Exception) -> None:
        if failed is None:
            raise error
        del samples[index]
        turns.pop(index, None)
        failed(index, error)

    for index, contestant in enumerate(contestants):
        try:
            samples[index].timing = timer.prepare(contestant)
            estimate = min(timer.sample(contestant) for _ in range(2))
        except Exception as error:  # of a kernel, a compiler or the device
            drop(index, error)
            continue
        affordable = seconds / max(estimate * timer.calls_per_sample, 1e-7)
        turns[index] = int(min(max(affordable, _MIN_ROUNDS), _MAX_ROUNDS))
    rounds = max(turns.values(), default=0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            line_up = list(enumerate(contestants))
            order.shuffle(line_up)
            if beside is not None and _takes_part(turn, min(_BESIDE, rounds), rounds):
                beside()
            for index, contestant in line_up:
                if index in turns and _takes_part(turn, turns[index], rounds):
                    try:
                        samples[index].seconds.append(timer.sample(contestant))
                    except Exception as error:
                        drop(index, error)
    finally:
        if collecting:
            gc.enable()
    return samples


def ratio(a: Samples, b: Samples, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of medians a / b with a 95 % bootstrap interval."""
    draws = numpy.random.default_rng(seed)

    def medians(s: Samples) -> numpy.ndarray:
        values = numpy.asarray(s.seconds)
        return numpy.median(draws.choice(values, size=(200, len(values))), axis=1)

    low, high = numpy.quantile(medians(a) / medians(b), (0.025, 0.975))
    return a.median / b.median, float(low), float(high)
