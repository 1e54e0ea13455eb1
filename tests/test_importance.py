"""matmul_with_importance and gather_head_matmul: rows, explicit gradients, no side effects."""

from __future__ import annotations

import pytest
import torch
from support import assert_as_exact

from mhmatmul_ext import matmul_with_importance, matmul_with_multi_head, reference, select_important

ops = torch.ops.mhmatmul
CASES = {  # top_p, top_k, capacity
    "some": (0.5, 3, None),
    "threshold": (0.7, None, None),
    "best": (0.0, 2, None),
    "all": (0.0, None, None),
    "none": (1.0, 1, None),
    "static": (0.5, 3, 4),
    "static, cut": (0.0, 5, 2),
    "static, empty": (0.5, None, 0),
}


def make(dtype, device, b=3, s=7, num_heads=2, head_dim=4, e=5):
    input = torch.randn(b, s, num_heads * head_dim, dtype=dtype, device=device)
    weight = torch.randn(num_heads * head_dim, e, dtype=dtype, device=device)
    return input, weight, torch.rand(b, s, device=device)


def plain(input, weight, indices, num_heads):
    """The kept rows in plain PyTorch, zero rows for -1."""
    kept = indices.flatten()
    rows = input.flatten(0, 1)[kept.clamp_min(0)].unflatten(-1, (num_heads, -1))
    output = torch.einsum("tnd,nde->tne", rows, weight.unflatten(0, (num_heads, -1)))
    return output.masked_fill((kept < 0)[:, None, None], 0).unflatten(0, indices.shape)


def all_gradients(input, weight, indices, num_heads, grad_output):
    input, weight = input.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(plain(input, weight, indices, num_heads), (input, weight), grad_output)


@pytest.mark.parametrize("case", CASES)
def test_output_and_explicit_gradients(case, dtype, device, capability):
    top_p, top_k, capacity = CASES[case]
    input, weight, probs = make(dtype, device)
    selection = {"num_heads": 2, "top_p": top_p, "top_k": top_k, "capacity": capacity}
    output, no_grad_input, no_grad_weight = matmul_with_importance(input, weight, probs, **selection)
    assert no_grad_input is None
    assert no_grad_weight is None

    indices, _ = select_important(probs, top_p, top_k, capacity=capacity)
    assert output.shape == (*indices.shape, 2, 5)
    grad_output = torch.randn_like(output)
    ours = matmul_with_importance(input, weight, probs, grad_output, **selection)
    exact = reference.matmul_with_importance(input.double(), weight.double(), probs, grad_output.double(), **selection)
    baseline = (plain(input, weight, indices, 2), *all_gradients(input, weight, indices, 2, grad_output))
    for got, base, expected in zip(ours, baseline, exact, strict=True):
        assert got.is_contiguous()
        assert got.dtype == dtype
        assert_as_exact(got, base, expected)
    assert torch.equal(ours[0], output)


@pytest.mark.parametrize("capacity", [None, 4])
def test_mask(capacity, device):
    input, weight, probs = make(torch.float32, device)
    mask = torch.randint(-1, 2, probs.shape, dtype=torch.int8, device=device)
    selection = {"num_heads": 2, "top_p": 0.4, "top_k": 3, "capacity": capacity, "mask": mask}
    indices, _ = select_important(probs, 0.4, 3, capacity=capacity, mask=mask)
    grad_output = torch.randn(*indices.shape, 2, 5, device=device)
    ours = matmul_with_importance(input, weight, probs, grad_output, **selection)
    for got, expected in zip(
        ours, reference.matmul_with_importance(input, weight, probs, grad_output, **selection), strict=True
    ):
        torch.testing.assert_close(got, expected)
    assert torch.equal(matmul_with_importance(input, weight, probs, **selection)[0], ours[0])


