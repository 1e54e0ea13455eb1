"""What the CPU kernels must reach, and how each figure comes from the timings of one run with two threads.

Figures are geometric means over the shapes with M >= 128 rows, unless they say otherwise. Fresh results are compared
with fresh ones of PyTorch, reused ones with reused ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from results import Results, geometric_mean
from shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from problem import Kind
    from timing import Timing

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Mark(Generic[Measured]):
    """One figure and its bound."""

    title: str
    figure: Callable[[Measured], float | None]  # None: this run did not measure it
    bound: float | None = None  # None: reported, not judged
    at_most: bool = False


class MarkResult(NamedTuple):
    """A mark with what was measured."""

    title: str
    value: float | None
    mark: str
    verdict: str


def mean(dtype: str, kind: Kind, ours: str, opponent: str) -> Callable[[Results[Timing]], float | None]:
    """The mean ratio of the rates."""
    return lambda results: results.mean(dtype, kind, ours, opponent)


def slowest_against_pytorch(results: Results[Timing]) -> float | None:
    """The lowest ratio on any shape: fresh against einsum, reused against bmm(out=) and the loop."""
    pairs = (("fresh", "einsum"), ("out=", "bmm(out=)"), ("out=", "loop"))
    return min((x for p in pairs for x in results.ratios("float32", "forward", *p).values()), default=None)


def cost_of_an_eighth(results: Results[Timing]) -> float | None:
    """Time of selecting and multiplying the kept eighth, over the time of our dense product."""
    costs = []
    for shape in SHAPES:
        kept, dense = (results.get(shape.name, "float32", "importance", name) for name in ("kept", "dense"))
        if shape.kept == 1 / 8 and kept and dense:
            costs.append(kept.median / dense.median)
    return geometric_mean(costs)


def gain_on_an_eighth(results: Results[Timing]) -> float | None:
    """The eager selection and product over ours."""
    names = [shape.name for shape in SHAPES if shape.kept == 1 / 8]
    ratios = [results.ratio(name, "float32", "importance", "kept", "eager") for name in names]
    return geometric_mean(ratio for ratio in ratios if ratio)


def decode_against_bmm(results: Results[Timing]) -> float | None:
    """The lower of fresh against fresh and reused against reused."""
    pairs = (("fresh", "bmm"), ("out=", "bmm(out=)"))
    ratios = [results.ratio("deepseek-q-1", "float32", "forward", *pair) for pair in pairs]
    return min((ratio for ratio in ratios if ratio), default=None)


def decode_bfloat16(results: Results[Timing]) -> float | None:
    """Our float32 over our bfloat16."""
    full, half = (results.get("deepseek-q-1", dtype, "forward", "fresh") for dtype in ("float32", "bfloat16"))
    return full.median / half.median if full and half else None


def call_overhead(results: Results[Timing]) -> float | None:
    """Our time over that of torch.bmm."""
    ratio = results.ratio("smallest", "float32", "forward", "fresh", "bmm")
    return 1 / ratio if ratio else None


def call_and_gradients_overhead(results: Results[Timing]) -> float | None:
    """Our time for a call and both gradients over that of torch.bmm."""
    ratio = results.ratio("smallest", "float32", "call and gradients", "fresh", "bmm")
    return 1 / ratio if ratio else None


def half_marks(dtype: str) -> tuple[Mark[Results[Timing]], ...]:
    """The same for both half types."""
    without = "x einsum without oneDNN, as on CPUs without half-precision instructions"
    return (
        Mark(f"forward {dtype}, fresh: of torch.mm float32", mean(dtype, "forward", "fresh", "torch.mm"), 0.85),
        Mark(f"forward {dtype}, fresh: x einsum", mean(dtype, "forward", "fresh", "einsum"), 30),
        Mark(f"forward {dtype}, fresh: {without}", mean(dtype, "forward", "fresh", "no oneDNN")),
        Mark(f"backward {dtype}: of torch.mm float32", mean(dtype, "backward", "both gradients", "torch.mm"), 0.75),
        Mark(f"backward {dtype}: x autograd of einsum", mean(dtype, "backward", "both gradients", "einsum"), 25),
        Mark(f"backward {dtype}: {without}", mean(dtype, "backward", "both gradients", "no oneDNN")),
    )


MARKS = (
    Mark("forward float32, out=: of torch.mm", mean("float32", "forward", "out=", "torch.mm"), 1),
    Mark("forward float32, fresh: of torch.mm", mean("float32", "forward", "fresh", "torch.mm"), 0.85),
    Mark("forward float32: x the best of einsum, bmm(out=), loop, on the worst shape", slowest_against_pytorch, 1),
    Mark("forward float32, fresh: x einsum().contiguous()", mean("float32", "forward", "fresh", "contiguous"), 1.5),
    Mark("backward float32: of torch.mm", mean("float32", "backward", "both gradients", "torch.mm"), 0.8),
    Mark("backward float32: x autograd of einsum", mean("float32", "backward", "both gradients", "einsum"), 1.2),
    *half_marks("bfloat16"),
    *half_marks("float16"),
    Mark("importance float32, 1/8 kept: of our dense call", cost_of_an_eighth, 0.15, at_most=True),
    Mark("importance float32, 1/8 kept: x topk, mask, index, einsum", gain_on_an_eighth, 2),
    Mark("deepseek-q, M = 1, float32: x bmm", decode_against_bmm, 1),
    Mark("deepseek-q, M = 1, bfloat16: x our float32", decode_bfloat16, 1.6),
    Mark("smallest call, float32: of torch.bmm's time", call_overhead, 1.5, at_most=True),
    Mark("smallest call and both gradients, float32: of torch.bmm's time", call_and_gradients_overhead),
)


def judge(measured: Measured, marks: Iterable[Mark[Measured]]) -> list[MarkResult]:
    """Every mark; what was not measured has no value."""
    judged = []
    for mark in marks:
        value = mark.figure(measured)
        if mark.bound is None:
            judged.append(MarkResult(mark.title, value, "reported", ""))
            continue
        passes = value is not None and (value <= mark.bound if mark.at_most else value >= mark.bound)
        verdict = "" if value is None else "pass" if passes else "MISS"
        judged.append(MarkResult(mark.title, value, f"{'<=' if mark.at_most else '>='} {mark.bound:.2f}", verdict))
    return judged


def print_marks(marks: list[MarkResult], over: str, markdown: bool) -> None:
    """Print the table of marks."""
    print(f"\nMarks, {over}\n")
    cells = [(m.title, "not measured" if m.value is None else f"{m.value:.2f}", m.mark, m.verdict) for m in marks]
    if markdown:
        print("| | measured | mark | |\n|---|---|---|---|")
    for title, value, mark, verdict in cells:
        line = f"| {title} | {value} | {mark} | {verdict} |" if markdown else f"{title:<100}"
        print(line if markdown else f"{line}{value:>12}  {mark:<8}  {verdict}".rstrip())
