"""The operators on `torch.distributed.tensor.DTensor`, by sharding rules for PyTorch's own engine.

`register()` adds the rules, for the backward operators as well. What is sharded decides what is sent:

========================  =====================  ==================================================================
sharded                   forward                backward
========================  =====================  ==================================================================
heads                     nothing                nothing
embed, the weight's last  nothing                the input's gradient is partial: one reduction, where it is needed
batch, or rows by index   nothing                the weight's gradient is partial
head dimension            the output is partial  nothing
========================  =====================  ==================================================================

Rows named by index are numbered over the whole batch, so `input` of the selective operators is not sharded by batch
without being gathered first. A selection whose size depends on data has no place in a DTensor at all: give
`capacity=`, or multiply each device's own sequences by `local_map`, with nothing sent::

    def keep(input, weight, probs):  # local tensors
        return matmul_with_importance(input, weight, probs, num_heads=4, top_p=0.7, capacity=64)[0]

    by_batch, whole = [Shard(0)], [Replicate()]
    keep = local_map(keep, out_placements=by_batch, in_placements=(by_batch, whole, by_batch), device_mesh=mesh)
"""

from __future__ import annotations

import functools
import itertools
import string
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["HeadParallel", "register"]

_ops = torch.ops.mhmatmul

# The dimensions of each operator's tensors by letter, as in einsum: a rule shards one letter wherever it stands. An
# operand without it is replicated, a result without it is a partial sum. m counts rows that indices name, and stays
# whole, as does what stands before it.
_DIMENSIONS = {
    "head_matmul": "...nd,nde,ne->...ne",
    "_head_matmul_wgrad": "...ne,...nd->nde",
    "_head_matmul_backward": "...ne,...nd,nde->...nd,nde",
    "gather_head_matmul": "mnd,nde,t,ne->tne",
    "_gather_distinct_head_matmul": "mnd,nde,t->tne",
    "_gather_head_matmul_dgrad": "tne,nde,t->mnd",
    "_gather_head_matmul_wgrad": "tne,mnd,t->nde",
    "_gather_head_matmul_backward": "tne,mnd,nde,t->mnd,nde",
    "combine": "...md,td,t,t->...md",
    "_combine_updates_grad": "...md,t,t->td",
    "_combine_gates_grad": "...md,td,t->t",
    "select_important_static": ",->,",  # its indices count the rows of the whole batch
}
# Which operand is added to the result: partial sums would hold it once for each device.
_ADDED = {"head_matmul": 2, "gather_head_matmul": 3, "combine": 0}

_NO_FIXED_SIZE = (
    "select_important: the number of kept tokens depends on data, so no DTensor can hold them; give capacity= for a "
    "selection of a fixed size, or call it on local tensors through torch.distributed.tensor.experimental.local_map"
)
_NO_OUT = "matmul_with_multi_head: out= cannot be a DTensor; call it without out="
_REFUSED = {
    "select_important": _NO_FIXED_SIZE,
    "_select_important_tensor": _NO_FIXED_SIZE,
    "_importance_head_matmul": _NO_FIXED_SIZE,
    "_head_matmul_out": _NO_OUT,
}


@functools.cache
def register() -> None:
    """Add the sharding rules of this package's operators to `DTensor`; calling it again does nothing.

    Operators whose result has a size that depends on data raise a `NotImplementedError` on DTensors that says what to
    do instead.

    Example:
        >>> from mhmatmul_ext import distributed
        >>> distributed.register()

    """
    for name in _DIMENSIONS:
        register_sharding(getattr(_ops, name).default)(functools.partial(_shardings, name))
    for name, reason in _REFUSED.items():
        torch.library.register_torch_dispatch(f"mhmatmul::{name}", DTensor, functools.partial(_refuse, reason))


def _refuse(reason: str, *args: Any) -> Any:
    raise NotImplementedError(reason)


Sharding = tuple[list[Placement | None], list[Placement | None]]  # of results, of arguments


def _shardings(op: str, *args: Any) -> list[Sharding]:
    """What one dimension of a mesh may do: replicate all, or shard one letter."""
    leading = string.ascii_uppercase[: args[0].ndim - 2]
    operands, results = (side.split(",") for side in _DIMENSIONS[op].replace("...", leading).split("->"))
    named = itertools.zip_longest(args, operands, fillvalue="")
    names = [name if hasattr(argument, "placements") else None for argument, name in named][: len(args)]
    adds = op in _ADDED and any(name is not None for name in names[_ADDED[op] : _ADDED[op] + 1])

    def place(name: str | None, letter: str, without: Placement) -> Placement | None:
        if name is None:
            return None
        return Shard(name.index(letter)) if letter in name else without

    allowed: list[Sharding] = [([Replicate() for _ in results], [place(name, "?", Replicate()) for name in names])]
    whole = {"m", *(leading if "m" in operands[0] else "")}
    for letter in sorted({*"".join(operands)} - whole):
        placed = [place(name, letter, Partial()) for name in results]
        if adds and Partial() in placed:
            continue
        allowed.append((placed, [place(name, letter, Replicate()) for name in names]))
    return allowed


class HeadParallel(ParallelStyle):
    """Give each device some heads of a module, for `torch.distributed.tensor.parallel.parallelize_module`.

    The module's own parameters are sharded along their first dimension, which has to belong to the heads: `weight`
    `[h, e]` or `[nh, hd, e]`, `bias` `[nh, e]`; the number of heads has to be a multiple of the number of devices. Fed
    by `ColwiseParallel` and followed by `RowwiseParallel`, it sends nothing.

    Args:
        input_layouts: how the first argument comes, if it is no DTensor; by default sharded along its last dimension,
            heads after heads.
        use_local_output: return the device's own heads as a plain tensor, as `ColwiseParallel` does.

    """

    def __init__(self, *, input_layouts: Placement | None = None, use_local_output: bool = True) -> None:
        super().__init__()
        register()
        self.input_layouts = input_layouts or Shard(-1)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._shard, self._distribute, self._localize)

    @staticmethod
    def _shard(name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter, device_mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(sharded, requires_grad=parameter.requires_grad))

    def _distribute(self, module: nn.Module, inputs: tuple[Any, ...], device_mesh: DeviceMesh) -> Any:
        input, *others = inputs
        if not isinstance(input, DTensor):
            input = DTensor.from_local(input, device_mesh, [self.input_layouts], run_check=False)
        return input, *others

    def _localize(self, module: nn.Module, output: Any, device_mesh: DeviceMesh) -> Any:
        return output.to_local() if self.use_local_output and isinstance(output, DTensor) else output
