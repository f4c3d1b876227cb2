"""One training step of one layer, forward and backward to x and z: time and memory.

The memory of a step is what it allocates beyond its inputs at its peak, and its largest single
buffer: a factorised step must not hold any buffer of the weight's size. Between forward and
backward lives what autograd keeps; with `recompute` nothing of it may be as large as T×r.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from failures import describe
from harness import GATE_FLOOR, Contestant, Refused, make_timer, measure, ratio
from layers import Layer, WeightSet
from lineup import three_op
from shapes import Shape
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import t2kernels as t2k
from t2kernels.ops import dispatch
from t2kernels.testing import relative_error

Step = Callable[[Tensor, Tensor, WeightSet], Tensor]  # x, z, weights -> y
Within = Callable[[], AbstractContextManager[object]]


def _ours(x: Tensor, z: Tensor, w: WeightSet, *, recompute: bool = False) -> Tensor:
    return t2k.svf_linear(x, w.factors, w.factors.S * z, recompute=recompute)


def _autograd_three_op(x: Tensor, z: Tensor, w: WeightSet) -> Tensor:
    return three_op(x, w.factors.U, w.factors.V, (w.factors.S * z).to(x.dtype))


def _rebuilt(x: Tensor, z: Tensor, w: WeightSet) -> Tensor:
    d = (w.factors.S * z).to(x.dtype)
    return F.linear(x, (w.factors.U * d) @ w.factors.V.T)


STEPS: dict[str, Step] = {
    "three-op autograd": _autograd_three_op,
    "rebuilt W' autograd": _rebuilt,
    "ours": _ours,
    "ours recompute": partial(_ours, recompute=True),
}


def steps_here(device: torch.device, layer: Layer, tokens: int) -> dict[str, tuple[Step, Within]]:
    """The forms that can run here and what each runs within: on a GPU also those whose kernels are
    asked for by name, in backward too."""
    steps: dict[str, tuple[Step, Within]] = {n: (step, nullcontext) for n, step in STEPS.items()}
    if device.type == "cuda":
        f = layer.sets[0].factors
        triton = dispatch.load("triton")
        reason = triton.unavailable(layer.x(tokens), f.U, f.V, layer.D[0], f.S, None, None, None)
        if reason is None:
            for name in ("ours", "ours recompute"):
                named = name.replace("ours", "ours triton")
                steps[named] = (STEPS[name], partial(t2k.backend, "triton"))
    return steps


def kept(step: Step, x: Tensor, z: Tensor, w: WeightSet) -> list[int]:
    """Bytes of each buffer that autograd keeps for backward beside the step's own inputs."""
    x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
    inputs = (x, z, w.weight, *w.factors, *w.leading)
    own = {t.untyped_storage().data_ptr() for t in inputs}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = step(x, z, w)
    sizes = list(found.values())
    del y
    return sizes


def gradients(step: Step, x: Tensor, z: Tensor, g: Tensor, w: WeightSet) -> tuple[Tensor, Tensor]:
    """(dx, dz) of one step."""
    x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
    with torch.enable_grad():
        step(x, z, w).backward(g)
    if x.grad is None or z.grad is None:
        raise RuntimeError("a step must reach x and z with gradients")
    return x.grad, z.grad


def allocations(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(peak bytes beyond the start, largest single allocation) of one call."""
    run()
    activities = [ProfilerActivity.CPU]
    before = 0
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(activities=activities, profile_memory=True) as record:
        result = run()
    del result
    highest = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    code = {"cpu": 0, "cuda": 1}[device.type]  # the profiler's device type
    sizes = [
        int(event["args"]["Bytes"])
        for event in sorted(events, key=lambda e: float(e.get("ts", 0)))
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == code
    ]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return max(peak, highest), max(sizes, default=0)


def measure_training(
    shape: Shape, dtype: str, tokens: int, device: torch.device, *, seconds: float
) -> list[dict[str, Any]]:
    """One row a form: time_us, peak_mem_mib, largest buffer, ratios; or why there is none."""
    layer = Layer(shape, dtype, device)
    x, z = layer.x(tokens), torch.ones(shape.rank, device=device)
    g = torch.randn(tokens, shape.out_features, generator=torch.Generator().manual_seed(3))
    g = (g / tokens**0.5).to(device, layer.activations)
    truth = gradients(_autograd_three_op, x.double(), z.double(), g.double(), layer.doubled)
    plain = gradients(_autograd_three_op, x, z, g, layer.sets[0])
    # A buffer as large as the weight in the narrowest dtype that a step could hold it in.
    weight_bytes = shape.in_features * shape.out_features * x.element_size()
    rows: list[dict[str, Any]] = []
    contestants = []
    for name, (step, within) in steps_here(device, layer, tokens).items():
        row: dict[str, Any] = {"shape": str(shape), "dtype": dtype, "tokens": tokens, "name": name}
        rows.append(row)
        call = partial(_step_on_set, step, x, z, g, layer)
        try:
            with within():
                found = gradients(step, x, z, g, layer.sets[0])
                alive = kept(step, x, z, layer.sets[0])
                peak, largest = allocations(partial(call, 0), device)
        except Exception as error:  # of a kernel, a compiler or the device: the others go on
            row["failed"] = describe(error, device)
            continue
        for part, got, want, near in zip(("dx", "dz"), found, truth, plain):
            error = relative_error(got, want)
            limit = 2 * relative_error(near, want) + GATE_FLOOR
            row[f"error_{part}"] = error
            if not error <= limit:
                row["refused"] = f"{part}: relative error {error:.2e}, allowed {limit:.2e}"
        if "refused" in row:
            continue
        row.update(peak_mem_mib=peak / 2**20, largest_mem_mib=largest / 2**20)
        row["weight_sized_buffer"] = largest >= weight_bytes
        row["kept_mib"] = sum(alive) / 2**20
        whole = tokens * shape.rank * x.element_size()
        row["keeps_tokens_by_rank"] = max(alive, default=0) >= whole
        contestants.append((row, Contestant(name, 1, call, _no_formula, 0, 0, within)))
    timer = make_timer(device, len(layer.sets))

    def failed(index: int, error: Exception) -> None:
        contestants[index][0]["failed"] = describe(error, device)

    with torch.enable_grad():
        samples = measure([c for _, c in contestants], timer, seconds=seconds, failed=failed)
    by_name = {contestants[index][0]["name"]: own for index, own in samples.items()}
    for index, own in samples.items():
        row = contestants[index][0]
        row.update(time_us=own.median * 1e6, p20_us=own.quantile(0.2) * 1e6)
        row.update(p80_us=own.quantile(0.8) * 1e6, repetitions=len(own.seconds), timing=own.timing)
        for other, key in (("three-op autograd", "three_op"), ("rebuilt W' autograd", "rebuilt")):
            if other in by_name:
                row[f"ratio_{key}"] = ratio(own, by_name[other])[0]
    return rows


def _step_on_set(step: Step, x: Tensor, z: Tensor, g: Tensor, layer: Layer, i: int) -> Tensor:
    return gradients(step, x, z, g, layer.sets[i])[0]


def _no_formula(rows: Tensor, double: bool) -> Tensor:
    raise Refused("a training step is checked by its gradients")
