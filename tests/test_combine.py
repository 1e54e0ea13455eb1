"""combine against the reference: values, gradients in every dtype, order of sums, refusals of indices."""

from __future__ import annotations

import pytest
import torch
from support import assert_as_exact

from mhmatmul_ext import combine, reference, select_important

ops = torch.ops.mhmatmul
INDICES = [3, -1, 0, 3, 5, 3, -1, 0]
NAN = float("nan")


def operands(device, dtype=torch.float32, d=7, gated=True, indices=INDICES):
    t = len(indices)
    base, updates, gates = (torch.randn(size, device=device).to(dtype) for size in [(2, 3, d), (t, d), (t,)])
    return base, updates, torch.tensor(indices, dtype=torch.int64, device=device), gates if gated else None


def plain(base, updates, indices, gates=None):
    """What one writes without this package."""
    added = updates if gates is None else updates * gates[:, None]
    named = indices >= 0
    return base.flatten(0, -2).index_add(0, indices[named], added[named]).view_as(base)


def assert_combined(base, updates, indices, gates):
    before = [None if tensor is None else tensor.clone() for tensor in (base, updates, indices, gates)]
    output = combine(base, updates, indices, gates)
    doubled = (base.double(), updates.double(), indices, None if gates is None else gates.double())
    assert_as_exact(output, plain(base, updates, indices, gates), reference.combine(*doubled), ulps=1)
    assert output.is_contiguous()
    assert output.data_ptr() != base.data_ptr() or output.numel() == 0
    for tensor, value in zip((base, updates, indices, gates), before, strict=True):
        assert tensor is None or torch.equal(tensor, value), "an operand was written"
    assert torch.equal(output, combine(base, updates, indices, gates)), "another result the second time"
    return output


@pytest.mark.parametrize("d", [1, 7, 33, 300])
@pytest.mark.parametrize("gated", [False, True])
def test_values(d, gated, dtype, device):
    base, updates, indices, gates = operands(device, dtype, d, gated)
    output = assert_combined(base, updates, indices, gates)
    untouched = [j for j in range(6) if j not in INDICES]
    assert torch.equal(output.flatten(0, 1)[untouched], base.flatten(0, 1)[untouched])
    rows = assert_combined(base.flatten(0, 1), updates, indices, gates)
    assert torch.equal(rows, output.flatten(0, 1))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 4)])
def test_empty(shape, device):
    base = torch.ones(shape, device=device)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    assert torch.equal(combine(base, base.new_ones(0, shape[-1]), nothing), base)
    padding = torch.tensor([-1, -1], device=device)
    gates = base.new_ones(2)
    assert torch.equal(combine(base, base.new_ones(2, shape[-1]), padding, gates), base)


def test_padding_adds_nothing_whatever_it_holds(device):
    base, updates, indices, gates = operands(device)
    padding = indices < 0
    expected = combine(base, updates, indices, gates)
    updates[padding], gates[padding] = NAN, NAN
    assert torch.equal(combine(base, updates, indices, gates), expected)
    leaves = [tensor.requires_grad_() for tensor in (base, updates, gates)]
    _, grad_updates, grad_gates = torch.autograd.grad(combine(base, updates, indices, gates).sum(), leaves)
    assert (grad_updates[padding] == 0).all()
    assert (grad_gates[padding] == 0).all()


@pytest.mark.parametrize("transform", ["autograd", "vjp"])
def test_padding_has_no_gradient_whatever_it_holds(transform, device):
    base, updates, indices, gates = operands(device)
    updates[1], gates[6] = NAN, NAN
    grad_output = torch.randn_like(base)
    grad_output[0, 0] = NAN  # the row that an index below zero might be taken for
    if transform == "vjp":
        _, pull_back = torch.func.vjp(lambda *given: combine(*given[:2], indices, given[2]), base, updates, gates)
        _, grad_updates, grad_gates = pull_back(grad_output)
    else:
        leaves = [tensor.requires_grad_() for tensor in (base, updates, gates)]
        combined = combine(base, updates, indices, gates)
        _, grad_updates, grad_gates = torch.autograd.grad(combined, leaves, grad_output)
    assert (grad_updates[indices < 0] == 0).all()
    assert (grad_gates[indices < 0] == 0).all()


def test_one_rounding(device):
    """256 ones of bfloat16 beside 256: adding them one by one in bfloat16 would stay at 256."""
    base = torch.full((1, 1), 256.0, dtype=torch.bfloat16, device=device)
    ones = torch.ones(256, 1, dtype=torch.bfloat16, device=device)
    assert combine(base, ones, torch.zeros(256, dtype=torch.int64, device=device)).item() == 512


