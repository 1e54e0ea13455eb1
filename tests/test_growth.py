"""A call's memory is its result and what is stated, to the page, and what is more is noticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

TRUST = Path(__file__).parents[1] / "trust"


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(str(TRUST))
    import growth

    yield growth
    for name in ("growth", "report"):
        sys.modules.pop(name, None)


def test_memory_is_the_result_and_the_stated_workspace(growth):
    memory = growth.in_a_process_of_its_own((1,))
    assert {m.operation for m in memory} == set(growth.OPERATIONS)
    for m in memory:
        assert m.peak >= m.result, m
        assert m.excess <= 0, m


def test_a_hidden_copy_is_noticed(growth):
    operand = torch.ones(1 << 24)  # 64 MiB: malloc returns so much to the system by itself
    add = operand.add
    add(1)
    peak, result = growth.peak(lambda: add(1))
    assert result == 1 << 26
    assert peak - result < growth.PAGES
    peak, result = growth.peak(lambda: operand.clone().add(1))
    assert peak - result > 0.99 * (1 << 26)  # the kernel counts pages apart, by thread or CPU, and adds up later


def test_exponents(growth):
    assert growth.exponent([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert growth.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_time_is_measured_for_every_size(growth):
    assert growth.BASE.tokens * growth.BASE.h > 0
    times = growth.time_growth((1, 2), 1)
    assert {(t.operation, t.letter) for t in times} == {
        (name, letter) for name, operation in growth.OPERATIONS.items() for letter in operation.varied
    }


def test_what_looks_too_steep_is_measured_again(growth, monkeypatch):
    """Once disturbed is linear; quadratic remains quadratic."""
    monkeypatch.setattr(growth, "OPERATIONS", {"combine": growth.OPERATIONS["combine"]._replace(varied="s")})
    for later, expected, count in (([1.0, 2.0], 1, 2), ([1.0, 4.0], 2, 1 + growth.AGAIN)):
        results = [[1.0, 4.0], *[later] * growth.AGAIN]
        left = results.copy()
        monkeypatch.setattr(growth, "seconds", lambda calls, rounds, left=left: left.pop(0))
        assert [t.exponent for t in growth.time_growth((1, 2), 1)] == [pytest.approx(expected)]
        assert len(results) - len(left) == count
