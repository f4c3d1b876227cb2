"""One process of data-parallel training: python ddp_worker.py RANK WORLD FOLDER (see
test_training.py)."""

import sys

import torch
import torch.distributed as dist

import t2kernels as t2k


def train(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world
    )
    net = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4))
    t2k.convert(net, progress=False)
    z = t2k.trainable(net)
    if rank == 1:
        with torch.no_grad():
            z[0].add_(1.0)  # DDP brings rank 0's z to every process
    wrapped = torch.nn.parallel.DistributedDataParallel(net)
    x = torch.arange(4 * 5 * 8, dtype=torch.float32).view(4, 5, 8).sin()
    mine = x[rank * 4 // world : (rank + 1) * 4 // world]
    optimiser = torch.optim.SGD(z, 0.1)
    wrapped(mine).square().mean().backward()
    optimiser.step()
    torch.save([p.detach() for p in z], f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
