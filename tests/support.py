"""What the tests share: plain PyTorch as a baseline, comparison by error against float64, and peak memory."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def einsum_heads(input: Tensor, weight: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
    """What one writes without this package."""
    heads = input.unflatten(-1, (num_heads, -1)), weight.unflatten(0, (num_heads, -1))
    output = torch.einsum("...nd,nde->...ne", *heads)
    return output if bias is None else output + bias


def assert_as_exact(ours: Tensor, plain: Tensor, exact: Tensor, ulps: float = 4) -> None:
    """Our error against float64 is at most twice plain PyTorch's in the same dtype, plus a few ulps.

    Args:
        ours: the result under test.
        plain: plain PyTorch's result in the same dtype.
        exact: the float64 result for the very same inputs.
        ulps: the allowance, in units in the last place of the largest value.
    """
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == plain.dtype
    if exact.numel() == 0:
        return
    assert not ours.isnan().any(), "NaN in the result"
    error = (ours.double() - exact).abs()
    allowance = ulps * torch.finfo(ours.dtype).eps * exact.abs().max()
    limit = 2 * (plain.double() - exact).abs().max() + allowance
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= limit, (
        f"error {error.max():.3g} exceeds {limit:.3g} at {worst}: got {ours[worst]}, exact {exact[worst]}"
    )


def peak_memory(device: str, function: Callable[[], object]) -> int:
    """The most that was allocated at once during a call, beyond what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())), initial=0))
