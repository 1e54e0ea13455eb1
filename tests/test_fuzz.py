"""Fuzzing finds nothing in us, and finds what is planted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import mhmatmul_ext

TRUST = Path(__file__).parents[1] / "trust"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(TRUST))
    import fuzz

    yield fuzz
    for name in ("cases", "fuzz", "oracle", "report"):
        sys.modules.pop(name, None)


def test_nothing_is_found(fuzz):
    counts = fuzz.fuzz(500)
    assert sum(n for (group, _), n in counts.items() if group == "kind") >= 500
    assert all(counts["kind", kind] >= 30 for kind in fuzz.KINDS)


def twice_rounded(result):
    return result * (1 + 2.0**-6)


def without_nan(result):
    return result.nan_to_num()


def with_a_row_missing(result):
    return torch.cat([result[:-1], 0 * result[-1:]])


def changed(function, change):
    def call(*args, out=None, **kwargs):
        return change(function(*args, **kwargs)) if out is None else function(*args, out=out, **kwargs)

    return call


def writing_to_its_operand(function):
    def call(base, *args):
        result = function(base, *args)
        with torch.no_grad():
            base.copy_(result)
        return result

    return call


def with_the_last_of_equals(function):
    """Ties won by the highest position."""

    def call(probs, top_p=1.0, top_k=None, *, capacity=None, mask=None):
        s = probs.shape[1]
        mask = mask.flip(1) if mask is not None else None
        indices, sizes = function(probs.flip(1), top_p, top_k, capacity=capacity, mask=mask)
        if capacity is not None or s == 0:
            return function(probs, top_p, top_k, capacity=capacity, mask=mask)
        return (indices // s * s + s - 1 - indices % s).sort().values, sizes

    return call


@pytest.mark.parametrize(
    ("kind", "function", "change"),
    [
        ("multi-head", "matmul_with_multi_head", twice_rounded),
        ("multi-head", "matmul_with_multi_head", without_nan),
        ("combine", "combine", twice_rounded),
        ("combine", "combine", with_a_row_missing),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_result_is_found(kind, function, change, fuzz, monkeypatch):
    monkeypatch.setattr(fuzz, function, changed(getattr(mhmatmul_ext, function), change))
    with pytest.raises(fuzz.WrongError):
        fuzz.fuzz(300, kinds=(kind,), shrink=False)


def test_a_wrong_selection_is_found(fuzz, monkeypatch):
    monkeypatch.setattr(fuzz, "select_important", with_the_last_of_equals(mhmatmul_ext.select_important))
    with pytest.raises(fuzz.WrongError, match=r"indices: .* differ"):
        fuzz.fuzz(300, kinds=("selection",), shrink=False)


def test_a_changed_operand_is_found(fuzz, monkeypatch):
    monkeypatch.setattr(fuzz, "combine", writing_to_its_operand(mhmatmul_ext.combine))
    with pytest.raises(fuzz.WrongError, match="an operand was changed"):
        fuzz.fuzz(300, kinds=("combine",), shrink=False)


def test_what_was_tried_is_told(fuzz, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "20", "--output", str(tmp_path / "fuzz.json")])
    assert fuzz.main() == 0
    record = json.loads((tmp_path / "fuzz.json").read_text())
    assert record["cases"] == sum(record["kind"].values()) == sum(record["dtype"].values())
    assert f"{record['cases']} cases" in capsys.readouterr().out


def test_the_oracle_refuses(fuzz):
    """An oracle that lets everything pass would find nothing either."""
    from oracle import Expected, WrongError, check

    exact, magnitude = torch.tensor([1.0, float("inf"), float("nan"), 1e30], dtype=torch.float64), torch.ones(4)
    wanted = Expected(exact, torch.tensor([1.0, 1.0, 1.0, 1e30], dtype=torch.float64), 10)
    check("right", torch.tensor([1.0, float("inf"), float("nan"), 1e30]), wanted)
    for wrong in ([1.001, float("inf"), float("nan"), 1e30], [1.0, -float("inf"), float("nan"), 1e30],
                  [1.0, float("inf"), 0.0, 1e30], [1.0, float("inf"), float("nan"), float("inf")]):  # fmt: skip
        with pytest.raises(WrongError):
            check("wrong", torch.tensor(wrong), wanted)
    half = Expected(torch.full((1,), 65519.0, dtype=torch.float64), torch.full((1,), 65519.0, dtype=torch.float64), 1)
    check("largest", torch.tensor([65504.0], dtype=torch.float16), half)
    with pytest.raises(WrongError):
        check(
            "infinite",
            torch.tensor([float("inf")], dtype=torch.float16),
            Expected(exact[:1] * 60000, magnitude[:1].double() * 60000, 1),
        )
