"""Train a small model whose heads live on several devices, and compare it with the same training in one process.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    torchrun --nproc-per-node 4 examples/tensor_parallel.py --tensor-parallel 2    # and FSDP2 over the batch

The heads of the projection are sharded between a column-parallel and a row-parallel layer, so that each block sends one
reduction forward and one backward, as without it. On CPU by gloo, or on as many GPUs as there are processes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mhmatmul_ext import matmul_with_multi_head
from mhmatmul_ext.distributed import HeadParallel

BATCH, SEQUENCE, WIDTH, HEADS, HEAD_DIM, EMBED = 8, 6, 16, 4, 8, 8


class HeadProjection(nn.Module):
    """Each head's own matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HEADS * HEAD_DIM, EMBED) / HEAD_DIM**0.5)
        self.bias = nn.Parameter(torch.zeros(HEADS, EMBED))

    def forward(self, input: Tensor) -> Tensor:
        """`[b, s, h]` to `[b, s, nh * e]`."""
        return matmul_with_multi_head(input, self.weight, HEADS, bias=self.bias).flatten(-2)


class Block(nn.Module):
    """Up, head by head, down, and back onto the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.heads = HeadProjection()
        self.down = nn.Linear(HEADS * EMBED, WIDTH)

    def forward(self, input: Tensor) -> Tensor:
        """`[b, s, width]` to the same."""
        output: Tensor = input + self.down(self.heads(self.up(input)).tanh())
        return output


PLAN = {"up": ColwiseParallel(), "heads": HeadParallel(), "down": RowwiseParallel()}


def make_data(device: str) -> tuple[Tensor, Tensor]:
    """The whole batch, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    input, target = torch.randn(2, BATCH, SEQUENCE, WIDTH, generator=generator).to(device)
    return input, target


def train(model: nn.Module, input: Tensor, target: Tensor, steps: int) -> list[Tensor]:
    """The loss of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def whole(parameter: Tensor) -> Tensor:
    """A parameter, gathered from all devices."""
    gathered: Tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return gathered


def run(steps: int, sharing: int) -> None:
    """Train both ways; every process compares, the first one tells."""
    world, rank = dist.get_world_size(), dist.get_rank()
    device = "cuda" if torch.cuda.device_count() >= world else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (world // sharing, sharing), mesh_dim_names=("batch", "heads"))

    torch.manual_seed(0)
    alone = nn.Sequential(Block(), Block()).to(device)
    model = copy.deepcopy(alone)
    for block in model:
        parallelize_module(block, mesh["heads"], PLAN)
    groups = mesh["batch"].size()
    if groups > 1:
        for block in model:
            fully_shard(block, mesh=mesh["batch"])
        fully_shard(model, mesh=mesh["batch"])

    input, target = make_data(device)
    expected = train(alone, input, target, steps)
    mine = mesh["batch"].get_local_rank()
    losses = torch.stack(train(model, input.chunk(groups)[mine], target.chunk(groups)[mine], steps))
    dist.all_reduce(losses, group=mesh["batch"].get_group())
    torch.testing.assert_close(losses / groups, torch.stack(expected))
    for sharded, plain in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(sharded), plain)

    with CommDebugMode() as comms, torch.no_grad():
        model(input)
    if rank == 0:
        print(f"{sharing} devices share the heads, {groups} group{'s' * (groups > 1)} of them the batch")
        print(f"loss {expected[0]:.4f} -> {expected[-1]:.4f} in {steps} steps, equal to one process")
        print(f"collectives of a forward pass: { {str(name): n for name, n in comms.get_comm_counts().items()} }")


def main() -> int:
    """Exit codes: 0 equal, 1 not equal, 2 an error of the user."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="of training (%(default)s)")
    parser.add_argument("--tensor-parallel", type=int, metavar="N", help="devices that share the heads (all)")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        name = Path(__file__).name
        print(f"{name}: error: start it by torchrun --nproc-per-node 2 examples/{name}", file=sys.stderr)
        return 2
    world = int(os.environ["WORLD_SIZE"])
    sharing = world if options.tensor_parallel is None else options.tensor_parallel
    if sharing < 1 or world % sharing or HEADS % sharing:
        parser.error(f"--tensor-parallel must divide {world} processes and {HEADS} heads, got {sharing}")
    dist.init_process_group()
    try:
        run(options.steps, sharing)
        dist.barrier()  # a process that leaves first takes the threads of the others' groups with it
    finally:
        gc.collect()  # meshes and hooks hold groups in cycles
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
