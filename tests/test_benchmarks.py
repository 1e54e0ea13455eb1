"""The benchmarks run, say what they must, and time nothing that is wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WITH_A_WRONG_OPPONENT = """
import sys
sys.path.insert(0, sys.argv[1])
import cpu, ways
ways.OPPONENTS[sys.argv[2]]["wrong"] = ways.OPPONENTS[sys.argv[2]]["einsum"]._replace(result=sys.argv[3])
sys.exit(cpu.main(sys.argv[4:]))
"""

DRAWN_BY_LOT = """
import json, random, sys
sys.path.insert(0, sys.argv[1])
import gpu_random
from gpu_floor import GpuRates
generator, rates = random.Random(int(sys.argv[2])), GpuRates({"bfloat16": 8e14}, 4e12, 4e12, 2e-5)
print(json.dumps([gpu_random.draw_shape(generator, rates, "bfloat16") for _ in range(50)]))
"""


def run(*command, cwd):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the package that these tests import
    command = [sys.executable, *command]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def said(result):
    """The last line of its errors: before it torch may have something to say of its own."""
    return result.stderr.strip().splitlines()[-1]


def floats(value):
    """Every number somewhere below."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in floats(item)]
    return [value] if isinstance(value, float) else []


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    choice = ("--shape", "mod", "smallest", "deepseek-q-1", "--dtype", "float32", "bfloat16")
    return run(
        BENCHMARKS / "cpu.py", "--quick", *choice, "--output", "quick.json", "--markdown", cwd=folder
    ), folder / "quick.json"


@pytest.mark.slow
def test_quick_run(quick):
    result, path = quick
    assert result.returncode == 0, result.stderr
    assert "mod: 8 rows, 16 x 128 -> 128" in result.stdout
    assert "| forward bfloat16, fresh: x einsum |" in result.stdout

    record = json.loads(path.read_text())
    assert all(math.isfinite(number) for number in floats(record))
    assert {"cpu", "cores", "threads", "capability", "torch", "commit"} <= record["environment"].keys()
    marks = {mark["title"]: mark for mark in record["marks"]}
    assert {title for title, mark in marks.items() if mark["value"] is None} == {t for t in marks if " float16" in t}
    assert {mark["verdict"] for mark in marks.values()} <= {"pass", "MISS", ""}


@pytest.mark.slow
def test_every_way_is_timed(quick):
    timings = json.loads(quick[1].read_text())["timings"]
    names = {(t["kind"], t["name"]) for t in timings if (t["shape"], t["dtype"]) == ("mod", "bfloat16")}
    forward = {"torch.mm", "fresh", "out=", "einsum", "contiguous", "bmm(out=)", "loop", "no oneDNN"}
    assert {("forward", name) for name in forward} <= names
    assert {("backward", name) for name in ("both gradients", "einsum", "no oneDNN")} <= names
    assert {("importance", name) for name in ("kept", "dense", "eager")} <= names
    assert all(t["median"] > 0 and t["iqr"] >= 0 for t in timings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "result"), [("forward", "r * 1.01"), ("forward", "r[:-1]"), ("backward", "(r[0], r[1] + 0.1)")]
)
def test_wrong_opponent_is_not_timed(kind, result, tmp_path):
    options = ("--quick", "--shape", "mod", "--dtype", "float32", "--output", "wrong.json")
    outcome = run("-c", WITH_A_WRONG_OPPONENT, BENCHMARKS, kind, result, *options, cwd=tmp_path)
    assert outcome.returncode == 1
    assert said(outcome).startswith(f"FAILED: {kind} (wrong) of mod in float32 is wrong: off by ")
    assert outcome.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "nonsense"), "argument --shape: invalid choice: 'nonsense'"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--output", "nowhere/result.json"), "--output: there is no folder nowhere"),
    ],
)
def test_says_what_is_wrong(options, message, tmp_path):
    result = run(BENCHMARKS / "cpu.py", "--quick", *options, cwd=tmp_path)
    assert result.returncode == 2
    assert said(result).startswith(f"cpu.py: error: {message}")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a CUDA device")
