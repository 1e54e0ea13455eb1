"""`python -m mhmatmul_ext check`: this installation against `mhmatmul_ext.reference`, in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _C, functional, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Tensors = tuple[Tensor, ...]


def checks() -> Iterator[tuple[str, str | None]]:
    """What was compared, and what is wrong with it, None if nothing; one after the other."""
    devices = ["cpu"]
    if torch.cuda.is_available() and _C.build_config()["cuda"]:
        devices.append("cuda")
    for device in devices:
        for dtype in DTYPES:
            for name, compare in COMPARISONS.items():
                generator = torch.Generator().manual_seed(0)

                def draw(*sizes: int, generator: torch.Generator = generator) -> Tensor:
                    return torch.randn(sizes, generator=generator, dtype=torch.float64)

                try:
                    fault = compare(dtype, device, draw)
                except Exception as error:  # whatever it is, the list of what works goes on
                    fault = f"{type(error).__name__}: {error}"
                yield f"{device}, {str(dtype).removeprefix('torch.')}: {name}", fault


def _difference(ours: Tensors, exact: Tensors, dtype: torch.dtype) -> str | None:
    """Where the results are further from the float64 ones than sums of a few hundred terms can be by rounding."""
    for i, (got, expected) in enumerate(zip(ours, exact, strict=True)):
        if got.shape != expected.shape or got.dtype != dtype:
            return f"result {i} is {got.dtype} {list(got.shape)}, expected {dtype} {list(expected.shape)}"
        error = (got.detach().cpu().double() - expected.detach()).abs().max().item()
        limit = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
        if not error <= limit:  # NaN is above any limit
            return f"result {i} is off by {error:.3g}, allowed {limit:.3g}"
    return None


def _differentiated(function: Callable[..., Tensor], operands: Tensors, grad_output: Tensor) -> Tensors:
    leaves = tuple(operand.detach().requires_grad_() for operand in operands)
    output = function(*leaves)
    return output, *torch.autograd.grad(output, leaves, grad_output)


def _compare(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], operands: Tensors, dtype: torch.dtype, device: str
) -> str | None:
    """Output and gradients, from the very same rounded operands; the last operand is the output's gradient."""
    *rounded, grad_output = (operand.to(dtype) for operand in operands)
    got = _differentiated(ours, tuple(x.to(device) for x in rounded), grad_output.to(device))
    expected = _differentiated(exact, tuple(x.double() for x in rounded), grad_output.double())
    return _difference(got, expected, dtype)


def _multi_head(dtype: torch.dtype, device: str, draw: Callable[..., Tensor]) -> str | None:
    def apply(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda input, weight, bias: function(input, weight, 4, bias=bias)

    operands = draw(3, 41, 4 * 24), draw(4 * 24, 40), draw(4, 40), draw(3, 41, 4, 40)
    ours, exact = apply(functional.matmul_with_multi_head), apply(reference.matmul_with_multi_head)
    return _compare(ours, exact, operands, dtype, device)


def _scores(dtype: torch.dtype, draw: Callable[..., Tensor]) -> Tensor:
    """Scores with ties, NaN and both zeros among them."""
    probs = (draw(5, 300).clamp(-1, 1) * 8).round().div(8).to(dtype)
    probs[1, 7:90], probs[2, ::3] = torch.nan, -0.0
    return probs


def _selection(dtype: torch.dtype, device: str, draw: Callable[..., Tensor]) -> str | None:
    probs = _scores(dtype, draw)
    mask = draw(5, 300).round().clamp(-1, 1).to(torch.int8)
    for top_p, top_k, capacity, wished in [
        (0.25, None, None, None), (0.0, 37, None, None), (0.5, 60, 50, None), (0.25, 20, None, mask),
    ]:  # fmt: skip
        got = functional.select_important(
            probs.to(device), top_p, top_k, capacity=capacity, mask=None if wished is None else wished.to(device)
        )
        expected = reference.select_important(probs, top_p, top_k, capacity=capacity, mask=wished)
        if not all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(got, expected, strict=True)):
            return f"another selection for top_p={top_p}, top_k={top_k}, capacity={capacity}"
    return None


def _importance(dtype: torch.dtype, device: str, draw: Callable[..., Tensor]) -> str | None:
    probs = _scores(dtype, draw)[:, :40].contiguous()
    t = len(reference.select_important(probs, 0.25, 9)[0])
    operands = [x.to(dtype) for x in (draw(5, 40, 4 * 16), draw(4 * 16, 24), draw(t, 4, 24))]
    input, weight, grad_output = (x.to(device) for x in operands)
    got = functional.matmul_with_importance(input, weight, probs.to(device), grad_output, 4, 0.25, 9)
    input, weight, grad_output = (x.double() for x in operands)
    expected = reference.matmul_with_importance(input, weight, probs, grad_output, 4, 0.25, 9)
    return _difference(_all(got), _all(expected), dtype)


def _all(results: functional.Result) -> Tensors:
    return tuple(result for result in results if result is not None)


def _combine(dtype: torch.dtype, device: str, draw: Callable[..., Tensor]) -> str | None:
    indices = (draw(90).abs() * 20).long().clamp(max=39) - 1  # some of them -1, some repeated

    def ours(base: Tensor, updates: Tensor, gates: Tensor) -> Tensor:
        return functional.combine(base, updates, indices.to(device), gates)

    def exact(base: Tensor, updates: Tensor, gates: Tensor) -> Tensor:
        return reference.combine(base, updates, indices, gates)

    return _compare(ours, exact, (draw(2, 20, 33), draw(90, 33), draw(90), draw(2, 20, 33)), dtype, device)


COMPARISONS: dict[str, Callable[[torch.dtype, str, Callable[..., Tensor]], str | None]] = {
    "matmul_with_multi_head and its gradients": _multi_head,
    "select_important, exactly": _selection,
    "matmul_with_importance and its explicit gradients": _importance,
    "combine and its gradients": _combine,
}
