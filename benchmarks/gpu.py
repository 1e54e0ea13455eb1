"""Time the package on this GPU against plain PyTorch, and against what the device can do.

Every result is compared with float64 before it is timed: all of it for NaN, and some rows or heads for their values.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from command import Parser, UserError, WrongResultError, check_folder, exit_code, progress
from gpu_floor import GpuRates, measure_rates
from gpu_marks import GPU_MARKS, MANY_ROWS, Runs
from gpu_timing import DTYPES, FULL, MODES, QUICK, Effort, Findings, Gpu, GpuTiming, Mode, Operands, measure
from gpu_ways import OURS, forget_compiled
from marks import MarkResult, judge, print_marks
from problem import Kind
from record import environment, gpu_environment, gpu_path, write
from shapes import GPU_SHAPES, Shape

from mhmatmul_ext import _C

JUDGED = ("bfloat16", "float32", "tf32")  # what the marks are about
LEGEND = """\
Microseconds a call, medians. graph: replayed from a CUDA graph, without the host's part; - where the result's size
depends on data, which no graph can hold. mixed: the same with a small kernel of PyTorch's behind each call, included.
stream: the graph's calls eagerly, one after the other: the host's part counts where it is longer, or a call waits.
eager: called with the device idle, the host's part included. cold: operands not in L2; hot: just used. floor: the share
of what the device's copy and torch.mm rates allow, graph cold, else stream cold. x: times our time (the line marked
1.00), in the same mode. *: ours. copy: of as many bytes, computing nothing. tf32: float32, rounded to TF32."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line and check its values."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0], epilog="Defaults are in parentheses.")
    add, names = parser.add_argument, [shape.name for shape in GPU_SHAPES]
    default = ", ".join(JUDGED)
    add("--dtype", nargs="+", choices=DTYPES, metavar="NAME", help=f"of {', '.join(DTYPES)} ({default})")
    add("--shape", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)} (all)")
    add("--quick", action="store_true", help="bfloat16 and few repeats: under a minute, the figures are rough")
    add("--repeats", type=int, metavar="N", help=f"of each timing, at least 2 ({FULL.rounds * FULL.repeats})")
    add("--compile", action="store_true", help="torch.compile(mode='max-autotune') as well, many minutes")
    add("--output", type=Path, metavar="FILE", help="JSON (results/DATE-gpu-NAME.json; none with --quick)")
    add("--markdown", action="store_true", help="the table of marks as markdown")
    options = parser.parse_args(argv)
    if options.repeats is not None and options.repeats < 2:
        raise UserError(f"--repeats must be at least 2, got {options.repeats}")
    if options.dtype is None:
        options.dtype = JUDGED[:1] if options.quick else JUDGED
    check_folder(options.output)
    if not torch.cuda.is_available():
        raise UserError("no CUDA device")
    if _C.build_config()["cuda"] is None:
        raise UserError("mhmatmul_ext was built without CUDA")
    if options.output is None and not options.quick:
        options.output = gpu_path()
    return options


