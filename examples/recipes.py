"""Four layers of published models by the operators, each checked against the formula it replaces, and timed.

Every recipe is a pair of functions of the same arguments: `plain`, the formula of the paper or public code as one
writes it in PyTorch, and `ours`. Run this file to compare them on your machine.
"""

from __future__ import annotations

import sys
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

from mhmatmul_ext import matmul_with_multi_head

if TYPE_CHECKING:
    from collections.abc import Callable

head_matmul = torch.ops.mhmatmul.head_matmul
ROUNDS = 5  # of timing; the two sides take turns, so that a busy machine slows both


# DeepSeek-V3's latent attention (arXiv:2412.19437): queries absorbed into the latent space, and values taken out of it.
# Both projections are slices of one packed parameter [nh, nope + v, kv]; neither is copied.
def absorb_plain(query: Tensor, attended: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Queries `[b, s, nh, nope]` and attended latents `[b, s, nh, kv]` by two einsums."""
    nope = query.shape[-1]
    absorbed = torch.einsum("bshd,hdc->bshc", query, packed[:, :nope])
    return absorbed, torch.einsum("bshc,hdc->bshd", attended, packed[:, nope:])


def absorb(query: Tensor, attended: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The same by views of the packed parameter."""
    nope = query.shape[-1]
    return head_matmul(query, packed[:, :nope]), head_matmul(attended, packed[:, nope:].mT)


# RG-LRU (Griffin, arXiv:2402.19427, equations 1 and 2): recurrence and input gate, two block-diagonal layers of one
# input. Side by side in one weight [nh, hd, 2 * hd] they read the input once.
def gates_plain(input: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    """Input `[b, s, h]`, weights `[nh, hd, 2 * hd]`, biases `[nh, 2 * hd]`; each gate `[b, s, h]`."""
    heads = input.unflatten(-1, (weights.shape[0], -1))
    first, second = (
        torch.einsum("...nd,nde->...ne", heads, weight) + bias
        for weight, bias in zip(weights.chunk(2, -1), biases.chunk(2, -1), strict=True)
    )
    return first.flatten(-2).sigmoid(), second.flatten(-2).sigmoid()


def gates(input: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    """The same in one product."""
    heads = input.unflatten(-1, (weights.shape[0], -1))
    first, second = head_matmul(heads, weights, biases).sigmoid().chunk(2, -1)
    return first.flatten(-2), second.flatten(-2)


# xLSTM (arXiv:2405.04517): head-wise expansion with the weight stored as [nh, out, in].
def expansion_plain(input: Tensor, weight: Tensor) -> tuple[Tensor]:
    """Input `[b, s, h]`; output `[b, s, nh * out]`."""
    heads = input.unflatten(-1, (weight.shape[0], -1))
    return (torch.einsum("...hd,hod->...ho", heads, weight).flatten(-2),)


def expansion(input: Tensor, weight: Tensor) -> tuple[Tensor]:
    """The same; `mhmatmul_ext.nn.HeadwiseLinear` with `weight_layout="hed"` is this as a module."""
    return (head_matmul(input.unflatten(-1, (weight.shape[0], -1)), weight.mT).flatten(-2),)


# Monarch (arXiv:2204.00595): two block-diagonal factors with a transposition of the blocks between them and after.
def monarch_plain(input: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor]:
    """Input `[m, k * p]`, first factor `[k, q, p]`, second `[q, r, k]`; output `[m, r * q]`."""
    blocks = input.unflatten(-1, (first.shape[0], -1))
    middle = torch.einsum("mkp,kqp->mkq", blocks, first)
    output = torch.einsum("mqk,qrk->mqr", middle.mT, second)
    return (output.mT.flatten(-2),)


def monarch(input: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor]:
    """The same; the transpositions are views that the second product reads in place."""
    middle = matmul_with_multi_head(input, first.mT.flatten(0, 1), first.shape[0])
    return (head_matmul(middle.mT, second.mT).mT.flatten(-2),)


class Recipe(NamedTuple):
    """Two ways, and the operands' sizes in a published model."""

    plain: Callable[..., tuple[Tensor, ...]]
    ours: Callable[..., tuple[Tensor, ...]]
    sizes: tuple[tuple[int, ...], ...]


RECIPES = {
    "DeepSeek MLA, both absorbed projections": Recipe(
        absorb_plain, absorb, ((1, 128, 32, 128), (1, 128, 32, 512), (32, 256, 512))
    ),
    "RG-LRU gates": Recipe(gates_plain, gates, ((2, 256, 2560), (10, 256, 512), (10, 512))),
    "xLSTM head-wise expansion": Recipe(expansion_plain, expansion, ((2, 512, 2048), (8, 512, 256))),
    "Monarch": Recipe(monarch_plain, monarch, ((512, 1024), (32, 32, 32), (32, 32, 32))),
}


def operands(recipe: Recipe, dtype: torch.dtype) -> list[Tensor]:
    """Operands drawn by lot, with results near 1."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator) for size in recipe.sizes]
    return [(tensor / 16 if i else tensor).to(dtype) for i, tensor in enumerate(drawn)]


def check(recipe: Recipe, given: list[Tensor]) -> None:
    """Raise unless both ways are as close to float64 as the dtype allows."""
    exact = recipe.plain(*[tensor.double() for tensor in given])
    for way in (recipe.plain, recipe.ours):
        for output, expected in zip(way(*given), exact, strict=True):
            limit = 16 * torch.finfo(output.dtype).eps * expected.abs().max().item()
            torch.testing.assert_close(output.double(), expected, rtol=0, atol=limit)


def main() -> int:
    """Check each recipe, then time both ways in turns."""
    print(f"milliseconds, median of {ROUNDS} rounds, {torch.get_num_threads()} threads")
    print(f"{'':<42}{'dtype':>10}{'formula':>10}{'ours':>10}{'ratio':>8}")
    work = [(name, dtype) for name in RECIPES for dtype in (torch.float32, torch.bfloat16)]
    for name, dtype in tqdm(work, leave=False, disable=None):
        recipe = RECIPES[name]
        given = operands(recipe, dtype)
        check(recipe, given)
        timers = [
            Timer("way(*given)", globals={"way": way, "given": given}, num_threads=torch.get_num_threads())
            for way in (recipe.plain, recipe.ours)
        ]
        rounds = [[timer.blocked_autorange(min_run_time=0.1).median for timer in timers] for _ in range(ROUNDS)]
        before, after = (1e3 * median(times) for times in zip(*rounds, strict=True))
        tqdm.write(f"{name:<42}{str(dtype)[6:]:>10}{before:>10.3f}{after:>10.3f}{before / after:>8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
