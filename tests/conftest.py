"""Devices to test on, poisoned memory for every test, and what to tell after a run: the composability table, and the
count of GPU tests that could not run.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # lets PyTorch's own matmuls run in deterministic mode

import torch
from composability import markdown

import mhmatmul_ext

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_GPU = "no CUDA device" if not torch.cuda.is_available() else None
if NO_GPU is None and mhmatmul_ext._C.build_config()["cuda"] is None:
    NO_GPU = "mhmatmul_ext was built without CUDA"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def _has_capability(name: str) -> bool:
    before = mhmatmul_ext._C.cpu_capability()
    try:
        mhmatmul_ext._C.set_cpu_capability(name)
    except ValueError:
        return False
    mhmatmul_ext._C.set_cpu_capability(before)
    return True


CAPABILITIES = [name for name in ("portable", "avx2", "avx512", "avx512_bf16", "amx") if _has_capability(name)]


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the CPU kernels that this machine can run."""
    before = mhmatmul_ext._C.cpu_capability()
    mhmatmul_ext._C.set_cpu_capability(request.param)
    yield request.param
    mhmatmul_ext._C.set_cpu_capability(before)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN, in C++ as well, so nothing unwritten passes for a result."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "uninitialised memory is not poisoned"
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    repeated = [item for item in items if _repeats_on_gpu(item)]
    items[:] = [item for item in items if item not in set(repeated)]
    config.hook.pytest_deselected(items=repeated)
    if NO_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"GPU test: {NO_GPU}"))


def _repeats_on_gpu(item: pytest.Item) -> bool:
    """CPU instruction sets make no difference on a GPU: one stands for all."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return bool(item.get_closest_marker("gpu")) and parameters.get("capability", CAPABILITIES[0]) != CAPABILITIES[0]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`make test-gpu` asks for GPU tests: none run is a failure there."""
    if not os.environ.get("MHMATMUL_DEMAND_GPU"):
        return
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    ran = [r for kind in ("passed", "failed") for r in terminal.stats.get(kind, []) if "gpu" in r.keywords]
    if not ran:
        terminal.write_line(f"No GPU test was run: {NO_GPU or 'none was selected'}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for kind in ("passed", "failed", "skipped") for r in terminalreporter.stats.get(kind, [])]
    gpu = [r for r in reports if "gpu" in r.keywords]
    ran = sum(not r.skipped for r in gpu)
    proofs = [(tuple(cell), r.failed) for r in reports for name, cell in r.user_properties if name == "composability"]
    cells, failed = {cell for cell, _ in proofs}, {cell for cell, is_failed in proofs if is_failed}
    if cells:
        terminalreporter.section("composability")
        terminalreporter.write_line("\n".join(markdown({cell: "✗" if cell in failed else "✓" for cell in cells})))
    terminalreporter.write_line(f"CPU instruction sets tested: {', '.join(CAPABILITIES)}")
    terminalreporter.write_line(f"GPU tests: {ran} run, {len(gpu) - ran} not run{f' ({NO_GPU})' if NO_GPU else ''}")
