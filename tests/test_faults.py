"""What goes wrong around a call leaves no trace: memory that runs out, interrupts, forks, threads, changed inputs."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mhmatmul_ext import combine, matmul_with_importance, matmul_with_multi_head, select_important

ops = torch.ops.mhmatmul
TESTS = Path(__file__).parent


def run_script(text, **environment):
    """A process of its own that imports the package as these tests do; what it printed."""
    text = textwrap.dedent(text)
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    result = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, env=variables, cwd=TESTS
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def operands(seed=0, rows=300):
    generator = torch.Generator().manual_seed(seed)
    input, weight = torch.randn(2, rows, 64, generator=generator), torch.randn(64, 48, generator=generator)
    return input, weight, torch.rand(2, rows, generator=generator)


def everything(input, weight, probs):
    """A result of every family, forward and backward."""
    output = matmul_with_multi_head(input, weight, 4)
    kept, grad_input, grad_weight = matmul_with_importance(input, weight, probs, None, 4, 0.5, 100)
    kept, grad_input, grad_weight = matmul_with_importance(input, weight, probs, torch.ones_like(kept), 4, 0.5, 100)
    indices, _ = select_important(probs, 0.5, 100)
    rows = input.flatten(0, 1)
    twice = ops._gather_head_matmul_dgrad(kept, weight.view(4, 16, 48), indices // 2, len(rows))
    combined = combine(input, rows[indices], indices, probs.flatten()[indices].to(input.dtype))
    return output, kept, grad_input, grad_weight, indices, twice, combined


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


OUT_OF_MEMORY = """
import resource, torch, mhmatmul_ext
from mhmatmul_ext import combine, matmul_with_importance, matmul_with_multi_head, select_important
ops = torch.ops.mhmatmul
torch.set_num_threads(2)
# Every result is larger than what the heap may have free: it has to be asked of the system.
b, s, h, e = 4, 512, 512, 512
input, weight, probs = torch.randn(b, s, h), torch.randn(h, e), torch.rand(b, s)
heads, rows = weight.view(4, 128, e), input.view(b * s, 4, 128)
kept, _, _ = matmul_with_importance(input, weight, probs, None, 4, 0.25)
indices, _ = select_important(probs, 0.25)
repeated = torch.arange(len(indices)) // 2
scores = torch.rand(4, 2**17)
narrow, many = torch.randn(4, 2**17, 2), select_important(scores, 0.25)[0]
updates, gates = torch.randn(len(many), 2), torch.rand(len(many))
calls = {
    "multi_head": lambda: matmul_with_multi_head(input, weight, 4),
    "importance": lambda: matmul_with_importance(input, weight, probs, None, 4, 0.25)[0],
    "gradients": lambda: matmul_with_importance(input, weight, probs, kept, 4, 0.25)[1],
    "repeated": lambda: ops._gather_head_matmul_dgrad(kept, heads, repeated, b * s),
    "wgrad": lambda: ops._gather_head_matmul_wgrad(kept, rows, indices),
    "select": lambda: select_important(scores, 0.25)[0],
    "static": lambda: select_important(scores, 0.25, capacity=2**17)[0],
    "combine": lambda: combine(narrow, updates, many, gates),
    "gates": lambda: ops._combine_gates_grad(narrow, updates, many),
}
expected = {name: call() for name, call in calls.items()}

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

refused = {name: 0 for name in calls}
for name, call in calls.items():
    for room in [0] + [2**power for power in range(12, 26)]:
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + room, resource.RLIM_INFINITY))
        try:
            result = call()
        except RuntimeError as error:
            result, text = None, str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if result is None:
            refused[name] += 1
            assert "alloc" in text or "memory" in text, (name, text)
        else:
            assert torch.equal(result, expected[name]), name
        del result
    assert torch.equal(call(), expected[name]), f"{name}, after what failed"
print(refused)
"""


@pytest.mark.slow
def test_out_of_memory_in_the_middle():
    """At many limits, so that each of an operator's allocations is the one that fails: an error, and no trace of it."""
    refused = eval(run_script(OUT_OF_MEMORY, MALLOC_MMAP_THRESHOLD_="4096", MALLOC_TRIM_THRESHOLD_="0"))
    assert min(refused.values()) > 0, refused


