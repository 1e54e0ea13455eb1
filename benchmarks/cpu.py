"""Time the package on this CPU against plain PyTorch, and against what the machine can do.

Every result is compared with float64 before anything is timed. Printed are ratios of rates measured in this run;
absolute times are in the JSON file.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from command import Parser, UserError, check_folder, exit_code, progress
from floor import Rates, find_compiler, measure_copy, measure_flops
from marks import MARKS, MarkResult, judge, print_marks
from problem import Kind, make_problem
from record import default_path, environment, write
from results import Results, has_many_rows
from shapes import SHAPES, Shape
from timing import FULL, QUICK, Candidate, Effort, Timing, build_mm, measure
from ways import OURS

from mhmatmul_ext import _C

DTYPES = ("float32", "bfloat16", "float16")
QUICK_ROWS = 8
COLUMNS = ("einsum", "contiguous", "bmm(out=)", "loop", "compiled", "bmm", "no oneDNN", "eager", "dense")
LEGEND = """\
Each column but the first two says how many times the rate of that is ours. mm: plain torch.mm in float32. floor: the
share of what multiply-add units and memory allow. einsum: its permuted view, and autograd through it for gradients.
contiguous: einsum().contiguous(). no oneDNN: einsum with PyTorch's own loops, as CPUs without half-precision
instructions run it. eager: topk, mask, nonzero, index, einsum. dense: our product of all tokens, by time.
fresh allocates its result, out= reuses one. *: the opponent ran on fewer rows, its rate is compared."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line and check its values."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0], epilog="Defaults are in parentheses.")
    add, names = parser.add_argument, [shape.name for shape in SHAPES]
    add("--threads", type=int, default=FULL.threads, metavar="N", help="(%(default)s)")
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES, metavar="NAME", help=f"of {', '.join(DTYPES)} (all)")
    add("--shape", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)} (all)")
    add("--quick", action="store_true", help="few rows and repeats, to see that it works: no figure means anything")
    add("--seconds-per-timing", type=float, metavar="S", help=f"for each way of each shape ({FULL.seconds})")
    add("--output", type=Path, metavar="FILE", help="JSON (results/DATE-cpu-INSTRUCTIONS.json; none with --quick)")
    add("--markdown", action="store_true", help="the table of marks as markdown")
    options = parser.parse_args(argv)
    if options.threads < 1:
        raise UserError(f"--threads must be at least 1, got {options.threads}")
    if options.seconds_per_timing is not None and not 0 < options.seconds_per_timing < float("inf"):
        raise UserError(f"--seconds-per-timing must be positive, got {options.seconds_per_timing}")
    if options.output is None and not options.quick:
        options.output = default_path(f"cpu-{_C.cpu_capability()}")
    check_folder(options.output)
    return options


def effort(options: argparse.Namespace) -> Effort:
    """How long to measure."""
    chosen = QUICK if options.quick else FULL
    seconds = options.seconds_per_timing or chosen.seconds
    return chosen._replace(threads=options.threads, seconds=seconds)


def kinds(shape: Shape) -> list[Kind]:
    """What is timed of a shape: gradients are for training, where rows are many, and for what a call costs."""
    backward: list[Kind] = ["backward"] if has_many_rows(shape) else []
    backward += ["call and gradients"] if shape.name == "smallest" else []
    importance: list[Kind] = ["importance"] if shape.kept else []
    return ["forward", *backward, *importance]


def measure_rates(effort: Effort, quick: bool) -> Rates:
    """What the machine can do."""
    flops = measure_flops(effort.threads, effort.seconds)
    return Rates(flops, measure_copy(effort.threads, effort.seconds, 16 if quick else 256))


def measure_all(options: argparse.Namespace, effort: Effort, mm: Candidate) -> list[Timing]:
    """Every chosen shape, dtype and kind; the dtypes of a shape one after the other."""
    timings = []
    chosen = [shape for shape in SHAPES if shape.name in options.shape]
    runs = progress([(shape, dtype) for shape in chosen for dtype in options.dtype], "timing")
    for shape, dtype in runs:
        runs.set_postfix_str(f"{shape.name}, {dtype}")
        problem = make_problem(shape.with_rows(QUICK_ROWS) if options.quick else shape, getattr(torch, dtype))
        for kind in kinds(shape):
            timings += measure(kind, problem, mm, effort)
    return timings


