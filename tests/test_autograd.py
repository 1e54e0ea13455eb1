"""Derivatives: only what is asked for, in every dtype, under torch.compile and autocast.

test_composability.py has those of every operator in every mode.
"""

from __future__ import annotations

import pytest
import torch
from support import assert_as_exact, einsum_heads
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks

from mhmatmul_ext import combine, matmul_with_importance, matmul_with_multi_head, reference, select_important

ops = torch.ops.mhmatmul
INDICES = [2, -1, 0, 2, 3, -1]


def operands(device, dtype=torch.float64, requires_grad=True):
    def make(*size):
        return torch.randn(*size, dtype=dtype, device=device, requires_grad=requires_grad)

    return make


def test_no_leading_dimension(device):
    make = operands(device)
    tensors = make(2, 4), make(2, 4, 5), make(2, 5)
    assert torch.autograd.gradcheck(ops.head_matmul, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ops.head_matmul, tensors)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("gathered", [False, True])
def test_only_the_gradients_asked_for(needs, gathered, device):
    make = operands(device, torch.float32, requires_grad=False)
    tensors = (make(6, 2, 4), make(2, 4, 5), make(2, 5))
    input, weight, bias = (t.requires_grad_(bool(need)) for t, need in zip(tensors, needs, strict=True))
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        if gathered:
            output = ops.gather_head_matmul(input, weight, torch.tensor(INDICES, device=device), bias)
        else:
            output = ops.head_matmul(input, weight, bias)
    assert (input.data_ptr() in saved) == bool(needs[1])
    assert (weight.data_ptr() in saved) == bool(needs[0])
    output.sum().backward()  # an expanded gradient
    for tensor, need in zip((input, weight, bias), needs, strict=True):
        assert (tensor.grad is not None) == bool(need)


def test_gradients_in_every_dtype(dtype, device, capability):
    input, weight = (
        torch.randn(3, 50, 16, device=device).to(dtype),
        torch.randn(16, 9, device=device).to(dtype),
    )
    grad_output = torch.randn(3, 50, 2, 9, device=device).to(dtype)

    def gradients(function, *tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(function(*leaves, 2), leaves, grad_output.to(leaves[0].dtype))

    ours = gradients(matmul_with_multi_head, input, weight)
    plain = gradients(einsum_heads, input, weight)
    exact = gradients(reference.matmul_with_multi_head, input.double(), weight.double())
    for got, base, expected in zip(ours, plain, exact, strict=True):
        assert_as_exact(got, base, expected)


def test_out_is_refused_where_gradients_are_recorded(device):
    make = operands(device, torch.float32)
    input, weight = make(3, 4), make(4, 5)
    out = torch.zeros(3, 1, 5, device=device)
    with pytest.raises(RuntimeError, match=r"^matmul_with_multi_head: out= is not differentiable"):
        matmul_with_multi_head(input, weight, out=out)
    assert (out == 0).all()
    with torch.no_grad():
        assert matmul_with_multi_head(input, weight, out=out) is out
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input.detach(), torch.ones_like(input))
        with pytest.raises(RuntimeError, match=r"^matmul_with_multi_head: out= is not supported .* forward-mode"):
            matmul_with_multi_head(dual, weight.detach(), out=out)


@pytest.mark.parametrize("capacity", [None, 2])
def test_explicit_gradients_carry_tangents_and_no_graph(capacity, device):
    """Each result is linear in two operands, so its tangent is the sum of two calls."""
    make, probs = operands(device, requires_grad=False), torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.7, 0.1]], device=device)
    values, tangents = ((make(2, 3, 4), make(4, 5), make(*size, 2, 5)) for size in 2 * [(2, 2) if capacity else (3,)])

    def explicit(input, weight, grad_output):
        return matmul_with_importance(input, weight, probs, grad_output, 2, 0.5, capacity=capacity)

    (x, w, g), (dx, dw, dg) = values, tangents
    _, found = torch.func.jvp(explicit, (x, w, g), (dx, dw, dg))
    for i, first, second in [(0, (dx, w, g), (x, dw, g)), (1, (x, w, dg), (x, dw, g)), (2, (dx, w, g), (x, w, dg))]:
        torch.testing.assert_close(found[i], explicit(*first)[i] + explicit(*second)[i])
    recorded = explicit(*(value.requires_grad_() for value in values))
    assert not any(result.requires_grad for result in recorded)


