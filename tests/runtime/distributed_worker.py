"""One process of a distributed run: python distributed_worker.py RANK WORLD FOLDER.

In each way that is installed it trains z of one converted model for two steps on its share of one
batch and leaves FOLDER/<way>-<world>-<rank>.pt; see test_distributed.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import t2kernels as t2k

ROWS = 4


def make_model(skew: int) -> nn.Module:
    """The same weights in every process; the z of process 1 are off, for others to correct."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)) for _ in range(2)]
    model = nn.Sequential(*blocks)
    t2k.convert(model, progress=False)
    for z in t2k.trainable(model):
        z.data.add_(0.5 * skew)
    return model


def batch() -> Tensor:
    return torch.arange(ROWS * 5 * 16, dtype=torch.float32).view(ROWS, 5, 16).sin()


def steps(forward: nn.Module, z: list[Any], x: Tensor, backward: Callable[[Tensor], Any]) -> None:
    """Two steps of the mean loss; backward averages the gradients of all processes."""
    optimiser = torch.optim.AdamW(z, 2e-2, weight_decay=0.0)
    for _ in range(2):
        backward(forward(x).square().mean())
        optimiser.step()
        optimiser.zero_grad()


def with_ddp(model: nn.Module, x: Tensor) -> dict[str, Any]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    # What DDP sends: parameters that want gradients, and buffers.
    sent = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    state = [*wrapped.state_dict(), *(n for n, _ in wrapped.named_buffers())]
    steps(wrapped, [p for p in wrapped.parameters() if p.requires_grad], x, Tensor.backward)
    return {"sent": sent, "state": state}


def with_accelerate(model: nn.Module, x: Tensor) -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 2e-2, weight_decay=0.0
    )
    wrapped, optimiser = accelerator.prepare(model, optimiser)
    for _ in range(2):
        accelerator.backward(wrapped(x).square().mean())
        optimiser.step()
        optimiser.zero_grad()
    kept = accelerator.get_state_dict(wrapped)
    return {"processes": accelerator.num_processes, "state": list(kept)}


def with_fsdp2(model: nn.Module, x: Tensor) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    marks = {name: layer.fingerprint for name, layer in t2k.svf_layers(model).items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:  # type: ignore[attr-defined]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = dict(model.named_parameters())
    sharded = [n for n, p in parameters.items() if isinstance(p, DTensor)]
    local = sum(p.to_local().numel() for p in parameters.values())  # type: ignore[attr-defined]
    steps(model, [p for p in parameters.values() if p.requires_grad], x, Tensor.backward)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)  # on process 0, the others get nothing
    z = {k.removesuffix(".z"): v for k, v in state.items() if k.endswith(".z")}
    expert = t2k.Expert(z, marks).z if z else {}
    total = sum(p.numel() for p in parameters.values())
    factors = {type(f).__name__ for m in t2k.svf_layers(model).values() for f in m.factors}
    return {
        "sharded": sharded, "local": local, "total": total, "factors": sorted(factors),
        "expert": expert,
    }  # fmt: skip


WAYS = {"ddp": with_ddp, "fsdp2": with_fsdp2, "accelerate": with_accelerate}


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    # accelerate reads its place from here; the group is there already, so nobody uses the address.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    x = batch()[rank * ROWS // world : (rank + 1) * ROWS // world]
    for way, train in WAYS.items():
        if way == "accelerate" and importlib.util.find_spec("accelerate") is None:
            continue
        # FSDP2 shards what each process has and sends nothing first.
        model = make_model(skew=0 if way == "fsdp2" else rank)
        facts = train(model, x)
        layers = t2k.svf_layers(model).values()
        z = [m.z.full_tensor() if way == "fsdp2" else m.z for m in layers]  # type: ignore[operator]
        facts["z"] = [t.detach().clone() for t in z]
        torch.save(facts, f"{folder}/{way}-{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