def ratio_text(results: Results[Timing], ours: Timing, opponent: str) -> str:
    """How many times the opponent's rate ours is; `dense` does more work and is compared by time."""
    other = results.get(ours.shape, ours.dtype, ours.kind, opponent)
    if other is None or other == ours:
        return ""
    ratio = other.median / ours.median if opponent == "dense" else ours.rate / other.rate
    return f"{ratio:.2f}{'*' if other.rows < ours.rows else ' '}"


def table_row(results: Results[Timing], rates: Rates, ours: Timing, columns: list[str]) -> str:
    """One line of a shape's table."""
    floor = rates.floor(ours.flop, ours.bytes)
    share = results.ratio(ours.shape, ours.dtype, ours.kind, ours.name, "torch.mm")
    what = f"  {ours.dtype:<9}{ours.kind}, {ours.name}"
    cells = "".join(f"{ratio_text(results, ours, name):>12}" for name in columns)
    return f"{what:<36}{share:>5.2f}{'-' if floor is None else f'{floor / ours.median:.0%}':>7}{cells}".rstrip()


def ours_of(results: Results[Timing]) -> list[Timing]:
    """Our own timings, but for the dense product beside a selection, which `forward` shows."""
    return [t for t in results.timings.values() if t.name in OURS[t.kind] and t.name != "dense"]


def print_tables(results: Results[Timing], rates: Rates) -> None:
    """Print a table for each shape."""
    print(f"\n{LEGEND}")
    rows = ours_of(results)
    for shape in SHAPES:
        own = [row for row in rows if row.shape == shape.name]
        columns = [name for name in COLUMNS if any(ratio_text(results, row, name) for row in own)]
        if own:
            print(f"\n{shape.name}: {own[0].rows} rows, {shape.num_heads} x {shape.head_dim} -> {shape.embed}")
            print(f"  {shape.source}")
            print(f"{'':<36}{'mm':>5}{'floor':>7}{''.join(f'{name + chr(32):>12}' for name in columns)}")
            print("\n".join(table_row(results, rates, row, columns) for row in own))


def record(
    options: argparse.Namespace, rates: Rates, results: Results[Timing], marks: list[MarkResult]
) -> dict[str, object]:
    """All that was measured."""
    entries = []
    for timing in results.timings.values():
        entry: dict[str, object] = {**timing._asdict(), "ours": timing.name in OURS[timing.kind]}
        floor = rates.floor(timing.flop, timing.bytes)
        if entry["ours"]:
            entry["of floor"] = None if floor is None else floor / timing.median
            key = (timing.shape, timing.dtype, timing.kind)
            others = [other for other in results.timings if other[:3] == key and other[3] not in OURS[timing.kind]]
            entry["times the rate of"] = {other[3]: results.ratio(*key, timing.name, other[3]) for other in others}
        entries.append(entry)
    return {
        "environment": environment() | {"threads": options.threads, "quick": options.quick},
        "rates": {
            "FLOP/s of multiply-adds": rates.flops,
            "FLOP/s of torch.mm": statistics.median(t.rate for t in results.timings.values() if t.name == "torch.mm"),
            "bytes/s of a copy": rates.copy,
        },
        "marks": [mark._asdict() for mark in marks],
        "timings": entries,
    }


def bench(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    torch.set_num_threads(options.threads)
    how = effort(options)
    mm = build_mm(how.mm_size)
    rates = measure_rates(how, options.quick)
    results = Results(measure_all(options, how, mm))
    here = environment()
    print(f"{here['cpu']}, {here['cores']} cores, {options.threads} threads, capability {here['capability']}")
    print(f"mhmatmul_ext {here['mhmatmul_ext']} at {here['commit']}, torch {here['torch']}")
    if rates.flops is None:
        why = "there is no C++ compiler" if find_compiler() is None else "peak.cpp does not compile"
        print(f"the floor and compiled einsum were not measured: {why}")
    if options.quick:
        print("--quick: few rows and repeats, no figure means anything")
    print_tables(results, rates)
    marks = judge(results, MARKS)
    over = f"geometric means over the shapes with 128 rows and more, {options.threads} threads (set for 2)"
    print_marks(marks, over, options.markdown)
    if options.output is not None:
        write(options.output, record(options, rates, results, marks))
        print(f"\nWritten: {options.output}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks."""
    return exit_code(Path(__file__).name, lambda: bench(parse_arguments(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
