"""Times on a GPU by events on the device, each way eager and replayed from a CUDA graph, with hot and with cold L2.

A graph holds one call after the other, and its time is divided among them: without what a launch costs the host. Mixed
is the same with a small kernel of PyTorch's behind each call, included: our kernels let one another begin early, which
others do not. A stream is the graph's calls made eagerly: the host's part counts where it is the longer one, or where a
call waits for the device. Eager calls start with the device idle: with all that the host takes. Hot: the operands were
just used. Cold: every call has operands of its own, several times as large as L2 together; eager, L2 is overwritten
before.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from functools import partial
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

    Names = dict[str, object]
    Call = Callable[[], object]
    Exact = tuple[Tensor | Sample, ...]

Mode = Literal["graph cold", "graph hot", "mixed cold", "stream cold", "eager cold", "eager hot"]
GRAPHS: tuple[Mode, ...] = ("graph cold", "graph hot", "mixed cold")
MODES: tuple[Mode, ...] = (*GRAPHS, "stream cold", "eager cold", "eager hot")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}

SERIES_SECONDS = 1e-3  # a graph or a stream holds calls for about as long
WAITING_SECONDS = 4e-3  # a stream of calls that wait for the device, which then waits for the events, too
MOST_CALLS = 128  # in it, where operand sets do not ask for more
CACHES = 6  # times the size of L2, for operands that are to be cold
MOST_SETS = 512
WARM_UP = 3


class Effort(NamedTuple):
    """How often to measure."""

    rounds: int  # of all ways by turns: a chip that heats up slows all alike
    repeats: int  # in each round
    mm_size: int  # of the square matrices whose product gives the matrix rate


FULL = Effort(rounds=8, repeats=4, mm_size=8192)
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


class Series(NamedTuple):
    """Calls with one operand set after the other, again and again."""

    calls: list[Call]
    sets: int
    names: Names  # of the last set

    def run(self, behind: Call | None = None) -> deque[object]:
        """Each set's result is kept until its next one, for the next set's to lie elsewhere."""
        results: deque[object] = deque()
        for call in self.calls:
            if len(results) == self.sets:
                results.popleft()
            results.append(call())
            if behind:
                behind()
        return results


class Captured(NamedTuple):
    """A graph of calls, and what keeps its memory: the last result of each operand set."""

    graph: torch.cuda.CUDAGraph
    results: deque[object]


class Candidate(NamedTuple):
    """A way that was checked."""

    name: str
    way: Way
    hot: Series  # with one operand set
    cold: Series  # with many
    graphs: dict[Mode, Captured]  # none: it cannot be captured

    def series(self, mode: Mode) -> Series:
        """What is called in this mode, unless it is one call for itself."""
        return self.hot if mode == "graph hot" else self.cold


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
        self._few = torch.zeros(64, device="cuda")

    def other_kernel(self) -> None:
        """A small one of PyTorch's."""
        self._few.add_(1)

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


def elapsed(call: Call, repeats: int, before: Call | None = None) -> list[float]:
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


def prepare(way: Way, problem: Problem) -> tuple[Names, Call]:
    """The names of a way with these operands, and its call."""
    names = namespace(problem)
    exec(way.setup, names)
    call: Call = eval(f"lambda: {way.statement}", names)
    return names, call


def series_of(prepared: Sequence[tuple[Names, Call]], seconds: float, length: float = SERIES_SECONDS) -> Series:
    """These calls by turns for about so long; each takes so many seconds."""
    count = min(MOST_CALLS, max(1, math.ceil(length / seconds)))
    calls = [call for _, call in prepared]
    return Series(calls * max(1, round(count / len(calls))), len(calls), prepared[-1][0])


