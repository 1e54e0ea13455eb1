"""Nothing is timed whose result was not compared with float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from command import WrongResultError
from torch import Tensor

# The largest error allowed, in units in the last place of the largest value. Half types are rounded once, or nearly;
# float32 sums of a thousand terms lose several, in any order. The tests are stricter: they know what is summed how.
ULPS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}
TF32_EPS, TF32_ULPS = 2.0**-10, 4  # each operand keeps ten bits
MANY_TERMS = 1024  # longer sums in float32 lose more, as the root of their length


class Sample(NamedTuple):
    """Some slices of a result along its first dimension, and how many products each of its sums has."""

    shape: tuple[int, ...]  # of the whole
    places: Tensor
    values: Tensor
    terms: int


def error_in_ulps(result: Tensor, expected: Tensor | Sample, eps: float | None = None) -> float:
    """The largest error in units in the last place of the largest value; infinite for a wrong size or NaN."""
    shape = expected.shape
    if result.numel() != math.prod(shape) or result.isnan().any():
        return math.inf
    result = result.reshape(shape)
    exact = expected
    if isinstance(expected, Sample):
        result, exact = result[expected.places], expected.values
    assert isinstance(exact, Tensor)
    error = (result.double() - exact).abs().max() / exact.abs().max()
    return error.item() / (eps or torch.finfo(result.dtype).eps)


def check_one(name: str, result: Tensor, expected: Tensor | Sample, tf32: bool) -> None:
    """Raise unless it is right; integers must be equal."""
    if isinstance(expected, Tensor) and not expected.is_floating_point():
        if not torch.equal(result.reshape(-1), expected):
            raise WrongResultError(f"{name} is wrong: other tokens are selected")
        return
    error = error_in_ulps(result, expected, TF32_EPS if tf32 else None)
    allowed = float(TF32_ULPS if tf32 else ULPS[result.dtype])
    if isinstance(expected, Sample) and result.dtype == torch.float32:
        allowed *= max(1.0, math.sqrt(expected.terms / MANY_TERMS))
    if not error <= allowed:
        raise WrongResultError(f"{name} is wrong: off by {error:.3g} ulps of the largest value, allowed {allowed:.3g}")


def check(name: str, results: tuple[Tensor, ...], exact: tuple[Tensor | Sample, ...], *, tf32: bool = False) -> None:
    """Raise unless every result is right."""
    for result, expected in zip(results, exact, strict=True):
        check_one(name, result, expected, tf32)
