"""`python -m mhmatmul_ext bench`: the forward product against plain PyTorch and the machine's limits."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import mhmatmul_ext
from mhmatmul_ext import matmul_with_multi_head, reference

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable
    from pathlib import Path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ["512x16x128x512", "4096x16x64x64", "2048x8x256x256"]  # DeepSeek's absorbed heads, xLSTM, RG-LRU


class UserError(Exception):
    """Something that the user can put right, told in one line."""


class Shape(NamedTuple):
    """Rows, heads, and a head's inputs and outputs."""

    rows: int
    num_heads: int
    head_dim: int
    embed: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read `rows x heads x inputs x outputs`."""
        numbers = text.split("x")
        if len(numbers) != 4 or not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
            raise UserError(f"--shapes: expected rows x heads x inputs x outputs as in {SHAPES[0]}, got {text}")
        return cls(*map(int, numbers))

    def __str__(self) -> str:
        return "x".join(map(str, self))


def _loop(input: Tensor, weight: Tensor, num_heads: int) -> Tensor:
    heads = zip(input.chunk(num_heads, -1), weight.chunk(num_heads, 0), strict=True)
    return torch.stack([rows @ matrix for rows, matrix in heads], dim=-2)


def _einsum(input: Tensor, weight: Tensor, num_heads: int) -> Tensor:
    heads = input.unflatten(-1, (num_heads, -1)), weight.unflatten(0, (num_heads, -1))
    return torch.einsum("mnd,nde->mne", *heads).contiguous()


def _bmm(input: Tensor, weight: Tensor, num_heads: int) -> Tensor:
    heads = input.unflatten(-1, (num_heads, -1)), weight.unflatten(0, (num_heads, -1))
    return torch.bmm(heads[0].transpose(0, 1), heads[1]).transpose(0, 1).contiguous()


OPPONENTS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"einsum": _einsum, "bmm": _bmm, "loop": _loop}


def _timed(call: Callable[[], object], minimum: float) -> list[float]:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    measurement = timer.blocked_autorange(min_run_time=minimum)
    return [float(seconds) for seconds in measurement.times]


def _limits(dtype: torch.dtype, device: str, minimum: float) -> tuple[float, float]:
    """Bytes per second of a copy and FLOP per second of `torch.mm` at their best, on operands that fill the machine."""
    side, count = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 26)
    source = torch.ones(count // dtype.itemsize, dtype=dtype, device=device)
    target = torch.ones_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    copying = min(_timed(lambda: target.copy_(source), minimum))
    multiplying = min(_timed(lambda: torch.mm(left, right, out=product), minimum))
    return 2 * source.nbytes / copying, 2 * side**3 / multiplying


def _verify(name: str, output: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    error = (output.double() - exact).abs().max().item()
    limit = 64 * torch.finfo(dtype).eps * exact.abs().max().item()
    if not error <= limit:
        raise ArithmeticError(f"{name} is off by {error:.3g}, allowed {limit:.3g}: nothing was timed")


def measure(shape: Shape, dtype: torch.dtype, device: str, opponents: list[str], minimum: float) -> dict[str, float]:
    """Seconds of each side of a shape, ours first, after comparing its result with float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = shape.num_heads * shape.head_dim
    input = torch.randn(shape.rows, hidden, generator=generator).to(device, dtype)
    weight = torch.randn(hidden, shape.embed, generator=generator).div(shape.head_dim**0.5).to(device, dtype)
    exact = reference.matmul_with_multi_head(input.double(), weight.double(), shape.num_heads)
    sides = {"mhmatmul_ext": matmul_with_multi_head, **{name: OPPONENTS[name] for name in opponents}}
    for name, function in sides.items():
        _verify(f"{name}, {shape}", function(input, weight, shape.num_heads), exact, dtype)
    return {
        name: median(_timed(partial(function, input, weight, shape.num_heads), minimum))
        for name, function in sides.items()
    }


def _progress(items: list[Shape]) -> Iterable[Shape]:
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: `pip install tqdm` for one", file=sys.stderr)
        return items
    bar: Iterable[Shape] = tqdm(items, leave=False, disable=None)
    return bar


