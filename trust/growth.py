"""How time and memory grow with b, s, h and e, as exponents, and that a call allocates what it says and nothing more.

The peak of a call's memory is read from Linux: everything counts, whoever allocated it. What it may be is the result
and `workspace`, beside what each thread keeps from call to call and pages that are not full.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from report import Row
from torch import Tensor

from mhmatmul_ext import combine, matmul_with_importance, matmul_with_multi_head, select_important

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_HEADS = 4
KEPT = 2  # every so many tokens, one
MOST_TIME, MOST_MEMORY = 1.25, 1.02  # exponents; 2 is quadratic
AGAIN = 3  # times at most that a line of times is measured anew
PER_THREAD = 4 << 20  # bytes that a thread keeps, at most
PAGES = 1 << 18  # bytes: pages that are not full, small allocations


class Sizes(NamedTuple):
    """As in the contract."""

    b: int
    s: int
    h: int
    e: int

    @property
    def tokens(self) -> int:
        """In all sequences."""
        return self.b * self.s


class Operation(NamedTuple):
    """A call for given sizes and dtype, and the bytes that it may use beside its result."""

    prepare: Callable[[Sizes, torch.dtype], Callable[[], object]]
    workspace: Callable[[Sizes, int], int] = lambda _, __: 0  # by the size of an element
    varied: str = "bshe"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def _input(sizes: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.ones(sizes.b, sizes.s, sizes.h, dtype=dtype)


def _weight(sizes: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.ones(sizes.h, sizes.e, dtype=dtype)


def _scores(sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """Distinct ones in a row, where the dtype can tell them apart."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(sizes.b, sizes.s, generator=generator).to(dtype)


def _places(sizes: Sizes) -> Tensor:
    return torch.arange(0, sizes.tokens, KEPT)


