"""Time the product for head dimensions and embed sizes of all kinds on this GPU: no size may fall off a cliff.

One size varies, the other is 128; 32 heads, 4096 rows. Replays of CUDA graphs, cold L2. Every result is
compared with float64 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from command import Parser, UserError, check_folder, exit_code, progress
from floor import work
from gpu_floor import GpuRates, measure_rates
from gpu_timing import DTYPES, QUICK, Gpu, Operands, allow_tf32, candidate_of, sample, with_graphs
from gpu_ways import OPPONENTS, OURS
from plot import find_pyplot
from record import environment, gpu_environment, gpu_path, write
from shapes import Shape

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPE = "bfloat16"  # unless told otherwise
OTHER, HEADS, ROWS = 128, 32, 4096
WAYS = {"ours": OURS["forward"]["out="], "bmm(out=)": OPPONENTS["forward"]["bmm(out=)"]}
# Every size up to two warps' rows, then what is and what is not a multiple of 2, 8, 16 and 64.
SIZES = (
    *range(1, 35),
    40,
    47,
    48,
    49,
    50,
    56,
    63,
    64,
    65,
    66,
    72,
    80,
    95,
    96,
    97,
    98,
    104,
    112,
    120,
    126,
    127,
    128,
    130,
)
VARIED = ("head_dim", "embed")


def shape_of(varied: str, size: int) -> Shape:
    """The shape in which one size varies."""
    sizes = {"head_dim": OTHER, "embed": OTHER, varied: size}
    return Shape(f"{varied} {size}", 1, ROWS, HEADS, sizes["head_dim"], sizes["embed"], "the curve over sizes")


def measure(shape: Shape, dtype: str, repeats: int, gpu: Gpu, rates: GpuRates) -> list[dict[str, Any]]:
    """All ways, checked and timed."""
    allow_tf32(dtype == "tf32")
    operands = Operands(shape, dtype)
    exact = operands.first.samples("forward")
    flop, bytes = work("forward", shape, DTYPES[dtype].itemsize)
    floor = rates.floor(dtype, flop, bytes)
    entries = []
    for name, way in WAYS.items():
        what = f"{shape.name} ({name})"
        candidate = candidate_of(what, name, way, operands, gpu.copies(bytes), exact)
        candidate = with_graphs(what, candidate, operands, gpu, exact)
        median = statistics.median(sample(candidate, "graph cold", repeats, gpu))
        entries.append({"name": name, "median": median, "floor": floor})
    return entries


def dtype_of(record: dict[str, Any]) -> str:
    """What was measured; records once did not say so."""
    return str(record.get("dtype", DTYPE))


def draw(record: dict[str, Any], picture: Path) -> None:
    """Shares of the floor over the sizes."""
    pyplot = find_pyplot()
    figure, all_axes = pyplot.subplots(1, len(VARIED), figsize=(14, 4.5), sharey=True, layout="constrained")
    for axes, varied in zip(all_axes, VARIED, strict=True):
        for name in WAYS:
            own = [e for e in record["timings"] if (e["varied"], e["name"]) == (varied, name)]
            axes.plot([e["size"] for e in own], [100 * e["floor"] / e["median"] for e in own], ".-", label=name)
        axes.set_xlabel(f"{varied}, the other size {OTHER}")
        axes.set_ylim(0, 105)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("% of the floor")
    all_axes[0].legend(loc="lower right")
    here = record["environment"]
    figure.suptitle(
        f"{here['gpu']}, torch {here['torch']}, {dtype_of(record)}, {HEADS} heads, {ROWS} rows, commit {here['commit']}"
    )
    figure.savefig(picture, dpi=120)
    print(f"Written: {picture}")


def parse_arguments(
    parser: Parser, argv: list[str] | None, kind: str, counts: tuple[str, ...] = ()
) -> argparse.Namespace:
    """Read the command line of a program that measures products of one `kind`, and check its values.

    `counts`: options of the parser's own that are numbers from 1 on.
    """
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default=DTYPE, help="tf32: float32, rounded to TF32 (%(default)s)")
    add("--repeats", type=int, default=QUICK.repeats, metavar="N", help="of each timing (%(default)s)")
    add("--output", type=Path, metavar="FILE", help=f"JSON (results/DATE-gpu-NAME-DTYPE-{kind}.json)")
    add("--draw", type=Path, metavar="JSON", help="measure nothing; draw this record as a .png beside it")
    options = parser.parse_args(argv)
    for name in (*counts, "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.draw is not None:
        return options
    check_folder(options.output)
    if not torch.cuda.is_available():
        raise UserError("no CUDA device")
    if options.output is None:
        options.output = gpu_path(f"{options.dtype} {kind}")
    return options


def redraw(draw: Callable[[dict[str, Any], Path], None], record: Path) -> None:
    """Draw a record as a .png beside it."""
    try:
        draw(json.loads(record.read_text()), record.with_suffix(".png"))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{record} is not a record of this program: {error}") from None


def run(options: argparse.Namespace) -> None:
    """Measure and write, or draw."""
    if options.draw is not None:
        redraw(draw, options.draw)
        return
    timings: list[dict[str, Any]] = []
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs cannot be captured on the default one
        rates = measure_rates([options.dtype], QUICK.mm_size)
        gpu = Gpu()
        for varied, size in progress([(varied, size) for varied in VARIED for size in SIZES], "timing"):
            entries = measure(shape_of(varied, size), options.dtype, options.repeats, gpu, rates)
            timings += [{"varied": varied, "size": size, **entry} for entry in entries]
    for ours, other in zip(timings[::2], timings[1::2], strict=True):
        share, ratio = ours["floor"] / ours["median"], other["median"] / ours["median"]
        name = f"{ours['varied']} {ours['size']}"
        print(f"{name:>12}{ours['median'] * 1e6:8.1f} us{share:7.0%} of the floor{ratio:7.2f} x bmm(out=)")
    here = environment() | gpu_environment()
    write(options.output, {"environment": here, "dtype": options.dtype, "timings": timings})
    print(f"Written: {options.output}")


def main(argv: list[str] | None = None) -> int:
    """Measure the sizes."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0], epilog="Defaults are in parentheses.")
    return exit_code(Path(__file__).name, lambda: run(parse_arguments(parser, argv, "sizes")))


if __name__ == "__main__":
    raise SystemExit(main())
