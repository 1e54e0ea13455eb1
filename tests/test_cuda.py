"""What only a GPU can show: the kernel for Hopper against plain PyTorch, bits, graphs, streams, very large tensors."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from support import assert_as_exact, einsum_heads

from mhmatmul_ext import matmul_with_importance, matmul_with_multi_head, select_important
from mhmatmul_ext.reference import select_important as specified

ops = torch.ops.mhmatmul
pytestmark = pytest.mark.gpu
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

# rows, nh, hd, e: large enough for the persistent kernel's dense form, one of each tile and of what does not divide;
# blocks that stay with their head and runs of rows; heads packed by two and by four; results that go through shared
# memory, since rows end within a sector of memory, by a tile for each warpgroup and by one for both; a head's weight in
# registers
DENSE = [
    (12608, 12, 64, 64),
    (8192, 16, 128, 128),
    (4001, 16, 72, 200),
    (2500, 40, 104, 264),
    (1024, 64, 128, 512),
    (4096, 16, 256, 256),
    (9001, 9, 8, 72),
    (3000, 70, 128, 128),
    (16001, 32, 32, 32),
    (20000, 24, 16, 16),
    (2048, 32, 512, 128),
    (2100, 24, 384, 136),
    (8192, 4, 512, 512),
    (1000, 100, 104, 456),
    (4001, 7, 128, 512),
    (3001, 32, 192, 192),
    (4001, 32, 120, 120),
    (3000, 33, 200, 248),
    (4096, 16, 448, 448),
    (9001, 24, 72, 40),
]
# rows, heads or columns that do not lie at multiples of 16 bytes, which the copy engine cannot take: A, B, C or all, in
# words of two elements and element by element; a long head, a wide tile and a narrow one, in part; few rows, which are
# cuBLAS's
UNALIGNED = [
    (4096, 32, 127, 128),
    (4096, 32, 128, 127),
    (4096, 32, 128, 34),
    (3001, 8, 100, 100),
    (16003, 12, 65, 65),
    (9001, 9, 67, 131),
    (9000, 9, 66, 130),
    (2500, 40, 500, 36),
    (20001, 8, 300, 65),
    (66003, 3, 33, 1),
    (66003, 3, 2, 8),
    (2003, 12, 65, 65),
    (3003, 5, 67, 131),
    (130, 31, 1, 129),
    (1, 1, 300, 65),
]
# so small that every tile has a block of its own: of 64 columns, of 128
ONE_WAVE = [
    (1, 128, 128, 512),
    (64, 128, 128, 512),
    (60, 128, 512, 128),
    (17, 3, 64, 72),
    (200, 5, 264, 136),
    (1000, 8, 128, 128),
    (65, 2, 40, 24),
    (300, 4, 512, 512),
    (130, 100, 72, 160),
]
# as small as each kernel is still taken for, for tools that make it a hundred times slower: one wave, persistent, the
# weight in registers, packed heads, long heads, through shared memory by two tiles and by one, 192 columns, at no
# multiples of 16 bytes
SMALL = [
    (64, 16, 128, 128),
    (600, 120, 128, 128),
    (200, 128, 128, 512),
    (1500, 64, 32, 32),
    (2000, 30, 512, 128),
    (600, 120, 120, 120),
    (1000, 33, 200, 256),
    (700, 40, 128, 192),
    (1000, 18, 70, 130),
    (1000, 33, 67, 131),
]
# float32 that may be rounded to TF32, weights held and, for heads over 128, streamed: each tile, what does not divide,
# one group of tiles for each block and several; columns of a tile that are not there, and inputs; blocks in pairs and,
# where there are three or five tiles side by side, without. Few rows, few columns for long heads and rows at no
# multiples of 16 bytes, or 32 in the output, are cuBLAS's.
TF32_HELD = [
    (16384, 32, 32, 32),
    (700, 264, 32, 32),
    (16001, 16, 32, 8),
    (6001, 96, 20, 40),
    (12001, 12, 64, 64),
    (3001, 33, 64, 104),
    (6000, 40, 64, 96),
    (8192, 16, 64, 256),
    (1500, 16, 4, 1024),
    (1001, 8, 64, 488),
    (3000, 50, 96, 40),
    (8192, 16, 128, 128),
    (4001, 24, 100, 192),
    (4001, 16, 72, 224),
    (1024, 128, 128, 512),
    (1000, 66, 128, 1024),
]
TF32_STREAMED = [
    (3000, 66, 256, 256),
    (4000, 44, 256, 384),
    (4001, 34, 252, 248),
    (2001, 3, 140, 640),
    (2000, 8, 512, 512),
    (1001, 6, 640, 632),
    (8192, 1, 1000, 1000),
]
TF32 = TF32_HELD + TF32_STREAMED
CUBLAS_TF32 = [
    (64, 16, 128, 128),
    (4096, 32, 33, 64),
    (4096, 32, 64, 33),
    (3001, 33, 64, 100),
    (256, 4, 512, 512),
    (4096, 32, 512, 128),
]
# of rows that are wider
ODD_TF32 = [(3000, 64, 32, 29), (2001, 16, 64, 61), (3000, 16, 128, 127), (3000, 16, 256, 253)]
# as SMALL
SMALL_TF32 = [
    (1000, 64, 32, 32),
    (700, 264, 32, 32),
    (400, 64, 64, 64),
    (256, 64, 128, 64),
    (200, 64, 64, 256),
    (800, 40, 128, 128),
    (128, 64, 128, 512),
    (3000, 16, 256, 256),
    (501, 22, 260, 248),
    (501, 16, 140, 384),
]
# rows to gather from, rows gathered, nh, hd, e: every number of blocks of k, tiles in part, one row, one head; a little
# for those tools, here and below
GATHERED = [
    (700, 512, 3, 64, 64),
    (64, 4096, 7, 128, 128),
    (3000, 1000, 5, 264, 136),
    (300, 1, 2, 512, 520),
    (90, 200, 1, 8, 8),
    (200, 333, 4, 24, 40),
    (2000, 2000, 32, 128, 128),
    (3000, 2000, 32, 32, 32),
    (300, 700, 8, 16, 16),
    (700, 512, 3, 65, 67),
    (64, 4096, 7, 128, 129),
    (3000, 1000, 5, 262, 136),
    (2000, 1500, 20, 120, 120),
    (2000, 1500, 20, 200, 192),
    pytest.param((200, 333, 4, 72, 136), id="little"),
]


def some_indices(rows: int, t: int) -> torch.Tensor:
    """Repeated, in any order, some of them naming no row."""
    indices = torch.randint(0, rows, (t,), device="cuda")
    indices[torch.rand(t, device="cuda") < 0.1] = -1
    indices[torch.rand(t, device="cuda") < 0.05] = rows
    return indices


def check_product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    output = ops.head_matmul(input, weight, bias)
    exact = torch.einsum("mnd,nde->mne", input.double(), weight.double()) + bias.double()
    assert_as_exact(output, torch.einsum("mnd,nde->mne", input, weight) + bias, exact)


@pytest.mark.parametrize("size", DENSE + UNALIGNED + ONE_WAVE, ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "shifted", "shifted by words"])
@halves
def test_dense(size, layout, dtype):
    m, nh, hd, e = size
    input = torch.randn(m, nh, hd, device="cuda", dtype=dtype)
    weight = torch.randn(nh, hd, e, device="cuda", dtype=dtype)
    bias = torch.randn(nh, e, device="cuda", dtype=dtype)
    if layout == "transposed":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        input = torch.randn(m, nh, hd + 24, device="cuda", dtype=dtype)[..., 8 : hd + 8]
        weight = torch.randn(nh, hd, e + 16, device="cuda", dtype=dtype)[..., :e]
    elif layout == "shifted":
        input = torch.randn(m * nh * hd + 3, device="cuda", dtype=dtype)[3:].view(m, nh, hd)
        weight = torch.randn(nh * hd * e + 1, device="cuda", dtype=dtype)[1:].view(nh, hd, e)
    elif layout == "shifted by words":
        input = torch.randn(m, nh, hd + 10, device="cuda", dtype=dtype)[..., 2 : hd + 2]
        weight = torch.randn(nh, e, hd + 6, device="cuda", dtype=dtype)[..., 4 : hd + 4].transpose(1, 2)
    check_product(input, weight, bias)


@pytest.mark.parametrize("size", SMALL, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@halves
def test_a_little_of_each_kernel(size, transposed, dtype):
    """For sanitize_gpu.py."""
    m, nh, hd, e = size
    input = torch.randn(m, nh, hd, device="cuda", dtype=dtype)
    weight = torch.randn(nh, hd, e, device="cuda", dtype=dtype)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    check_product(input, weight, torch.randn(nh, e, device="cuda", dtype=dtype))


@pytest.fixture
def tf32():
    """float32 products may be rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def tf32_numbers(*size: int) -> torch.Tensor:
    """That rounding to TF32 leaves as they are: the product is then as exact as one of float32."""
    return (torch.randn(*size, device="cuda").view(torch.int32) & ~0x1FFF).view(torch.float32)


