"""Times on a GPU by events on the device, each way eager and replayed from a CUDA graph, with hot and with cold L2.

A graph holds one call after the other, and its time is divided among them: without what a launch costs the host.
Eager calls start with the device idle: with what the host takes. Hot: the operands were just used. Cold: in a graph
every call has operands of its own, several times as large as L2 together; eager, L2 is overwritten before.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from command import WrongResultError
from floor import work
from gpu_ways import OURS, all_ways, namespace
from problem import Kind, Problem, make_problem
from torch import Tensor
from verify import check
from ways import Way, evaluate, result_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shapes import Shape
    from verify import Sample

Mode = Literal["graph cold", "graph hot", "eager cold", "eager hot"]
MODES: tuple[Mode, ...] = ("graph cold", "graph hot", "eager cold", "eager hot")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}

GRAPH_SECONDS = 1e-3  # a graph holds calls for about as long
MOST_CALLS = 128  # in a graph, where operand sets do not ask for more
CACHES = 6  # times the size of L2, for operands that are to be cold
MOST_SETS = 512
WARM_UP = 3


class Effort(NamedTuple):
    """How often to measure."""

    rounds: int  # of all ways by turns: a chip that heats up slows all alike
    repeats: int  # in each round
    mm_size: int  # of the square matrices whose product gives the matrix rate


FULL = Effort(rounds=4, repeats=6, mm_size=8192)
QUICK = Effort(rounds=1, repeats=5, mm_size=4096)


class GpuTiming(NamedTuple):
    """How long one way took for one shape, in one mode."""

    shape: str
    dtype: str
    kind: Kind
    name: str
    mode: Mode
    statement: str
    rows: int
    flop: float
    bytes: float  # the fewest that must be moved
    calls: int  # between two events
    sets: int  # of operands
    repeats: int
    median: float  # seconds a call
    iqr: float

    @property
    def rate(self) -> float:
        """Calls per second: all ways of a kind do the same work, and selecting has no FLOP."""
        return 1 / self.median


class Captured(NamedTuple):
    """A graph of calls, and what keeps its memory: the result of the last call of each operand set."""

    graph: torch.cuda.CUDAGraph
    results: deque[object]
    calls: int
    sets: int


class Candidate(NamedTuple):
    """A way that was checked."""

    name: str
    way: Way
    call: Callable[[], object]
    graphs: dict[Mode, Captured]  # empty: it cannot be captured


class Findings(NamedTuple):
    """What a run found besides times."""

    wrong: list[str]  # our errors, and all wrong results
    notes: list[str]  # opponents that could not be timed

    def add(self, what: str, error: Exception, ours: bool) -> None:
        """Sort in something that went wrong."""
        if isinstance(error, WrongResultError):
            self.wrong.append(str(error))
            return
        lines = str(error).strip().splitlines() or [""]
        (self.wrong if ours else self.notes).append(f"{what}: {type(error).__name__}: {lines[0]}")


class Gpu:
    """The current device and stream, and what to overwrite its L2 with."""

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.stream = torch.cuda.current_stream()
        self.l2 = self.properties.L2_cache_size
        self._flushed = torch.empty(max(4 * self.l2, 64 << 20) // 4, dtype=torch.int32, device="cuda")

    def flush(self) -> None:
        """Fill L2 with something else."""
        self._flushed.fill_(1)

    def copies(self, bytes: float) -> int:
        """How many operand sets of this size L2 can by no means hold."""
        return min(MOST_SETS, max(1, math.ceil(CACHES * self.l2 / bytes)))


class Operands:
    """A problem, and as many copies of it as are asked for."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self.tf32 = dtype == "tf32"
        self._problems = [make_problem(shape, DTYPES[dtype], "cuda")]

    @property
    def first(self) -> Problem:
        """The problem."""
        return self._problems[0]

    def take(self, count: int) -> list[Problem]:
        """So many."""
        while len(self._problems) < count:
            self._problems.append(self.first.copy())
        return self._problems[:count]


def allow_tf32(allowed: bool) -> None:
    """Let float32 products round their operands to TF32, or not."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def elapsed(call: Callable[[], object], repeats: int, before: Callable[[], object] | None = None) -> list[float]:
    """Seconds of each of so many calls.

    With `before`, that is run and waited for ahead of each call, untimed; without, one call follows the other.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:  # the first record of an event creates it
        start.record()
        end.record()
    torch.cuda.synchronize()
    for start, end in events:
        if before is not None:
            before()
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def prepare(way: Way, problem: Problem) -> tuple[dict[str, object], Callable[[], object]]:
    """The names of a way with these operands, and its call."""
    names = namespace(problem)
    exec(way.setup, names)
    call: Callable[[], object] = eval(f"lambda: {way.statement}", names)
    return names, call


def capture(calls: Sequence[Callable[[], object]], sets: int, stream: torch.cuda.Stream) -> Captured:
    """A graph of these calls; operand sets keep their results, for the next one's to lie elsewhere."""
    graph = torch.cuda.CUDAGraph()
    results: deque[object] = deque()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            if len(results) == sets:
                results.popleft()
            results.append(call())
    return Captured(graph, results, len(calls), sets)


