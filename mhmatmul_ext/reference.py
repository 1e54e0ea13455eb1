"""The specification: the public functions again, in slow and obvious PyTorch.

Products are computed in float64 and rounded once to the input's dtype; float64 operands give float64 results, which is
how the tests use it. Everything is differentiable by plain autograd. Arguments are taken to be valid.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor


def matmul_with_multi_head(
    input: Tensor,
    weight: Tensor,
    num_heads: int = 1,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Head by head: `input[..., n*hd:(n+1)*hd] @ weight[n*hd:(n+1)*hd, :]`."""
    head_dim = input.shape[-1] // num_heads
    heads = []
    for n in range(num_heads):
        rows = slice(n * head_dim, (n + 1) * head_dim)
        product = input[..., rows].double() @ weight[rows, :].double()
        heads.append(product if bias is None else product + bias[n].double())
    output = torch.stack(heads, dim=-2).to(input.dtype)
    return output if out is None else out.copy_(output)


def select_important(
    probs: Tensor,
    top_p: float | Tensor = 1.0,
    top_k: int | None = None,
    *,
    capacity: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence: what reaches the threshold, best first, ties by position, cut, back in order.

    Protected tokens need not reach it and come before the best.
    """
    b, s = probs.shape
    if mask is None:
        mask = torch.zeros(b, s, dtype=torch.int8)
    elif mask.dtype == torch.bool:
        mask = mask.to(torch.int8) - 1
    wishes = mask.tolist()  # 1 protected, 0 by its score, -1 never
    reaches = (probs >= top_p).tolist()
    scores = [[-math.inf if math.isnan(score) else score for score in row] for row in probs.tolist()]
    kept: list[list[int]] = []
    counts: list[int] = []
    for i in range(b):
        survivors = [j for j in range(s) if wishes[i][j] > 0 or (wishes[i][j] == 0 and reaches[i][j])]
        best_first = sorted(survivors, key=lambda j: (wishes[i][j] <= 0, -scores[i][j], j))
        best_first = best_first[: s if top_k is None else top_k]
        counts.append(len(best_first))
        kept.append([i * s + j for j in sorted(best_first[:capacity])])
    if capacity is not None:
        padded = [row + [-1] * (capacity - len(row)) for row in kept]
        indices = torch.tensor(padded, dtype=torch.int64, device=probs.device).reshape(b, capacity)
        return indices, torch.tensor(counts, dtype=torch.int64, device=probs.device)
    starts = [0, *accumulate(counts)]
    indices = torch.tensor([index for row in kept for index in row], dtype=torch.int64, device=probs.device)
    return indices, torch.tensor(starts, dtype=torch.int32, device=probs.device)


def matmul_with_importance(
    input: Tensor,
    weight: Tensor,
    probs: Tensor,
    grad_output: Tensor | None = None,
    num_heads: int = 1,
    top_p: float | Tensor = 1.0,
    top_k: int | None = None,
    *,
    capacity: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Select, multiply the selected rows, and differentiate the product by autograd in float64."""
    indices, _ = select_important(probs, top_p, top_k, capacity=capacity, mask=mask)
    places = indices.flatten()
    is_token = places >= 0

    def product(input: Tensor, weight: Tensor) -> Tensor:
        rows = input.flatten(0, 1)[places[is_token]]
        kept = matmul_with_multi_head(rows, weight, num_heads)
        output = kept.new_zeros((*places.shape, *kept.shape[1:])).index_put((is_token.nonzero()[:, 0],), kept)
        return output.reshape(*indices.shape, *output.shape[1:])

    if grad_output is None:
        return product(input, weight), None, None
    with torch.enable_grad():
        exact_input = input.detach().double().requires_grad_()
        exact_weight = weight.detach().double().requires_grad_()
        exact_output = product(exact_input, exact_weight)
        grad_input, grad_weight = torch.autograd.grad(
            exact_output, (exact_input, exact_weight), grad_output.detach().double()
        )
    return exact_output.detach().to(input.dtype), grad_input.to(input.dtype), grad_weight.to(weight.dtype)


def combine(base: Tensor, updates: Tensor, indices: Tensor, gates: Tensor | None = None) -> Tensor:
    """Update by update, in order."""
    rows = list(base.double().flatten(0, -2).unbind())
    for r, row in enumerate(indices.tolist()):
        if row >= 0:
            rows[row] = rows[row] + updates[r].double() * (1 if gates is None else gates[r].double())
    return torch.stack(rows).to(base.dtype).reshape(base.shape) if rows else base.clone()