@pytest.fixture
def ctrl_c():
    """A process that was started in the background ignores SIGINT; this one does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_interrupts_between_operators():
    """Ctrl-C comes out of a loop of calls as KeyboardInterrupt, and the next call is right."""
    problem = operands()
    expected = everything(*problem)
    for _ in range(10):
        timer = threading.Timer(0.01, signal.raise_signal, [signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 -- the loop is what is interrupted
            timer.start()
            while True:
                everything(*problem)
        timer.join()
        assert same(everything(*problem), expected)


class Products(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, seed):
        return [result.double().sum() for result in everything(*operands(seed))]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    """Workers forked from a process whose threads have computed already, and workers that start afresh."""
    dataset = Products()
    expected = [dataset[seed] for seed in range(len(dataset))]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120
    )
    got = list(loader)
    assert len(got) == len(expected)
    for results, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(results, wanted)


@pytest.mark.slow
def test_fork_after_parallel_work():
    """A child with one thread, as PyTorch's own workers have: OpenMP's other threads stay with the parent."""
    out = run_script(
        """
        import os, torch
        from mhmatmul_ext import matmul_with_multi_head
        torch.set_num_threads(4)
        input, weight = torch.randn(4, 512, 256), torch.randn(256, 256)
        expected = matmul_with_multi_head(input, weight, 4)
        children = []
        for _ in range(3):
            if (child := os.fork()) == 0:
                torch.set_num_threads(1)
                os._exit(0 if torch.equal(matmul_with_multi_head(input, weight, 4), expected) else 1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert torch.equal(matmul_with_multi_head(input, weight, 4), expected)
        print("good")
        """
    )
    assert out == "good\n"


def test_eight_threads_at_once():
    problems = [operands(seed, rows=100 + seed) for seed in range(8)]
    expected = [everything(*problem) for problem in problems]
    barrier = threading.Barrier(8)

    def work(number):
        barrier.wait()
        return [same(everything(*problems[i % 8]), expected[i % 8]) for i in range(number, number + 16)]

    with ThreadPoolExecutor(8) as pool:
        assert all(all(results) for results in pool.map(work, range(8)))


def test_threads_come_and_go():
    """Each has scratch memory of its own, given back when it ends."""
    problem = operands()
    expected = everything(*problem)
    for _ in range(10):
        results = []

        def work(results=results):
            results.append(same(everything(*problem), expected))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 4


@pytest.mark.slow
def test_one_openmp_thread():
    """The same bits where the environment allows a single thread."""
    script = """
        import torch
        from test_faults import everything, operands
        print(torch.get_num_threads(), [result.double().sum().item().hex() for result in everything(*operands())])
        """
    expected = [result.double().sum().item().hex() for result in everything(*operands())]
    assert run_script(script, OMP_NUM_THREADS="1") == f"1 {expected}\n"


def test_within_the_work_of_another_operator():
    """From a hook, amid a backward pass, and from another operator's kernel."""
    problem = operands()
    expected = everything(*problem)
    seen = []
    leaf = torch.ones(3, requires_grad=True)
    leaf.register_hook(lambda grad: seen.append(same(everything(*problem), expected)))
    (leaf * 2).sum().backward()

    with torch.library._scoped_library("mhmatmul_test", "FRAGMENT") as library:
        library.define("nested(Tensor x) -> Tensor")

        def nested(x):
            seen.append(same(everything(*problem), expected))
            return x.clone()

        library.impl("nested", nested, "CPU")
        torch.ops.mhmatmul_test.nested(torch.ones(3))
    assert seen == [True, True]


def test_within_a_parallel_region():
    """Called by every thread of OpenMP's pool at once, in whose regions torch's own loops run as well."""
    [runtime] = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp.so" in line}
    parallel, problem, seen = ctypes.CDLL(runtime).GOMP_parallel, operands(), []
    in_parallel, expected = ctypes.CDLL(runtime).omp_in_parallel, everything(*problem)
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda _: seen.append((in_parallel(), same(everything(*problem), expected)))
    )
    for _ in range(5):
        parallel(region, None, 2, 0)
    assert seen == 10 * [(1, True)]