def dense(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """The multi-head product."""
    input, weight = _input(sizes, dtype), _weight(sizes, dtype)
    return lambda: matmul_with_multi_head(input, weight, NUM_HEADS)


def strided(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """The same with a slice of wider rows and a transposed weight."""
    input = torch.ones(sizes.b, sizes.s, sizes.h + 8, dtype=dtype)[..., : sizes.h]
    weight = torch.ones(sizes.e, sizes.h, dtype=dtype).t()
    return lambda: matmul_with_multi_head(input, weight, NUM_HEADS)


def uncollapsed(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """The same with a slice of longer sequences."""
    input = torch.ones(sizes.b, sizes.s + 8, sizes.h, dtype=dtype)[:, : sizes.s]
    weight = _weight(sizes, dtype)
    return lambda: matmul_with_multi_head(input, weight, NUM_HEADS)


def gradients(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """Its backward."""
    leaves = _input(sizes, dtype).requires_grad_(), _weight(sizes, dtype).requires_grad_()
    output = matmul_with_multi_head(*leaves, NUM_HEADS)
    grad_output = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)


def selected(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """The product of the selected tokens."""
    input, weight, scores = _input(sizes, dtype), _weight(sizes, dtype), _scores(sizes, dtype)
    return lambda: matmul_with_importance(input, weight, scores, num_heads=NUM_HEADS, top_p=0.0, top_k=sizes.s // KEPT)


def selected_gradients(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """The same with explicit gradients."""
    input, weight, scores = _input(sizes, dtype), _weight(sizes, dtype), _scores(sizes, dtype)
    k = sizes.s // KEPT
    grad_output = torch.ones(sizes.b * k, NUM_HEADS, sizes.e, dtype=dtype)
    return lambda: matmul_with_importance(input, weight, scores, grad_output, NUM_HEADS, 0.0, k)


def repeated(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """The gradient of rows that were gathered more than once."""
    indices = _places(sizes).clamp(max=sizes.tokens // 2)
    weight = _weight(sizes, dtype).unflatten(0, (NUM_HEADS, -1))
    grad_output = torch.ones(len(indices), NUM_HEADS, sizes.e, dtype=dtype)
    return lambda: torch.ops.mhmatmul._gather_head_matmul_dgrad(grad_output, weight, indices, sizes.tokens)


def selection(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """`select_important` alone."""
    scores = _scores(sizes, dtype)
    return lambda: select_important(scores, 0.0, sizes.s // KEPT)


def masked(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """The same with protected tokens."""
    scores, mask = _scores(sizes, dtype), torch.zeros(sizes.b, sizes.s, dtype=torch.int8)
    mask[:, ::100] = 1
    return lambda: select_important(scores, 0.0, sizes.s // KEPT, mask=mask)


def combined(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """`combine` with gates."""
    places, base = _places(sizes), _input(sizes, dtype)
    updates, gates = torch.ones(len(places), sizes.h, dtype=dtype), torch.ones(len(places), dtype=dtype)
    return lambda: combine(base, updates, places, gates)


def combined_strided(sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """The same with every other column of wider rows."""
    places = _places(sizes)
    base = torch.ones(sizes.b, sizes.s, sizes.h, 2, dtype=dtype)[..., 0]
    updates = torch.ones(len(places), sizes.h, 2, dtype=dtype)[..., 0]
    return lambda: combine(base, updates, places)


def _combining(sizes: Sizes, itemsize: int) -> int:
    """Which updates a row gets."""
    return 8 * (2 * sizes.tokens + sizes.tokens // KEPT)


def _selecting(sizes: Sizes, itemsize: int) -> int:
    """The positions of kept tokens once more, or before them each thread's: a row's positions and twice its scores."""
    return max(8 * sizes.tokens // KEPT, torch.get_num_threads() * (8 + 2 * itemsize) * sizes.s)


def _selecting_for_a_product(sizes: Sizes, itemsize: int) -> int:
    return 8 * (sizes.tokens // KEPT + sizes.b) + _selecting(sizes, itemsize)


def _repeating(sizes: Sizes, itemsize: int) -> int:
    """Rows before they are added up, of a block; for half types those gradients, the weight and the sums in float32."""
    block = min(1024, sizes.tokens // KEPT)
    widened = block * NUM_HEADS * sizes.e + sizes.h * sizes.e + sizes.tokens * sizes.h
    return 8 * sizes.tokens + 4 * (block * sizes.h + (0 if itemsize == 4 else widened))


OPERATIONS = {
    "multi-head": Operation(dense),
    "multi-head, strided": Operation(strided),
    "multi-head, longer rows": Operation(uncollapsed, lambda z, size: size * z.tokens * z.h),
    "its gradients": Operation(gradients),
    "selected": Operation(selected, _selecting_for_a_product),
    "selected, gradients": Operation(
        selected_gradients, lambda z, size: _selecting_for_a_product(z, size) + 8 * z.tokens
    ),
    "gathered twice, gradient": Operation(repeated, _repeating),
    "selection": Operation(selection, _selecting, "bs"),
    "selection, int8 mask": Operation(masked, lambda z, _: 48 * z.tokens, "bs"),
    "combine": Operation(combined, _combining, "bsh"),
    "combine, strided": Operation(
        combined_strided, lambda z, size: _combining(z, size) + size * z.h * (z.tokens + z.tokens // KEPT), "bsh"
    ),
}


def exponent(factors: list[int], values: list[float]) -> float:
    """The slope of values over factors, both as logarithms."""
    x, y = [math.log(factor) for factor in factors], [math.log(value) for value in values]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def vary(base: Sizes, letter: str, factor: int) -> Sizes:
    """One size, so many times as large."""
    return base._replace(**{letter: factor * getattr(base, letter)})


def seconds(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """The least time of each call on the processor: by the clock, other programs would add theirs to long calls."""
    best = [math.inf] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - start)
    return best


def _status(name: str) -> int:
    """Bytes, as Linux counts this process's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status says nothing about {name}")


def return_freed_memory() -> None:
    """Have malloc keep nothing: what is freed would hide what is allocated next."""
    libc = ctypes.CDLL(None)
    mmap_threshold, trim_threshold, arenas = -3, -1, -8  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
    for option, value in ((mmap_threshold, 1 << 16), (trim_threshold, 0), (arenas, 1)):
        libc.mallopt(option, value)


def peak(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes at the highest above those before, and those that its result holds."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    result = call()
    highest = _status("VmHWM") - before
    tensors = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]
    return highest, sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class Memory(NamedTuple):
    """One call's bytes."""

    operation: str
    dtype: str
    sizes: Sizes
    first: int  # the peak of a first call, after which threads keep their scratch memory
    peak: int
    result: int
    workspace: int  # stated

    @property
    def excess(self) -> int:
        """Beyond what may be."""
        kept = self.first - self.peak - PER_THREAD * torch.get_num_threads()
        return max(self.peak - self.result - self.workspace, kept) - PAGES


LARGE = Sizes(4, 512, 1024, 512)
SMALL = Sizes(1, 8, 8, 2)
VERY_LONG = Sizes(8, 1 << 17, 4, 1)  # for selections, whose result is small beside the scores


def measure_memory(factors: tuple[int, ...]) -> list[Memory]:
    """Each operation at its base sizes, and with one size larger."""
    return_freed_memory()
    found = []
    for name, operation in OPERATIONS.items():
        base = LARGE if "h" in operation.varied else VERY_LONG
        for dtype in operation.dtypes:
            grown = [vary(base, letter, factor) for letter in operation.varied for factor in factors if factor > 1]
            for sizes in (base, *grown):
                operation.prepare(SMALL, dtype)()  # brings in code and threads
                call = operation.prepare(sizes, dtype)
                (first, _), (highest, result) = peak(call), peak(call)
                label, workspace = str(dtype).removeprefix("torch."), operation.workspace(sizes, dtype.itemsize)
                found.append(Memory(name, label, sizes, first, highest, result, workspace))
    return found


def in_a_process_of_its_own(factors: tuple[int, ...]) -> list[Memory]:
    """The same where nothing was done to memory before, and what malloc was told ends with it."""
    command = [sys.executable, __file__, "--memory-json", *map(str, factors)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    entries = json.loads(result.stdout)
    return [Memory(name, dtype, Sizes(*sizes), *numbers) for name, dtype, sizes, *numbers in entries]


class Growth(NamedTuple):
    """How something grows with one size."""

    operation: str
    letter: str
    exponent: float


def memory_growth(memory: list[Memory]) -> list[Growth]:
    """Of the peaks: from the base sizes to the largest."""
    found = []
    for name, operation in OPERATIONS.items():
        own = [m for m in memory if (m.operation, m.dtype) == (name, "float32")]
        base = own[0].sizes
        for letter in operation.varied:
            others = [x for x in "bshe" if x != letter]
            line = [m for m in own if all(getattr(m.sizes, x) == getattr(base, x) for x in others)]
            factors = [getattr(m.sizes, letter) // getattr(base, letter) for m in line]
            found.append(Growth(name, letter, exponent(factors, [float(m.peak) for m in line])))
    return found


BASE = Sizes(2, 256, 256, 64)
LONG = Sizes(4, 1 << 14, 4, 1)


def time_growth(factors: tuple[int, ...], rounds: int) -> list[Growth]:
    """Of the least times, in float32, on one thread; what looks too steep is measured again, for others may be busy."""
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, operation in OPERATIONS.items():
        base = BASE if "h" in operation.varied else LONG
        for letter in operation.varied:
            calls = [operation.prepare(vary(base, letter, factor), torch.float32) for factor in factors]
            times = seconds(calls, rounds)
            for _ in range(AGAIN):
                if exponent(list(factors), times) <= MOST_TIME:
                    break
                times = [min(pair) for pair in zip(times, seconds(calls, rounds), strict=True)]
            found.append(Growth(name, letter, exponent(list(factors), times)))
    torch.set_num_threads(threads)
    return found


def table(growths: list[Growth]) -> str:
    """A line for each operation."""
    lines = [f"{'':<26}" + "".join(f"{letter:>7}" for letter in "bshe")]
    for name in dict.fromkeys(growth.operation for growth in growths):
        found = {growth.letter: f"{growth.exponent:.2f}" for growth in growths if growth.operation == name}
        lines.append(f"{name:<26}" + "".join(f"{found.get(letter, '-'):>7}" for letter in "bshe"))
    return "\n".join(lines)


def memory_table(memory: list[Memory]) -> str:
    """Each operation at its base sizes."""
    lines = [f"{'MiB':<26}{'':<10}{'peak':>9}{'result':>9}{'workspace':>11}"]
    for name in OPERATIONS:
        for dtype in dict.fromkeys(m.dtype for m in memory):
            m = next(m for m in memory if (m.operation, m.dtype) == (name, dtype))
            mebibytes = [f"{x / (1 << 20):.1f}" for x in (m.peak, m.result, m.workspace)]
            lines.append(f"{name:<26}{dtype:<10}{mebibytes[0]:>9}{mebibytes[1]:>9}{mebibytes[2]:>11}")
    return "\n".join(lines)


def worst(growths: list[Growth]) -> Growth:
    """The fastest growth."""
    return max(growths, key=lambda growth: growth.exponent)


def rows(short: bool) -> list[Row]:
    """For `make trust`."""
    times = time_growth((1, 4, 16) if short else (1, 2, 4, 8, 16), 10 if short else 30)
    memory = in_a_process_of_its_own((1, 4) if short else (1, 2, 4))
    slowest, largest, most = worst(times), worst(memory_growth(memory)), max(memory, key=lambda m: m.excess)
    return [
        Row(
            "time grows as b, s, h, e",
            len(times),
            "exponents",
            f"at most {slowest.exponent:.2f} ({slowest.operation}, {slowest.letter})",
            slowest.exponent <= MOST_TIME,
        ),
        Row(
            "memory grows as b, s, h, e",
            len(memory_growth(memory)),
            "exponents",
            f"at most {largest.exponent:.2f} ({largest.operation}, {largest.letter})",
            largest.exponent <= MOST_MEMORY,
        ),
        Row(
            "memory is the result and the stated workspace",
            len(memory),
            "calls",
            "nothing" if most.excess <= 0 else f"{most.excess >> 20} MiB more: {most}",
            most.excess <= 0,
        ),
    ]


def main() -> int:
    """Measure and print; fails where something grows faster than it should, or is more than was said."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="fewer sizes")
    parser.add_argument("--memory-json", type=int, nargs="+", metavar="FACTOR", help="measure memory alone, as JSON")
    options = parser.parse_args()
    if options.memory_json:
        print(json.dumps(measure_memory(tuple(options.memory_json))))
        return 0
    times = time_growth((1, 4, 16) if options.short else (1, 2, 4, 8, 16), 10 if options.short else 30)
    print(f"Exponents of time\n{table(times)}\n")
    memory = in_a_process_of_its_own((1, 4) if options.short else (1, 2, 4))
    growths = memory_growth(memory)
    print(f"Exponents of memory\n{table(growths)}\n\n{memory_table(memory)}\n")
    failures = [f"time: {g}" for g in times if g.exponent > MOST_TIME]
    failures += [f"memory: {g}" for g in growths if g.exponent > MOST_MEMORY]
    failures += [f"{m.excess} bytes more than stated: {m}" for m in memory if m.excess > 0]
    print("\n".join(f"FAILED: {failure}" for failure in failures) or "passed")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
