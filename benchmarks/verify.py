"""Nothing is timed whose result was not compared with float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The largest error allowed, in units in the last place of the largest value. Half types are rounded once, or nearly;
# float32 sums of a thousand terms lose several, in any order. The tests are stricter: they know what is summed how.
ULPS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}


class WrongResultError(Exception):
    """Something that was to be timed computes something else."""


def error_in_ulps(result: Tensor, exact: Tensor) -> float:
    """The largest error in units in the last place of the largest value; infinite for a wrong size or NaN."""
    if result.numel() != exact.numel() or result.isnan().any():
        return math.inf
    error = (result.reshape(exact.shape).double() - exact).abs().max() / exact.abs().max()
    return error.item() / torch.finfo(result.dtype).eps


def check(name: str, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Raise unless every result is right."""
    for result, expected in zip(results, exact, strict=True):
        error, allowed = error_in_ulps(result, expected), ULPS[result.dtype]
        if not error <= allowed:
            raise WrongResultError(f"{name} is wrong: off by {error:.3g} ulps of the largest value, allowed {allowed}")
