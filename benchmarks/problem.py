"""Operands of a shape, drawn by lot, and the exact results for them in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from shapes import Shape
from torch import Tensor
from verify import Sample

from mhmatmul_ext import reference

# backward: both gradients. wgrad: that of the weight alone. importance gradients: output and both gradients.
Kind = Literal["forward", "backward", "call and gradients", "wgrad", "importance", "importance gradients", "selection"]
SAMPLED_ROWS, SAMPLED_HEADS = 256, 8


def spread(length: int, count: int, device: torch.device) -> Tensor:
    """So many indices below `length`, the first and the last among them, all where there are no more."""
    return torch.linspace(0, length - 1, min(length, count), dtype=torch.float64, device=device).round().long()


def some_rows(A: Tensor, W: Tensor) -> Sample:
    """Rows of the product of `[M, nh, k]` and `[nh, k, n]`."""
    rows = spread(A.shape[0], SAMPLED_ROWS, A.device)
    values = torch.einsum("mnd,nde->mne", A[rows].double(), W.double())
    return Sample((A.shape[0], A.shape[1], W.shape[2]), rows, values, terms=A.shape[2])


def some_heads(A: Tensor, G: Tensor) -> Sample:
    """Heads of the weight's gradient, each summed over all rows."""
    heads = spread(A.shape[1], SAMPLED_HEADS, A.device)
    values = torch.einsum("mnd,mne->nde", A[:, heads].double(), G[:, heads].double())
    return Sample((*A.shape[1:], G.shape[2]), heads, values, terms=A.shape[0])


def some_scattered_rows(G: Tensor, W: Tensor, indices: Tensor, M: int) -> Sample:
    """Rows of the input's gradient where only the rows `indices` were multiplied; kept ones are among them."""
    t = len(indices)
    rows = torch.cat([spread(M, SAMPLED_ROWS, G.device), indices[spread(t, SAMPLED_ROWS, G.device)]]).unique()
    places = torch.full((M,), -1, device=G.device)
    places[indices] = torch.arange(t, device=G.device)
    places = places[rows]
    values = torch.einsum("mne,nde->mnd", G[places.clamp(min=0)].double(), W.double())
    values *= (places >= 0)[:, None, None]
    return Sample((M, *W.shape[:2]), rows, values, terms=W.shape[2])


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
    def kept(self) -> Tensor:
        """Flat positions of the selected tokens."""
        return reference.select_important(self.probs, 0.0, self.shape.top_k)[0]

    @property
    def kept_grad(self) -> Tensor:
        """A gradient for the selected tokens, `[t, nh, e]`: no token has less than `top_k` beside it."""
        return self.grad_output.flatten(0, 1)[: self.shape.batch * self.shape.top_k]

    def copy(self) -> Problem:
        """The same numbers elsewhere in memory."""
        names = ("input", "weight", "grad_output", "probs", "out")
        return replace(self, **{name: getattr(self, name).clone() for name in names})

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
            return (self._output[self.kept],)
        return (self._output,)

    def samples(self, kind: Kind) -> tuple[Tensor | Sample, ...]:
        """Enough of the float64 results to tell right from wrong, where all of them would not fit."""
        A, W, G = self.heads
        if kind == "selection":
            return (self.kept,)
        if kind == "forward":
            return (some_rows(A, W),)
        if kind == "wgrad":
            return (some_heads(A, G),)
        if kind == "backward":
            return some_rows(G, W.transpose(1, 2)), some_heads(A, G)
        output = some_rows(A[self.kept], W)
        if kind == "importance":
            return (output,)
        G = self.kept_grad
        return output, some_scattered_rows(G, W, self.kept, len(A)), some_heads(A[self.kept], G)


def make_problem(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Draw operands of unit variance, weights such that the output has it as well, and scores without ties."""
    generator = torch.Generator(device).manual_seed(0)
    rows, wide = (shape.batch, shape.sequence), (shape.num_heads, shape.embed)
    hidden = shape.num_heads * shape.head_dim

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(sizes, generator=generator, device=device)).to(dtype)

    return Problem(
        shape,
        draw(*rows, hidden),
        draw(hidden, shape.embed, scale=1 / math.sqrt(shape.head_dim)),
        draw(*rows, *wide),
        torch.rand(rows, generator=generator, device=device).argsort(dim=1) / shape.sequence,
        torch.zeros(*rows, *wide, dtype=dtype, device=device),
    )
