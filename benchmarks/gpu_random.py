"""Time products of sizes drawn by lot on this GPU: how often the kernel that is chosen for them is the faster one.

Sizes are drawn evenly on a logarithmic scale, three quarters of them multiples of 8; products that the floor lets take
less than 3 or more than 100 microseconds are drawn again. Replays of CUDA graphs, cold L2. Every result is compared
with float64 before it is timed.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from command import Parser, exit_code, progress
from floor import work
from gpu_floor import GpuRates, measure_rates
from gpu_sizes import WAYS, dtype_of, measure, parse_arguments, redraw
from gpu_timing import DTYPES, QUICK, Gpu
from plot import find_pyplot
from record import environment, gpu_environment, write
from shapes import Shape

RANGES = {"rows": (128, 16384), "num_heads": (1, 256), "head_dim": (16, 640), "embed": (16, 4096)}
SHORTEST, LONGEST = 3e-6, 100e-6  # seconds, by the floor
ALIGNED, ANY = "multiples of 8", "any sizes"


def draw_shape(generator: random.Random, rates: GpuRates, dtype: str) -> tuple[Shape, str]:
    """The next product, and whether its sizes are multiples of 8."""
    while True:
        kind = ALIGNED if generator.random() < 0.75 else ANY
        sizes = {
            name: round(math.exp(generator.uniform(math.log(low), math.log(high))))
            for name, (low, high) in RANGES.items()
        }
        if kind == ALIGNED:
            sizes |= {name: (sizes[name] + 7) // 8 * 8 for name in ("head_dim", "embed")}
        rows, num_heads, head_dim, embed = sizes.values()
        name = f"{rows} rows, {num_heads} x {head_dim} -> {embed}"
        shape = Shape(name, 1, rows, num_heads, head_dim, embed, "drawn by lot")
        if SHORTEST <= rates.floor(dtype, *work("forward", shape, DTYPES[dtype].itemsize)) <= LONGEST:
            return shape, kind


def ratios(record: dict[str, Any], kind: str) -> list[float]:
    """How many times as long the other way took as ours, ascending."""
    medians = [[e["median"] for e in record["timings"] if (e["kind"], e["name"]) == (kind, name)] for name in WAYS]
    return sorted(other / ours for ours, other in zip(*medians, strict=True))


def draw(record: dict[str, Any], picture: Path) -> None:
    """The ratios in ascending order."""
    pyplot = find_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for kind in (ALIGNED, ANY):
        own = ratios(record, kind)
        axes.plot([100 * (i + 0.5) / len(own) for i in range(len(own))], own, label=f"{kind} ({len(own)})")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("% of the products")
    axes.set_ylabel("time of bmm(out=) / ours")
    axes.grid(alpha=0.3)
    axes.legend()
    here = record["environment"]
    title = f"{here['gpu']}, torch {here['torch']}, {dtype_of(record)}, commit {here['commit']}"
    figure.suptitle(title, fontsize="medium")
    figure.savefig(picture, dpi=120)
    print(f"Written: {picture}")


def run(options: argparse.Namespace) -> None:
    """Measure and write, or draw."""
    if options.draw is not None:
        redraw(draw, options.draw)
        return
    timings: list[dict[str, Any]] = []
    generator = random.Random(options.seed)
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs cannot be captured on the default one
        rates = measure_rates([options.dtype], QUICK.mm_size)
        gpu = Gpu()
        for _ in progress(range(options.count), "timing"):
            shape, kind = draw_shape(generator, rates, options.dtype)
            sizes = {"rows": shape.rows, "num_heads": shape.num_heads, "head_dim": shape.head_dim, "embed": shape.embed}
            entries = measure(shape, options.dtype, options.repeats, gpu, rates)
            timings += [{"kind": kind, **sizes, **entry} for entry in entries]
    record = {
        "environment": environment() | gpu_environment(),
        "dtype": options.dtype,
        "seed": options.seed,
        "timings": timings,
    }
    for kind in (ALIGNED, ANY):
        if own := ratios(record, kind):
            slower = sum(ratio < 0.95 for ratio in own)
            print(
                f"{kind}: {len(own)} products, {statistics.geometric_mean(own):.2f} x bmm(out=) in the geometric mean, "
                f"{own[0]:.2f} to {own[-1]:.2f}; {slower} are more than 5 % slower"
            )
    write(options.output, record)
    print(f"Written: {options.output}")


def main(argv: list[str] | None = None) -> int:
    """Measure the products."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0], epilog="Defaults are in parentheses.")
    parser.add_argument("--count", type=int, default=400, metavar="N", help="how many products (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (%(default)s)")
    return exit_code(Path(__file__).name, lambda: run(parse_arguments(parser, argv, "random", counts=("count",))))


if __name__ == "__main__":
    raise SystemExit(main())