@pytest.mark.parametrize("shape", [(0, 7, 2, 4, 5), (3, 0, 2, 4, 5), (3, 7, 2, 0, 5), (3, 7, 2, 4, 0), (1, 1, 1, 1, 1)])
def test_empty_sizes(shape, dtype, device):
    input, weight, probs = make(dtype, device, *shape)
    output, _, _ = matmul_with_importance(input, weight, probs, num_heads=shape[2], top_p=0.0)
    assert output.shape == (shape[0] * shape[1], shape[2], shape[4])
    _, grad_input, grad_weight = matmul_with_importance(
        input, weight, probs, torch.ones_like(output), num_heads=shape[2], top_p=0.0
    )
    assert grad_input.shape == input.shape
    assert grad_weight.shape == weight.shape
    if 0 in shape:
        assert (grad_input == 0).all()
        assert (grad_weight == 0).all()


def test_rows_are_those_of_the_dense_call(dtype, device, capability):
    input, weight, probs = make(dtype, device, 3, 300, 2, 32, 24)
    output, _, _ = matmul_with_importance(input, weight, probs, num_heads=2, top_p=0.5, top_k=40)
    indices, _ = select_important(probs, 0.5, 40)
    dense = matmul_with_multi_head(input, weight, 2).flatten(0, 1)[indices]
    exact = reference.matmul_with_multi_head(input.double(), weight.double(), 2).flatten(0, 1)[indices]
    assert_as_exact(output, dense, exact)


def test_probs_may_have_another_dtype(device):
    input, weight, probs = make(torch.bfloat16, device)
    output, _, _ = matmul_with_importance(input, weight, probs.double(), num_heads=2, top_p=0.5)
    assert output.dtype == torch.bfloat16


