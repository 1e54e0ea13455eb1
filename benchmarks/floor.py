"""The least time that a shape can take on this machine: its work, over rates measured in the same run."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.benchmark import Timer

if TYPE_CHECKING:
    from problem import Kind
    from shapes import Shape

ROUNDS = 5  # the best counts: these are limits


class Rates(NamedTuple):
    """What the machine can do, with as many threads as are timed."""

    flops: float | None  # float32 multiply-adds per second, two each; None: there is no compiler to measure it with
    copy: float  # bytes read and written per second

    def floor(self, flop: float, bytes: float) -> float | None:
        """Seconds below which nothing can be done."""
        return None if self.flops is None else max(flop / self.flops, bytes / self.copy)


def work(kind: Kind, shape: Shape, itemsize: int) -> tuple[float, float]:
    """FLOP, and the fewest bytes that must be read and written, each tensor once."""
    M, nh, e, h = shape.rows, shape.num_heads, shape.embed, shape.num_heads * shape.head_dim
    t = shape.batch * shape.top_k
    if kind == "backward":
        return 4.0 * M * h * e, float(itemsize * (M * nh * e + 2 * M * h + 2 * h * e))
    if kind == "wgrad":
        return 2.0 * M * h * e, float(itemsize * (M * nh * e + M * h + h * e))
    if kind == "selection":  # scores, 64-bit positions
        return 0.0, float(4 * M + 8 * t)
    if kind == "importance gradients":  # output and gradients; grad_input is dense, zeros included
        return 6.0 * t * h * e, float(itemsize * (2 * t * nh * e + t * h + M * h + 2 * h * e) + 4 * M)
    scores = 0
    if kind == "importance":
        scores = 4 * M
        M = t
    return 2.0 * M * h * e, float(itemsize * (M * h + h * e + M * nh * e) + scores)


def find_compiler() -> str | None:
    """The system's C++ compiler."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def measure_flops(threads: int, seconds: float) -> float | None:
    """The rate of `peak.cpp` on all threads at once; ctypes lets go of the interpreter lock."""
    compiler = find_compiler()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.cpp")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        if subprocess.run([compiler, *flags, source, "-o", library], capture_output=True, check=False).returncode:
            return None
        function = ctypes.CDLL(str(library)).fma_rate
    function.argtypes, function.restype = [ctypes.c_double, ctypes.POINTER(ctypes.c_float)], ctypes.c_double

    def rate(_: int) -> float:
        return float(function(seconds, ctypes.byref(ctypes.c_float(0.5))))

    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(rate, range(threads))) for _ in range(ROUNDS))


def measure_copy(threads: int, seconds: float, mebibytes: int) -> float:
    """The rate of a copy between two buffers of this size, too large for most caches."""
    src = torch.ones(mebibytes << 20, dtype=torch.uint8)
    names = {"src": src, "dst": torch.zeros_like(src)}
    timer = Timer("dst.copy_(src)", globals=names, num_threads=threads)
    return float(2 * src.numel() / min(timer.blocked_autorange(min_run_time=seconds * ROUNDS).times))
