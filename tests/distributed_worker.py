"""One process of test_distributed.py: every arrangement of every operator's operands, compared with plain tensors."""

from __future__ import annotations

import copy
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from composability import ROWS, Make, Sizes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import local_map
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_leaves

from mhmatmul_ext import distributed, matmul_with_importance, matmul_with_multi_head, select_important
from mhmatmul_ext.nn import HeadwiseLinear, MixtureOfDepths

# Dimensions of the tensor arguments: n heads (or h, heads after heads), d head dimension, e embed, b batch or rows.
OPERANDS = {
    "head_matmul": "bsnd nde ne",
    "_head_matmul_wgrad": "bsne bsnd",
    "_head_matmul_backward": "bsne bsnd nde",
    "multi_head_matmul": "bsn ne",
    "_multi_head_matmul_bias": "bsn ne ne",
    "gather_head_matmul": "mnd nde b ne",
    "_gather_distinct_head_matmul": "mnd nde b",
    "_gather_head_matmul_dgrad": "bne nde b",
    "_gather_head_matmul_wgrad": "bne mnd b",
    "_gather_head_matmul_backward": "bne mnd nde b",
    "combine": "mme be b b",
    "_combine_updates_grad": "mme b b",
    "_combine_gates_grad": "mme be b",
    "select_important_static": "bs ",
    "_importance_matmul_tensor, capacity": "bsn ne bs ",
    "_importance_matmul_grads, capacity": "bsn ne bs bcne ",
}
SIZES = {"even": Sizes(b=4, s=3, nh=4, hd=4, e=8), "uneven": Sizes(b=3, s=3, nh=3, hd=5, e=6)}


def kinds(world):
    """Uneven shards are the same on any number of processes."""
    return SIZES if world == 2 else {"even": SIZES["even"]}


LETTERS = {"n": "heads", "e": "embed", "d": "head dimension", "b": "batch", "": "nothing"}


def sent(mode: CommDebugMode) -> int:
    return mode.get_total_counts()


def arrange(arguments, operands, letter, mesh):
    """DTensors sharded by the letter where they have it, replicated elsewhere; 0-d tensors stay plain."""
    names = iter(operands.split(" "))
    arranged = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            name = next(names)
            placement = Shard(name.index(letter)) if letter and letter in name else Replicate()
            if argument.dim():
                leaf = distribute_tensor(argument.detach(), mesh, [placement])
                argument = leaf.requires_grad_(argument.requires_grad)
        arranged.append(argument)
    return arranged


def leaves_of(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]


def full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def run_arrangement(row, letter, sizes, mesh):
    """Collectives of forward and backward, after both were found equal to those of plain tensors."""
    torch.manual_seed(0)
    arguments = row.make(Make(mesh.device_type, torch.float64, requires_grad=row.is_differentiable), sizes)
    expected = tree_leaves(row(*arguments))
    arranged = arrange(arguments, OPERANDS[row.name], letter, mesh)
    with CommDebugMode() as forward:
        got = tree_leaves(row(*arranged))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(full(ours), theirs)
    if not row.is_differentiable:
        return sent(forward), 0
    recorded = [(ours, theirs) for ours, theirs in zip(got, expected, strict=True) if theirs.requires_grad]
    grads = [torch.randn_like(theirs) for _, theirs in recorded]
    theirs = torch.autograd.grad([theirs for _, theirs in recorded], leaves_of(arguments), grads)
    arriving = [
        distribute_tensor(g, mesh, [Replicate() if p.is_partial() else p for p in ours.placements])
        for g, (ours, _) in zip(grads, recorded, strict=True)
    ]
    with CommDebugMode() as backward:
        found = torch.autograd.grad([ours for ours, _ in recorded], leaves_of(arranged), arriving)
    for ours, wanted in zip(found, theirs, strict=True):
        torch.testing.assert_close(full(ours), wanted)
    return sent(forward), sent(backward)


def flat_heads_compile(mesh):
    """Sharded heads under torch.compile(fullgraph=True)."""
    input, weight = torch.randn(2, 3, 8), torch.randn(8, 5)
    compiled = torch.compile(lambda x, w: matmul_with_multi_head(x, w, 4), fullgraph=True, backend="aot_eager")
    operands = distribute_tensor(input, mesh, [Shard(2)]), distribute_tensor(weight, mesh, [Shard(0)])
    torch.testing.assert_close(compiled(*operands).full_tensor(), matmul_with_multi_head(input, weight, 4))


