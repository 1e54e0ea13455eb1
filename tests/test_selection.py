"""select_important against the reference, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmatmul_ext import reference, select_important

NAN, INF = float("nan"), float("inf")


def assert_same_selection(probs, top_p=1.0, top_k=None, capacity=None, mask=None):
    got = select_important(probs, top_p, top_k, capacity=capacity, mask=mask)
    expected = reference.select_important(probs, top_p, top_k, capacity=capacity, mask=mask)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.device == probs.device
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs), f"got {ours.tolist()}, expected {theirs.tolist()}"
    return got


ROWS = {
    "ties at the k-th": [0.5, 0.9, 0.5, 0.5, 0.9],
    "all equal": [0.7] * 5,
    "NaN takes no place": [NAN, 0.9, NAN, 0.8, 0.1],
    "only NaN": [NAN] * 5,
    "infinities": [INF, -INF, 0.5, INF, 1.0],
    "both zeros are one value": [-0.0, 0.0, -0.0, 0.0, -1.0],
    "outside [0, 1]": [-3.0, 7.5, 2.0, -0.25, 1.0],
    "subnormal": [1e-42, 0.0, 2e-42, -1e-42, 1e-45],
    "two values": [0.0, 1.0, 0.0, 1.0, 0.0],
    "ascending": [0.1, 0.2, 0.3, 0.4, 0.5],
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
def test_rows(row, top_p, dtype, device):
    probs = torch.tensor([ROWS[row], ROWS[row][::-1]], dtype=dtype, device=device)
    for top_k in [None, 1, 2, 4, 5]:
        assert_same_selection(probs, top_p, top_k)
        for capacity in [0, 1, 3, 5, 8]:
            assert_same_selection(probs, top_p, top_k, capacity)


def test_lowest_position_wins_a_tie(device):
    indices, cu_seqlens = select_important(torch.full((2, 4), 0.5, device=device), 0.5, 2)
    assert indices.tolist() == [0, 1, 4, 5]
    assert cu_seqlens.tolist() == [0, 2, 4]


def test_threshold_is_rounded_to_the_dtype_of_probs(dtype, device):
    """0.7 in probs passes top_p=0.7 in every dtype, though float32's 0.7 is below and bfloat16's above the number."""
    below = torch.nextafter(torch.tensor(0.7, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    probs = torch.tensor([[0.7, below.item()]], dtype=dtype, device=device)
    for top_p in [
        0.7,
        torch.tensor(0.7, dtype=torch.float64),
        torch.tensor(0.7, device=device, dtype=torch.float64),
    ]:
        assert select_important(probs, top_p)[0].tolist() == [0]
    assert_same_selection(probs, 0.7)


def test_tensor_threshold_has_no_range(device):
    probs = torch.tensor([[-2.0, 3.0, NAN, 0.5]], device=device)
    for top_p, kept in [(-5.0, [0, 1, 3]), (2.0, [1]), (NAN, []), (INF, []), (-INF, [0, 1, 3])]:
        indices, _ = select_important(probs, torch.tensor(top_p, device=device))
        assert indices.tolist() == kept


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1), (1, 3000), (2000, 3), (5, 1025)])
def test_shapes(shape, dtype, device):
    probs = torch.rand(shape, device=device).to(dtype)
    assert_same_selection(probs, 0.5)
    assert_same_selection(probs, 0.25, capacity=2)
    if shape[1]:
        assert_same_selection(probs, 0.25, max(1, shape[1] // 8))


@pytest.mark.parametrize("s", [4096, 8192, 8193, 40_001, 150_001])
@pytest.mark.parametrize("levels", [3, 1000, 1 << 20])
def test_long_rows(s, levels, dtype, device):
    """On a GPU several blocks share a row of several tiles, one each or more; few levels make ties across them."""
    probs = (torch.randint(levels, (3, s), device=device) / levels).to(dtype)
    probs[1, s // 2 :] = NAN
    for top_k in (None, 1, s // 8, s - 1):
        assert_same_selection(probs, 0.25, top_k)
    assert_same_selection(probs, 0.25, s // 8, capacity=s // 10)


def test_many_rows(dtype, device):
    assert_same_selection(torch.rand(70_000, 3, device=device).to(dtype), 0.5, 2)


@pytest.mark.parametrize("b", [40, 300])
def test_many_long_rows(b, device):
    """A GPU has room for several blocks a row at once, or for no more than one."""
    assert_same_selection(torch.rand(b, 20_000, device=device), 0.5, 4000)


def test_few_kept_do_not_hold_on_to_the_memory_for_many(device):
    probs = torch.rand(4, 200_000, device=device)
    indices, _ = assert_same_selection(probs, 0.999)
    assert indices.untyped_storage().nbytes() < 2**20


@pytest.mark.gpu
def test_capture_is_refused():
    probs, graph = torch.rand(2, 100, device="cuda"), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot capture; give a capacity"), torch.cuda.graph(graph):
        select_important(probs, 0.5)
    assert_same_selection(probs, 0.5)


@pytest.mark.parametrize(
    "layout",
    [lambda p: p.t().contiguous().t(), lambda p: p[::2], lambda p: p[:, 1::3], lambda p: p[:1].expand_as(p),
     lambda p: p[:, :1].expand_as(p)],
    ids=["transposed", "rows", "columns", "one row expanded", "one column expanded"],
)  # fmt: skip
def test_layouts(layout, dtype, device):
    probs = layout(torch.rand(6, 40, device=device).to(dtype))
    assert_same_selection(probs, 0.3, 7)
    assert_same_selection(probs, 0.3, 7, capacity=5)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
def test_masks(row, top_p, dtype, device):
    probs = torch.tensor([ROWS[row], ROWS[row][::-1]], dtype=dtype, device=device)
    for wishes in ([0, 0, 0, 1, 1], [-1, 0, 0, 0, -1], [0, -1, 1, -1, 0], [1] * 5):
        wished = torch.tensor([wishes, wishes[::-1]], dtype=torch.int8, device=device)
        for mask in (wished, wished >= 0):
            for top_k, capacity in [(None, None), (1, None), (2, None), (None, 1), (2, 3), (5, 8)]:
                assert_same_selection(probs, top_p, top_k, capacity, mask)


def test_protected_tokens_come_before_any_score(device):
    probs = torch.tensor([[INF, 0.0, NAN, INF]], device=device)
    mask = torch.tensor([[0, 1, 1, 0]], dtype=torch.int8, device=device)
    for top_p in (1.0, torch.tensor(NAN, device=device)):
        assert select_important(probs, top_p, 2, mask=mask)[0].tolist() == [1, 2]
        assert select_important(probs, top_p, 1, mask=mask)[0].tolist() == [1]
    assert select_important(probs, 1.0, 3, mask=mask)[0].tolist() == [0, 1, 2]


def test_never_keeping_is_exact_where_infinity_is_kept(device):
    probs = torch.tensor([[INF, 0.0, INF, -INF]], device=device)
    mask = torch.tensor([[False, True, True, True]], device=device)
    assert select_important(probs, torch.tensor(-INF, device=device), mask=mask)[0].tolist() == [1, 2, 3]


def test_overflow_shows_and_the_best_stay(device):
    probs = torch.tensor([[0.6, 0.9, 0.7, 0.9, 0.8]], device=device)
    indices, counts = select_important(probs, 0.5, capacity=3)
    assert indices.tolist() == [[1, 3, 4]]
    assert counts.tolist() == [5]


def test_no_side_effect_and_no_gradient(device):
    probs = torch.rand(3, 7, device=device, requires_grad=True)
    before, version = probs.detach().clone(), probs._version
    outputs = select_important(probs, 0.5, 3)
    assert not any(tensor.requires_grad for tensor in outputs)
    assert torch.equal(probs, before)
    assert probs._version == version


SCORES = st.sampled_from([NAN, INF, -INF, -0.0, 0.0, 0.5, 0.25, 1.0, 0.7, -1.0, 1e-42, 3.0])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), b=st.integers(0, 4), s=st.integers(1, 12), top_p=st.sampled_from([0.0, 0.25, 0.7, 1.0]))
def test_any_rows(data, b, s, top_p):
    rows = data.draw(st.lists(st.lists(SCORES | st.floats(width=16), min_size=s, max_size=s), min_size=b, max_size=b))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    top_k = data.draw(st.none() | st.integers(1, s))
    capacity = data.draw(st.none() | st.integers(0, s + 2))
    probs = torch.tensor(rows, dtype=dtype).reshape(b, s)
    assert_same_selection(probs, top_p, top_k, capacity)
    wishes = data.draw(st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=b * s, max_size=b * s))
    mask = torch.tensor(wishes, dtype=torch.int8).reshape(b, s)
    assert_same_selection(probs, top_p, top_k, capacity, mask)
    assert_same_selection(probs, top_p, top_k, capacity, mask >= 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_bit_pattern(dtype, device):
    """All 65,536 values of a half type in one row: every key, both zeros, every NaN, in any order."""
    bits = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0)).to(torch.int16)
    probs = bits.view(dtype).view(1, -1).to(device)
    for top_k in (1, 2, 1000, 32_768, 60_000, 65_536):
        for top_p in (0.0, 0.5, 1.0, torch.tensor(-torch.inf)):
            assert_same_selection(probs, top_p, top_k)