def check_tf32(input: torch.Tensor, weight: torch.Tensor) -> None:
    bias = torch.randn(weight.shape[0], weight.shape[2], device="cuda")
    output = ops.head_matmul(input, weight, bias)
    exact = torch.einsum("mnd,nde->mne", input.double(), weight.double()) + bias.double()
    # The matrix unit cuts what it adds: hundreds of times less than rounding to TF32 would.
    assert_as_exact(output, torch.einsum("mnd,nde->mne", input, weight) + bias, exact, ulps=16)


@pytest.mark.parametrize("size", TF32 + CUBLAS_TF32, ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "shifted"])
def test_tf32(size, layout, tf32):
    m, nh, hd, e = size
    input, weight = tf32_numbers(m, nh, hd), tf32_numbers(nh, hd, e)
    if layout == "transposed":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        input, weight = tf32_numbers(m, nh, hd + 12)[..., 4 : hd + 4], tf32_numbers(nh, hd, e + 8)[..., :e]
    elif layout == "shifted":
        input = tf32_numbers(m * nh * hd + 3)[3:].view(m, nh, hd)
    check_tf32(input, weight)


@pytest.mark.parametrize("size", SMALL_TF32, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_little_of_tf32(size, transposed, tf32):
    """For sanitize_gpu.py."""
    m, nh, hd, e = size
    weight = tf32_numbers(nh, e, hd).transpose(1, 2) if transposed else tf32_numbers(nh, hd, e)
    check_tf32(tf32_numbers(m, nh, hd), weight)


@pytest.mark.parametrize("size", TF32, ids=str)
def test_tf32_is_to_nearest(size, tf32):
    """As far from exact as the product of operands that were rounded to nearest; cut operands lie twice as far off."""
    m, nh, hd, e = size
    input, weight = torch.randn(m, nh, hd, device="cuda"), torch.randn(nh, hd, e, device="cuda")
    exact = torch.einsum("mnd,nde->mne", input.double(), weight.double())

    def nearest(tensor):
        return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()

    rounded = torch.einsum("mnd,nde->mne", nearest(input), nearest(weight))
    error = (ops.head_matmul(input, weight) - exact).abs()
    assert error.mean() <= 1.02 * (rounded - exact).abs().mean()
    assert error.max() <= 1.1 * (rounded - exact).abs().max()


@pytest.mark.parametrize("size", TF32 + ODD_TF32, ids=str)
def test_nothing_beside_the_result_is_written_in_tf32(size, tf32):
    """Nor are bits others for what lies there; cuBLAS's may be, which has rows at no multiples of 32 bytes."""
    m, nh, hd, e = size
    width = (e + 7) // 8 * 8
    input, wide = tf32_numbers(m, nh, hd), tf32_numbers(nh, hd, width)
    expected = ops.head_matmul(input, wide)[..., :e]
    for before, behind in ((8, 0), (0, 8), (8, 16), (4, 0), (0, 4), (8, 4)):
        whole = torch.full((m + 2, nh, before + width + behind), 7.0, device="cuda")
        out = whole[1:-1, :, before : before + e]
        ops._head_matmul_out(input, wide[..., :e], None, out)
        if before % 8 == behind % 8 == 0:
            assert torch.equal(out, expected)
        else:
            assert_as_exact(out, expected, expected.double(), ulps=16)
        out.fill_(7)
        assert (whole == 7).all(), f"{before} before, {behind} behind"


@pytest.mark.parametrize(
    "size",
    [
        (16384, 32, 32, 32),
        (6000, 40, 64, 96),
        (8192, 16, 128, 128),
        (4096, 128, 128, 512),
        (8192, 20, 256, 256),
        (4000, 12, 512, 640),
    ],
    ids=str,
)
def test_rows_do_not_meet_in_tf32(size, tf32):
    """The same bits whatever rows are beside a row, and what is not finite stays in its row, and in its head."""
    m, nh, hd, e = size
    input, weight = torch.randn(m, nh, hd, device="cuda"), torch.randn(nh, hd, e, device="cuda")
    whole = ops.head_matmul(input, weight)
    assert torch.equal(ops.head_matmul(input, weight), whole), "repeated"
    assert torch.equal(ops.head_matmul(input[77:], weight), whole[77:])
    input[100, 5], input[1000, 6], weight[10] = torch.inf, torch.nan, torch.nan
    output = ops.head_matmul(input, weight)
    assert not output[100, 5].isfinite().any()
    assert output[1000, 6].isnan().all()
    assert output[:, 10].isnan().all()
    output[100, 5], output[1000, 6], output[:, 10] = whole[100, 5], whole[1000, 6], whole[:, 10]
    assert torch.equal(output, whole)


def test_when_tf32_is_taken(tf32):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper")

    def kernel(m, nh, hd, e, width=None):
        width = width or e
        input, weight = torch.randn(m, nh, hd, device="cuda"), torch.randn(nh, hd, width, device="cuda")[..., :e]
        out = torch.empty(m, nh, width, device="cuda")[..., :e]
        names = kernels_of(lambda: ops._head_matmul_out(input, weight, None, out))
        return next((own for own in ("held", "streamed") if any(f"tf32_{own}" in name for name in names)), None)

    for size in TF32_HELD:
        assert kernel(*size) == "held", size
    for size in TF32_STREAMED:
        assert kernel(*size) == "streamed", size
    for size in SMALL_TF32:
        assert kernel(*size) is not None, size
    for size in ODD_TF32:
        assert kernel(*size, width=(size[3] + 7) // 8 * 8) is not None, size
    for size in CUBLAS_TF32:
        assert kernel(*size) is None, size
    torch.set_float32_matmul_precision("highest")
    assert kernel(*TF32[0]) is None


@pytest.mark.parametrize("size", DENSE[:5] + DENSE[-2:] + UNALIGNED, ids=str)
@halves
def test_nothing_beside_the_result_is_written(size, dtype):
    """Into rows and heads with room between them, aligned or not: what lies there stays as it is."""
    m, nh, hd, e = size
    input = torch.randn(m, nh, hd, device="cuda", dtype=dtype)
    weight = torch.randn(nh, hd, e, device="cuda", dtype=dtype)
    plain = torch.einsum("mnd,nde->mne", input, weight)
    exact = torch.einsum("mnd,nde->mne", input.double(), weight.double())
    for before, behind in ((1, 0), (0, 3), (2, 4), (5, 6), (8, 8)):
        whole = torch.full((m + 2, nh, before + e + behind), 7, device="cuda", dtype=dtype)
        out = whole[1:-1, :, before : before + e]
        ops._head_matmul_out(input, weight, None, out)
        assert_as_exact(out, plain, exact)
        out.fill_(7)
        assert (whole == 7).all(), f"{before} before, {behind} behind"


@pytest.mark.parametrize("size", GATHERED, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@halves
def test_gathered(size, transposed, with_bias, dtype):
    rows, t, nh, hd, e = size
    input = torch.randn(rows, nh, hd, device="cuda", dtype=dtype)
    weight = torch.randn(nh, hd, e, device="cuda", dtype=dtype)
    bias = torch.randn(nh, e, device="cuda", dtype=dtype) if with_bias else None
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    indices = some_indices(rows, t)
    padding = ((indices < 0) | (indices >= rows)).view(-1, 1, 1)
    gathered = input[indices.clamp(0, rows - 1)]

    def plain(operand, weight, bias):
        product = torch.einsum("mnd,nde->mne", operand, weight)
        return (product if bias is None else product + bias).masked_fill(padding, 0)

    output = ops.gather_head_matmul(input, weight, indices, bias)
    exact = plain(gathered.double(), weight.double(), None if bias is None else bias.double())
    assert_as_exact(output, plain(gathered, weight, bias), exact)


def kernels_of(function) -> list[str]:
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        function()
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages()]


@halves
def test_which_kernel_is_taken(dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper")
    input = torch.randn(8192, 16, 128, device="cuda", dtype=dtype)
    weight = torch.randn(16, 128, 128, device="cuda", dtype=dtype)
    indices = some_indices(8192, 500)
    gathered = kernels_of(lambda: ops.gather_head_matmul(input, weight, indices))
    assert any("head_gemm" in name for name in gathered)
    assert not any("copy_rows" in name for name in gathered), "the rows were copied"
    assert any("head_gemm" in name for name in kernels_of(lambda: ops.head_matmul(input, weight)))
    assert any("one_wave" in name for name in kernels_of(lambda: ops.head_matmul(input[:100], weight)))
    wide = torch.randn(16, 128, 512, device="cuda", dtype=dtype)
    assert any("held" in name for name in kernels_of(lambda: ops.head_matmul(input, wide)))
    for (m, nh, hd, e), own in zip(SMALL, ("one_wave", "head_gemm", "held", *7 * ["head_gemm"]), strict=True):
        small = [torch.randn(*sizes, device="cuda", dtype=dtype) for sizes in ((m, nh, hd), (nh, hd, e))]
        assert any(own in name for name in kernels_of(lambda small=small: ops.head_matmul(*small))), (m, nh, hd, e)
    odd = weight[..., 1:]  # not aligned as the copy engine wants it
    loose = re.compile(r"head_gemm.*, true>\s*>\(")
    assert any(loose.search(name) for name in kernels_of(lambda: ops.head_matmul(input, odd)))
    assert not any(loose.search(name) for name in kernels_of(lambda: ops.head_matmul(input, weight)))
    assert not any("head_gemm" in name for name in kernels_of(lambda: ops.head_matmul(input[:100], odd))), "few rows"
    long = torch.randn(8192, 16, 514, device="cuda", dtype=dtype)
    weight = torch.randn(16, 514, 128, device="cuda", dtype=dtype)
    assert not any("head_gemm" in name for name in kernels_of(lambda: ops.head_matmul(long, weight))), "long heads"


@pytest.mark.parametrize("width", [16, 32, 64, 65, 100, 127])
@halves
def test_heads_do_not_meet(width, dtype):
    """Heads packed into one tile, or not at multiples of 16 bytes: what is not finite in one stays there."""
    input = torch.randn(12800, 32, width, device="cuda", dtype=dtype)
    weight = torch.randn(32, width, width, device="cuda", dtype=dtype)
    expected = ops.head_matmul(input, weight)
    input[:, 5], weight[10] = torch.inf, torch.nan
    output = ops.head_matmul(input, weight)
    others = [head for head in range(32) if head not in (5, 10)]
    assert torch.equal(output[:, others], expected[:, others])
    assert not output[:, [5, 10]].isfinite().any()


@halves
def test_a_weight_that_is_not_finite_leaves_padding_zero(dtype):
    input = torch.randn(50, 2, 64, device="cuda", dtype=dtype)
    weight = torch.full((2, 64, 128), torch.inf, device="cuda", dtype=dtype)
    output = ops.gather_head_matmul(input, weight, torch.tensor([3, -1, 50, 7], device="cuda"))
    assert torch.equal(output[1:3], torch.zeros_like(output[1:3]))
    assert not output[[0, 3]].isfinite().any()


@pytest.mark.parametrize("size", [s for s in DENSE + ONE_WAVE if s[2] in (16, 32) or s[2] >= 64], ids=str)
@halves
def test_bits_of_a_row(size, dtype):
    """A row alone, in a few, in many, gathered: the same bits, though different kernels may have made them."""
    m, nh, hd, e = size
    input = torch.randn(m, nh, hd, device="cuda", dtype=dtype)
    weight = torch.randn(nh, hd, e, device="cuda", dtype=dtype)
    whole = ops.head_matmul(input, weight)
    order = torch.randperm(m, device="cuda")
    assert torch.equal(ops.gather_head_matmul(input, weight, order), whole[order])
    for rows in (1, 16, 64, 200, 1000):
        assert torch.equal(ops.head_matmul(input[:rows], weight), whole[:rows]), f"{rows} rows"
    assert torch.equal(ops.head_matmul(input, weight), whole), "repeated"


@pytest.mark.parametrize("top_k", [None, 100])
@pytest.mark.parametrize("top_p", [0.0, 0.9, 0.9999, 1.0])
@halves
def test_product_before_the_count_is_known(top_p, top_k, dtype):
    """The rows that are there, in memory of about their size, whatever share of the places they take."""
    b, s, nh, hd, e = 5, 1000, 8, 128, 128
    input = torch.randn(b, s, nh * hd, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(nh * hd, e, device="cuda", dtype=dtype)
    probs = torch.rand(b, s, device="cuda").clamp(max=0.99999)
    indices, cu_seqlens = select_important(probs, top_p, top_k)
    assert top_p < 1 or not len(indices)

    output, found, found_cu_seqlens = ops.importance_matmul(input, weight, probs, nh, top_p, top_k)
    assert torch.equal(found, indices)
    assert torch.equal(found_cu_seqlens, cu_seqlens)
    rows, heads = input.detach().view(b * s, nh, hd), weight.view(nh, hd, e)
    assert torch.equal(output, ops.gather_head_matmul(rows, heads, indices))
    assert output.untyped_storage().nbytes() <= 2 * output.nbytes + (1 << 20)

    grad_output = torch.randn_like(output)
    (grad_input,) = torch.autograd.grad(output, input, grad_output)
    assert torch.equal(
        grad_input.view_as(rows), ops._gather_head_matmul_dgrad(grad_output, heads, indices, b * s, True)
    )


@halves
def test_nothing_but_the_kernels_is_asked_of_the_device(dtype):
    """No copy, no clearing, no event, no synchronisation: the host looks for the count after the last launch."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("elsewhere the product waits for the count")
    input = torch.randn(4, 1000, 1024, device="cuda", dtype=dtype)
    weight, probs = torch.randn(1024, 128, device="cuda", dtype=dtype), torch.rand(4, 1000, device="cuda")
    ops.importance_matmul(input, weight, probs, 8, 0.5, 400)
    with torch.profiler.profile() as profile:
        ops.importance_matmul(input, weight, probs, 8, 0.5, 400)
    names = [event.name for event in profile.events()]
    asked = ("Memcpy", "Memset", "memset", "EventRecord", "EventSynchronize", "StreamSynchronize", "StreamWaitEvent")
    assert sum("mhmatmul::cuda" in name for name in names) == 2, names
    assert not any(word in name for name in names for word in asked), names


def test_selections_leave_nothing_to_the_next():
    """Of any number of rows, one after another on a stream, several streams and threads at once."""
    sizes = [(1, 5), (300, 40), (3, 9000), (1000, 7), (2, 100000), (8, 8192), (64, 333)]
    probs = [torch.rand(b, s, device="cuda") for b, s in sizes]
    expected = [specified(p.cpu(), 0.3, min(50, p.shape[1])) for p in probs]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()

    def select_on(stream):
        with torch.cuda.stream(stream):
            return [[select_important(p, 0.3, min(50, p.shape[1])) for p in probs] for _ in range(20)]

    with ThreadPoolExecutor(6) as pool:
        rounds = [found for done in pool.map(select_on, 2 * streams) for found in done]
    torch.cuda.synchronize()
    for found in rounds:
        for (indices, cu_seqlens), (positions, offsets) in zip(found, expected, strict=True):
            assert torch.equal(indices.cpu(), positions)
            assert torch.equal(cu_seqlens.cpu(), offsets)


# rows, nh, hd, e: one tile and several, rows, inputs and columns in part, one head, two blocks of a head's inputs
BACKWARD = [
    (1024, 4, 128, 512),
    (1000, 3, 128, 264),
    (2000, 5, 256, 256),
    (1333, 2, 200, 136),
    (1024, 16, 128, 128),
    (999, 1, 104, 72),
    (3000, 7, 64, 64),
    (1500, 3, 40, 24),
    pytest.param((600, 12, 64, 64), id="little"),
]


def plain_gradients(grad_output, input, weight):
    return (
        torch.einsum("mne,nde->mnd", grad_output, weight),
        torch.einsum("mnd,mne->nde", input, grad_output),
    )


@pytest.mark.parametrize("size", BACKWARD, ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "expanded"])
@halves
def test_both_gradients(size, layout, dtype):
    m, nh, hd, e = size
    input = torch.randn(m, nh, hd, device="cuda", dtype=dtype)
    weight = torch.randn(nh, hd, e, device="cuda", dtype=dtype)
    grad_output = torch.randn(m, nh, e, device="cuda", dtype=dtype)
    if layout == "transposed":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        input = torch.randn(m, nh, hd + 24, device="cuda", dtype=dtype)[..., 8 : hd + 8]
        weight = torch.randn(nh, hd, e + 16, device="cuda", dtype=dtype)[..., :e]
        grad_output = torch.randn(m, 2, nh, e, device="cuda", dtype=dtype)[:, 1]
    elif layout == "expanded":
        grad_output = torch.randn(1, nh, e, device="cuda", dtype=dtype).expand(m, nh, e)
    both = ops._head_matmul_backward(grad_output, input, weight)
    alone = ops._head_matmul_wgrad(grad_output, input)
    exact = plain_gradients(grad_output.double(), input.double(), weight.double())
    for ours, plain, reference in zip(both, plain_gradients(grad_output, input, weight), exact, strict=True):
        assert_as_exact(ours, plain, reference)
    assert_as_exact(alone, plain_gradients(grad_output, input, weight)[1], exact[1])
    for ours, again in zip(both, ops._head_matmul_backward(grad_output, input, weight), strict=True):
        assert torch.equal(ours, again), "repeated"
    assert torch.equal(alone, ops._head_matmul_wgrad(grad_output, input)), "repeated"


@pytest.mark.parametrize("size", BACKWARD, ids=str)
@pytest.mark.parametrize("padding", ["none", "last", "scattered"])
@halves
def test_both_gradients_of_the_selected(size, padding, dtype):
    """Rows by distinct indices; a padding row's gradient may hold anything, rows not named get zeros."""
    t, nh, hd, e = size
    rows = 2 * t + 5
    input = torch.randn(rows, nh, hd, device="cuda", dtype=dtype)
    weight = torch.randn(nh, hd, e, device="cuda", dtype=dtype)
    grad_output = torch.randn(t, nh, e, device="cuda", dtype=dtype)
    indices = torch.randperm(rows, device="cuda")[:t]
    if padding == "last":
        indices[-200:] = -1
    elif padding == "scattered":
        indices[torch.rand(t, device="cuda") < 0.1] = -1
        indices[::100] = rows
    is_row = (indices >= 0) & (indices < rows)
    grad_output[~is_row] = torch.nan
    named = indices[is_row]

    def plain(grad_output, input, weight):
        of_rows, grad_weight = plain_gradients(grad_output[is_row], input[named], weight)
        return torch.zeros_like(input).index_copy(0, named, of_rows), grad_weight

    both = ops._gather_head_matmul_backward(grad_output, input, weight, indices, True)
    exact = plain(grad_output.double(), input.double(), weight.double())
    for ours, other, reference in zip(both, plain(grad_output, input, weight), exact, strict=True):
        assert_as_exact(ours, other, reference)
    for ours, again in zip(
        both, ops._gather_head_matmul_backward(grad_output, input, weight, indices, True), strict=True
    ):
        assert torch.equal(ours, again), "repeated"
    alone = ops._gather_head_matmul_wgrad(grad_output, input, indices)
    if torch.cuda.get_device_capability() == (9, 0):
        assert torch.equal(alone, both[1]), "the same sums, with the input's gradient or without"
    assert_as_exact(alone, plain(grad_output, input, weight)[1], exact[1])


@halves
def test_gradient_of_the_weight_by_repeated_rows(dtype):
    """Rows are only read, so they may come again."""
    input = torch.randn(50, 3, 96, device="cuda", dtype=dtype)
    grad_output = torch.randn(3000, 3, 200, device="cuda", dtype=dtype)
    indices = some_indices(50, 3000)
    is_row = (indices >= 0) & (indices < 50)
    grad_output[~is_row] = torch.nan

    def plain(grad_output, input):
        return torch.einsum("mnd,mne->nde", input[indices[is_row]], grad_output[is_row])

    ours = ops._gather_head_matmul_wgrad(grad_output, input, indices)
    assert_as_exact(ours, plain(grad_output, input), plain(grad_output.double(), input.double()))


@halves
def test_grad_output_is_read_once(dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper")
    input = torch.randn(4096, 16, 128, device="cuda", dtype=dtype)
    weight = torch.randn(16, 128, 512, device="cuda", dtype=dtype)
    grad_output = torch.randn(2048, 16, 512, device="cuda", dtype=dtype)
    indices = torch.randperm(4096, device="cuda")[:2048]
    dense = kernels_of(lambda: ops._head_matmul_backward(grad_output, input[:2048], weight))
    selected = kernels_of(lambda: ops._gather_head_matmul_backward(grad_output, input, weight, indices, True))
    for names in (dense, selected):
        assert sum("backward_kernel" in name for name in names) == 1, names
        assert not any("gemm" in name or "copy_rows" in name for name in names), names
    alone = kernels_of(lambda: ops._gather_head_matmul_wgrad(grad_output, input, indices))
    assert any("backward_kernel" in name for name in alone), alone
    assert not any("copy_rows" in name or "mask" in name for name in alone), alone


@pytest.mark.parametrize("capacity", [None, 100])
@halves
def test_gradients_of_the_selected(capacity, dtype):
    """The gathering product with the inverse of the selection; padding rows may hold any gradient."""
    b, s, nh, hd, e = 4, 700, 6, 64, 192
    input = torch.randn(b, s, nh * hd, device="cuda", dtype=dtype)
    weight = torch.randn(nh * hd, e, device="cuda", dtype=dtype)
    probs = torch.rand(b, s, device="cuda")
    indices, _ = select_important(probs, 0.5, 80, capacity=capacity)
    is_row = indices >= 0
    grad_output = torch.randn(*indices.shape, nh, e, device="cuda", dtype=dtype)
    grad_output[~is_row] = torch.nan
    _, grad_input, grad_weight = matmul_with_importance(
        input, weight, probs, grad_output, nh, 0.5, 80, capacity=capacity
    )

    def plain(input, weight, grad_output):
        rows = input.detach().flatten(0, 1).requires_grad_()
        weight = weight.detach().requires_grad_()
        einsum_heads(rows[indices[is_row]], weight, nh).backward(grad_output[is_row])
        return rows.grad.view(b, s, -1), weight.grad

    exact = plain(input.double(), weight.double(), grad_output.double())
    for ours, other, reference in zip((grad_input, grad_weight), plain(input, weight, grad_output), exact, strict=True):
        assert_as_exact(ours, other, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(dtype):
    b, s, nh, h, e = 4, 512, 4, 256, 128
    input, probs = torch.randn(b, s, h, device="cuda", dtype=dtype), torch.rand(b, s, device="cuda")
    weight, grad_output = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((h, e), (b, 64, nh, e)))
    threshold = torch.tensor(0.3, device="cuda")

    def work():
        dense = matmul_with_multi_head(input, weight, nh)
        return dense, *matmul_with_importance(input, weight, probs, grad_output, nh, threshold, 50, capacity=64)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = work()
    input.copy_(torch.randn_like(input))
    probs.copy_(torch.rand_like(probs))
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, work(), strict=True):
        assert torch.equal(got, wanted)


class Edge(ctypes.Structure):
    _fields_ = [("from_port", ctypes.c_ubyte), ("to_port", ctypes.c_ubyte), ("type", ctypes.c_ubyte)]
    _fields_ += [("reserved", ctypes.c_ubyte * 5)]


def kinds_of_edges(graph: torch.cuda.CUDAGraph) -> list[int]:
    """Of a graph whose nodes follow one another: 1 where a node may begin before the one ahead has ended."""
    major = torch.version.cuda.partition(".")[0]
    runtime = ctypes.CDLL(f"libcudart.so.{major}")
    edges = runtime.cudaGraphGetEdges if int(major) >= 13 else runtime.cudaGraphGetEdges_v2
    raw, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t(0)
    assert edges(raw, None, None, None, ctypes.byref(count)) == 0
    ends, data = [(ctypes.c_void_p * count.value)() for _ in range(2)], (Edge * count.value)()
    assert edges(raw, *ends, data, ctypes.byref(count)) == 0
    following = {begin: (end, edge.type) for begin, end, edge in zip(*ends, data, strict=True)}
    node = next(iter(following.keys() - {end for end, _ in following.values()}))
    kinds = []
    while node in following:
        node, kind = following[node]
        kinds.append(kind)
    return kinds


@contextmanager
def side_stream() -> Iterator[None]:
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def captured(work: Callable[[], object], **options) -> torch.cuda.CUDAGraph:
    """On the current stream, where `work` is done once before."""
    work()
    graph = torch.cuda.CUDAGraph(**options)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        work()
    return graph


@halves
def test_a_captured_kernel_begins_early_behind_ours_alone(dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper")
    input = torch.randn(4, 16, 128, device="cuda", dtype=dtype)
    weight = torch.randn(16, 128, 128, device="cuda", dtype=dtype)
    out, few = torch.empty_like(input), torch.zeros(4, device="cuda")

    def work():
        for _ in range(2):
            ops._head_matmul_out(input, weight, None, out)
            ops._head_matmul_out(input, weight, None, out)
            few.add_(1)

    with side_stream():
        for _ in range(2):  # what one capture left is nothing to the next
            graph = captured(work, keep_graph=True)
            assert kinds_of_edges(graph) == [1, 0, 0, 1, 0]
            expected = out.clone()
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected)


@pytest.mark.parametrize("between", [False, True], ids=["one ahead", "two ahead"])
@halves
def test_a_weight_that_a_captured_kernel_ahead_writes(dtype, between):
    """Other weights come before the kernel ahead has ended, once all before that have. Most of the device is idle, so
    that what may come up does."""

    def on_device(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    A, W, few = on_device(64, 8, 512), on_device(8, 512, 64), on_device(4, 8, 64)
    made, outs = list(on_device(8, 64, 8, 64)), list(on_device(8, 4, 8, 64))
    little = on_device(1, 1, 64), on_device(1, 64, 64), None, on_device(1, 1, 64)

    def work(synchronize=lambda: None):
        for weight, out in zip(made, outs, strict=True):
            ops._head_matmul_out(A, W, None, weight)
            synchronize()
            if between:
                ops._head_matmul_out(*little)
            ops._head_matmul_out(few, weight.transpose(0, 1), None, out)

    with side_stream():
        graph = captured(work)
        work(torch.cuda.synchronize)
        expected = torch.stack(outs)
        for _ in range(20):
            for tensor in made + outs:
                tensor.fill_(math.nan)
            graph.replay()
            assert torch.equal(torch.stack(outs), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("heads", "hd", "e"),
    [(128, 128, 512), (128, 512, 128), (16, 512, 128), (96, 256, 256), (8, 448, 320), (1, 64, 64), (3, 200, 104)],
)
@pytest.mark.parametrize("rows", [1, 16, 32, 64, 200])
def test_captured_products_behind_one_another(rows, heads, hd, e, transposed):
    """Each with a weight of its own, by the rows that the one ahead has made: what they give called one by one."""
    A = torch.randn(rows, heads, hd, device="cuda", dtype=torch.bfloat16)
    shapes = [(hd, e), (e, hd)] * 3
    weights = [torch.randn(heads, *shape, device="cuda", dtype=torch.bfloat16) / 16 for shape in shapes]
    if transposed:
        weights = [weight.transpose(1, 2).contiguous().transpose(1, 2) for weight in weights]
    outs = [torch.empty(rows, heads, n, device="cuda", dtype=torch.bfloat16) for _, n in shapes]

    def work(synchronize=lambda: None):
        made = A
        for weight, out in zip(weights, outs, strict=True):
            ops._head_matmul_out(made, weight, None, out)
            synchronize()
            made = out

    with side_stream():
        graph = captured(work)
        work(torch.cuda.synchronize)
        expected = [out.clone() for out in outs]
        for _ in range(3):
            for out in outs:
                out.fill_(math.nan)
            graph.replay()
            for out, wanted in zip(outs, expected, strict=True):
                assert torch.equal(out, wanted)


def test_streams_do_not_share():
    """The same calls on several streams at once give what they give alone."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [torch.randn(2, 2048, 1024, device="cuda", dtype=torch.bfloat16) for _ in streams]
    weights = [torch.randn(1024, 128, device="cuda", dtype=torch.bfloat16) for _ in streams]
    probs = [torch.rand(2, 2048, device="cuda") for _ in streams]

    def work(i):
        grad_output = torch.ones(2, 256, 8, 128, device="cuda", dtype=torch.bfloat16)
        return matmul_with_importance(inputs[i], weights[i], probs[i], grad_output, 8, 0.2, 256, capacity=256)

    alone = [work(i) for i in range(len(streams))]
    torch.cuda.synchronize()
    for _ in range(5):
        together = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together.append(work(i))
        torch.cuda.synchronize()
        for got, wanted in zip(together, alone, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_threads_that_have_asked_cuda_for_nothing():
    """As autograd's own: what the copy engine is told needs a context, which such a thread has not got yet."""
    input = torch.randn(4096, 16, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(16, 128, 128, device="cuda", dtype=torch.bfloat16)
    grad_output = torch.randn(4096, 16, 128, device="cuda", dtype=torch.bfloat16)

    def work():
        return ops.head_matmul(input, weight), *ops._head_matmul_backward(grad_output, input, weight)

    with ThreadPoolExecutor(1) as fresh:
        results = fresh.submit(work).result()
    for got, wanted in zip(results, work(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    input = torch.randn(2, 300, 256, device="cuda:1", dtype=torch.bfloat16)
    weight = torch.randn(256, 128, device="cuda:1", dtype=torch.bfloat16)
    probs = torch.rand(2, 300, device="cuda:1")
    with torch.cuda.device(0):
        output, *_ = matmul_with_importance(input, weight, probs, num_heads=4, top_p=0.0, top_k=100)
        indices, _ = select_important(probs, 0.0, 100)
        assert torch.equal(output, matmul_with_multi_head(input, weight, 4).flatten(0, 1)[indices])


@pytest.mark.parametrize("gathered", [False, True])
def test_more_elements_than_an_int_counts(gathered):
    """2^31 + 2^20 elements come out; the last rows, beyond the first 4 GiB, are those of a small call."""
    rows, nh, hd, e = 2**17 + 64, 32, 64, 512
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    input = torch.randn(rows, nh, hd, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(nh, hd, e, device="cuda", dtype=torch.bfloat16)
    if gathered:
        output = ops.gather_head_matmul(input, weight, torch.arange(rows, device="cuda"))
    else:
        output = ops.head_matmul(input, weight)
    assert output.numel() > 2**31
    for part in (slice(0, 128), slice(rows // 2, rows // 2 + 128), slice(rows - 128, rows)):
        plain = torch.einsum("mnd,nde->mne", input[part], weight)
        exact = torch.einsum("mnd,nde->mne", input[part].double(), weight.double())
        assert_as_exact(output[part], plain, exact)
    del output
    torch.cuda.empty_cache()