def a_batch_by_local_map(mesh):
    """Whole sequences on each device: selecting and multiplying them sends nothing, with and without a capacity."""
    input, weight, probs = torch.randn(4, 3, 8), torch.randn(8, 5), torch.rand(4, 3)
    by_batch, whole = [Shard(0)], [Replicate()]

    def keep(input, weight, probs):
        return matmul_with_importance(input, weight, probs, num_heads=4, top_p=0.3, capacity=2)[0]

    mapped = local_map(keep, out_placements=by_batch, in_placements=(by_batch, whole, by_batch), device_mesh=mesh)
    operands = [distribute_tensor(t, mesh, p) for t, p in [(input, by_batch), (weight, whole), (probs, by_batch)]]
    with CommDebugMode() as mode:
        output = mapped(*operands)
    assert sent(mode) == 0
    torch.testing.assert_close(output.full_tensor(), keep(input, weight, probs))


def equal_to_alone(alone, shared, input, mine):
    """The shared module's output is the lone one's, and its gradients are those of the whole batch."""
    torch.testing.assert_close(shared(mine), alone(mine))
    shared(mine).square().mean().backward()
    alone(input).square().mean().backward()
    for ours, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(ours.grad), theirs.grad)


def headwise_linear_in_parallel(mesh):
    """Each device has some heads of the layer, in both layouts: its neighbours' one reduction is all that is sent."""
    for layout in ("hde", "hed"):
        torch.manual_seed(0)
        alone = nn.Sequential(nn.Linear(8, 16), HeadwiseLinear(16, 24, 4, weight_layout=layout), nn.Linear(24, 8))
        shared = copy.deepcopy(alone)
        plan = {"0": ColwiseParallel(), "1": distributed.HeadParallel(), "2": RowwiseParallel()}
        parallelize_module(shared, mesh, plan)
        assert shared[1].weight.to_local().shape[0] == 4 // mesh.size()
        input = torch.randn(2, 5, 8)
        with CommDebugMode() as mode, torch.no_grad():
            shared(input)
        assert sent(mode) == 1
        equal_to_alone(alone, shared, input, input)
        whole = distribute_tensor(torch.randn(2, 5, 16), mesh, [Replicate()])  # a DTensor stays as it is
        heads = shared[1](whole)
        torch.testing.assert_close(heads, alone[1](whole.to_local()).chunk(mesh.size(), -1)[mesh.get_local_rank()])
        compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input), alone(input))


def mixture_of_depths_under_fsdp(mesh):
    """FSDP2 gives the modules plain tensors, so a batch may be routed on each device."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(8), HeadwiseLinear(8, 8, 4))
    alone = nn.Sequential(nn.Linear(8, 8), MixtureOfDepths(block, 8, capacity=0.5))
    shared = copy.deepcopy(alone)
    fully_shard(shared[1].block, mesh=mesh)
    fully_shard(shared, mesh=mesh)
    input = torch.randn(2 * mesh.size(), 6, 8)
    equal_to_alone(alone, shared, input, input.chunk(mesh.size())[mesh.get_local_rank()])


def refusals(mesh):
    """What cannot be on a DTensor says what to do instead."""
    probs = distribute_tensor(torch.rand(4, 3), mesh, [Shard(0)])
    input, weight, out = (
        distribute_tensor(torch.randn(*size), mesh, [Replicate()]) for size in [(4, 3, 8), (8, 5), (4, 3, 1, 5)]
    )
    calls = {
        "capacity=": lambda: select_important(probs, 0.5),
        "local_map": lambda: matmul_with_importance(input, weight, probs, num_heads=2, top_p=torch.tensor(0.5)),
        "fixed size": lambda: matmul_with_importance(input, weight, probs, num_heads=2, top_p=0.5),
        "without out=": lambda: matmul_with_multi_head(input, weight, out=out),
    }
    for text, call in calls.items():
        with pytest.raises(NotImplementedError, match=text):
            call()


CASES = (
    flat_heads_compile, a_batch_by_local_map, headwise_linear_in_parallel, mixture_of_depths_under_fsdp, refusals,
)  # fmt: skip


def attempt(function, *arguments):
    """The result, or how it failed, as text."""
    try:
        return function(*arguments)
    except Exception:
        return traceback.format_exc()


def main(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(world))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    distributed.register()
    distributed.register()
    mesh = init_device_mesh("cpu", (int(world),))
    results = {
        (row.name, sharded, kind): attempt(run_arrangement, row, letter, sizes, mesh)
        for row in ROWS
        if row.name in OPERANDS
        for letter, sharded in LETTERS.items()
        for kind, sizes in kinds(int(world)).items()
    }
    for case in CASES:
        results[case.__name__] = attempt(case, mesh)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
