"""Operands of a shape, drawn by lot, and the exact results for them in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from shapes import Shape
from torch import Tensor

from mhmatmul_ext import reference

Kind = Literal["forward", "backward", "importance"]


@dataclass(frozen=True, eq=False)
class Problem:
    """One shape in one dtype: operands, a place for the output, exact results."""

    shape: Shape
    input: Tensor  # [b, s, h]
    weight: Tensor  # [h, e]
    grad_output: Tensor  # [b, s, nh, e]
    probs: Tensor  # [b, s]
    out: Tensor  # [b, s, nh, e]

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and gradient with their heads apart: `[M, nh, hd]`, `[nh, hd, e]`, `[M, nh, e]`."""
        by_head = (self.shape.num_heads, self.shape.head_dim)
        input = self.input.flatten(0, 1).unflatten(-1, by_head)
        return input, self.weight.unflatten(0, by_head), self.grad_output.flatten(0, 1)

    @cached_property
    def _output(self) -> Tensor:
        input, weight = self.input.double(), self.weight.double()
        return reference.matmul_with_multi_head(input, weight, self.shape.num_heads).flatten(0, 1)

    @cached_property
    def _gradients(self) -> tuple[Tensor, Tensor]:
        input, weight, grad_output = (x.double() for x in self.heads)
        grad_input = torch.einsum("mne,nde->mnd", grad_output, weight)
        return grad_input, torch.einsum("mnd,mne->nde", input, grad_output)

    def exact(self, kind: Kind) -> tuple[Tensor, ...]:
        """The float64 results, rows flattened and heads apart."""
        if kind == "backward":
            return self._gradients
        if kind == "importance":
            indices, _ = reference.select_important(self.probs, 0.0, self.shape.top_k)
            return (self._output[indices],)
        return (self._output,)


def make_problem(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Draw operands of unit variance, weights such that the output has it as well, and scores without ties."""
    generator = torch.Generator().manual_seed(0)
    rows, wide = (shape.batch, shape.sequence), (shape.num_heads, shape.embed)
    hidden = shape.num_heads * shape.head_dim

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(sizes, generator=generator)).to(device, dtype)

    return Problem(
        shape,
        draw(*rows, hidden),
        draw(hidden, shape.embed, scale=1 / math.sqrt(shape.head_dim)),
        draw(*rows, *wide),
        (torch.rand(rows, generator=generator).argsort(dim=1) / shape.sequence).to(device),
        torch.zeros(*rows, *wide, dtype=dtype, device=device),
    )
