"""On CPU a row has the same bits whatever is computed beside it: other rows, calls, threads, strides."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from mhmatmul_ext import combine, matmul_with_importance, matmul_with_multi_head, select_important

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


@dataclass
class Everything:
    """Operands for every operator whose numbers are sums, and their results."""

    input: torch.Tensor  # [rows, nh, hd]
    weight: torch.Tensor  # [nh, hd, e]
    bias: torch.Tensor
    grad_output: torch.Tensor  # [rows, nh, e]
    distinct: torch.Tensor
    repeated: torch.Tensor
    probs: torch.Tensor

    @classmethod
    def of(cls, size, dtype):
        input, weight, bias = operands(size, dtype)
        rows = size[0]
        indices = torch.randint(-1, rows, (rows,))
        return cls(
            input, weight, bias, torch.randn(rows, size[1], size[3]).to(dtype), torch.randperm(rows), indices,
            torch.rand(1, rows),
        )  # fmt: skip

    def results(self):
        input, weight, grad_output = self.input, self.weight, self.grad_output
        yield ops.head_matmul(input, weight, self.bias)
        yield from ops._head_matmul_backward(grad_output, input, weight)
        for indices in (self.distinct[::2], self.repeated):
            yield ops.gather_head_matmul(input, weight, indices, self.bias)
            yield from ops._gather_head_matmul_backward(grad_output[: len(indices)], input, weight, indices)
        flat, rows = input.flatten(1), weight.flatten(0, 1)
        k = max(1, len(input) // 3)
        yield from matmul_with_importance(flat[None], rows, self.probs, grad_output[:k], len(weight), 0.0, k)
        leaves = [tensor.clone().requires_grad_() for tensor in (input, weight, self.bias)]
        output = ops.gather_head_matmul(leaves[0], leaves[1], self.repeated, leaves[2])
        yield from torch.autograd.grad(output, leaves, grad_output)
        base, updates, gates = input[:, 0], input[:, -1], self.bias.new_ones(len(input)) / 3
        yield combine(base, updates, self.repeated, gates)
        yield ops._combine_updates_grad(base, self.repeated, gates)
        yield ops._combine_gates_grad(base, updates, self.repeated)


def assert_same(results, expected, what):
    results = list(results)
    assert len(results) == len(expected)
    for i, (got, wanted) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(got, wanted), f"{what}: result {i}"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_threads(size, dtype, capability, threads):
    everything = Everything.of(size, dtype)
    threads(1)
    expected = list(everything.results())
    for count in (2, 3, 4):
        threads(count)
        assert_same(everything.results(), expected, f"{count} threads")


def test_a_hundred_repeats(dtype):
    everything = Everything.of((67, 2, 140, 33), dtype)
    expected = list(everything.results())
    for i in range(100):
        assert_same(everything.results(), expected, f"repeat {i}")


def test_beside_and_after_other_threads(dtype, capability):
    """Eight threads of Python share kernels, scratch memory and the pool of threads below."""
    one = Everything.of((130, 3, 40, 70), dtype)
    expected = list(one.results())
    others = [Everything.of(size, other) for size in SIZES[1:] for other in (torch.float32, torch.bfloat16)]
    with ThreadPoolExecutor(8) as pool:
        beside = [pool.submit(lambda: list(one.results())) for _ in range(4)]
        unrelated = [pool.submit(lambda other=other: list(other.results())) for other in others]
        for future in beside:
            assert_same(future.result(), expected, "beside other threads")
        for other, future in zip(others, unrelated, strict=True):
            assert_same(future.result(), list(other.results()), "in a thread")
    assert_same(one.results(), expected, "after other threads")


def test_deterministic_algorithms_change_and_refuse_nothing(dtype, capability):
    assert torch.are_deterministic_algorithms_enabled()
    everything = Everything.of((130, 3, 140, 33), dtype)
    expected = list(everything.results())
    torch.use_deterministic_algorithms(False)
    assert_same(everything.results(), expected, "not deterministic")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows_per_call", [1, 3, 16, 17, 64])
def test_split_into_calls(size, rows_per_call, dtype, capability):
    input, weight, bias = operands(size, dtype)
    whole = ops.head_matmul(input, weight, bias)
    parts = [ops.head_matmul(part, weight, bias) for part in input.split(rows_per_call)]
    assert torch.equal(torch.cat(parts), whole)
    grad_output = torch.randn_like(whole)
    grad_input, _ = ops._head_matmul_backward(grad_output, input, weight)
    parts = [
        ops._head_matmul_backward(of_output, of_input, weight)[0]
        for of_output, of_input in zip(grad_output.split(rows_per_call), input.split(rows_per_call), strict=True)
    ]
    assert torch.equal(torch.cat(parts), grad_input)


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
        grad_output = torch.randn_like(output)
        _, grad_input, grad_weight = matmul_with_importance(input, weight, probs, grad_output, nh, top_p, top_k)
        rows, heads = input.flatten(0, 1)[indices].unflatten(-1, (nh, hd)), weight.unflatten(0, (nh, hd))
        dense_grad_input, dense_grad_weight = ops._head_matmul_backward(grad_output, rows, heads)
        assert torch.equal(grad_input.flatten(0, 1)[indices], dense_grad_input.flatten(1))
        assert torch.equal(grad_weight, dense_grad_weight.flatten(0, 1))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_strides(size, dtype, capability):
    input, weight, bias = operands(size, dtype)
    expected = ops.head_matmul(input, weight, bias)
    strided = {
        "heads first": lambda rows: rows.transpose(0, 1).contiguous().transpose(0, 1),
        "every other column": lambda rows: torch.stack([rows, rows + 1], -1)[..., 0],
        "offset": lambda rows: torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view_as(rows),
    }
    inputs = {name: lay_out(input) for name, lay_out in strided.items()}
    weights = {
        "transposed": weight.mT.contiguous().mT,
        "slice over columns": torch.cat([weight, weight], 2)[..., : weight.shape[2]],
        "neither": torch.stack([weight, weight + 1], -1)[..., 0],
    }
    grad_output = torch.randn_like(expected)
    gradients = ops._head_matmul_backward(grad_output, input, weight)
    for name, other in inputs.items():
        assert torch.equal(ops.head_matmul(other, weight, bias), expected), f"input {name}"
        assert_same(ops._head_matmul_backward(grad_output, other, weight), gradients, f"input {name}")
    for name, other in weights.items():
        assert torch.equal(ops.head_matmul(input, other, bias), expected), f"weight {name}"
        assert torch.equal(ops.head_matmul(input[:1], other, bias), expected[:1]), f"one row, weight {name}"
        assert_same(ops._head_matmul_backward(grad_output, input, other), gradients, f"weight {name}")
    for name in inputs:
        other = strided[name](grad_output)
        assert_same(ops._head_matmul_backward(other, input, weight), gradients, f"grad_output {name}")
    out = torch.empty(size[0], size[1], size[3] + 3, dtype=dtype)[..., : size[3]]
    ops._head_matmul_out(input, weight, bias, out)
    assert torch.equal(out, expected)


def test_no_column_beyond_the_last_is_written(dtype, capability):
    for e in range(1, 70):
        wide = torch.full((5, 2, e + 40), 7.0, dtype=dtype)
        ops._head_matmul_out(torch.randn(5, 2, 9).to(dtype), torch.randn(2, 9, e).to(dtype), None, wide[..., :e])
        assert (wide[..., e:] == 7).all()
        assert wide[..., :e].isfinite().all()
