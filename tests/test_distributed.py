"""DTensor: every operator on 2 and 4 processes, equal to plain tensors, and how many collectives it took."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composability import ROWS, applies
from distributed_worker import CASES, LETTERS, OPERANDS, kinds

ROOT = Path(__file__).parents[1]
CELLS = [row for row in ROWS if applies("DTensor", row)]
# The flat form and the selection are views over these sizes, which DTensor splits and merges only in equal parts.
FLAT = {"multi_head_matmul", "_multi_head_matmul_bias", *(name for name in OPERANDS if "importance_matmul" in name)}
SENDS = {
    ("select_important_static", "batch"),  # its indices count the rows of the whole batch
    ("_importance_matmul_tensor, capacity", "batch"),
    ("_importance_matmul_grads, capacity", "batch"),
    ("combine", "batch"),  # adds all rows to base, which partial sums would hold several times
    ("_combine_updates_grad", "batch"),
    ("_combine_gates_grad", "batch"),
    ("head_matmul", "head dimension"),  # with a bias, which partial sums would add several times
    ("gather_head_matmul", "head dimension"),
}

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="a torch without gloo"
)


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """What all processes found, by their number."""

    @functools.cache
    def of(world):
        folder = tmp_path_factory.mktemp(f"world-{world}")
        command = [sys.executable, Path(__file__).with_name("distributed_worker.py")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(world), folder], stderr=subprocess.PIPE, text=True, env=environment
            )
            for rank in range(world)
        ]
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert all(process.returncode == 0 for process in processes), "\n".join(errors)
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("row", CELLS, ids=[row.name for row in CELLS])
def test_sharded_operators(row, world, results, record_property):
    """Equal to plain tensors, forward and backward; sharded heads, embed and rows send nothing."""
    record_property("composability", (row.name, "DTensor"))
    for found in results(world):
        for sharded in LETTERS.values():
            for kind in kinds(world):
                outcome = found[row.name, sharded, kind]
                if kind == "uneven" and row.name in FLAT and sharded in ("heads", "batch") and isinstance(outcome, str):
                    assert "Sharding propagation failed for aten.view" in outcome
                    continue
                assert isinstance(outcome, tuple), outcome
                if kind == "even":
                    assert (sum(outcome) > 0) == ((row.name, sharded) in SENDS), (sharded, outcome)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_cases(case, world, results):
    for found in results(world):
        assert found[case] is None, found[case]


def run_example(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    example = ROOT / "examples" / "tensor_parallel.py"
    return subprocess.run(
        [*command, example, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "arguments", "said"),
    [
        (2, (), "2 devices share the heads, 1 group of them the batch"),
        (4, ("--tensor-parallel", "2"), "2 devices share the heads, 2 groups of them the batch"),
    ],
    ids=["heads", "heads and FSDP2"],
)
def test_training_equals_that_of_one_process(processes, arguments, said):
    result = run_example(processes, "--steps", "4", *arguments)
    assert result.returncode == 0, result.stderr
    assert said in result.stdout
    assert "equal to one process" in result.stdout
    # those of the row-parallel layers of two blocks: sharing the heads adds none
    assert "'c10d_functional.all_reduce': 2}" in result.stdout


@pytest.mark.slow
def test_example_without_torchrun_says_how():
    command = [sys.executable, ROOT / "examples" / "tensor_parallel.py"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "torchrun --nproc-per-node 2 examples/tensor_parallel.py" in result.stderr
    assert "Traceback" not in result.stderr