def capture(series: Series, gpu: Gpu, mode: Mode) -> Captured:
    """A graph of these calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=gpu.stream):
        results = series.run(gpu.other_kernel if mode == "mixed cold" else None)
    return Captured(graph, results)


def replayed(captured: Captured, way: Way, names: Names) -> tuple[Tensor, ...]:
    """The result of the last call of a graph; what a replay does not write holds NaN, or no position."""
    names["r"] = captured.results[-1]
    results = result_of(way, names)
    for result in results:
        result.fill_(math.nan if result.is_floating_point() else -2)
    captured.graph.replay()
    return results


def candidate_of(what: str, name: str, way: Way, operands: Operands, copies: int, exact: Exact) -> Candidate:
    """The way, its result checked, not captured yet."""
    names, call = prepare(way, operands.first)
    check(what, evaluate(way, names), exact, tf32=operands.tf32)
    names.pop("r")
    elapsed(call, WARM_UP)
    seconds = statistics.median(elapsed(call, WARM_UP))
    prepared = [(names, call), *(prepare(way, problem) for problem in operands.take(copies)[1:])]
    length = SERIES_SECONDS if way.captures else WAITING_SECONDS
    return Candidate(name, way, series_of(prepared[:1], seconds), series_of(prepared, seconds, length), {})


def with_graphs(what: str, candidate: Candidate, operands: Operands, gpu: Gpu, exact: Exact) -> Candidate:
    """The same with its graphs, their results checked."""
    graphs = {mode: capture(candidate.series(mode), gpu, mode) for mode in GRAPHS}
    for mode, captured in graphs.items():
        results = replayed(captured, candidate.way, candidate.series(mode).names)
        check(f"{what}, replayed from a graph,", results, exact, tf32=operands.tf32)
    return candidate._replace(graphs=graphs)


def build(kind: Kind, operands: Operands, with_compile: bool, gpu: Gpu, findings: Findings) -> list[Candidate]:
    """All ways that give the right result."""
    exact = operands.first.samples(kind)
    bytes = work(kind, operands.shape, DTYPES[operands.dtype].itemsize)[1]
    candidates = []
    for name, way in all_ways(kind, with_compile).items():
        what = f"{kind} ({name}) of {operands.shape.name} in {operands.dtype}"
        ours = name in OURS[kind]
        try:
            candidate = candidate_of(what, name, way, operands, gpu.copies(bytes), exact)
        except Exception as error:
            findings.add(what, error, ours)
            continue
        if way.captures:
            try:
                candidate = with_graphs(what, candidate, operands, gpu, exact)
            except Exception as error:
                findings.add(f"{what}, captured", error, ours)
        candidates.append(candidate)
    return candidates


def copy_of(kind: Kind, operands: Operands, gpu: Gpu) -> Candidate:
    """A copy of as many bytes: how near the floor one comes at this size with nothing to compute."""
    bytes = work(kind, operands.shape, DTYPES[operands.dtype].itemsize)[1]
    halves = [torch.zeros(2, math.ceil(bytes / 2), dtype=torch.uint8, device="cuda") for _ in range(gpu.copies(bytes))]
    calls: list[tuple[Names, Call]] = [({}, partial(to.copy_, source)) for to, source in halves]
    seconds = statistics.median(elapsed(calls[0][1], WARM_UP))
    copy = Candidate("copy", Way("to.copy_(source)"), series_of(calls[:1], seconds), series_of(calls, seconds), {})
    return copy._replace(graphs={mode: capture(copy.series(mode), gpu, mode) for mode in GRAPHS})


def sample(candidate: Candidate, mode: Mode, repeats: int, gpu: Gpu) -> list[float]:
    """Seconds a call."""
    if mode.startswith("eager"):
        call = candidate.hot.calls[0]
        return elapsed(call, repeats, gpu.flush if mode == "eager cold" else call)
    series = candidate.series(mode)
    run = candidate.graphs[mode].graph.replay if mode in GRAPHS else series.run
    # While one runs the next is launched, as far as the host gets; but for the first.
    return [seconds / len(series.calls) for seconds in elapsed(run, repeats + 1)[1:]]


def measure(
    kind: Kind, operands: Operands, effort: Effort, with_compile: bool, gpu: Gpu, findings: Findings
) -> list[GpuTiming]:
    """Check, then time, all ways for one problem, in all modes."""
    allow_tf32(operands.tf32)
    candidates = build(kind, operands, with_compile, gpu, findings)
    if kind == "forward":
        candidates.append(copy_of(kind, operands, gpu))
    times: dict[tuple[int, Mode], list[float]] = {}
    order = list(enumerate(candidates))
    for _ in range(effort.rounds):
        for mode in MODES:  # one candidate right after the other: the device's clock changes as it warms up
            for i, candidate in order:
                if mode not in GRAPHS or candidate.graphs:
                    times.setdefault((i, mode), []).extend(sample(candidate, mode, effort.repeats, gpu))
        order.reverse()
    shape, itemsize = operands.shape, DTYPES[operands.dtype].itemsize
    flop, bytes = work(kind, shape, itemsize)
    timings = []
    for (i, mode), seconds in sorted(times.items(), key=lambda item: item[0][0]):
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        name, way, *_ = candidates[i]
        series = candidates[i].series(mode)
        calls, sets = (1, 1) if mode.startswith("eager") else (len(series.calls), series.sets)
        about = (shape.name, operands.dtype, kind, name, mode, way.statement, shape.rows, flop, bytes)
        timings.append(GpuTiming(*about, calls, sets, len(seconds), median, high - low))
    return timings
