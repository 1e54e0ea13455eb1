"""What PyTorch asks of operators in Python: fake kernels, rules of `torch.vmap` for selections, and FLOP formulas.

A fake kernel gives shapes, dtypes and strides of the results, for tracing and `torch.device("meta")`, and begins with
the same checks as the real kernels (csrc/checks.h). The operators not listed here are made of these.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.mhmatmul

Shape = tuple[int, ...]


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"mhmatmul::{name}")


@_fake("head_matmul")
def _(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _ops._check_head_matmul("head_matmul", input, weight, bias)
    return input.new_empty((*input.shape[:-1], weight.shape[2]))


@_fake("_head_matmul_out")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    _ops._check_head_matmul("head_matmul", input, weight, bias, None, out)


@_fake("_head_matmul_wgrad")
def _(grad_output: Tensor, input: Tensor) -> Tensor:
    _ops._check_head_matmul_backward("_head_matmul_wgrad", grad_output, input)
    return grad_output.new_empty((grad_output.shape[-2], input.shape[-1], grad_output.shape[-1]))


@_fake("_head_matmul_backward")
def _(grad_output: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _ops._check_head_matmul_backward("_head_matmul_backward", grad_output, input, weight)
    return input.new_empty(input.shape), weight.new_empty(weight.shape)


@_fake("gather_head_matmul")
def _(input: Tensor, weight: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    _ops._check_head_matmul("gather_head_matmul", input, weight, bias, indices)
    return input.new_empty((indices.shape[0], weight.shape[0], weight.shape[2]))


@_fake("_gather_distinct_head_matmul")
def _(input: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    _ops._check_head_matmul("gather_head_matmul", input, weight, None, indices)
    return input.new_empty((indices.shape[0], weight.shape[0], weight.shape[2]))


@_fake("_gather_head_matmul_dgrad")
def _(grad_output: Tensor, weight: Tensor, indices: Tensor, m: int, distinct: bool = False) -> Tensor:
    _ops._check_head_matmul_backward("_gather_head_matmul_dgrad", grad_output, None, weight, indices, m)
    return weight.new_empty((m, weight.shape[0], weight.shape[1]))


@_fake("_gather_head_matmul_wgrad")
def _(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    _ops._check_head_matmul_backward("_gather_head_matmul_wgrad", grad_output, input, None, indices)
    return grad_output.new_empty((grad_output.shape[1], input.shape[2], grad_output.shape[2]))


@_fake("_gather_head_matmul_backward")
def _(
    grad_output: Tensor, input: Tensor, weight: Tensor, indices: Tensor, distinct: bool = False
) -> tuple[Tensor, Tensor]:
    _ops._check_head_matmul_backward("_gather_head_matmul_backward", grad_output, input, weight, indices)
    return input.new_empty(input.shape), weight.new_empty(weight.shape)


@_fake("combine")
def _(base: Tensor, updates: Tensor, indices: Tensor, gates: Tensor | None = None) -> Tensor:
    _ops._check_combine("combine", "base", base, updates, indices, gates)
    return base.new_empty(base.shape)


@_fake("_combine_updates_grad")
def _(grad_output: Tensor, indices: Tensor, gates: Tensor | None) -> Tensor:
    _ops._check_combine("_combine_updates_grad", "grad_output", grad_output, None, indices, gates)
    return grad_output.new_empty((indices.shape[0], grad_output.shape[-1]))


@_fake("_combine_gates_grad")
def _(grad_output: Tensor, updates: Tensor, indices: Tensor) -> Tensor:
    _ops._check_combine("_combine_gates_grad", "grad_output", grad_output, updates, indices)
    return grad_output.new_empty((indices.shape[0],))


def _new_selection(probs: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    torch._check(kept <= probs.numel())
    indices = probs.new_empty((kept,), dtype=torch.int64)
    return indices, probs.new_empty((probs.shape[0] + 1,), dtype=torch.int32)


@_fake("select_important")
def _(probs: Tensor, top_p: float = 1.0, top_k: int | None = None) -> tuple[Tensor, Tensor]:
    _ops._check_select("select_important", probs, top_p, None, top_k)
    return _new_selection(probs)


@_fake("_select_important_tensor")
def _(probs: Tensor, top_p: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    _ops._check_select("select_important", probs, None, top_p, top_k)
    return _new_selection(probs)


@_fake("_importance_head_matmul")
def _(
    input: Tensor, weight: Tensor, probs: Tensor, top_p_value: float | None, top_p: Tensor | None, top_k: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    _ops._check_importance_head_matmul("matmul_with_importance", input, weight, probs, top_p_value, top_p, top_k)
    indices, cu_seqlens = _new_selection(probs)
    return input.new_empty((indices.shape[0], weight.shape[0], weight.shape[2])), indices, cu_seqlens


@_fake("select_important_static")
def _(probs: Tensor, top_p: Tensor, top_k: int | None, capacity: int) -> tuple[Tensor, Tensor]:
    _ops._check_select("select_important", probs, None, top_p, top_k, capacity)
    indices = probs.new_empty((probs.shape[0], capacity), dtype=torch.int64)
    return indices, probs.new_empty((probs.shape[0],), dtype=torch.int64)


# Selections under torch.vmap: sequences are independent, so a batch of calls is one call with more sequences.


@torch.library.register_vmap("mhmatmul::select_important_static")
def _(
    info: Any, in_dims: tuple[int | None, ...], probs: Tensor, top_p: Tensor, top_k: int | None, capacity: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    probs = probs.expand(info.batch_size, *probs.shape) if in_dims[0] is None else probs.movedim(in_dims[0], 0)
    if in_dims[1] is not None:  # NaN is never kept, so it can stand for what does not reach a call's own threshold
        reaches = probs >= top_p.to(probs.device, probs.dtype).reshape(-1, 1, 1)
        probs, top_p = probs.where(reaches, math.nan), torch.full((), -math.inf, dtype=probs.dtype)
    calls, b, s = probs.shape
    indices, counts = _ops.select_important_static.default(probs.flatten(0, 1), top_p, top_k, capacity)
    first = torch.arange(calls, device=probs.device).reshape(-1, 1, 1) * (b * s)  # each call counts from its own
    indices = indices.unflatten(0, (calls, b))
    return (torch.where(indices < 0, -1, indices - first), counts.unflatten(0, (calls, b))), (0, 0)


def _refuse_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    raise RuntimeError(
        "select_important: the number of kept tokens depends on data and may differ between the calls that torch.vmap "
        "joins; give capacity= for a selection of a fixed size"
    )


for _name in ("select_important", "_select_important_tensor"):
    torch.library.register_vmap(f"mhmatmul::{_name}", _refuse_vmap)


# FLOP, for torch.utils.flop_counter: two for each multiply-add. The number of kept tokens is that of the result, the
# padding of a selection of a fixed size included.


def _flops(*names: str) -> Any:
    return register_flop_formula([getattr(_ops, name) for name in names])


@_flops("head_matmul", "gather_head_matmul", "_gather_distinct_head_matmul")
def _(input: Shape, weight: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * weight[1]


@_flops("_importance_head_matmul")
def _(input: Shape, weight: Shape, *args: Any, out_shape: tuple[Shape, ...], **kwargs: Any) -> int:
    return 2 * math.prod(out_shape[0]) * weight[1]


@_flops("_head_matmul_out")
def _(input: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(input) * weight[2]


@_flops("_head_matmul_wgrad", "_gather_head_matmul_wgrad")
def _(grad_output: Shape, input: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(grad_output) * input[-1]


@_flops("_gather_head_matmul_dgrad")
def _(grad_output: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(grad_output) * weight[1]


@_flops("_head_matmul_backward", "_gather_head_matmul_backward")
def _(grad_output: Shape, input: Shape, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(grad_output) * input[-1]
