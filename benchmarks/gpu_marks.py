"""What the CUDA kernels must reach, and how each figure comes from the timings of one run.

Times are of graph replays where it says neither stream nor eager, with cold L2. Reused results are compared with
reused ones of PyTorch, fresh ones with fresh ones. Means are geometric.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from marks import Mark
from results import Results, geometric_mean
from shapes import GPU_SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from gpu_floor import GpuRates
    from gpu_timing import GpuTiming, Mode
    from problem import Kind

MANY_ROWS = tuple(shape.name for shape in GPU_SHAPES[:12])
DECODE = tuple(shape.name for shape in GPU_SHAPES if shape.rows <= 64)
WIDE = ("deepseek-q-1024", "deepseek-q-4096")
SELECTING = 6e-6  # seconds, allowed on top of the floor of the product


class Runs:
    """The timings of each mode, and the rates."""

    def __init__(self, timings: Iterable[GpuTiming], rates: GpuRates) -> None:
        self.rates = rates
        self.timings = list(timings)
        self._by_mode: dict[str, Results[GpuTiming]] = {}
        for mode in {timing.mode for timing in self.timings}:
            self._by_mode[mode] = Results([t for t in self.timings if t.mode == mode], MANY_ROWS)

    def mode(self, mode: Mode) -> Results[GpuTiming]:
        """The timings of a mode."""
        return self._by_mode.get(mode) or Results([], MANY_ROWS)

    def floor(self, timing: GpuTiming) -> float:
        """Seconds below which it cannot be done."""
        return self.rates.floor(timing.dtype, timing.flop, timing.bytes)

    def shares(self, names: Collection[str], dtype: str) -> list[float]:
        """The shares of the floor that our forward, reusing its result, reaches on these shapes."""
        found = [self.mode("graph cold").get(name, dtype, "forward", "out=") for name in names]
        return [self.floor(timing) / timing.median for timing in found if timing]


def mean_share(dtype: str) -> Callable[[Runs], float | None]:
    """The mean share of the floor."""
    return lambda runs: geometric_mean(runs.shares(MANY_ROWS, dtype))


def worst_share(dtype: str) -> Callable[[Runs], float | None]:
    """The smallest share of the floor."""
    return lambda runs: min(runs.shares(MANY_ROWS, dtype), default=None)


def worst_ratio(dtype: str, kind: Kind, ours: str, opponent: str) -> Callable[[Runs], float | None]:
    """The smallest ratio of the rates on any shape."""
    return lambda runs: min(runs.mode("graph cold").ratios(dtype, kind, ours, opponent).values(), default=None)


def worst_decode(runs: Runs) -> float | None:
    """The largest multiple of the floor."""
    return max((1 / share for share in runs.shares(DECODE, "bfloat16")), default=None)


def against_contiguous(runs: Runs) -> float | None:
    """The mean ratio of the rates, fresh against fresh."""
    return runs.mode("graph cold").mean("bfloat16", "forward", "fresh", "contiguous")


def importance_cost(mode: Mode, name: str) -> Callable[[Runs], float | None]:
    """Our time over the floor and what selecting may take."""

    def figure(runs: Runs) -> float | None:
        timing = runs.mode(mode).get("importance", "bfloat16", "importance", name)
        return timing.median / (runs.floor(timing) + SELECTING) if timing else None

    return figure


def kept_ratio(mode: Mode, kind: Kind) -> Callable[[Runs], float | None]:
    """Against topk, mask and nonzero and what follows, both with a result as long as it must be.

    The shape is that which has the name of the kind.
    """
    return lambda runs: runs.mode(mode).ratio(kind, "bfloat16", kind, "kept", "eager")


def selection_time(mode: Mode, name: str) -> Callable[[Runs], float | None]:
    """Microseconds."""

    def figure(runs: Runs) -> float | None:
        timing = runs.mode(mode).get("selection", "bfloat16", "selection", name)
        return timing.median * 1e6 if timing else None

    return figure


def wide_backward(runs: Runs) -> float | None:
    """The smaller of the ratios with 128 heads of 128 to 512."""
    ratios = runs.mode("graph cold").ratios("bfloat16", "backward", "explicit", "two bmm(out=)")
    return min((ratio for name, ratio in ratios.items() if name in WIDE), default=None)


GPU_MARKS = (
    Mark("forward, out=: of the floor, mean of 12 shapes", mean_share("bfloat16"), 0.85),
    Mark("forward, out=: of the floor, worst shape", worst_share("bfloat16"), 0.7),
    Mark("forward, out=: x bmm(out=), worst shape", worst_ratio("bfloat16", "forward", "out=", "bmm(out=)"), 1),
    Mark("forward, fresh: x einsum().contiguous(), mean of 12 shapes", against_contiguous, 1.8),
    Mark("forward, M = 1 to 64, out=: times the floor, worst shape", worst_decode, 1.4, at_most=True),
    Mark("importance, capacity: times (floor + 6 us)", importance_cost("graph cold", "capacity"), 1.25, at_most=True),
    Mark("importance, stream: times (floor + 6 us)", importance_cost("stream cold", "kept"), 1.25, at_most=True),
    Mark("importance, eager: times (floor + 6 us)", importance_cost("eager cold", "kept"), 1.25, at_most=True),
    Mark("importance, stream: x topk, mask, nonzero, index, einsum", kept_ratio("stream cold", "importance"), 5),
    Mark("importance, eager: x topk, mask, nonzero, index, einsum", kept_ratio("eager cold", "importance"), 5),
    Mark("selection, capacity: microseconds", selection_time("graph cold", "capacity"), 10, at_most=True),
    Mark("selection, stream: microseconds", selection_time("stream cold", "kept"), 10, at_most=True),
    Mark("selection, eager: microseconds", selection_time("eager cold", "kept"), 10, at_most=True),
    Mark("selection, stream: x topk, mask, nonzero", kept_ratio("stream cold", "selection"), 8),
    Mark("selection, eager: x topk, mask, nonzero", kept_ratio("eager cold", "selection"), 8),
    Mark("backward, 128 -> 512: x two bmm(out=), worse of two shapes", wide_backward, 1.2),
    Mark("wgrad: x bmm(out=), worst shape", worst_ratio("bfloat16", "wgrad", "explicit", "bmm(out=)"), 1),
    Mark("forward TF32, out=: of its floor, mean of 12 shapes", mean_share("tf32"), 0.85),
    Mark("forward TF32, out=: of its floor, worst shape", worst_share("tf32"), 0.7),
    Mark("forward float32, out=: x bmm(out=), worst shape", worst_ratio("float32", "forward", "out=", "bmm(out=)"), 1),
)
