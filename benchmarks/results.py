"""All timings of a run, and the ratios between them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from problem import Kind
    from shapes import Shape
    from timing import Timing


def has_many_rows(shape: Shape) -> bool:
    """The shapes that the marks are about, where they name no other."""
    return shape.rows >= 128


class Results:
    """Timings by shape, dtype, kind and name."""

    def __init__(self, timings: Iterable[Timing]) -> None:
        self.timings = {(t.shape, t.dtype, t.kind, t.name): t for t in timings}

    def get(self, shape: str, dtype: str, kind: Kind, name: str) -> Timing | None:
        """One timing, or None where it was not measured."""
        return self.timings.get((shape, dtype, kind, name))

    def ratio(self, shape: str, dtype: str, kind: Kind, ours: str, opponent: str) -> float | None:
        """How many times the opponent's rate ours is."""
        one, other = (self.get(shape, dtype, kind, name) for name in (ours, opponent))
        return one.rate / other.rate if one and other else None

    def ratios(self, dtype: str, kind: Kind, ours: str, opponent: str) -> dict[str, float]:
        """The ratios for the shapes with many rows."""
        names = [shape.name for shape in SHAPES if has_many_rows(shape)]
        found = {name: self.ratio(name, dtype, kind, ours, opponent) for name in names}
        return {name: ratio for name, ratio in found.items() if ratio is not None}

    def mean(self, dtype: str, kind: Kind, ours: str, opponent: str) -> float | None:
        """Their geometric mean."""
        return geometric_mean(self.ratios(dtype, kind, ours, opponent).values())


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None
