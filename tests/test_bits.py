"""On CPU a row has the same bits whatever is computed beside it: other rows, calls, threads, strides."""

from __future__ import annotations

import pytest
import torch

from mhmatmul_ext import matmul_with_importance, matmul_with_multi_head, select_important

ops = torch.ops.mhmatmul
SIZES = [(130, 3, 40, 70), (100, 2, 600, 33), (70, 1, 1030, 5), (300, 4, 64, 128), (67, 2, 7, 600)]  # rows, nh, hd, e


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def operands(size, dtype):
    rows, nh, hd, e = size
    return torch.randn(rows, nh, hd).to(dtype), torch.randn(nh, hd, e).to(dtype), torch.randn(nh, e).to(dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_threads(size, dtype, capability, threads):
    input, weight, bias = operands(size, dtype)
    grad_output = torch.randn(size[0], size[1], size[3]).to(dtype)
    indices = torch.randperm(size[0])[: size[0] // 2]

    def results():
        yield ops.head_matmul(input, weight, bias)
        yield from ops._head_matmul_backward(grad_output, input, weight)
        yield ops.gather_head_matmul(input, weight, indices)
        yield from ops._gather_head_matmul_backward(grad_output[: len(indices)], input, weight, indices)

    threads(1)
    expected = list(results())
    for count in (2, 3, 4):
        threads(count)
        for got, wanted in zip(results(), expected, strict=True):
            assert torch.equal(got, wanted), f"{count} threads"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows_per_call", [1, 3, 16, 17, 64])
def test_split_into_calls(size, rows_per_call, dtype, capability):
    input, weight, bias = operands(size, dtype)
    whole = ops.head_matmul(input, weight, bias)
    parts = [ops.head_matmul(part, weight, bias) for part in input.split(rows_per_call)]
    assert torch.equal(torch.cat(parts), whole)
    transposed = weight.transpose(1, 2)
    whole = ops.head_matmul(whole, transposed)
    parts = [ops.head_matmul(part, transposed) for part in torch.cat(parts).split(rows_per_call)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("hd", [1, 31, 33, 64, 129, 130])
def test_any_numbers_in_few_rows(hd, dtype, capability):
    """Subnormal numbers, zeros of both signs and infinities too: a few rows may take another way than many."""
    tiny = torch.finfo(dtype).tiny
    for scale in (1.0, tiny**0.5, tiny):
        input, weight = (torch.randn(20, 2, hd) * scale).to(dtype), (torch.randn(2, hd, 96) * scale).to(dtype)
        input[torch.rand(input.shape) < 0.2] = -0.0
        weight[torch.rand(weight.shape) < 0.2] = 0.0
        input[17, 0, 0], weight[1, 0, 5] = float("inf"), float("-inf")
        whole = ops.head_matmul(input, weight)
        for rows in (1, 2, 3, 5, 16):
            got = torch.cat([ops.head_matmul(part, weight) for part in input.split(rows)])
            torch.testing.assert_close(got, whole, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(got.signbit(), whole.signbit()), f"{rows} rows a call"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_selected_rows_are_the_dense_rows(size, dtype, capability):
    rows, nh, hd, e = size
    input, weight = torch.randn(2, rows, nh * hd).to(dtype), torch.randn(nh * hd, e).to(dtype)
    probs = torch.rand(2, rows)
    for top_p, top_k in [(0.5, None), (0.0, rows // 8), (0.99, 3)]:
        output, _, _ = matmul_with_importance(input, weight, probs, num_heads=nh, top_p=top_p, top_k=top_k)
        indices, _ = select_important(probs, top_p, top_k)
        assert torch.equal(output, matmul_with_multi_head(input, weight, nh).flatten(0, 1)[indices])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_strides(size, dtype, capability):
    input, weight, bias = operands(size, dtype)
    expected = ops.head_matmul(input, weight, bias)
    inputs = {
        "heads first": input.transpose(0, 1).contiguous().transpose(0, 1),
        "every other column": torch.stack([input, input + 1], -1)[..., 0],
        "offset": torch.cat([input.new_zeros(1), input.flatten()])[1:].view_as(input),
    }
    weights = {
        "transposed": weight.mT.contiguous().mT,
        "slice over columns": torch.cat([weight, weight], 2)[..., : weight.shape[2]],
        "neither": torch.stack([weight, weight + 1], -1)[..., 0],
    }
    for name, other in inputs.items():
        assert torch.equal(ops.head_matmul(other, weight, bias), expected), f"input {name}"
    for name, other in weights.items():
        assert torch.equal(ops.head_matmul(input, other, bias), expected), f"weight {name}"
        assert torch.equal(ops.head_matmul(input[:1], other, bias), expected[:1]), f"one row, weight {name}"
    out = torch.empty(size[0], size[1], size[3] + 3, dtype=dtype)[..., : size[3]]
    ops._head_matmul_out(input, weight, bias, out)
    assert torch.equal(out, expected)


def test_no_column_beyond_the_last_is_written(dtype, capability):
    for e in range(1, 70):
        wide = torch.full((5, 2, e + 40), 7.0, dtype=dtype)
        ops._head_matmul_out(torch.randn(5, 2, 9).to(dtype), torch.randn(2, 9, e).to(dtype), None, wide[..., :e])
        assert (wide[..., e:] == 7).all()
        assert wide[..., :e].isfinite().all()
