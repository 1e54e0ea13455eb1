"""Ways to compute the same thing: ours, and what one writes without this package."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from floor import find_compiler
from problem import Kind, Problem
from torch import Tensor

from mhmatmul_ext import matmul_with_importance, matmul_with_multi_head, select_important

if TYPE_CHECKING:
    from collections.abc import Callable


def always(problem: Problem) -> bool:
    """For every problem."""
    return True


def has_few_rows(problem: Problem) -> bool:
    """For decoding, where what a call costs counts."""
    return problem.shape.rows <= 16


def has_compiler(problem: Problem) -> bool:
    """For machines where torch.compile can work."""
    return find_compiler() is not None


def is_half(problem: Problem) -> bool:
    """For the types that oneDNN multiplies by instructions of their own."""
    return problem.input.dtype.itemsize == 2


class Way(NamedTuple):
    """An expression over the names of `namespace`."""

    statement: str  # what is timed
    result: str = "r"  # the result to check, where the statement's value is `r`
    setup: str = ""  # run once, not timed
    computes: Kind = "forward"
    applies: Callable[[Problem], bool] = always
    onednn: bool = True  # False: PyTorch's own loops, which CPUs without half-precision instructions run
    captures: bool = True  # False: no CUDA graph can hold it, since sizes depend on data, or it is one already


def evaluate(way: Way, names: dict[str, object]) -> tuple[Tensor, ...]:
    """The result of a way, of one call; memory that it was to write and did not holds NaN."""
    for name in ("out", "grad_A", "grad_W"):
        memory = names.get(name)
        if isinstance(memory, Tensor):
            memory.fill_(math.nan)
    names["r"] = eval(way.statement, names)
    return result_of(way, names)


def result_of(way: Way, names: dict[str, object]) -> tuple[Tensor, ...]:
    """What is to be checked, after the statement gave `r`."""
    result = eval(way.result, names)
    return result if isinstance(result, tuple) else (result,)


def einsum(A: Tensor, W: Tensor) -> Tensor:
    """What one writes first."""
    return torch.einsum("mnd,nde->mne", A, W)


def loop(A: Tensor, W: Tensor, out: Tensor) -> None:
    """Head by head, each product written where it belongs."""
    for n in range(W.shape[0]):
        torch.mm(A[:, n], W[n], out=out[:, n])


def select_and_multiply(A: Tensor, W: Tensor, probs: Tensor, top_k: int) -> Tensor:
    """Mixture-of-Depths in plain PyTorch: the scores have no ties."""
    kth = probs.topk(top_k, dim=1).values[:, -1:]
    indices = (probs >= kth).flatten().nonzero().flatten()
    return torch.einsum("mnd,nde->mne", A[indices], W)


EINSUM = "torch.einsum('mnd,nde->mne', A, W)"
EINSUM_GRADIENTS = Way(
    "torch.autograd.grad(y, (A, W), G, retain_graph=True)",
    setup=f"A, W = A.detach().requires_grad_(), W.detach().requires_grad_()\ny = {EINSUM}",
    computes="backward",
)
FRESH = Way("matmul_with_multi_head(input, weight, nh)")
GRADIENTS = Way(
    "torch.autograd.grad(y, (input, weight), grad_output, retain_graph=True)",
    setup="input, weight = input.detach().requires_grad_(), weight.detach().requires_grad_()\n"
    "y = matmul_with_multi_head(input, weight, nh)",
    computes="backward",
)
SELECTED = Way("matmul_with_importance(input, weight, probs, None, nh, 0.0, top_k)", "r[0]", computes="importance")

CALL_AND_GRADIENTS = Way(
    "torch.autograd.grad(matmul_with_multi_head(input, weight, nh), (input, weight), grad_output)",
    setup="input, weight = input.detach().requires_grad_(), weight.detach().requires_grad_()",
    computes="backward",
)
BMM_AND_GRADIENTS = Way(
    "torch.autograd.grad(torch.bmm(AT, W), (AT, W), GT)",
    "(r[0].transpose(0, 1), r[1])",
    setup="AT, W, GT = A.transpose(0, 1).requires_grad_(), W.detach().requires_grad_(), G.transpose(0, 1)",
    computes="backward",
)

OURS: dict[Kind, dict[str, Way]] = {
    "forward": {
        "fresh": FRESH,
        "out=": Way("matmul_with_multi_head(input, weight, nh, out=out)", "out"),
    },
    "backward": {
        "both gradients": GRADIENTS,
    },
    "call and gradients": {
        "fresh": CALL_AND_GRADIENTS,
    },
    "importance": {
        "kept": SELECTED,
        "dense": FRESH,
    },
}

OPPONENTS: dict[Kind, dict[str, Way]] = {
    "forward": {
        "einsum": Way(EINSUM),
        "contiguous": Way(f"{EINSUM}.contiguous()"),
        "bmm(out=)": Way("torch.bmm(A.transpose(0, 1), W, out=O.transpose(0, 1))", "O"),
        "loop": Way("loop(A, W, O)", "O"),
        "compiled": Way(
            "compiled(A, W)",
            setup="torch._dynamo.reset()\ncompiled = torch.compile(einsum, dynamic=False)",
            applies=has_compiler,
        ),
        "bmm": Way("torch.bmm(AT, W)", "r.transpose(0, 1)", "AT = A.transpose(0, 1)", applies=has_few_rows),
        "no oneDNN": Way(EINSUM, applies=is_half, onednn=False),
    },
    "backward": {
        "einsum": EINSUM_GRADIENTS,
        "no oneDNN": EINSUM_GRADIENTS._replace(applies=is_half, onednn=False),
    },
    "call and gradients": {"bmm": BMM_AND_GRADIENTS},
    "importance": {"eager": Way("select_and_multiply(A, W, probs, top_k)", computes="importance")},
}


def namespace(problem: Problem) -> dict[str, object]:
    """The names that statements may use: small letters as the public functions take them, capitals by head."""
    A, W, G = problem.heads
    functions = (matmul_with_multi_head, matmul_with_importance, select_important, einsum, loop, select_and_multiply)
    return {function.__name__: function for function in functions} | {
        "torch": torch,
        "input": problem.input,
        "weight": problem.weight,
        "grad_output": problem.grad_output,
        "probs": problem.probs,
        "out": problem.out,
        "nh": problem.shape.num_heads,
        "top_k": problem.shape.top_k,
        "A": A,
        "W": W,
        "G": G,
        "O": problem.out.flatten(0, 1),
        "kept_grad": problem.kept_grad,
    }