def test_the_known_example():
    torch.manual_seed(42)
    input, weight, probs = torch.randn(2, 5, 4), torch.randn(4, 3), torch.rand(2, 5)
    output, _, _ = matmul_with_importance(input, weight, probs, num_heads=2, top_p=0.7, top_k=2)
    assert output.shape == (3, 2, 3)
    torch.testing.assert_close(output.flatten()[:3], torch.tensor([1.2396, -0.1764, 1.4309]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("top_p", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_explicit_gradients_have_no_side_effects(mode, top_p, device):
    input, weight, probs = make(torch.float32, device)
    input.requires_grad_()
    weight.requires_grad_()
    probs.requires_grad_()
    operands = (input, weight, probs)
    before = [(tensor.detach().clone(), tensor._version) for tensor in operands]
    rng = torch.get_rng_state()
    with mode():
        t = matmul_with_importance(input, weight, probs, num_heads=2, top_p=top_p)[0].shape[0]
        grad_output = torch.randn(t, 2, 5, device=device).requires_grad_(mode is torch.enable_grad)
        rng = torch.get_rng_state()
        results = matmul_with_importance(input, weight, probs, grad_output, num_heads=2, top_p=top_p)
    for result in results:
        assert not result.requires_grad
        assert result.grad_fn is None
    for tensor, (value, version) in zip(operands, before, strict=True):
        assert tensor.requires_grad
        assert tensor.grad is None
        assert tensor._version == version
        assert torch.equal(tensor, value)
    assert grad_output.grad is None
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
def test_grad_output_layouts(kind, device):
    input, weight, probs = make(torch.float32, device)
    t = matmul_with_importance(input, weight, probs, num_heads=2, top_p=0.3)[0].shape[0]
    grad_output = {
        "expanded": lambda: torch.ones((), device=device).expand(t, 2, 5),
        "transposed": lambda: torch.randn(5, 2, t, device=device).transpose(0, 2),
        "sliced": lambda: torch.randn(t, 2, 9, device=device)[..., 2:7],
    }[kind]()
    ours = matmul_with_importance(input, weight, probs, grad_output, num_heads=2, top_p=0.3)
    exact = reference.matmul_with_importance(input, weight, probs, grad_output, num_heads=2, top_p=0.3)
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gather_with_repeats_and_padding(with_bias, dtype, device, capability):
    input, weight = (
        torch.randn(6, 2, 4, dtype=dtype, device=device),
        torch.randn(2, 4, 5, dtype=dtype, device=device),
    )
    bias = torch.randn(2, 5, dtype=dtype, device=device) if with_bias else None
    indices = torch.tensor([3, -1, 0, 3, 5, -1, 3, 0], device=device)
    operands = [tensor.detach().requires_grad_() for tensor in (input, weight, bias) if tensor is not None]

    def run(function, *tensors):
        output = function(*tensors)
        return (output, *torch.autograd.grad(output, tensors, grad_output.to(output.dtype)))

    def ours(input, weight, bias=None):
        return ops.gather_head_matmul(input, weight, indices, bias)

    def in_pytorch(input, weight, bias=None):
        output = torch.einsum("tnd,nde->tne", input[indices.clamp_min(0)], weight)
        output = output if bias is None else output + bias
        return output.masked_fill((indices < 0)[:, None, None], 0)

    grad_output = torch.randn(8, 2, 5, dtype=dtype, device=device)
    got, base = run(ours, *operands), run(in_pytorch, *operands)
    exact = run(in_pytorch, *(tensor.detach().double().requires_grad_() for tensor in operands))
    for one, two, expected in zip(got, base, exact, strict=True):
        assert_as_exact(one.detach(), two.detach(), expected.detach())
    assert (got[0][1] == 0).all()
    assert (got[1][[1, 2, 4]] == 0).all()


def test_padding_rows_read_nothing(device):
    """NaN and infinity in what a padding row would have touched stay out of every result."""
    input, weight = torch.randn(4, 2, 3, device=device), torch.randn(2, 3, 5, device=device)
    weight[0, 0, 0] = float("inf")
    indices = torch.tensor([-1, 2], device=device)
    grad_output = torch.randn(2, 2, 5, device=device)
    grad_output[0] = float("nan")
    assert (ops.gather_head_matmul(input, weight, indices)[0] == 0).all()
    weight[0, 0, 0] = 1.0
    grad_input, grad_weight = ops._gather_head_matmul_backward(grad_output, input, weight, indices)
    assert grad_input.isfinite().all()
    assert grad_weight.isfinite().all()
    assert (grad_input[[0, 1, 3]] == 0).all()


def test_padding_of_no_rows_has_tangents(device):
    """There is no row to stand for one that is not there."""
    input, weight = torch.zeros(0, 2, 3, device=device), torch.randn(2, 3, 4, device=device)
    indices = torch.full((5,), -1, device=device)

    def function(input, weight):
        return torch.ops.mhmatmul.gather_head_matmul(input, weight, indices)

    results = torch.func.jvp(function, (input, weight), (input, torch.ones_like(weight)))
    for result in results:
        assert torch.equal(result, torch.zeros(5, 2, 4, device=device))


@pytest.mark.parametrize("indices", [[0, 6], [-2], [2**40], [-(2**62)]])
def test_wild_indices(indices, device):
    input, weight = torch.randn(6, 2, 4, device=device), torch.randn(2, 4, 5, device=device)
    indices = torch.tensor(indices, device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match=r"gather_head_matmul: indices must be in \[-1, m\) = \[-1, 6\), got "):
            ops.gather_head_matmul(input, weight, indices)
        with pytest.raises(IndexError, match="indices must be in"):
            ops._gather_head_matmul_dgrad(torch.randn(len(indices), 2, 5), weight, indices, 6)
    else:  # names no row, like -1
        wild = (indices < 0) | (indices >= 6)
        output = ops.gather_head_matmul(input, weight, indices)
        assert (output[wild] == 0).all()
        grads = ops._gather_head_matmul_backward(torch.randn_like(output), input, weight, indices)
        assert all(grad.isfinite().all() for grad in grads)


def test_repeats_give_the_same_bits(dtype, device):
    input, weight, probs = make(dtype, device, 3, 70, 2, 64, 33)
    t = matmul_with_importance(input, weight, probs, num_heads=2, top_p=0.2)[0].shape[0]
    grad_output = torch.randn(t, 2, 33, dtype=dtype, device=device)
    first = matmul_with_importance(input, weight, probs, grad_output, num_heads=2, top_p=0.2)
    for _ in range(3):
        again = matmul_with_importance(input, weight, probs, grad_output, num_heads=2, top_p=0.2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
