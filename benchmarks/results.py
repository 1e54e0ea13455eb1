"""All timings of a run, and the ratios between them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from problem import Kind
    from shapes import Shape


class Timed(Protocol):
    """How fast one way was on one shape."""

    @property
    def shape(self) -> str:
        """The name of the shape."""

    @property
    def dtype(self) -> str:
        """The name of the dtype."""

    @property
    def kind(self) -> Kind:
        """What is computed."""

    @property
    def name(self) -> str:
        """The name of the way."""

    @property
    def rate(self) -> float:
        """Work per second."""


T = TypeVar("T", bound=Timed)


def has_many_rows(shape: Shape) -> bool:
    """The shapes that the marks are about, where they name no other."""
    return shape.rows >= 128


MANY_ROWS = tuple(shape.name for shape in SHAPES if has_many_rows(shape))


class Results(Generic[T]):
    """Timings by shape, dtype, kind and name; `averaged` names the shapes that ratios and means are about."""

    def __init__(self, timings: Iterable[T], averaged: Collection[str] = MANY_ROWS) -> None:
        self.averaged = averaged
        self.timings = {(t.shape, t.dtype, t.kind, t.name): t for t in timings}

    def get(self, shape: str, dtype: str, kind: Kind, name: str) -> T | None:
        """One timing, or None where it was not measured."""
        return self.timings.get((shape, dtype, kind, name))

    def ratio(self, shape: str, dtype: str, kind: Kind, ours: str, opponent: str) -> float | None:
        """How many times the opponent's rate ours is."""
        one, other = (self.get(shape, dtype, kind, name) for name in (ours, opponent))
        return one.rate / other.rate if one and other else None

    def ratios(self, dtype: str, kind: Kind, ours: str, opponent: str) -> dict[str, float]:
        """The ratios for the shapes with many rows."""
        found = {name: self.ratio(name, dtype, kind, ours, opponent) for name in self.averaged}
        return {name: ratio for name, ratio in found.items() if ratio is not None}

    def mean(self, dtype: str, kind: Kind, ours: str, opponent: str) -> float | None:
        """Their geometric mean."""
        return geometric_mean(self.ratios(dtype, kind, ours, opponent).values())


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None