def test_operands_changed_before_backward_are_noticed(device):
    make = operands(device, torch.float32)
    input, weight = make(3, 4), make(4, 5)
    output = matmul_with_multi_head(input, weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def combined(input, weight, indices, cu_seqlens):
    rows = input.flatten(0, 1)[indices]
    return combine(input, (rows @ weight @ weight.t()).square(), indices, rows.sum(-1))


COMPILED = {
    "multi head": lambda x, w, p, g: matmul_with_multi_head(x, w, 2).square(),
    "multi head with bias": lambda x, w, p, g: matmul_with_multi_head(x, w, 2, bias=w[:2]).square(),
    "importance": lambda x, w, p, g: matmul_with_importance(x, w, p, num_heads=2, top_p=0.5)[0].square(),
    "importance, tensor": lambda x, w, p, g: matmul_with_importance(x, w, p, num_heads=2, top_p=p.new_full((), 0.5))[
        0
    ].square(),
    "importance, static": lambda x, w, p, g: matmul_with_importance(
        x, w, p, num_heads=2, top_p=0.5, top_k=3, capacity=2
    )[0].square(),
    "importance, protected": lambda x, w, p, g: matmul_with_importance(
        x, w, p, num_heads=2, top_p=0.5, top_k=3, mask=(x[..., 0] > 0).to(torch.int8)
    )[0].square(),
    "selected tokens put back": lambda x, w, p, g: combined(x, w, *select_important(p, 0.5, 3)),
    "selection and a layer": lambda x, w, p, g: torch.nn.functional.layer_norm(
        x.flatten(0, 1)[select_important(p, 0.5, 3)[0]], (8,)
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_fullgraph(name, dynamic, device):
    function = COMPILED[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    fills = [None, 0.0, 1.0]  # some tokens, none, all
    if device == "cuda" and name in ("selection and a layer", "selected tokens put back"):
        fills.remove(0.0)  # the launcher that Inductor writes for torch's own indexing divides by zero for no rows
    for fill in fills:
        input = torch.randn(2, 5, 8, device=device, requires_grad=True)
        weight = torch.randn(8, 3, device=device, requires_grad=True)
        probs = torch.rand(2, 5, device=device) if fill is None else torch.full((2, 5), fill, device=device)
        expected, got = function(input, weight, probs, None), compiled(input, weight, probs, None)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected)
        leaves = (input, weight)
        for ours, theirs in zip(
            torch.autograd.grad(got.sum(), leaves, allow_unused=True),
            torch.autograd.grad(expected.sum(), leaves, allow_unused=True),
            strict=True,
        ):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1, "recompiled for another number of kept tokens"


def test_compile_explicit_gradients_and_out(device):
    @torch.compile(fullgraph=True)
    def compiled(input, weight, probs, grad_output, out):
        dense = matmul_with_multi_head(input, weight, 2, out=out)
        return dense + 1, matmul_with_importance(input, weight, probs, grad_output, num_heads=2, top_p=0.0)

    torch._dynamo.reset()
    input, weight, probs = (torch.randn(size, device=device) for size in [(2, 5, 8), (8, 3), (2, 5)])
    probs = probs.abs()
    grad_output, out = torch.randn(10, 2, 3, device=device), torch.empty(2, 5, 2, 3, device=device)
    dense, results = compiled(input, weight, probs, grad_output, out)
    torch.testing.assert_close(out, matmul_with_multi_head(input, weight, 2))
    torch.testing.assert_close(dense, out + 1)
    expected = matmul_with_importance(input, weight, probs, grad_output, num_heads=2, top_p=0.0)
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted)


STRIDES = {
    "contiguous": lambda b: torch.full((b, 5, 2, 3), 7.0),
    "columns": lambda b: torch.full((b, 5, 2, 6), 7.0)[..., 2:5],
    "transposed": lambda b: torch.full((5, b, 2, 3), 7.0).transpose(0, 1),
    "heads first": lambda b: torch.full((2, b, 5, 3), 7.0).permute(1, 2, 0, 3),
}


@pytest.mark.parametrize("name", STRIDES)
def test_compile_out_of_any_strides(name, device):
    """Written where it lies, what is between untouched, one graph for any batch."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        lambda input, weight, out: matmul_with_multi_head(input, weight, 2, out=out) + 1,
        fullgraph=True, dynamic=True, backend=counter,
    )  # fmt: skip
    weight = torch.randn(8, 3, device=device)
    for b in (7, 11, 13):  # equal to no other size: those of the first call count as one
        input, out = torch.randn(b, 5, 8, device=device), STRIDES[name](b).to(device)
        whole = out._base if out._base is not None else out
        expected = matmul_with_multi_head(input, weight, 2)
        torch.testing.assert_close(compiled(input, weight, out), expected + 1)
        torch.testing.assert_close(out, expected)
        assert (whole == 7).sum() == whole.numel() - out.numel()
    assert counter.frame_count == 1


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(region, compiled, device):
    """Operands are cast to the region's dtype, scores never; gradients return in the operands' dtype."""
    input = torch.randn(2, 5, 8, device=device, requires_grad=True)
    weight = torch.randn(8, 3, device=device, requires_grad=True)
    probs = torch.full((2, 5), 0.7, device=device)
    lower = torch.nextafter(probs, torch.zeros_like(probs))  # the same number in either half type

    def function(input, weight):
        dense = matmul_with_multi_head(input, weight, 2)
        return dense, matmul_with_importance(input, weight, lower, num_heads=2, top_p=0.7)[0]

    torch._dynamo.reset()
    run = torch.compile(function, fullgraph=True) if compiled else function
    # torch 2.11's on-disk cache of compiled graphs does not tell one autocast dtype from another
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with uncached, torch.autocast(device, dtype=region):
        dense, kept = run(input, weight)
        explicit = matmul_with_importance(input, weight, probs, torch.ones(10, 2, 3, device=device), 2, 0.7)
    assert dense.dtype == kept.dtype == region
    assert kept.shape[0] == 0
    assert [tensor.dtype for tensor in explicit] == [region, torch.float32, torch.float32]
    dense.float().sum().backward()
    assert input.grad.dtype == weight.grad.dtype == torch.float32
    exact = reference.matmul_with_multi_head(input.detach().to(region).double(), weight.detach().to(region).double(), 2)
    assert_as_exact(dense.detach(), exact.to(region), exact)
