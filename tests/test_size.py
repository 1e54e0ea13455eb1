"""Sizes that 32 bits cannot count: operands of more than 2^31 elements, real where memory allows, or mostly absent."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from mhmatmul_ext import combine, matmul_with_importance, matmul_with_multi_head, select_important

ops = torch.ops.mhmatmul
FAR = 2**31 + 64  # elements
NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python does not name


@pytest.fixture
def plain_memory():
    """Without the NaN in fresh memory: filling it twice is most of the time."""
    torch.use_deterministic_algorithms(False)


def available():
    """Bytes that may be had without swapping."""
    return 1024 * int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()).group(1))


@pytest.fixture(scope="module")
def sparse():
    """2^35 bytes, of which those that nobody touches do not exist."""
    return mmap.mmap(-1, 2**35, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)


def far_apart(sparse, tensor, offset):
    """A copy whose first axis steps by more than 2^31 elements, `offset` elements behind the beginning."""
    whole = torch.frombuffer(sparse, dtype=tensor.dtype)
    inner = torch.empty(tensor.shape[1:]).stride()
    view = whole.as_strided(tensor.shape, (FAR, *inner), offset)
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_beyond_32_bits(sparse, dtype, capability):
    """Every operand, in every operator."""
    places = iter(range(0, FAR, 2**16))

    def far(tensor):
        return far_apart(sparse, tensor, next(places))

    input, weight = torch.randn(3, 2, 40).to(dtype), torch.randn(2, 40, 24).to(dtype)
    bias, grad_output = torch.randn(2, 24).to(dtype), torch.randn(3, 2, 24).to(dtype)
    indices, repeated = torch.tensor([2, -1, 0]), torch.tensor([2, 2, 0])
    calls = {
        "product": lambda f: ops.head_matmul(f(input), f(weight), f(bias)),
        "backward": lambda f: ops._head_matmul_backward(f(grad_output), f(input), f(weight)),
        "gathered": lambda f: ops.gather_head_matmul(f(input), f(weight), indices),
        "gathered backward": lambda f: ops._gather_head_matmul_backward(f(grad_output), f(input), f(weight), indices),
        "repeated": lambda f: ops._gather_head_matmul_backward(f(grad_output), f(input), f(weight), repeated),
        "combined": lambda f: combine(f(input[:, 0]), f(input[:, 1]), repeated, bias[0, :3]),
        "selected": lambda f: select_important(f(input[:, 0].sigmoid()), 0.4, 20),
        "selected in a fixed size": lambda f: select_important(f(input[:, 0].sigmoid()), 0.4, 20, capacity=30),
    }
    for name, call in calls.items():
        got, expected = call(far), call(torch.Tensor.contiguous)
        if isinstance(got, torch.Tensor):
            got, expected = [got], [expected]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name
    out = far(torch.zeros_like(grad_output))
    ops._head_matmul_out(input, weight, bias, out)
    assert torch.equal(out, ops.head_matmul(input, weight, bias))


def test_indices_beyond_32_bits(sparse):
    """Rows that lie beyond 2^31 elements and are the 2^31-th and more, of memory that is mostly absent."""
    rows = torch.frombuffer(sparse, dtype=torch.bfloat16)[: 2**34].view(-1, 1, 4)  # 2^32 of them
    indices = torch.tensor([0, 2**31, 2**31 + 1, 2**32 - 1])
    rows[indices] = torch.arange(1.0, 17.0).view(4, 1, 4).bfloat16()
    weight, grad_output = torch.randn(1, 4, 3).bfloat16(), torch.randn(4, 1, 3).bfloat16()
    few, order = rows[indices], torch.arange(4)
    assert torch.equal(ops.gather_head_matmul(rows, weight, indices), ops.head_matmul(few, weight))
    got = ops._gather_head_matmul_wgrad(grad_output, rows, indices)
    assert torch.equal(got, ops._gather_head_matmul_wgrad(grad_output, few, order))
    text = rf"gather_head_matmul: indices must be in [-1, m) = [-1, {2**32}), got {2**32} at position 0"
    with pytest.raises(IndexError, match=re.escape(text)):
        ops.gather_head_matmul(rows, weight, indices[-1:] + 1)


@pytest.mark.parametrize("b", [2**16, 2**33])
def test_more_tokens_than_32_bits_count(b):
    """Shapes and strides of what would be returned, without the memory."""
    s, h, e, capacity = 2**17 + 1, 8, 3, 5
    with torch.device("meta"):
        input, weight, probs = torch.empty(b, s, h), torch.empty(h, e), torch.empty(b, s)
        indices = torch.empty(7, dtype=torch.int64)
    assert matmul_with_multi_head(input, weight, 4).shape == (b, s, 4, e)
    selected, counts = select_important(probs, torch.empty((), device="meta"), None, capacity=capacity)
    assert (selected.shape, counts.shape) == ((b, capacity), (b,))
    output, _, _ = matmul_with_importance(input, weight, probs, None, 4, torch.empty((), device="meta"), None,
                                          capacity=capacity)  # fmt: skip
    assert output.shape == (b, capacity, 4, e)
    combined = combine(input, torch.empty(7, h, device="meta"), indices)
    assert combined.shape == input.shape
    assert combined.stride() == input.stride()
    grads = ops._gather_head_matmul_backward(
        torch.empty(7, 4, e, device="meta"), input.view(b * s, 4, 2), weight.view(4, 2, e), indices
    )
    assert [grad.shape for grad in grads] == [(b * s, 4, 2), (4, 2, e)]


@pytest.mark.slow
@pytest.mark.usefixtures("plain_memory")
def test_more_elements_than_32_bits_count():
    """Input, output, gradient of the input and sum of combine, of 2^31 elements and a few, in bfloat16."""
    needed = 15 * 2**30
    if available() < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, {available() >> 30} are")
    period, nh, hd, e = 1024, 64, 16, 16
    h, m = nh * hd, 2**21 + 1024
    pattern, weight = torch.randn(period, h).bfloat16(), torch.randn(h, e).bfloat16()
    input = torch.empty(m, h, dtype=torch.bfloat16)
    assert input.numel() > 2**31
    input.view(-1, period, h).copy_(pattern)

    expected = matmul_with_multi_head(pattern, weight, nh)
    output = matmul_with_multi_head(input, weight, nh)
    assert output.numel() > 2**31
    assert torch.equal(output[:period], expected)
    assert torch.equal(output[-period:], expected)
    assert all(torch.equal(part, expected) for part in output.split(period))

    rows, heads = input.view(m, nh, hd), weight.view(nh, hd, e)
    indices = torch.tensor([m - 1, 0, 2**20 + 5, -1, 2**21 + 3])
    gathered = ops.gather_head_matmul(rows, heads, indices)
    assert torch.equal(gathered, torch.where((indices < 0)[:, None, None], 0, expected[indices % period]))
    del output

    updates = torch.randn(len(indices), h).bfloat16()
    combined = combine(input, updates, indices)
    wanted = torch.where((indices < 0)[:, None], combined[indices], (input[indices].float() + updates).bfloat16())
    assert torch.equal(combined[indices], wanted)
    combined[indices] = input[indices]
    combined[-1] = input[-1]
    assert all(torch.equal(part, pattern) for part in combined.split(period))
    del combined

    grad_output = torch.randn(len(indices), nh, e).bfloat16()
    grad_input, grad_weight = ops._gather_head_matmul_backward(grad_output, rows, heads, indices)
    few = ops._gather_head_matmul_backward(grad_output, rows[indices], heads, torch.tensor([0, 1, 2, -1, 4]))
    assert torch.equal(grad_weight, few[1])
    kept = indices[indices >= 0]
    assert torch.equal(grad_input[kept], few[0][indices >= 0])
    grad_input[kept] = 0
    assert not any(part.any() for part in grad_input.split(period))