def _plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names, rows = record["opponents"], record["results"]
    for i, name in enumerate(names):
        places = [j + 0.8 * (i - (len(names) - 1) / 2) / len(names) for j in range(len(rows))]
        left.bar(places, [row["seconds"][name] / row["seconds"]["mhmatmul_ext"] for row in rows], 0.7 / len(names))
    left.axhline(1, color="black", linewidth=0.8)
    left.set_ylabel("times as fast as")
    left.legend(["equal", *names])
    right.bar(range(len(rows)), [100 * row["of_floor"] for row in rows])
    right.set_ylabel("percent of the floor")
    for axes in (left, right):
        axes.set_xticks(range(len(rows)), [row["shape"] for row in rows])
    figure.suptitle(f"mhmatmul_ext {record['version']}, {record['device']}, {record['dtype']}")
    figure.savefig(path, dpi=150, format=_format(path))


def _check_memory(shapes: list[Shape], dtype: torch.dtype, device: str) -> None:
    """Refuse what would end in a failed allocation, or with the operating system ending the process."""
    if device == "cuda":
        memory = torch.cuda.mem_get_info()[1]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for m, n, d, e in shapes:
        doubles, outputs = torch.float64.itemsize, m * n * e  # the comparison with float64 holds the most at once
        needed = (doubles + dtype.itemsize) * n * (m * d + d * e) + (3 * doubles + dtype.itemsize) * outputs
        if needed > memory:
            gib = 2**30
            raise UserError(
                f"--shapes: {Shape(m, n, d, e)} needs {needed / gib:.3g} GiB of memory, this machine has "
                f"{memory / gib:.3g} GiB"
            )


def _check_writable(flag: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"{flag}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag}: {path} cannot be written")


def _format(picture: Path) -> str:
    return picture.suffix.removeprefix(".").lower() or "png"


def _check_picture(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: `pip install matplotlib`")
    from matplotlib.backend_bases import FigureCanvasBase

    if (name := _format(path)) not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"--plot: {path}: matplotlib draws no {name}; try .png, .svg or .pdf")


def bench(options: argparse.Namespace) -> None:
    """Measure, print a table, and write what was asked for."""
    shapes = [Shape.parse(text) for text in options.shapes]
    if options.device == "cuda" and not (torch.cuda.is_available() and mhmatmul_ext._C.build_config()["cuda"]):
        raise UserError("--device cuda: no CUDA device, or mhmatmul_ext was built without CUDA")
    dtype = DTYPES[options.dtype]
    _check_memory(shapes, dtype, options.device)
    for flag, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            _check_writable(flag, path)
    if options.plot is not None:
        _check_picture(options.plot)
    opponents = list(dict.fromkeys(options.opponents))

    bandwidth, rate = _limits(dtype, options.device, options.seconds)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    record: dict[str, Any] = {
        "version": mhmatmul_ext.__version__, "torch": torch.__version__, "device": device, "dtype": options.dtype,
        "opponents": opponents, "results": [],
    }  # fmt: skip
    for shape in _progress(shapes):
        seconds = measure(shape, dtype, options.device, opponents, options.seconds)
        m, n, d, e = shape
        floor = max(dtype.itemsize * n * (m * d + d * e + m * e) / bandwidth, 2 * m * n * d * e / rate)
        of_floor = floor / seconds["mhmatmul_ext"]
        record["results"].append({"shape": str(shape), "seconds": seconds, "floor": floor, "of_floor": of_floor})

    print(f"{device}, {options.dtype}; every result was compared with float64 before it was timed")
    print(f"{'rows x heads x in x out':<24}{'us':>10}{'of floor':>10}", end="")
    print("".join(f"{'x ' + name:>10}" for name in opponents))
    for row in record["results"]:
        ours = row["seconds"]["mhmatmul_ext"]
        ratios = "".join(f"{row['seconds'][name] / ours:>10.2f}" for name in opponents)
        print(f"{row['shape']:<24}{1e6 * ours:>10.1f}{row['of_floor']:>10.0%}{ratios}")
    print("of floor: the time of moving the bytes by a copy or of the FLOP by torch.mm, the longer one, over ours")
    print("x NAME: how many times as fast as it")
    try:
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
        if options.plot is not None:
            _plot(record, options.plot)
    except OSError as error:
        raise UserError(str(error)) from error
