"""Our errors stay within twice PyTorch's and an ulp, and what is worse is not let pass."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

TRUST = Path(__file__).parents[1] / "trust"


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(TRUST))
    import accuracy

    yield accuracy
    for name in ("accuracy", "report"):
        sys.modules.pop(name, None)


def test_within_twice_pytorchs(accuracy):
    comparisons = list(accuracy.compare_all((16, 129)))
    assert len(comparisons) == 2 * len(accuracy.DTYPES) * len(accuracy.PRODUCTS) * len(accuracy.DATA)
    for comparison in comparisons:
        assert comparison.share <= 1, comparison
    assert max(comparison.ours for comparison in comparisons) > accuracy.ALLOWANCE, "nothing adversarial in it"


def test_special_numbers_as_pytorchs(dtype, accuracy):
    tried, wrong = accuracy.check_special(dtype)
    assert tried > 4000
    assert wrong == 0


def test_what_is_worse_is_found(accuracy, monkeypatch, capsys, tmp_path):
    """Sums taken one term after the other in the dtype itself; and zeros for subnormal numbers."""

    def rounded_at_every_step(input, weight, num_heads=1):
        a, b = input.unflatten(-1, (num_heads, -1)), weight.unflatten(0, (num_heads, -1))
        sums = a.new_zeros(len(a), num_heads, b.shape[2])
        for k in range(b.shape[1]):
            sums = sums + a[..., k : k + 1] * b[:, k]
        return torch.where(sums.abs() < torch.finfo(sums.dtype).tiny, 0 * sums, sums)

    monkeypatch.setattr(accuracy, "matmul_with_multi_head", rounded_at_every_step)
    worse = accuracy.compare(torch.bfloat16, "output", 129, "positive")
    assert worse.share > 2
    assert accuracy.check_special(torch.float16)[1] > 0
    monkeypatch.setattr(accuracy, "SHORT_LENGTHS", (129,))
    monkeypatch.setattr(accuracy, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--short", "--output", str(tmp_path / "accuracy")])
    assert accuracy.main() == 1
    assert "FAILED" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "accuracy.json").read_text())) == len(accuracy.PRODUCTS) * len(accuracy.DATA)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
