"""What the tests share: plain PyTorch as a baseline, and comparison by error against float64."""

from __future__ import annotations

import torch
from torch import Tensor


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
