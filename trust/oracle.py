"""What a result may be: the float64 result, and how far from it rounding may take a sum, element by element."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHUNK = 128  # terms that are added one after the other before their sum joins the others (csrc/cpu/gemm_tuning.h)


class WrongError(AssertionError):
    """A result that no order of rounding explains."""


class Expected(NamedTuple):
    """Sums of products in float64."""

    exact: Tensor
    magnitude: Tensor  # the same sums over the absolute values of the operands, what is not finite left out
    terms: int  # how many products a sum has


def _finite_magnitude(tensor: Tensor) -> Tensor:
    return tensor.abs().nan_to_num(0.0, 0.0, 0.0)


def expected(
    function: Callable[..., Tensor],
    operands: Sequence[Tensor],
    grad_output: Tensor | None,
    terms: Sequence[int],
) -> list[Expected]:
    """A function that is linear in each operand: its result and its gradients, in float64."""
    results = []
    for prepare in (torch.Tensor.double, lambda tensor: _finite_magnitude(tensor.double())):
        leaves = [prepare(tensor.detach()).requires_grad_() for tensor in operands]
        output = function(*leaves)
        results.append([output.detach()])
        if grad_output is not None:
            gradients = torch.autograd.grad(output, leaves, prepare(grad_output.detach()), allow_unused=True)
            zeros = (torch.zeros_like(leaf) for leaf in leaves)
            results[-1] += [zero if grad is None else grad for grad, zero in zip(gradients, zeros, strict=True)]
    return [Expected(*found) for found in zip(*results, terms, strict=True)]


def flush(tensor: Tensor) -> Tensor:
    """Zeros for subnormal numbers, as bfloat16 on AMX and with AVX-512 BF16 takes them."""
    return torch.where(tensor.abs() < torch.finfo(tensor.dtype).tiny, torch.zeros_like(tensor), tensor)


def check(name: str, result: Tensor, wanted: Expected, flushes: bool = False) -> None:
    """Raise unless rounding explains every element of the result.

    Sums are taken in float32, in float64 for float64, and rounded once more at the store. Where an intermediate sum may
    overflow, only what no order of summation could change is demanded.
    """
    exact, magnitude, terms = wanted
    if result.shape != exact.shape:
        raise WrongError(f"{name}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
    if result.numel() == 0:
        return
    dtype = result.dtype
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    stored = torch.finfo(dtype)
    steps = min(terms, CHUNK) + terms // CHUNK + 4
    if dtype == torch.float64:
        steps += terms  # the float64 result errs as well
    error = steps * sums.eps * magnitude + steps * sums.smallest_normal * sums.eps
    if flushes:
        error = error + steps * sums.smallest_normal + terms * sums.smallest_normal
    rounded = error
    if dtype != torch.float32:
        rounded = error + stored.eps * exact.abs().nan_to_num(0, 0, 0) + stored.smallest_normal * stored.eps

    got = result.double()
    if magnitude.max() < stored.max / 4 and ((got - exact).abs() <= rounded).all():
        return  # nothing special, as nearly always
    may_overflow = magnitude + error >= sums.max
    overflow = stored.max * (1 + stored.eps / 4) if dtype != torch.float64 else math.inf  # what is stored as infinity
    is_right = (got - exact).abs() <= rounded
    is_infinite = got == exact.sign() * math.inf
    finite = torch.where(
        exact.abs() - error >= overflow,
        is_infinite,
        is_right & got.isfinite() | is_infinite & (exact.abs() + error >= overflow),
    )
    opposite = magnitude - exact.abs() + 4 * terms * 2.0**-53 * magnitude  # what the other sign may amount to
    too_large = exact.isfinite() & (exact.abs() > sums.max * (1 + 2 * steps * sums.eps))
    surely_infinite = too_large & (opposite < sums.max / 4)
    overflowing = ~surely_infinite | is_infinite
    passed = torch.where(may_overflow, overflowing, finite)
    passed = torch.where(exact.isinf() & ~may_overflow, got == exact, passed)
    passed = torch.where(exact.isnan() & magnitude.isfinite(), got.isnan(), passed)
    if not passed.all():
        place = tuple(int(i) for i in (~passed).nonzero()[0])
        raise WrongError(
            f"{name}: {int((~passed).sum())} of {result.numel()} wrong, the first at {place}: got {got[place]:.9g}, "
            f"exact {exact[place]:.9g}, allowed error {rounded[place]:.3g}"
        )


def bits(tensor: Tensor) -> Tensor:
    """As integers: NaN equals itself, -0.0 is not 0.0."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    if not tensor.is_floating_point():
        return tensor
    return tensor.resolve_neg().contiguous().view(integers[tensor.element_size()])


def check_same(name: str, result: Tensor, wanted: Tensor) -> None:
    """Raise unless every bit is the same; one NaN is as good as another."""
    if result.shape != wanted.shape or result.dtype != wanted.dtype:
        raise WrongError(f"{name}: {tuple(result.shape)} {result.dtype}, expected {tuple(wanted.shape)} {wanted.dtype}")
    same = bits(result) == bits(wanted)
    if result.is_floating_point():
        same |= result.isnan() & wanted.isnan()
    if not same.all():
        place = tuple(int(i) for i in (~same).nonzero()[0])
        raise WrongError(
            f"{name}: {int((~same).sum())} of {result.numel()} differ, the first at {place}: got {result[place]}, "
            f"expected {wanted[place]}"
        )