def test_sums_are_in_order(device):
    """1e8 + 1 - 1e8 is 0 in float32, 1e8 - 1e8 + 1 is 1."""
    base, indices = torch.zeros(1, 1, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    for updates, expected in [([1e8, 1.0, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)]:
        assert combine(base, torch.tensor(updates, device=device)[:, None], indices).item() == expected


def test_many_rows(dtype, device):
    """More than one task for each thread; every row named several times, in no order."""
    m, t, d = 4096, 10_000, 65
    indices = torch.randint(-1, m, (t,)).tolist()
    base, updates, gates = (torch.randn(size, device=device).to(dtype) for size in [(m, d), (t, d), (t,)])
    assert_combined(base, updates, torch.tensor(indices, device=device), gates)


@pytest.mark.parametrize(
    "layout",
    [lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: torch.stack([x, x], -1)[..., 0],
     lambda x: x[:1].expand_as(x)],
    ids=["transposed", "strided", "expanded"],
)  # fmt: skip
def test_layouts(layout, device):
    base, updates, indices, gates = operands(device)
    base, updates, gates = layout(base), layout(updates), layout(gates[:, None])[:, 0]
    assert_combined(base, updates, torch.stack([indices, indices], -1)[:, 0], gates)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients(gated, dtype, device):
    base, updates, indices, gates = operands(device, dtype, 129, gated)
    grad_output = torch.randn_like(base)

    def gradients(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (base, updates, gates) if x is not None]
        output = function(*leaves[:2], indices, *leaves[2:])
        return torch.autograd.grad(output, leaves, grad_output.to(dtype))

    ours, others = gradients(combine, dtype), gradients(plain, dtype)
    exact = gradients(reference.combine, torch.float64)
    for got, other, expected in zip(ours, others, exact, strict=True):
        assert_as_exact(got, other, expected)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_only_the_gradients_asked_for(needs, device):
    base, updates, indices, gates = operands(device)
    saved = []
    for tensor, need in zip((base, updates, gates), needs, strict=True):
        tensor.requires_grad_(bool(need))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        output = combine(base, updates, indices, gates)
    assert base.data_ptr() not in saved
    assert (updates.data_ptr() in saved) == bool(needs[2])
    assert (gates.data_ptr() in saved) == bool(needs[1])
    output.sum().backward()  # an expanded gradient
    for tensor, need in zip((base, updates, gates), needs, strict=True):
        assert (tensor.grad is not None) == bool(need)


def test_vmap(device):
    base, updates, indices, gates = operands(device)
    batch = [torch.stack([x, 2 * x, -x]) for x in (base, updates, gates)]
    got = torch.vmap(lambda b, u, g: combine(b, u, indices, g))(*batch)
    for i in range(3):
        torch.testing.assert_close(got[i], combine(batch[0][i], batch[1][i], indices, batch[2][i]))


@pytest.mark.parametrize("name", ["combine", "_combine_updates_grad", "_combine_gates_grad"])
@pytest.mark.parametrize("wrong", [-2, 6])
def test_index_that_names_no_row(name, wrong):
    base, updates, indices, gates = operands("cpu")
    indices[4] = wrong
    arguments = {
        "combine": (base, updates, indices, gates),
        "_combine_updates_grad": (base, indices, gates),
        "_combine_gates_grad": (base, updates, indices),
    }
    text = rf"^{name}: indices must be in \[-1, m\) = \[-1, 6\), got {wrong} at position 4"
    with pytest.raises(IndexError, match=text):
        getattr(ops, name)(*arguments[name])


@pytest.mark.gpu
def test_index_that_names_no_row_is_no_wild_access():
    base, updates, indices, gates = operands("cuda")
    expected = combine(base, updates, indices, gates)
    wild = torch.where(indices < 0, torch.tensor([6, 1 << 40] * 4, device="cuda"), indices)
    assert torch.equal(combine(base, updates, wild, gates), expected)
    assert torch.equal(ops._combine_updates_grad(base, wild, gates), ops._combine_updates_grad(base, indices, gates))
    assert torch.equal(ops._combine_gates_grad(base, updates, wild), ops._combine_gates_grad(base, updates, indices))


def test_puts_back_what_a_selection_took(device):
    input, probs = torch.randn(3, 9, 4, device=device), torch.rand(3, 9, device=device)
    for capacity in (None, 5):
        indices = select_important(probs, 0.4, 4, capacity=capacity)[0].flatten()
        taken = input.flatten(0, 1)[indices.clamp_min(0)]
        output = combine(input, taken, indices)
        expected = input.clone()
        expected.view(-1, 4)[indices[indices >= 0]] *= 2
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_keeps_the_widest_dtype(compiled, device):
    """A float32 residual stream stays so when a block hands over bfloat16."""
    base, updates, indices, gates = operands(device)
    updates = updates.bfloat16().requires_grad_()
    torch._dynamo.reset()
    run = torch.compile(combine, fullgraph=True) if compiled else combine
    with torch.autocast(device, dtype=torch.bfloat16):
        output = run(base, updates, indices, gates)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, combine(base, updates.float(), indices, gates))
    output.sum().backward()
    assert updates.grad.dtype == torch.bfloat16