def effort(options: argparse.Namespace) -> Effort:
    """How often to measure."""
    chosen = QUICK if options.quick else FULL
    if options.repeats is None:
        return chosen
    rounds = min(chosen.rounds, options.repeats)
    return chosen._replace(rounds=rounds, repeats=-(-options.repeats // rounds))


def kinds(shape: Shape) -> list[Kind]:
    """What is timed of a shape."""
    if shape.name == "selection":
        return ["selection"]
    gradients: list[Kind] = ["backward", "wgrad"] if shape.name in MANY_ROWS else []
    dense: list[Kind] = [] if shape.name == "importance" else ["forward", *gradients]
    return [*dense, "importance", "importance gradients"] if shape.kept else dense


def measure_shape(
    shape: Shape, dtype: str, options: argparse.Namespace, gpu: Gpu, findings: Findings
) -> list[GpuTiming]:
    """All kinds, in memory that the shape before left free; what fails is noted, and the others go on."""
    timings = []
    try:
        forget_compiled()
        gc.collect()
        torch.cuda.empty_cache()
        operands = Operands(shape, dtype)
        for kind in kinds(shape):
            timings += measure(kind, operands, effort(options), options.compile, gpu, findings)
    except Exception as error:
        findings.add(f"{shape.name} in {dtype}", error, ours=True)
    return timings


def measure_all(options: argparse.Namespace, findings: Findings) -> list[GpuTiming]:
    """Every chosen shape and dtype."""
    gpu = Gpu()
    timings = []
    chosen = [shape for shape in GPU_SHAPES if shape.name in options.shape]
    pairs = [(shape, dtype) for shape in chosen for dtype in options.dtype]
    # Selecting has no operands of that dtype: once is enough.
    pairs = [(shape, dtype) for shape, dtype in pairs if shape.name != "selection" or dtype == options.dtype[0]]
    runs = progress(pairs, "timing")
    for shape, dtype in runs:
        runs.set_postfix_str(f"{shape.name}, {dtype}")
        timings += measure_shape(shape, dtype, options, gpu, findings)
    return timings


def best_mode(runs: Runs, timing: GpuTiming) -> Mode:
    """Graph replays where there are some."""
    key = (timing.shape, timing.dtype, timing.kind, timing.name)
    return "graph cold" if runs.mode("graph cold").get(*key) else "stream cold"


def ratio_text(runs: Runs, timing: GpuTiming) -> str:
    """Its time over that of the first of ours that is timed alike."""
    key = (timing.shape, timing.dtype, timing.kind)
    mode = best_mode(runs, timing)
    ours = [own for name in OURS[timing.kind] if (own := runs.mode(mode).get(*key, name))]
    alike = [own for own in ours if best_mode(runs, own) == mode] or ours
    this = runs.mode(mode).get(*key, timing.name)
    return f"{this.median / alike[0].median:.2f}" if alike and this else ""


def table_row(runs: Runs, timing: GpuTiming) -> str:
    """One line of a shape's table."""
    key = (timing.shape, timing.dtype, timing.kind, timing.name)
    found = {mode: runs.mode(mode).get(*key) for mode in MODES}
    cells = "".join(f"{t.median * 1e6:>12.1f}" if t else f"{'-':>12}" for t in found.values())
    this = found[best_mode(runs, timing)]
    share = f"{runs.floor(this) / this.median:.0%}" if this else ""
    name = f"    {timing.name}{' *' if timing.name in OURS[timing.kind] else ''}"
    return f"{name:<32}{cells}{share:>8}{ratio_text(runs, timing):>8}".rstrip()


def print_tables(runs: Runs) -> None:
    """Print a table for each shape."""
    print(f"\n{LEGEND}")
    rows = list(runs.mode("eager hot").timings.values())
    for shape in GPU_SHAPES:
        own = [row for row in rows if row.shape == shape.name]
        if not own:
            continue
        print(f"\n{shape.name}: {shape.rows} rows, {shape.num_heads} x {shape.head_dim} -> {shape.embed}")
        print(f"  {shape.source}")
        print(f"{'':<32}{''.join(f'{mode:>12}' for mode in MODES)}{'floor':>8}{'x':>8}")
        for dtype, kind in dict.fromkeys((row.dtype, row.kind) for row in own):
            group = [row for row in own if (row.dtype, row.kind) == (dtype, kind)]
            print(f"  {dtype} {kind}, floor {runs.floor(group[0]) * 1e6:.1f} us")
            print("\n".join(table_row(runs, row) for row in group))


def print_rates(rates: GpuRates) -> None:
    """Print what the device can do."""
    products = ", ".join(f"{dtype} {flops / 1e12:.0f}" for dtype, flops in rates.flops.items())
    print(f"copy {rates.copy / 1e12:.2f} TB/s read and written, write {rates.write / 1e12:.2f} TB/s")
    print(f"torch.mm in TFLOP/s: {products}; the smallest kernel, eager: {rates.launch * 1e6:.0f} us")


def record(
    options: argparse.Namespace, runs: Runs, marks: list[MarkResult], findings: Findings, device: dict[str, object]
) -> dict[str, object]:
    """All that was measured."""
    entries = []
    for timing in runs.timings:
        floor = runs.floor(timing)
        entry: dict[str, object] = {**timing._asdict(), "ours": timing.name in OURS[timing.kind]}
        entry |= {"floor": floor, "of floor": floor / timing.median}
        if entry["ours"]:
            key = (timing.shape, timing.dtype, timing.kind)
            results = runs.mode(timing.mode)
            others = [k[3] for k in results.timings if k[:3] == key and k[3] not in OURS[timing.kind]]
            entry["times the rate of"] = {name: results.ratio(*key, timing.name, name) for name in others}
        entries.append(entry)
    return {
        "environment": environment() | device | {"quick": options.quick},
        "rates": {
            "FLOP/s of torch.mm": runs.rates.flops,
            "bytes/s of a copy": runs.rates.copy,
            "bytes/s of writing": runs.rates.write,
            "seconds of the smallest kernel, eager": runs.rates.launch,
        },
        "marks": [mark._asdict() for mark in marks],
        "wrong": findings.wrong,
        "not timed": findings.notes,
        "timings": entries,
    }


def bench(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    findings = Findings([], [])
    torch.backends.cudnn.benchmark = True  # ours may time cuBLAS's algorithms
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs cannot be captured on the default one
        rates = measure_rates(options.dtype, effort(options).mm_size)
        torch.cuda.empty_cache()
        runs = Runs(measure_all(options, findings), rates)
    here, device = environment(), gpu_environment()
    print(f"{device['gpu']}, {device['multiprocessors']} multiprocessors, CUDA {device['cuda']}")
    print(f"mhmatmul_ext {here['mhmatmul_ext']} at {here['commit']}, torch {here['torch']}")
    print_rates(rates)
    if options.quick:
        print("--quick: few repeats, the figures are rough")
    print_tables(runs)
    marks = judge(runs, GPU_MARKS)
    over = "bfloat16 where no other is named, graph replays where nothing else is, cold L2 (set for an H200)"
    print_marks(marks, over, options.markdown)
    if findings.notes:
        print("\nNot timed:\n" + "\n".join(findings.notes))
    if options.output is not None:
        write(options.output, record(options, runs, marks, findings, device))
        print(f"\nWritten: {options.output}")
    if findings.wrong:
        raise WrongResultError("\n".join(findings.wrong))


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks."""
    return exit_code(Path(__file__).name, lambda: bench(parse_arguments(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
