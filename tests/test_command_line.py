"""python -m mhmatmul_ext: self-test and benchmark, their pictures, refusals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhmatmul_ext import _C, _bench, _check, functional, reference
from mhmatmul_ext.__main__ import main

QUICK = ["bench", "--seconds", "0.001", "--shapes", "8x2x4x3", "5x1x7x2"]
SHAPES_TEXT = "--shapes: expected rows x heads x inputs x outputs as in 512x16x128x512"


def test_check(capsys):
    assert main(["check"]) == 0
    text = capsys.readouterr().out
    assert text.count("\nok ") == 16 * (1 + (torch.cuda.is_available()))
    assert "CPU capability" in text
    assert text.endswith("all checks passed\n")


def wrong_by_a_hair(input, weight, num_heads=1, **kwargs):
    return reference.matmul_with_multi_head(
        input, weight * (1 + 64 * torch.finfo(weight.dtype).eps), num_heads, **kwargs
    )


def raising(*args, **kwargs):
    raise RuntimeError("no kernel")


@pytest.mark.parametrize(
    ("name", "broken", "count"),
    [
        ("matmul_with_multi_head", wrong_by_a_hair, 4),
        ("combine", lambda base, updates, indices, gates: base * 1 + 0 * updates.sum() * gates.sum(), 4),
        ("combine", raising, 4),
        ("select_important", lambda probs, *a, **k: reference.select_important(probs.nan_to_num(nan=1.0), *a, **k), 4),
    ],
)
def test_check_finds_what_is_wrong(name, broken, count, monkeypatch, capsys):
    monkeypatch.setattr(functional, name, broken)
    assert main(["check"]) == 1
    text = capsys.readouterr().out
    assert text.count("FAILED") >= count
    assert "checks failed" in text


def test_check_takes_nothing_for_nan():
    nan = (torch.full((2,), torch.nan),)
    assert _check._difference(nan, (torch.ones(2).double(),), torch.float32)


def test_check_goes_over_every_device(monkeypatch):
    """Told that there is a GPU: where there is none, its comparisons fail one by one, and none is left out."""
    built = _C.build_config() | {"cuda": "13.0"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_C, "build_config", lambda: built)
    names = [name for name, _ in _check.checks()]
    on = {device: [name.partition(", ")[2] for name in names if name.startswith(device)] for device in ("cpu", "cuda")}
    assert on["cpu"] == on["cuda"]
    assert len(names) == 2 * 16


@pytest.mark.parametrize("got", [torch.ones(3), torch.ones(2).half()])
def test_check_tells_of_another_shape_or_dtype(got):
    text = _check._difference((got,), (torch.ones(2).double(),), torch.float32)
    assert text == f"result 0 is {got.dtype} {list(got.shape)}, expected torch.float32 [2]"


def test_info_of_a_library_with_cuda(monkeypatch, capsys):
    built = _C.build_config() | {"cuda": "13.0", "cuda_architectures": "8.0;9.0a"}
    monkeypatch.setattr(_C, "build_config", lambda: built)
    assert main(["info"]) == 0
    assert "CPU, CUDA 13.0 for architectures 8.0;9.0a" in capsys.readouterr().out


def test_as_a_program(tmp_path):
    """And ended quietly by a pipe that nobody reads any more."""
    command = [sys.executable, "-m", "mhmatmul_ext", "info"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CPU capability" in done.stdout
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == -signal.SIGPIPE
    assert "Traceback" not in done.stderr  # torch may say that it finds no GPU
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench(dtype, tmp_path, capsys):
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    options = ["--dtype", dtype, "--json", str(numbers), "--opponents", "einsum", "loop"]
    assert main([*QUICK, *options]) == 0
    text = capsys.readouterr().out
    assert "8x2x4x3" in text
    assert "x einsum" in text
    record = json.loads(numbers.read_text())
    assert [row["shape"] for row in record["results"]] == ["8x2x4x3", "5x1x7x2"]
    for row in record["results"]:
        assert set(row["seconds"]) == {"mhmatmul_ext", "einsum", "loop"}
        assert min(row["seconds"].values()) > 0
        assert row["of_floor"] == pytest.approx(row["floor"] / row["seconds"]["mhmatmul_ext"])
    pytest.importorskip("matplotlib")
    for path in (picture, tmp_path / "without_a_suffix"):
        assert main([*QUICK, "--plot", str(path)]) == 0
        assert path.read_bytes().startswith(b"\x89PNG")


def test_bench_times_nothing_that_is_wrong(monkeypatch, capsys):
    monkeypatch.setitem(_bench.OPPONENTS, "bmm", lambda input, weight, n: _bench._einsum(input, weight, n) + 1)
    assert main(QUICK) == 1
    assert "FAILED: bmm, 8x2x4x3 is off by 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--shapes", "8x2x4"], f"{SHAPES_TEXT}, got 8x2x4"),
        (["--shapes", "8x2x4x0"], f"{SHAPES_TEXT}, got 8x2x4x0"),
        (["--shapes", f"{10**30}x1x1x1"], "--shapes: 1000000000000000000000000000000x1x1x1 needs "),
        (["--shapes", "8x2x4x3", "1000000x1000x1000x1000"], "--shapes: 1000000x1000x1000x1000 needs 3.73e+04 GiB"),
        (["--json", "/nowhere/at/all.json"], "--json: there is no folder /nowhere/at"),
        (["--json", "."], "--json: . is a folder"),
        ([*QUICK[1:], "--json", "/dev/full"], "[Errno 28] No space left on device"),
        (["--plot", "picture.xyz"], "--plot: picture.xyz: matplotlib draws no xyz; try .png, .svg or .pdf"),
    ],
)
def test_bench_refuses(options, text, capsys):
    assert main(["bench", *options]) == 2
    assert capsys.readouterr().err.startswith(f"python -m mhmatmul_ext bench: error: {text}")


def test_bench_refuses_what_the_machine_lacks(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*QUICK, "--device", "cuda"]) == 2
    assert "--device cuda: no CUDA device, or mhmatmul_ext was built without CUDA" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1 << 30))
    with pytest.raises(_bench.UserError, match="this machine has 1 GiB"):
        _bench._check_memory([_bench.Shape(1 << 20, 16, 128, 128)], torch.float32, "cuda")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(_bench.UserError, match=r"--json: numbers\.json cannot be written"):
        _bench._check_writable("--json", Path("numbers.json"))


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_bench_times_for_a_positive_time(seconds, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--seconds", seconds])
    assert caught.value.code == 2
    assert f"argument --seconds: must be a positive number, got {seconds}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "check", "bench"])
def test_interrupted(command, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mhmatmul_ext.__main__.info", interrupt)
    monkeypatch.setattr(_bench, "measure", interrupt)
    assert main([command] if command != "bench" else QUICK) == 130


def test_bench_without_its_extras(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(QUICK) == 0
    assert "pip install tqdm" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*QUICK, "--plot", str(tmp_path / "picture.png")]) == 2
    assert "--plot needs matplotlib: `pip install matplotlib`" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["bench"], ["check"], ["info"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python -m mhmatmul_ext" in text
    assert "Exit codes: 0 all right, 1 a result is wrong, 2 wrong usage." in text
