"""matmul_with_multi_head and head_matmul against float64, over dtypes, layouts and sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import assert_as_exact, einsum_heads

from mhmatmul_ext import matmul_with_multi_head, reference

SIZES = [  # leading sizes, num_heads, head_dim, e
    ((2, 5), 2, 2, 3),
    ((7,), 4, 16, 8),
    ((), 3, 5, 7),
    ((1, 1), 1, 1, 1),
    ((2, 3, 4), 2, 9, 5),
    ((3, 700), 2, 64, 33),
    ((1030,), 3, 17, 1),
]
EMPTY = [((0, 5), 2, 4, 3), ((2, 0), 2, 4, 3), ((2, 5), 2, 4, 0), ((2, 5), 2, 0, 3), ((0,), 1, 0, 0)]

INPUT_LAYOUTS = {
    "contiguous": lambda x: x,
    "fused projection slice": lambda x: torch.cat([x, x + 1, x - 1], -1)[..., x.shape[-1] : 2 * x.shape[-1]] - 1,
    "rows of a fused projection": lambda x: torch.cat([x, x + 1], -1)[..., : x.shape[-1]],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "every other row": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
}
WEIGHT_LAYOUTS = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.t().contiguous().t(),
    "columns of a wider one": lambda w: torch.cat([w, w + 1], 1)[:, : w.shape[1]],
    "expanded": lambda w: w[:, :1].expand_as(w),
}


def make(sizes, dtype, device):
    leading, num_heads, head_dim, e = sizes
    input = torch.randn(*leading, num_heads * head_dim, dtype=dtype, device=device)
    return input, torch.randn(num_heads * head_dim, e, dtype=dtype, device=device), num_heads


def check(input, weight, num_heads, bias=None):
    output = matmul_with_multi_head(input, weight, num_heads, bias=bias)
    exact = reference.matmul_with_multi_head(
        input.double(), weight.double(), num_heads, bias=None if bias is None else bias.double()
    )
    assert output.is_contiguous()
    assert_as_exact(output, einsum_heads(input, weight, num_heads, bias), exact)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward(sizes, with_bias, dtype, device, capability):
    input, weight, num_heads = make(sizes, dtype, device)
    bias = torch.randn(num_heads, sizes[3], dtype=dtype, device=device) if with_bias else None
    check(input, weight, num_heads, bias)


def test_long_sums_in_few_rows(dtype, device, capability):
    """PyTorch's own sums are at their most exact here. The yardstick is finer than float64, which is tested as well."""
    input, weight, num_heads = make(((8,), 16, 512, 128), dtype, device)
    heads = input.unflatten(-1, (num_heads, -1)), weight.unflatten(0, (num_heads, -1))
    finer = np.einsum("rnd,nde->rne", *(operand.double().cpu().numpy().astype(np.longdouble) for operand in heads))
    exact = torch.from_numpy(finer.astype(np.float64)).to(device)
    assert_as_exact(matmul_with_multi_head(input, weight, num_heads), einsum_heads(input, weight, num_heads), exact)


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(sizes, dtype, device):
    input, weight, num_heads = make(sizes, dtype, device)
    output = matmul_with_multi_head(input, weight, num_heads)
    assert output.shape == (*sizes[0], num_heads, sizes[3])
    assert (output == 0).all()  # an empty sum
    bias = torch.randn(num_heads, sizes[3], dtype=dtype, device=device)
    assert torch.equal(matmul_with_multi_head(input, weight, num_heads, bias=bias), bias.expand_as(output))


@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
def test_input_layouts(layout, dtype, device, capability):
    input, weight, num_heads = make(((4, 6), 2, 8, 5), dtype, device)
    check(INPUT_LAYOUTS[layout](input), weight, num_heads)


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_weight_layouts(layout, dtype, device, capability):
    input, weight, num_heads = make(((4, 6), 2, 8, 5), dtype, device)
    check(input, WEIGHT_LAYOUTS[layout](weight), num_heads)


