"""Derivatives: reverse mode to second order, only what is asked for, under torch.compile and autocast."""

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


def differentiable_calls(device):
    """Every differentiable operator, with operands for it."""
    make = operands(device)
    indices = torch.tensor(INDICES, device=device)
    probs = torch.rand(2, 5, device=device)
    t = len(INDICES)
    return {
        "head_matmul": (ops.head_matmul, (make(2, 3, 2, 4), make(2, 4, 5), make(2, 5))),
        "head_matmul, no leading dimension": (ops.head_matmul, (make(2, 4), make(2, 4, 5), make(2, 5))),
        "_head_matmul_wgrad": (ops._head_matmul_wgrad, (make(3, 2, 5), make(3, 2, 4))),
        "_head_matmul_backward": (ops._head_matmul_backward, (make(3, 2, 5), make(3, 2, 4), make(2, 4, 5))),
        "multi_head_matmul": (lambda x, w: ops.multi_head_matmul(x, w, 2), (make(2, 3, 8), make(8, 5))),
        "gather_head_matmul": (
            lambda x, w, c: ops.gather_head_matmul(x, w, indices, c),
            (make(4, 2, 3), make(2, 3, 5), make(2, 5)),
        ),
        "_gather_head_matmul_dgrad": (
            lambda g, w: ops._gather_head_matmul_dgrad(g, w, indices, 4),
            (make(t, 2, 5), make(2, 3, 5)),
        ),
        "_gather_head_matmul_wgrad": (
            lambda g, x: ops._gather_head_matmul_wgrad(g, x, indices),
            (make(t, 2, 5), make(4, 2, 3)),
        ),
        "_gather_head_matmul_backward": (
            lambda g, x, w: ops._gather_head_matmul_backward(g, x, w, indices),
            (make(t, 2, 5), make(4, 2, 3), make(2, 3, 5)),
        ),
        "combine": (lambda x, u, g: ops.combine(x, u, indices, g), (make(2, 2, 3), make(t, 3), make(t))),
        "combine, no gates": (lambda x, u: ops.combine(x, u, indices), (make(4, 3), make(t, 3))),
        "_combine_updates_grad": (lambda z, g: ops._combine_updates_grad(z, indices, g), (make(2, 2, 3), make(t))),
        "_combine_updates_grad, no gates": (lambda z: ops._combine_updates_grad(z, indices, None), (make(4, 3),)),
        "_combine_gates_grad": (lambda z, u: ops._combine_gates_grad(z, u, indices), (make(2, 2, 3), make(t, 3))),
        "matmul_with_multi_head": (
            lambda x, w, c: matmul_with_multi_head(x, w, 2, bias=c),
            (make(2, 3, 8), make(8, 5), make(2, 5)),
        ),
        "matmul_with_importance": (
            lambda x, w: matmul_with_importance(x, w, probs, num_heads=2, top_p=0.3)[0],
            (make(2, 5, 8), make(8, 3)),
        ),
        "matmul_with_importance, static": (
            lambda x, w: matmul_with_importance(x, w, probs, num_heads=2, top_p=0.3, capacity=4)[0],
            (make(2, 5, 8), make(8, 3)),
        ),
    }


CALLS = list(differentiable_calls("cpu"))


@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives(name, device):
    function, tensors = differentiable_calls(device)[name]
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", CALLS)
def test_torch_func(name, device):
    """Functorch goes through the formulas; they agree with the kernels' backward."""
    function, tensors = differentiable_calls(device)[name]

    def total(*arguments):
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((output.square()).sum() for output in outputs)

    positions = tuple(range(len(tensors)))
    ours = torch.autograd.grad(total(*tensors), tensors)
    for got, expected in zip(torch.func.grad(total, positions)(*tensors), ours, strict=True):
        torch.testing.assert_close(got, expected)


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


OPCHECKED = {
    "head_matmul": lambda d, g: ops_args(d, g, (2, 3, 2, 4), (2, 4, 5), (2, 5)),
    "_head_matmul_wgrad": lambda d, g: ops_args(d, g, (3, 2, 5), (3, 2, 4)),
    "_head_matmul_backward": lambda d, g: ops_args(d, g, (3, 2, 5), (3, 2, 4), (2, 4, 5)),
    "gather_head_matmul": lambda d, g: (*ops_args(d, g, (4, 2, 3), (2, 3, 5)), torch.tensor(INDICES, device=d)),
    "_gather_head_matmul_dgrad": lambda d, g: (
        *ops_args(d, g, (6, 2, 5), (2, 3, 5)), torch.tensor(INDICES, device=d), 4,
    ),
    "_gather_head_matmul_wgrad": lambda d, g: (
        *ops_args(d, g, (6, 2, 5), (4, 2, 3)), torch.tensor(INDICES, device=d),
    ),
    "_gather_head_matmul_backward": lambda d, g: (
        *ops_args(d, g, (6, 2, 5), (4, 2, 3), (2, 3, 5)), torch.tensor(INDICES, device=d),
    ),
    "combine": lambda d, g: (
        *ops_args(d, g, (2, 2, 3), (6, 3)), torch.tensor(INDICES, device=d), *ops_args(d, g, (6,)),
    ),
    "_combine_updates_grad": lambda d, g: (
        *ops_args(d, g, (4, 3)), torch.tensor(INDICES, device=d), *ops_args(d, g, (6,)),
    ),
    "_combine_gates_grad": lambda d, g: (*ops_args(d, g, (4, 3), (6, 3)), torch.tensor(INDICES, device=d)),
    "multi_head_matmul": lambda d, g: (*ops_args(d, g, (2, 5, 8), (8, 3)), 2),
    "select_important": lambda d, g: (torch.rand(2, 5, device=d), 0.5, 3),
    "_select_important_tensor": lambda d, g: (torch.rand(2, 5, device=d), torch.tensor(0.5, device=d), 3),
    "select_important_static": lambda d, g: (torch.rand(2, 5, device=d), torch.tensor(0.5, device=d), 3, 2),
    "importance_matmul": lambda d, g: (*ops_args(d, g, (2, 5, 8), (8, 3)), torch.rand(2, 5, device=d), 2, 0.5, 3),
}  # fmt: skip


def ops_args(device, requires_grad, *sizes):
    return tuple(torch.randn(size, device=device, requires_grad=requires_grad) for size in sizes)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name, requires_grad, device):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs of torch's own kernels as well
    result = torch.library.opcheck(getattr(ops, name).default, OPCHECKED[name](device, requires_grad))
    assert set(result.values()) == {"SUCCESS"}


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
