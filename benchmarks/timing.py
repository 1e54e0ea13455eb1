"""What is timed together takes turns, after every result was compared with float64."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from floor import work
from problem import Kind, Problem, make_problem
from torch import Tensor
from torch.utils.benchmark import Timer
from verify import check
from ways import OPPONENTS, OURS, Way, evaluate, is_half, namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

FEW_ROWS = 8  # for a guess at the time of a call


class Effort(NamedTuple):
    """How long to measure."""

    threads: int
    seconds: float  # of timing, for each way
    rounds: int
    longest_call: float  # seconds; an opponent that takes longer gets fewer rows, and is compared by its rate
    mm_size: int  # of the square float32 matrices of plain torch.mm


FULL = Effort(threads=2, seconds=0.3, rounds=5, longest_call=0.25, mm_size=1536)
QUICK = Effort(threads=2, seconds=0.002, rounds=2, longest_call=0.02, mm_size=256)


class Candidate(NamedTuple):
    """Something to check and to time."""

    name: str
    way: Way
    names: dict[str, object]
    exact: tuple[Tensor, ...]
    dtype: torch.dtype
    rows: int
    flop: float
    bytes: float


class Timing(NamedTuple):
    """How long one way took for one shape."""

    shape: str
    dtype: str
    kind: Kind
    name: str
    statement: str
    rows: int  # fewer than the shape's where a whole call would take too long
    flop: float
    bytes: float  # the fewest that must be moved
    median: float  # seconds a call
    iqr: float

    @property
    def rate(self) -> float:
        """FLOP per second."""
        return self.flop / self.median


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Let PyTorch use oneDNN, or not, for a while."""
    before = torch._C._get_mkldnn_enabled()
    torch.backends.mkldnn.set_flags(before and enabled, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before, _fp32_precision=None)


def run(candidate: Candidate) -> tuple[Tensor, ...]:
    """The result of a way, of one call."""
    with onednn(candidate.way.onednn):
        return evaluate(candidate.way, candidate.names)


def build(name: str, way: Way, problem: Problem) -> Candidate:
    """Prepare a way for a problem."""
    names = namespace(problem)
    with onednn(way.onednn):
        exec(way.setup, names)
    dtype, rows = problem.input.dtype, problem.shape.rows
    flop, bytes = work(way.computes, problem.shape, dtype.itemsize)
    return Candidate(name, way, names, problem.exact(way.computes), dtype, rows, flop, bytes)


def build_mm(size: int) -> Candidate:
    """Plain torch.mm in float32, the result reused: what this PyTorch reaches on this machine."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, size, size, generator=generator)
    names = {"torch": torch, "A": A, "B": B, "out": torch.zeros(size, size)}
    exact = (A.double() @ B.double(),)
    way = Way("torch.mm(A, B, out=out)", "out")
    return Candidate("torch.mm", way, names, exact, A.dtype, size, 2.0 * size**3, 12.0 * size**2)


def affordable(way: Way, problem: Problem, longest: float) -> Problem:
    """The problem, or the same with fewer rows where half types take too long; selecting is never cut."""
    if way.computes == "importance" or not is_half(problem):
        return problem

    def with_rows(rows: int) -> Problem:
        if rows >= problem.shape.rows:
            return problem
        return make_problem(problem.shape.with_rows(rows), problem.input.dtype)

    probe = build("probe", way, with_rows(FEW_ROWS))
    run(probe)
    start = time.perf_counter()
    run(probe)
    seconds_a_row = (time.perf_counter() - start) / probe.rows
    return with_rows(max(1, int(longest / seconds_a_row)))


def candidates(kind: Kind, problem: Problem, effort: Effort) -> list[Candidate]:
    """Ours and all opponents."""
    ours = [build(name, way, problem) for name, way in OURS[kind].items()]
    opponents = {name: way for name, way in OPPONENTS[kind].items() if way.applies(problem)}
    plain = next(iter(opponents.values()))
    # All opponents that go through oneDNN share one number of rows, all others another.
    paths = {way.onednn for way in opponents.values()}
    problems = {path: affordable(plain._replace(onednn=path), problem, effort.longest_call) for path in paths}
    return [*ours, *(build(name, way, problems[way.onednn]) for name, way in opponents.items())]


def take_turns(candidates: list[Candidate], effort: Effort) -> list[list[float]]:
    """Seconds a call, of each, by turns: a busy machine slows all alike."""
    timers = [Timer(c.way.statement, globals=c.names, num_threads=effort.threads) for c in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    spent = [0.0] * len(candidates)
    for turn in range(effort.rounds):
        for i, (candidate, timer) in enumerate(zip(candidates, timers, strict=True)):
            if turn >= 2 and spent[i] > 2 * effort.seconds:
                continue  # slow, and known well enough
            start = time.perf_counter()
            with onednn(candidate.way.onednn):
                times[i] += timer.blocked_autorange(min_run_time=effort.seconds / effort.rounds).times
            spent[i] += time.perf_counter() - start
    return times


def measure(kind: Kind, problem: Problem, mm: Candidate, effort: Effort) -> list[Timing]:
    """Check, then time, all ways for one problem, and plain torch.mm among them."""
    dtype = str(problem.input.dtype).removeprefix("torch.")
    timed = [mm, *candidates(kind, problem, effort)]
    for candidate in timed:
        check(f"{kind} ({candidate.name}) of {problem.shape.name} in {dtype}", run(candidate), candidate.exact)
    timings = []
    for candidate, times in zip(timed, take_turns(timed, effort), strict=True):
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        name, statement = candidate.name, candidate.way.statement
        work = (candidate.rows, candidate.flop, candidate.bytes)
        timings.append(Timing(problem.shape.name, dtype, kind, name, statement, *work, median, high - low))
    return timings
