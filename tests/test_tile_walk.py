"""Which blocks of the Hopper kernels work on which tiles: every tile once, groups together and told as they are."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from itertools import chain, groupby, product
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler, target = shutil.which("c++") or "g++", tmp_path_factory.mktemp("walk") / "walk.so"
    source = ROOT / "tests" / "tile_walk.cpp"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([*command, "-I", ROOT / "csrc", source, "-o", target], check=True)
    library = ctypes.CDLL(str(target))
    for name in ("blocks_of", "groups_of", "most_groups_of", "most_tiles_of", "tiles_of"):
        getattr(library, name).restype = ctypes.c_int64
    for tile_of in (library.tile_of, library.tf32_tile_of):
        tile_of.argtypes = [*4 * [ctypes.c_int64], ctypes.c_bool, ctypes.c_int, ctypes.c_void_p]
        tile_of.restype = ctypes.c_bool
    return library


def tiles_of(library, cut, given, block):
    capacity = cut[0] * cut[1] * cut[2] + 1
    out = (ctypes.c_int64 * (5 * capacity))()
    count = library.tiles_of(*cut, given, block, ctypes.c_int64(capacity), out)
    return [tuple(out[5 * i : 5 * i + 5]) for i in range(count)]


TILES_TO_SHARE = {
    "heads": st.integers(1, 40),
    "m_blocks": st.integers(1, 20),
    "n_blocks": st.integers(1, 9),
    "multiprocessors": st.integers(1, 140),
}


@settings(max_examples=300, deadline=None)
@given(**TILES_TO_SHARE, left_out=st.integers(0, 20))
@example(heads=128, m_blocks=16, n_blocks=2, multiprocessors=132, left_out=0)
@example(heads=1, m_blocks=1, n_blocks=200, multiprocessors=132, left_out=0)
@example(heads=133, m_blocks=1, n_blocks=1, multiprocessors=132, left_out=0)
@example(heads=32, m_blocks=128, n_blocks=1, multiprocessors=132, left_out=127)
@example(heads=3, m_blocks=4, n_blocks=2, multiprocessors=132, left_out=4)
def test_walk(library, heads, m_blocks, n_blocks, multiprocessors, left_out):
    cut = (heads, m_blocks, n_blocks, multiprocessors)
    given = max(0, m_blocks - left_out)  # what the device finds, of the most that the host expects
    blocks = library.blocks_of(*cut)
    assert 1 <= blocks <= max(multiprocessors, 1)
    seen, groups, most = [], 0, [0, 0]
    for block in range(blocks):
        tiles = tiles_of(library, cut, given, block)
        own = sum(tile[3] for tile in tiles)
        groups += own
        most = [max(most[0], own), max(most[1], len(tiles))]
        seen += [tile[:3] for tile in tiles]
        for _, same in groupby(tiles, key=lambda tile: tile[:2]):
            group = list(same)
            rows = [tile[2] for tile in group]
            step = rows[1] - rows[0] if len(rows) > 1 else 1
            assert step >= 1
            assert rows == list(range(rows[0], rows[0] + step * len(rows), step)), "a group goes down its rows"
            assert [tile[3] for tile in group] == [1] + [0] * (len(group) - 1), "one first"
            assert [tile[4] for tile in group] == list(range(len(group)))[::-1], "left in the group"
    assert sorted(seen) == sorted(product(range(n_blocks), range(heads), range(given))), "every tile once"
    assert groups <= library.groups_of(*cut)
    assert groups == library.groups_of(*cut) or given < m_blocks
    assert most[0] <= library.most_groups_of(*cut)
    assert most[0] == library.most_groups_of(*cut) or given < m_blocks
    assert most[1] <= library.most_tiles_of(*cut), "a last run may be shorter"


def dealt_tiles(library, deal, heads_before_rows, block):
    heads, m_blocks, n_blocks, _ = deal
    out, team, most = (ctypes.c_int * (3 * heads * m_blocks * n_blocks))(), ctypes.c_int(), ctypes.c_int()
    count = library.dealt_tiles(*deal, heads_before_rows, block, out, ctypes.byref(team), ctypes.byref(most))
    assert count <= most.value
    return [tuple(out[3 * i : 3 * i + 3]) for i in range(count)], team.value, most.value


@settings(max_examples=300, deadline=None)
@given(**TILES_TO_SHARE, heads_before_rows=st.booleans())
@example(heads=10, m_blocks=32, n_blocks=2, multiprocessors=132, heads_before_rows=True)
@example(heads=3, m_blocks=1, n_blocks=8, multiprocessors=1, heads_before_rows=False)
def test_dealt_walk(library, heads, m_blocks, n_blocks, multiprocessors, heads_before_rows):
    deal = (heads, m_blocks, n_blocks, multiprocessors)
    blocks = library.dealt_blocks(*deal)
    assert 1 <= blocks <= multiprocessors
    walks = [dealt_tiles(library, deal, heads_before_rows, block) for block in range(blocks)]
    _, team, most = walks[0]
    assert blocks % team == 0, "clusters are whole"
    assert max(len(tiles) for tiles, _, _ in walks) == most
    assert min(len(tiles) for tiles, _, _ in walks) >= max(1, most - 1), "evenly dealt"
    seen = list(chain.from_iterable(tiles for tiles, _, _ in walks))
    assert sorted(seen) == sorted(product(range(n_blocks), range(heads), range(m_blocks))), "every tile once"
    for first in range(0, blocks, team):
        together = zip(*(tiles for tiles, _, _ in walks[first : first + team]), strict=True)
        for tiles in together:
            assert len({tile[1:] for tile in tiles}) == 1, "a team shares rows of a head"
            assert [tile[0] for tile in tiles] == list(range(tiles[0][0], tiles[0][0] + team))
    if n_blocks == team and len(walks) > team and heads > 1 and m_blocks > 1:
        (_, head, row), (_, next_head, next_row) = walks[0][0][0], walks[team][0][0]
        assert (next_head - head, next_row - row) == ((1, 0) if heads_before_rows else (0, 1))


def test_more_tiles_than_can_be_counted(library):
    assert library.dealt_blocks(2**15, 2**15, 2, 132) == 132
    assert library.dealt_blocks(2**15, 2**16, 2, 132) == 0


TILES = {(128, 128), (64, 256), (64, 192), (128, 64), (64, 128)}


def tile_of(library, m, heads, k, n, gathers=False, multiprocessors=132):
    """None where cuBLAS is the faster one."""
    tile = (ctypes.c_int * 2)()
    return tuple(tile) if library.tile_of(m, heads, k, n, gathers, multiprocessors, tile) else None


@settings(max_examples=300, deadline=None)
@given(
    m=st.integers(1, 2**31 - 300),
    heads=st.integers(1, 300),
    k=st.integers(1, 600),
    n=st.integers(1, 5000),
    gathers=st.booleans(),
    multiprocessors=st.integers(1, 140),
)
@example(m=2**31 - 300, heads=1, k=512, n=1, gathers=False, multiprocessors=1)
def test_whatever_is_taken_has_a_tile(library, m, heads, k, n, gathers, multiprocessors):
    tile = tile_of(library, m, heads, k, n, gathers, multiprocessors)
    assert tile is not None or not gathers or k > 512, "where rows would be copied first"
    if tile is not None:
        assert k <= 512
        assert tile in TILES
        assert not (gathers and tile == (64, 256)), "no registers for gathered rows"
        piece_of_b, stages_of_a = tile[1] * -(-k // 64) * 128, 2 * tile[0] * 128
        assert piece_of_b + stages_of_a <= 224 * 1024, "B stays in shared memory, beside two stages of A"


def test_which_tile_and_whether(library):
    """On 132 multiprocessors, as measured: sizes of published models, and what is between them."""
    for m, heads, k, n, tile in (
        (8192, 10, 256, 256, (64, 256)),
        (8192, 4, 512, 512, (128, 128)),
        (8192, 16, 512, 512, (128, 128)),
        (2048, 64, 512, 512, None),  # two pieces of B for each block
        (8192, 64, 64, 64, (128, 64)),
        (8192, 16, 128, 128, (128, 128)),
        (4096, 128, 512, 128, (128, 128)),
        (4096, 16, 192, 192, (64, 192)),
        (4096, 32, 128, 384, (64, 192)),
        (4096, 1, 4096, 4096, None),
        (64, 16, 256, 256, None),
        (4096, 32, 128, 16, None),
    ):
        assert tile_of(library, m, heads, k, n) == tile, (m, heads, k, n)
    for n, tile in ((64, (128, 64)), (128, (128, 128)), (192, (64, 192)), (256, (128, 128)), (512, (128, 128))):
        assert tile_of(library, 8192, 32, 128, n, gathers=True) == tile


STREAMED = (256, 128, 32)


def tf32_tile_of(library, m, heads, k, n, transposed=False, multiprocessors=132):
    """None where cuBLAS is the faster one."""
    tile = (ctypes.c_int * 3)()
    return tuple(tile) if library.tf32_tile_of(m, heads, k, n, transposed, multiprocessors, tile) else None


@settings(max_examples=300, deadline=None)
@given(
    m=st.integers(1, 2**31 - 300),
    heads=st.integers(1, 300),
    k=st.integers(1, 600),
    n=st.integers(1, 5000),
    transposed=st.booleans(),
    multiprocessors=st.integers(1, 140),
)
@example(m=2**31 - 300, heads=1, k=256, n=1, transposed=False, multiprocessors=1)
@example(m=2**31 - 300, heads=300, k=512, n=5000, transposed=False, multiprocessors=132)
def test_whatever_is_taken_in_tf32_has_a_tile(library, m, heads, k, n, transposed, multiprocessors):
    tile = tf32_tile_of(library, m, heads, k, n, transposed, multiprocessors)
    if tile is None:
        return
    if tile == STREAMED:
        assert 128 < k <= 2048
        assert n > 128
        assert not transposed
        return
    rows, columns, inputs = tile
    assert k <= inputs
    assert inputs in (32, 64, 128)
    assert columns in (64, 128, 256)
    assert rows * columns == 8192, "four warpgroups, each with 32 rows and 64 columns"


def test_which_tile_of_tf32_and_whether(library):
    """On 132 multiprocessors, as measured: sizes of published models, and what is between them."""
    for m, heads, k, n, tile in (
        (1024, 128, 128, 512, (32, 256, 128)),
        (8192, 64, 64, 64, (128, 64, 64)),
        (16384, 32, 32, 32, (128, 64, 32)),
        (8192, 16, 128, 128, (64, 128, 128)),
        (8192, 10, 256, 256, STREAMED),
        (8192, 4, 512, 512, STREAMED),
        (4096, 8, 1024, 1024, STREAMED),
        (1024, 128, 512, 128, None),
        (4096, 16, 192, 192, None),
        (4096, 1, 4096, 4096, None),
        (8192, 64, 40, 40, (128, 64, 64)),
        (16384, 64, 40, 40, None),
        (127, 128, 128, 512, None),
        (64, 16, 512, 512, None),
        (256, 1, 64, 64, None),
    ):
        assert tf32_tile_of(library, m, heads, k, n) == tile, (m, heads, k, n)
    assert tf32_tile_of(library, 8192, 10, 256, 256, transposed=True) is None
    assert tf32_tile_of(library, 8192, 16, 128, 128, transposed=True) == (64, 128, 128)


@settings(max_examples=200, deadline=None)
@given(
    heads=st.integers(1, 40),
    hd_groups=st.integers(1, 3),
    row_tiles=st.integers(1, 200),
    teams=st.sampled_from([1, 7, 66, 132]),
    tiles_per_partial=st.floats(0.1, 20),
)
@example(heads=128, hd_groups=1, row_tiles=64, teams=66, tiles_per_partial=5.3)
def test_segments(library, heads, hd_groups, row_tiles, teams, tiles_per_partial):
    cut = (heads, hd_groups, row_tiles, teams, ctypes.c_double(tiles_per_partial))
    splits = library.splits_of(*cut)
    assert 1 <= splits <= row_tiles
    out = (ctypes.c_int64 * (5 * heads * hd_groups * splits))()
    count = library.segments_of(*cut, out)
    assert count == heads * hd_groups * splits
    segments = sorted(tuple(out[5 * i : 5 * i + 5]) for i in range(count))
    for _, of_head in groupby(segments, key=lambda segment: segment[:2]):
        own = list(of_head)
        assert [segment[2] for segment in own] == list(range(splits))
        tiles = [list(range(segment[3], row_tiles, segment[4])) for segment in own]
        assert all(tiles), "no segment is empty"
        assert sorted(chain.from_iterable(tiles)) == list(range(row_tiles)), "every tile once"


def test_blocks_go_down_the_rows_side_by_side(library):
    """As the sizes of published models come out: neighbouring heads at the same rows, each block with its own."""
    for heads, m_blocks, n_blocks, busy in ((32, 128, 1, 128), (16, 128, 1, 128), (10, 128, 1, 130), (12, 99, 1, 132)):
        cut = (heads, m_blocks, n_blocks, 132)
        assert library.blocks_of(*cut) == busy
        walks = [tiles_of(library, cut, m_blocks, block) for block in range(busy)]
        for block, tiles in enumerate(walks):
            assert {tile[:2] for tile in tiles} == {(0, block % heads)}, "the piece of B that it stays with"
            assert [tile[2] for tile in tiles] == list(range(block // heads, m_blocks, busy // heads))


def test_all_multiprocessors_work(library):
    """Where heads do not divide them, and where there are more pieces than multiprocessors."""
    for heads, m_blocks, n_blocks in ((100, 128, 1), (70, 64, 1), (128, 64, 2), (50, 40, 1)):
        cut = (heads, m_blocks, n_blocks, 132)
        shares = [len(tiles_of(library, cut, m_blocks, block)) for block in range(library.blocks_of(*cut))]
        even = heads * m_blocks * n_blocks / 132
        assert max(shares) <= 1.1 * even, (heads, max(shares), even)


def test_splits_fill_the_device(library):
    """As the sizes of published models come out: one head's rows go to as many clusters as there are."""
    few = ctypes.c_double(5)
    assert library.splits_of(128, 1, 64, 66, few) == 1  # 128 heads in two rounds of 66 clusters
    assert library.splits_of(16, 1, 128, 132, few) == 8
    assert library.splits_of(1, 1, 1, 132, few) == 1