@pytest.mark.parametrize("command", [("gpu.py", "--quick"), ("gpu_sizes.py",), ("gpu_random.py",)], ids=" ".join)
def test_gpu_without_a_device(command, tmp_path):
    name, *options = command
    result = run(BENCHMARKS / name, *options, cwd=tmp_path)
    assert (result.returncode, result.stdout, said(result)) == (2, "", f"{name}: error: no CUDA device")


@pytest.mark.slow
def test_products_drawn_by_lot(tmp_path):
    drawn = [run("-c", DRAWN_BY_LOT, BENCHMARKS, seed, cwd=tmp_path) for seed in ("0", "0", "1")]
    assert all(result.returncode == 0 for result in drawn), drawn
    first, again, other = (json.loads(result.stdout) for result in drawn)
    assert first == again != other
    kinds = {kind for _, kind in first}
    assert kinds == {"multiples of 8", "any sizes"}
    for (_, batch, rows, num_heads, head_dim, embed, *_), kind in first:
        assert batch == 1
        assert kind == "any sizes" or head_dim % 8 == embed % 8 == 0
        moved = 2 * num_heads * (rows * (head_dim + embed) + head_dim * embed)
        assert 3e-6 <= max(moved / 4e12, 2 * num_heads * rows * head_dim * embed / 8e14) <= 100e-6


@pytest.mark.slow
def test_picture_of_random_products(tmp_path):
    timings = [
        {"kind": kind, "name": name, "median": median}
        for kind in ("multiples of 8", "any sizes")
        for name, median in (("ours", 1e-6), ("bmm(out=)", 2e-6), ("ours", 2e-6), ("bmm(out=)", 1e-6))
    ]
    environment = {"gpu": "none", "torch": "none", "commit": "none"}
    (tmp_path / "random.json").write_text(json.dumps({"environment": environment, "timings": timings}))
    result = run(BENCHMARKS / "gpu_random.py", "--draw", "random.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "random.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("{}")
    result = run(BENCHMARKS / "gpu_random.py", "--draw", "other.json", cwd=tmp_path)
    assert (result.returncode, said(result)) == (
        2,
        "gpu_random.py: error: other.json is not a record of this program: 'timings'",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "nonsense"), "argument --shape: invalid choice: 'nonsense'"),
        (("--repeats", "1"), "--repeats must be at least 2, got 1"),
        (("--output", "nowhere/result.json"), "--output: there is no folder nowhere"),
    ],
)
def test_gpu_says_what_is_wrong(options, message, tmp_path):
    result = run(BENCHMARKS / "gpu.py", "--quick", *options, cwd=tmp_path)
    assert result.returncode == 2
    assert said(result).startswith(f"gpu.py: error: {message}")


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_quick_run(tmp_path):
    choice = ("--shape", "mod", "deepseek-q-1", "selection", "--output", "gpu.json")
    result = run(BENCHMARKS / "gpu.py", "--quick", *choice, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Not timed" not in result.stdout
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert all(math.isfinite(number) for number in floats(record))
    timed = {(t["kind"], t["name"], t["mode"]) for t in record["timings"] if t["shape"] == "mod"}
    graph = {("forward", "out="), ("forward", "bmm(out=)"), ("backward", "explicit"), ("importance", "capacity")}
    eager = graph | {("importance", "kept"), ("importance", "eager")}
    assert {(*way, mode) for way in graph for mode in ("graph cold", "graph hot", "mixed cold")} <= timed
    assert {(*way, mode) for way in eager for mode in ("stream cold", "eager cold", "eager hot")} <= timed
    assert not any(mode.startswith("graph") for kind, name, mode in timed if name in ("kept", "eager"))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
def test_gpu_random(dtype, tmp_path):
    choice = ("--count", "3", "--dtype", dtype, "--output", "random.json")
    result = run(BENCHMARKS / "gpu_random.py", *choice, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "random.json").read_text())
    timings = record["timings"]
    assert record["dtype"] == dtype
    assert [entry["name"] for entry in timings] == 3 * ["ours", "bmm(out=)"]
    assert all(entry[name] > 0 for entry in timings for name in ("floor", "median"))


@pytest.mark.slow
def test_plot_says_what_is_wrong(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    result = run(BENCHMARKS / "plot.py", "other.json", "picture.png", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (2, "plot.py: error: other.json is not a record of gpu.py\n")