def replayed(captured: Captured, way: Way, names: dict[str, object]) -> tuple[Tensor, ...]:
    """The result of the last call of a graph; what a replay does not write holds NaN, or no position."""
    names["r"] = captured.results[-1]
    results = result_of(way, names)
    for result in results:
        result.fill_(math.nan if result.is_floating_point() else -2)
    captured.graph.replay()
    return results


def capture_both(
    what: str, way: Way, operands: Operands, copies: int, seconds: float, gpu: Gpu, exact: tuple[Tensor | Sample, ...]
) -> dict[Mode, Captured]:
    """Graphs with one operand set and with many, their results checked."""
    calls = min(MOST_CALLS, max(1, math.ceil(GRAPH_SECONDS / seconds)))
    prepared = [prepare(way, problem) for problem in operands.take(copies)]
    graphs: dict[Mode, Captured] = {}
    plans: list[tuple[Mode, int, int]] = [("graph hot", 1, calls), ("graph cold", copies, round(calls / copies))]
    for mode, sets, each in plans:
        captured = capture([call for _, call in prepared[:sets]] * max(1, each), sets, gpu.stream)
        name = f"{what}, replayed from a graph,"
        check(name, replayed(captured, way, prepared[sets - 1][0]), exact, tf32=operands.tf32)
        graphs[mode] = captured
    return graphs


def build(kind: Kind, operands: Operands, with_compile: bool, gpu: Gpu, findings: Findings) -> list[Candidate]:
    """All ways that give the right result."""
    exact = operands.first.samples(kind)
    bytes = work(kind, operands.shape, DTYPES[operands.dtype].itemsize)[1]
    candidates = []
    for name, way in all_ways(kind, with_compile).items():
        what = f"{kind} ({name}) of {operands.shape.name} in {operands.dtype}"
        ours = name in OURS[kind]
        try:
            names, call = prepare(way, operands.first)
            check(what, evaluate(way, names), exact, tf32=operands.tf32)
            names.pop("r")
            elapsed(call, WARM_UP)
            seconds = statistics.median(elapsed(call, WARM_UP))
        except Exception as error:
            findings.add(what, error, ours)
            continue
        graphs: dict[Mode, Captured] = {}
        if way.captures:
            try:
                graphs = capture_both(what, way, operands, gpu.copies(bytes), seconds, gpu, exact)
            except Exception as error:
                findings.add(f"{what}, captured", error, ours)
        candidates.append(Candidate(name, way, call, graphs))
    return candidates


def copy_of(kind: Kind, operands: Operands, gpu: Gpu) -> Candidate:
    """A copy of as many bytes: how near the floor one comes at this size with nothing to compute."""
    bytes = work(kind, operands.shape, DTYPES[operands.dtype].itemsize)[1]
    sets = gpu.copies(bytes)
    halves = [torch.zeros(2, math.ceil(bytes / 2), dtype=torch.uint8, device="cuda") for _ in range(sets)]
    calls = [lambda to=to, source=source: to.copy_(source) for to, source in halves]
    each = min(MOST_CALLS, max(1, math.ceil(GRAPH_SECONDS / statistics.median(elapsed(calls[0], WARM_UP)))))
    graphs: dict[Mode, Captured] = {
        "graph hot": capture(calls[:1] * each, 1, gpu.stream),
        "graph cold": capture(calls * max(1, round(each / sets)), sets, gpu.stream),
    }
    return Candidate("copy", Way("to.copy_(source)"), calls[0], graphs)


def sample(candidate: Candidate, mode: Mode, repeats: int, gpu: Gpu) -> list[float]:
    """Seconds a call."""
    if mode in ("eager cold", "eager hot"):
        return elapsed(candidate.call, repeats, gpu.flush if mode == "eager cold" else candidate.call)
    captured = candidate.graphs[mode]
    # While one replay runs the next is launched, which takes no time then; but for the first.
    return [seconds / captured.calls for seconds in elapsed(captured.graph.replay, repeats + 1)[1:]]


def measure(
    kind: Kind, operands: Operands, effort: Effort, with_compile: bool, gpu: Gpu, findings: Findings
) -> list[GpuTiming]:
    """Check, then time, all ways for one problem, in all modes."""
    allow_tf32(operands.tf32)
    candidates = build(kind, operands, with_compile, gpu, findings)
    if kind == "forward":
        candidates.append(copy_of(kind, operands, gpu))
    times: dict[tuple[int, Mode], list[float]] = {}
    for _ in range(effort.rounds):
        for i, candidate in enumerate(candidates):
            for mode in MODES:
                if mode.startswith("eager") or candidate.graphs:
                    times.setdefault((i, mode), []).extend(sample(candidate, mode, effort.repeats, gpu))
    shape, itemsize = operands.shape, DTYPES[operands.dtype].itemsize
    flop, bytes = work(kind, shape, itemsize)
    timings = []
    for (i, mode), seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        name, way, _, graphs = candidates[i]
        calls, sets = (graphs[mode].calls, graphs[mode].sets) if mode in graphs else (1, 1)
        about = (shape.name, operands.dtype, kind, name, mode, way.statement, shape.rows, flop, bytes)
        timings.append(GpuTiming(*about, calls, sets, len(seconds), median, high - low))
    return timings
