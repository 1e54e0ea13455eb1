"""Fake kernels: the shapes, dtypes and strides of each operator's results, for tracing and `torch.device("meta")`.

Each begins with the same checks as the real kernels (csrc/checks.h). The operators not listed here are made of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.mhmatmul


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"mhmatmul::{name}")


@_fake("head_matmul")
def _(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _ops._check_head_matmul("head_matmul", input, weight, bias)
    return input.new_empty((*input.shape[:-1], weight.shape[2]))


@_fake("_head_matmul_out")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
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


@_fake("select_important_static")
def _(probs: Tensor, top_p: Tensor, top_k: int | None, capacity: int) -> tuple[Tensor, Tensor]:
    _ops._check_select("select_important", probs, None, top_p, top_k, capacity)
    indices = probs.new_empty((probs.shape[0], capacity), dtype=torch.int64)
    return indices, probs.new_empty((probs.shape[0],), dtype=torch.int64)
