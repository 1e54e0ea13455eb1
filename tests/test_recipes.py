"""The recipes of examples/: outputs and gradients are those of the formulas."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from support import peak_memory

FILE = Path(__file__).parents[1] / "examples" / "recipes.py"
RECIPES = runpy.run_path(str(FILE))["RECIPES"]
SMALL = {
    "DeepSeek MLA, both absorbed projections": ((2, 3, 4, 5), (2, 3, 4, 7), (4, 5 + 6, 7)),
    "RG-LRU gates": ((2, 3, 8), (4, 2, 4), (4, 4)),
    "xLSTM head-wise expansion": ((2, 3, 8), (4, 3, 2)),
    "Monarch": ((5, 4 * 3), (4, 2, 3), (2, 6, 4)),
}


def test_every_recipe_is_tested():
    assert set(SMALL) == set(RECIPES)


@pytest.mark.parametrize("name", SMALL)
def test_equal_to_the_formula(name, device):
    tensors = [torch.randn(size, dtype=torch.float64, device=device, requires_grad=True) for size in SMALL[name]]
    ours, plain = RECIPES[name].ours(*tensors), RECIPES[name].plain(*tensors)
    grads = [torch.randn_like(output) for output in plain]
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(
        torch.autograd.grad(ours, tensors, grads), torch.autograd.grad(plain, tensors, grads), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_packed_parameter_is_not_copied(dtype, device):
    """Both slices are read where they lie, the transposed one too: the results alone are allocated."""
    recipe = RECIPES["DeepSeek MLA, both absorbed projections"]
    given = [torch.randn(size, device=device).to(dtype) for size in recipe.sizes]
    results = sum(output.nbytes for output in recipe.ours(*given))
    used = peak_memory(device, lambda: [recipe.ours(*given)])
    assert results <= used < results + given[2].nbytes // 8


def test_monarch_is_the_matrix_it_stands_for():
    """Two block-diagonal matrices and two permutations, all written out."""
    k, p, q, r = 4, 3, 2, 6
    first, second = torch.randn(k, q, p).double(), torch.randn(q, r, k).double()
    by_block = torch.arange(k * q).view(k, q).T.flatten()
    by_output = torch.arange(q * r).view(q, r).T.flatten()
    matrix = torch.block_diag(*second)[by_output] @ torch.block_diag(*first)[by_block]
    input = torch.randn(5, k * p).double()
    torch.testing.assert_close(RECIPES["Monarch"].ours(input, first, second)[0], input @ matrix.T)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_published_sizes(name, dtype):
    names = runpy.run_path(str(FILE))
    names["check"](RECIPES[name], names["operands"](RECIPES[name], dtype))