def test_from_threads_of_a_script():
    input, weight, _ = operands()
    expected = matmul_with_multi_head(input, weight, 4)

    @torch.jit.script
    def forked(input: torch.Tensor, weight: torch.Tensor, heads: int):
        futures = [torch.jit.fork(torch.ops.mhmatmul.multi_head_matmul, input, weight, heads) for _ in range(4)]
        return [torch.jit.wait(future) for future in futures]

    for _ in range(5):
        assert all(torch.equal(output, expected) for output in forked(input, weight, 4))


def test_autograd_from_several_threads():
    """Each with leaves of its own, and all into the same leaf, as PyTorch allows."""

    def gradients(problem):
        input, weight, probs = problem
        input, weight = input.clone().requires_grad_(), weight.clone().requires_grad_()
        kept, _, _ = matmul_with_importance(input, weight, probs, None, 4, 0.5)
        (kept.square().sum() + matmul_with_multi_head(input, weight, 4).sum()).backward()
        return input.grad, weight.grad

    problems = [operands(seed, rows=60 + seed) for seed in range(8)]
    expected = [gradients(problem) for problem in problems]
    with ThreadPoolExecutor(8) as pool:
        for got, wanted in zip(pool.map(gradients, problems * 4), expected * 4, strict=True):
            assert same(got, wanted)

    input, weight, _ = operands()
    weight.requires_grad_()
    [single] = torch.autograd.grad(matmul_with_multi_head(input, weight, 4).sum(), weight)
    threads = [
        threading.Thread(target=lambda: matmul_with_multi_head(input, weight, 4).sum().backward()) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(weight.grad, 8 * single, rtol=1e-5, atol=1e-4)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


# What each function takes, and whether its backward needs that again. A selection is not made again.
TAKEN = {
    "multi_head": {"input": True, "weight": True},
    "importance": {"input": True, "weight": True, "probs": False},
    "gather": {"input": True, "weight": True, "indices": True},
    "combine": {"input": False, "updates": True, "gates": True, "indices": True},
}


@pytest.mark.parametrize(
    ("function", "changed"), [(function, changed) for function, taken in TAKEN.items() for changed in taken]
)
def test_inputs_changed_before_backward(function, changed):
    """What backward needs may not be written into; PyTorch says so as it does for its own. All else may."""
    input, weight, probs = operands(rows=20)
    indices = torch.arange(0, 40, 3)
    here = {"input": input, "weight": weight, "probs": probs, "indices": indices}
    here |= {"updates": torch.randn(len(indices), 64), "gates": torch.rand(len(indices))}
    differentiable = {"input", "weight", "updates", "gates"} & TAKEN[function].keys()
    roots = {name: here[name].requires_grad_() for name in differentiable}
    here |= {name: root * 1 for name, root in roots.items()}  # not leaves, so that they may be changed
    calls = {
        "multi_head": lambda: matmul_with_multi_head(here["input"], here["weight"], 4),
        "importance": lambda: matmul_with_importance(here["input"], here["weight"], here["probs"], None, 4, 0.5)[0],
        "gather": lambda: ops.gather_head_matmul(
            here["input"].view(40, 4, 16), here["weight"].view(4, 16, 48), here["indices"]
        ),
        "combine": lambda: combine(here["input"], here["updates"], here["indices"], here["gates"]),
    }
    expected = torch.autograd.grad(calls[function]().sum(), list(roots.values()), retain_graph=True)
    output = calls[function]()
    with torch.no_grad():
        here[changed].zero_()
    if TAKEN[function][changed]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        return
    torch.testing.assert_close(torch.autograd.grad(output.sum(), list(roots.values())), expected)


def test_outputs_changed_before_backward():
    """No output is needed again."""
    input, weight, _ = operands(rows=20)
    [expected] = torch.autograd.grad(matmul_with_multi_head(input, weight.requires_grad_(), 4).sum(), weight)
    output = matmul_with_multi_head(input, weight, 4)
    output.add_(1)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), weight)[0], expected)
