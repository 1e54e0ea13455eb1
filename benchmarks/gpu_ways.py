"""Ways to compute the same thing on a GPU: ours, and what one writes without this package."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import ways
from torch import Tensor
from ways import EINSUM, EINSUM_GRADIENTS, GRADIENTS, SELECTED, Way

if TYPE_CHECKING:
    from collections.abc import Callable

    from problem import Kind, Problem


def select(probs: Tensor, top_k: int) -> Tensor:
    """The positions of the `top_k` highest: topk, mask, nonzero; the scores have no ties."""
    kth = probs.topk(top_k, dim=1).values[:, -1:]
    return (probs >= kth).flatten().nonzero().flatten()


def select_static(probs: Tensor, top_k: int) -> Tensor:
    """The same in a size known before, for a graph: topk, sort."""
    positions = probs.topk(top_k, dim=1, sorted=False).indices.sort(dim=1).values
    starts = torch.arange(0, probs.numel(), probs.shape[1], device=probs.device)
    return (positions + starts[:, None]).flatten()


def multiply(A: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    """The product of some rows."""
    return torch.einsum("mnd,nde->mne", A.index_select(0, indices), W)


def multiply_into(A: Tensor, W: Tensor, indices: Tensor, out: Tensor) -> None:
    """The same, written where it belongs."""
    torch.bmm(A.index_select(0, indices).transpose(0, 1), W, out=out.transpose(0, 1))


def differentiate(A: Tensor, W: Tensor, indices: Tensor, G: Tensor) -> tuple[Tensor, ...]:
    """The product of some rows and its gradients, by autograd."""
    output = multiply(A, W, indices)
    return output.detach(), *torch.autograd.grad(output, (A, W), G)


@lru_cache
def compiled(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Einsum, compiled; once for all operands of a shape."""
    return torch.compile(ways.einsum, dynamic=False, mode=mode)


def forget_compiled() -> None:
    """Let the next shape be compiled for itself."""
    if compiled.cache_info().currsize:
        torch._dynamo.reset()
        compiled.cache_clear()


WITH_GRADIENTS = "A, W = A.detach().requires_grad_(), W.detach().requires_grad_()"
WEIGHT_GRADIENT = "torch.bmm(A.permute(1, 2, 0), G.transpose(0, 1), out=grad_W)"
INPUT_GRADIENT = "torch.bmm(G.transpose(0, 1), W.transpose(1, 2), out=grad_A.transpose(0, 1))"
CAPACITY = "matmul_with_importance(input, weight, probs, {}, nh, 0.0, top_k, capacity=top_k)"
STATIC_GRADIENT = "kept_grad.unflatten(0, (-1, top_k))"

OURS: dict[Kind, dict[str, Way]] = {
    "forward": ways.OURS["forward"],
    "backward": {
        "explicit": Way("torch.ops.mhmatmul._head_matmul_backward(G, A, W)"),
        "autograd": GRADIENTS,
    },
    "wgrad": {"explicit": Way("torch.ops.mhmatmul._head_matmul_wgrad(G, A)")},
    "importance": {
        "kept": SELECTED._replace(captures=False),
        "capacity": Way(CAPACITY.format(None), "r[0]"),
    },
    "importance gradients": {
        "kept": Way("matmul_with_importance(input, weight, probs, kept_grad, nh, 0.0, top_k)", captures=False),
        "capacity": Way(CAPACITY.format(STATIC_GRADIENT)),
    },
    "selection": {
        "kept": Way("select_important(probs, 0.0, top_k)", "r[0]", captures=False),
        "capacity": Way("select_important(probs, 0.0, top_k, capacity=top_k)", "r[0]"),
    },
}

OPPONENTS: dict[Kind, dict[str, Way]] = {
    "forward": {
        "bmm(out=)": ways.OPPONENTS["forward"]["bmm(out=)"],
        "einsum": Way(EINSUM),
        "contiguous": Way(f"{EINSUM}.contiguous()"),
        "compiled": Way("compute(A, W)", setup="compute = compiled('max-autotune-no-cudagraphs')"),
        "compiled, its graphs": Way("compute(A, W)", setup="compute = compiled('max-autotune')", captures=False),
    },
    "backward": {
        "two bmm(out=)": Way(
            f"({INPUT_GRADIENT}, {WEIGHT_GRADIENT})",
            "(grad_A, grad_W)",
            "grad_A, grad_W = torch.empty_like(A), torch.empty_like(W)",
        ),
        "einsum": EINSUM_GRADIENTS,
    },
    "wgrad": {"bmm(out=)": Way(WEIGHT_GRADIENT, "grad_W", "grad_W = torch.empty_like(W)")},
    "importance": {
        "eager": Way("multiply(A, W, select(probs, top_k))", captures=False),
        "eager, bmm(out=)": Way("multiply_into(A, W, select(probs, top_k), kept_out)", "kept_out", captures=False),
        "static": Way("multiply(A, W, select_static(probs, top_k))"),
    },
    "importance gradients": {
        "eager": Way("differentiate(A, W, select(probs, top_k), kept_grad)", setup=WITH_GRADIENTS, captures=False),
        "static": Way("differentiate(A, W, select_static(probs, top_k), kept_grad)", setup=WITH_GRADIENTS),
    },
    "selection": {
        "eager": Way("select(probs, top_k)", captures=False),
        "static": Way("select_static(probs, top_k)"),
    },
}


def all_ways(kind: Kind, with_compile: bool) -> dict[str, Way]:
    """Ours first."""
    opponents = {n: w for n, w in OPPONENTS[kind].items() if with_compile or not n.startswith("compiled")}
    return OURS[kind] | opponents


def namespace(problem: Problem) -> dict[str, object]:
    """The names that statements may use."""
    functions = (select, select_static, multiply, multiply_into, differentiate, compiled)
    own: dict[str, object] = {function.__name__: function for function in functions}
    names = ways.namespace(problem) | own
    return names | {"kept_out": problem.out.flatten(0, 1)[: len(problem.kept_grad)]}