def test_packed_weight_slice_over_heads(dtype, device, capability):
    """DeepSeek's absorbed projections: slices over heads of one packed parameter, one of them transposed."""
    packed = torch.randn(3, 8 + 6, 5, dtype=dtype, device=device)
    nope, value = packed[:, :8], packed[:, 8:].transpose(1, 2)
    for weight in (nope, value):
        input = torch.randn(2, 7, 3, weight.shape[1], dtype=dtype, device=device)
        plain = torch.einsum("bsnd,nde->bsne", input, weight)
        exact = torch.einsum("bsnd,nde->bsne", input.double(), weight.double())
        assert_as_exact(torch.ops.mhmatmul.head_matmul(input, weight), plain, exact)


def test_half_is_rounded_once(device, capability):
    """Sums that float16 cannot hold on the way come out right: 2048 + 1 + ... + 1 in float32, rounded at the store."""
    input = torch.ones(1, 2049, dtype=torch.float16, device=device)
    weight = torch.ones(2049, 1, dtype=torch.float16, device=device)
    weight[0] = 2048
    assert matmul_with_multi_head(input, weight).item() == 4096
    tiny = torch.full((1, 1), 2.0**-12, dtype=torch.float16, device=device)  # lost if the product is rounded first
    one, bias = torch.ones(1, 1, dtype=torch.float16, device=device), torch.ones_like(tiny)
    half_ulp = torch.full_like(tiny, 2.0**-11)
    input, weight = torch.cat([half_ulp, tiny], 1), torch.cat([one, one])
    assert matmul_with_multi_head(input, weight, bias=bias).item() == 1 + 2.0**-10


OUT_LAYOUTS = {
    "contiguous": lambda *size, **kw: torch.empty(*size, **kw),
    "columns of a wider one": lambda b, s, n, e, **kw: torch.empty(b, s, n, e + 3, **kw)[..., :e],
    "heads first": lambda b, s, n, e, **kw: torch.empty(n, b, s, e, **kw).permute(1, 2, 0, 3),
    "batch and sequence swapped": lambda b, s, n, e, **kw: torch.empty(s, b, n, e, **kw).transpose(0, 1),
    "negated lazily": lambda *size, **kw: torch._neg_view(torch.empty(*size, **kw)),
}


@pytest.mark.parametrize("layout", OUT_LAYOUTS)
def test_out(layout, dtype, device):
    input, weight, num_heads = make(((4, 6), 2, 8, 5), dtype, device)
    out = OUT_LAYOUTS[layout](4, 6, 2, 5, dtype=dtype, device=device)
    version = out._version
    returned = matmul_with_multi_head(input, weight, num_heads, out=out)
    assert returned is out
    assert out._version > version
    assert torch.equal(out, matmul_with_multi_head(input, weight, num_heads))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_out_that_a_graph_has_saved_is_noticed(mode, device):
    input, weight, num_heads = make(((4, 6), 2, 8, 5), torch.float32, device)
    out = torch.ones(4, 6, 2, 5, device=device)
    product = out * torch.ones(5, device=device, requires_grad=True)
    with mode():
        matmul_with_multi_head(input, weight, num_heads, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_out_may_not_share_memory(device):
    input, weight = torch.randn(4, 6, device=device), torch.randn(6, 6, device=device)
    before = input.clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        matmul_with_multi_head(input, weight, out=input.unsqueeze(1))
    with pytest.raises(RuntimeError, match="single memory location"):
        matmul_with_multi_head(input, weight, out=torch.empty(1, 1, 6, device=device).expand(4, 1, 6))
    assert torch.equal(input, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40])
def test_special_values_stay_in_their_row_and_head(value, device):
    input, weight, num_heads = make(((5,), 2, 4, 3), torch.float32, device)
    input[2, 1] = value
    output, plain = matmul_with_multi_head(input, weight, num_heads), einsum_heads(input, weight, num_heads)
    torch.testing.assert_close(output, plain, equal_nan=True)
    if value != 1e-40:
        assert not output[2, 0].isfinite().any()
        output[2, 0] = 0
    assert output.isfinite().all()


def test_repeats_give_the_same_bits(dtype, device):
    input, weight, num_heads = make(((3, 70), 2, 64, 33), dtype, device)
    first = matmul_with_multi_head(input, weight, num_heads)
    assert all(torch.equal(first, matmul_with_multi_head(input, weight, num_heads)) for _ in range(5))
