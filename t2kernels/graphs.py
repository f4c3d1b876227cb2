"""CUDA graphs of one decoding step: captured once for each batch size, replayed for every routing.

What a step costs on the host (a few µs of Python and of launch for each layer) is paid at capture
only. With ``serving.Slots`` a replay sees the mixtures, experts and routing of the moment.
"""

from __future__ import annotations

import copy
import dataclasses
import numbers
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .mixtures import shown
from .ops import cuda_forms
from .serving import BASE, Slots
from .streams import StreamOrder

# The tests put a graph for the CPU in their place.
_cuda: Any = torch.cuda
_DEVICE = "cuda"


class StepGraphs:
    """``step`` as one CUDA graph for each of a few batch sizes; a call replays the smallest that
    holds its rows.

    Args:
        step: called by keyword with tensors of exactly as many rows as a graph is for; returns
            tensors, alone or in tuples, lists, mappings and dataclasses, whose types a call keeps
            (a mapping that cannot be written to becomes a dict). It must allocate nothing that
            outlives it and wait for nothing. Whatever else it reads (weights, a static key/value
            cache) it reads at the addresses of the capture, for ever.
        inputs: {name: example} on the GPU. The first axis is the batch, its length here is free.
        batches: the numbers of rows to capture for. Rows that a batch is short of are padded.
        shared: names of inputs without a batch axis (a common position), copied whole.
        padding: {name: value} of padding rows, 0 by default.
        slots: serving slots; each graph is captured inside ``slots.use(rows)``, and padding rows
            are the base. Without, ``step`` runs as the caller has set up the model.
        warmup: calls of ``step`` before each capture, at least 1. They make what must exist before
            (library handles, workspaces, the counters of a cooperative kernel); what ``step``
            writes into state of its own, such as a cache, must be reset after construction.

    Attributes:
        inputs: the static inputs, with the rows of the largest batch.
        outputs: {rows: what ``step`` returned at capture}, overwritten by each replay.

    All is captured at construction, the largest first, into one pool of memory. Nothing is captured
    or tuned later. A call runs in order with the one before it, on whatever stream; two that shall
    run at once need a ``StepGraphs`` each. ``close`` gives back what the graphs hold. Raises
    RuntimeError where the inputs are not on a GPU.

        slots = bank.slots(64, batch=32)
        graphs = t2k.StepGraphs(step, {"ids": ids}, batches=(1, 8, 32), slots=slots)
        slots.admit(5, {"math": 0.7, "code": 0.3})
        slots.assign([5, None, 5])
        logits = graphs(ids=ids_of_three_rows)
    """

    def __init__(
        self,
        step: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        *,
        batches: Sequence[int],
        slots: Slots | None = None,
        shared: Iterable[str] = (),
        padding: Mapping[str, float] | None = None,
        warmup: int = 2,
    ) -> None:
        if not callable(step):
            raise TypeError(f"StepGraphs: step must be callable, got {type(step).__name__}.")
        self._step, self._slots = step, slots
        self._device = _device_of(inputs)
        _check_kinds(slots, shared, padding)
        self._shared, self._padding = frozenset(shared), dict(padding or {})
        self._batches = _checked_batches(batches, slots)
        _check_names(inputs, self._shared, self._padding)
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:
            raise ValueError(f"StepGraphs: warmup must be an int ≥ 1, got {warmup!r}.")
        if slots is not None and slots.arena.device != self._device:
            raise ValueError(
                f"StepGraphs: the inputs are on {self._device}, the slots on {slots.arena.device}."
            )
        with torch.inference_mode(False):
            self.inputs = {name: self._static(name, x) for name, x in inputs.items()}
        self.outputs: dict[int, Any] = {}
        self._graphs: dict[int, Any] = {}
        self._order = StreamOrder()
        barriers = cuda_forms.barriers
        with barriers.noted() as counters:
            self._give_back = weakref.finalize(
                self, barriers.give_back, counters, self._order.wait_on_host
            )
            self._capture(warmup)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes, rising."""
        return self._batches

    @torch.no_grad()
    def __call__(self, **inputs: Tensor) -> Any:
        """What ``step`` returns for these inputs: views of static memory, valid until the next
        call. Tensors whose first axis has the graph's number of rows are cut to the call's."""
        self._check_open()
        rows = self._rows(inputs)
        batch = next(b for b in self._batches if b >= rows)
        if self._slots is not None and any(s != BASE for s in self._slots.assigned[rows:batch]):
            raise ValueError(
                f"StepGraphs: the batch has {rows} rows, but slots are assigned to rows beyond it: "
                f"{self._slots.assigned[rows:batch]}. Assign the slots of this batch first."
            )
        with self._order.writing(self._device):
            for name, x in inputs.items():
                static = self.inputs[name]
                if name in self._shared:
                    static.copy_(x)
                    continue
                static[:rows].copy_(x)
                if rows < batch:
                    static[rows:batch].fill_(self._padding.get(name, 0))
            self._replay(batch)
        return _cut(self.outputs[batch], rows, batch)

    def replay(self, batch: int) -> Any:
        """Replay the graph for ``batch`` rows on the inputs as they are; its whole outputs."""
        self._check_open()
        if batch not in self._graphs:
            raise ValueError(
                f"StepGraphs.replay: batch must be one of {self._batches}, got {batch!r}."
            )
        with self._order.writing(self._device):
            self._replay(batch)
        return self.outputs[batch]

    def close(self) -> None:
        """Give back the graphs, their memory and the counters that they hold; waits for their last
        replay. A later call raises RuntimeError. Nothing happens the second time."""
        self._order.wait_on_host()
        self._graphs.clear()
        self.outputs.clear()
        self._give_back()

    # -- helpers -------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._give_back.alive:
            raise RuntimeError("StepGraphs: closed. Make a new one.")

    def _replay(self, batch: int) -> None:
        reading: AbstractContextManager[None] = nullcontext()
        if self._slots is not None:
            self._slots.check_ready()
            reading = self._slots.reading()
        with reading:
            self._graphs[batch].replay()

    def _static(self, name: str, example: Tensor) -> Tensor:
        """The static input, filled with the example as far as it goes."""
        if name in self._shared:
            return example.detach().clone()
        shape = (self._batches[-1], *example.shape[1:])
        static = torch.full(
            shape, self._padding.get(name, 0), dtype=example.dtype, device=example.device
        )
        rows = min(shape[0], example.shape[0])
        static[:rows].copy_(example[:rows].detach())
        return static

    def _views(self, batch: int) -> dict[str, Tensor]:
        return {n: x if n in self._shared else x[:batch] for n, x in self.inputs.items()}

    @torch.no_grad()
    def _capture(self, warmup: int) -> None:
        current, side = _cuda.current_stream(self._device), _cuda.Stream(self._device)
        pool = _cuda.graph_pool_handle()
        for batch in reversed(self._batches):
            views = self._views(batch)
            routing: AbstractContextManager[None] = nullcontext()
            if self._slots is not None:
                routing = self._slots.use(batch)
            with routing:
                side.wait_stream(current)
                with _cuda.stream(side):
                    for _ in range(warmup):
                        self._step(**views)
                graph = _cuda.CUDAGraph()
                with _cuda.graph(graph, pool=pool, stream=side):
                    self.outputs[batch] = self._step(**views)
                current.wait_stream(side)
            self._graphs[batch] = graph

    def _rows(self, inputs: Mapping[str, Tensor]) -> int:
        """The rows of a call, checked against the static inputs."""
        if inputs.keys() != self.inputs.keys():
            raise ValueError(
                f"StepGraphs: expected the inputs {sorted(self.inputs)}, got {sorted(inputs)}."
            )
        rows: dict[str, int] = {}
        for name, x in inputs.items():
            static = self.inputs[name]
            if not isinstance(x, Tensor) or x.dtype != static.dtype:
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"StepGraphs: {name} must be {static.dtype}, got {got}.")
            begin = 0 if name in self._shared else 1
            if x.dim() != static.dim() or x.shape[begin:] != static.shape[begin:]:
                expected = ("rows", *static.shape[1:]) if begin else tuple(static.shape)
                raise ValueError(
                    f"StepGraphs: {name} must have shape {expected}, got {tuple(x.shape)}."
                )
            if begin:
                rows[name] = x.shape[0]
        if len(set(rows.values())) != 1:
            raise ValueError(f"StepGraphs: the inputs have different numbers of rows: {rows}.")
        count = next(iter(rows.values()))
        if not 1 <= count <= self._batches[-1]:
            raise ValueError(
                f"StepGraphs: a batch has 1 to {self._batches[-1]} rows, got {count}. Capture a "
                "larger batch."
            )
        return count

    def __repr__(self) -> str:
        return f"StepGraphs({sorted(self.inputs)}, batches={self._batches})"


def _device_of(inputs: Mapping[str, Tensor]) -> torch.device:
    """The one GPU that all inputs are on."""
    if not isinstance(inputs, Mapping) or not inputs:
        raise ValueError("StepGraphs: inputs must be a non-empty {name: example tensor}.")
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"StepGraphs: {name} must be a tensor, got {type(x).__name__}.")
        if x.device.type != _DEVICE:
            raise RuntimeError(
                f"StepGraphs: CUDA graphs need inputs on a GPU, {name} is on {x.device}. There is "
                "no graph on other devices; call the step itself."
            )
    devices = {x.device for x in inputs.values()}
    if len(devices) > 1:
        raise ValueError(
            f"StepGraphs: inputs must be on one device, got {sorted(map(str, devices))}."
        )
    return devices.pop()


def _check_kinds(slots: object, shared: object, padding: object) -> None:
    if slots is not None and not isinstance(slots, Slots):
        raise TypeError(
            f"StepGraphs: slots must be what bank.slots(...) returns, got {type(slots).__name__}."
        )
    if isinstance(shared, str) or not isinstance(shared, Iterable):
        raise TypeError(
            f"StepGraphs: shared must be a list of names like ('position',), got {shown(shared)}."
        )
    if padding is None:
        return
    if not isinstance(padding, Mapping):
        got = type(padding).__name__
        raise TypeError(f"StepGraphs: padding must be {{name: value}}, got {got}.")
    for name, value in padding.items():
        if not isinstance(value, numbers.Number):
            raise TypeError(f"StepGraphs: padding of {name!r} must be a number, got {value!r}.")


def _checked_batches(batches: Sequence[int], slots: Slots | None) -> tuple[int, ...]:
    wrong = not isinstance(batches, Sequence) or not batches
    if wrong or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in batches):
        raise ValueError(
            f"StepGraphs: batches must be a list of ints ≥ 1 like (1, 8, 32), got {batches!r}."
        )
    if slots is not None and max(batches) > slots.batch:
        raise ValueError(
            f"StepGraphs: a batch of {max(batches)} rows, but the slots are for {slots.batch}. "
            "Make them with bank.slots(count, batch=...)."
        )
    return tuple(sorted(set(batches)))


def _check_names(
    inputs: Mapping[str, Tensor], shared: frozenset[str], padding: Mapping[str, float]
) -> None:
    rows = inputs.keys() - shared
    for what, names, allowed in (("shared", shared, inputs.keys()), ("padding", padding, rows)):
        unknown = sorted(set(names) - set(allowed))
        if unknown:
            raise ValueError(
                f"StepGraphs: {what} names {unknown}, expected some of {sorted(allowed)}."
            )
    if not rows:
        raise ValueError("StepGraphs: every input is shared; one must have a batch axis.")
    for name in rows:
        if inputs[name].dim() == 0:
            raise ValueError(f"StepGraphs: {name} has no axis; name it in shared.")


def _cut(output: Any, rows: int, batch: int) -> Any:
    """The first ``rows`` of every tensor in ``output`` that has ``batch`` rows."""
    if isinstance(output, Tensor):
        return output[:rows] if output.dim() and output.shape[0] == batch else output
    if isinstance(output, Mapping):
        cut = {name: _cut(value, rows, batch) for name, value in output.items()}
        if not isinstance(output, MutableMapping):
            return cut
        mapping = copy.copy(output)
        for name, value in cut.items():  # also sets the attributes of transformers' outputs
            mapping[name] = value
        return mapping
    if isinstance(output, tuple):
        make = getattr(type(output), "_make", type(output))  # named tuples take no iterable
        return make([_cut(value, rows, batch) for value in output])
    if isinstance(output, list):
        items = copy.copy(output)
        items[:] = [_cut(value, rows, batch) for value in output]
        return items
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        whole = copy.copy(output)
        for field in dataclasses.fields(output):
            value = _cut(getattr(output, field.name), rows, batch)
            object.__setattr__(whole, field.name, value)  # frozen ones, too
        return whole
    return output
