"""What this GPU can do, measured in the same run: the limits that times are compared with."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

import torch
from gpu_timing import DTYPES, allow_tf32, elapsed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MEBIBYTES = 1024  # of each buffer
REPEATS = 12  # the best counts: these are limits


class GpuRates(NamedTuple):
    """What the device can do."""

    flops: dict[str, float]  # of a large torch.mm, by dtype
    copy: float  # bytes read and written per second
    write: float  # bytes written per second, reading none
    launch: float  # seconds that the smallest kernel takes when it is called eagerly

    def floor(self, dtype: str, flop: float, bytes: float) -> float:
        """Seconds below which nothing can be done."""
        return max(flop / self.flops[dtype], bytes / self.copy)


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    elapsed(call, 2)
    return min(elapsed(call, REPEATS))


def measure_flops(dtype: str, size: int) -> float:
    """The rate of a product of two square matrices."""
    allow_tf32(dtype == "tf32")
    A, B = torch.randn(2, size, size, device="cuda").to(DTYPES[dtype])
    out = torch.empty_like(A)
    return 2.0 * size**3 / best(lambda: torch.mm(A, B, out=out))


def measure_rates(dtypes: Iterable[str], mm_size: int) -> GpuRates:
    """All rates."""
    src = torch.ones(MEBIBYTES << 18, dtype=torch.int32, device="cuda")
    dst = torch.empty_like(src)
    copy = 2 * src.nbytes / best(lambda: dst.copy_(src))
    write = dst.nbytes / best(lambda: dst.fill_(1))
    few = torch.zeros(1, device="cuda")
    launch = statistics.median(elapsed(lambda: few.add_(1), REPEATS, before=few.zero_))
    return GpuRates({dtype: measure_flops(dtype, mm_size) for dtype in dtypes}, copy, write, launch)
