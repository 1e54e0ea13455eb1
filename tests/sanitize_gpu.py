"""Runs the operators' GPU tests under each tool of compute-sanitizer; fails if a tool did not run or found something.

Each tool runs the same tests in one process, without the caching allocator, so that the memory around every
tensor is the driver's to guard. Arguments that name tools choose among them, others go to pytest.

On an H200 synccheck takes a minute, memcheck seven and initcheck, in four processes, one and a half; racecheck takes
ten seconds a test. With --kernel-name, for our kernels alone, it fails itself: "failed to handle a hardware exception"
(compute-sanitizer 2025.3.1).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
FILES = ("test_cuda.py", "test_selection.py", "test_importance.py", "test_combine.py")
# Each kernel at sizes that a tool slowing it a hundred times can take.
CHOSEN = (
    "little",
    "test_rows",
    "test_shapes",
    "test_long_rows",
    "test_output_and_explicit_gradients",
    "test_gather_with_repeats_and_padding",
    "test_wild_indices",
    "test_values",
)
TOOLS = {
    "memcheck": ("--leak-check", "no"),
    "racecheck": (),
    "initcheck": ("--show-backtrace", "no", "--print-limit", "1000000"),
    "synccheck": (),
}
FOUND = 99  # exit code of a tool that found something
CUBLAS = ("nvjet", "cublas", "cutlass", "sm80_xmma", "sm90_xmma")  # how its kernels' names begin


def is_of_cublas_alone(output: str) -> bool:
    """Whether every race reported is one of cuBLAS's kernels, which synchronise in ways the tool cannot see."""
    kernels = re.findall(r"Race reported between \w+ access at (\S+)", output)
    displayed = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", output)
    return (
        displayed is not None and len(kernels) == int(displayed[1]) > 0 and all(k.startswith(CUBLAS) for k in kernels)
    )


def is_of_others_alone(output: str) -> bool:
    """Whether no read reported is one of our kernels': the tool cannot see what the copy engine has written.

    What was never written is therefore for the tests to find, which compare every element. A kernel with more such
    reads than the tool has room for is reported in part, which counts as one or two errors more.
    """
    kernels = re.findall(r"Uninitialized __global__ memory read.*\n=+ +at (.*)", output)
    summary = re.search(r"ERROR SUMMARY: (\d+) errors?", output)
    in_part = output.count("Error buffer overflow has been detected")
    if summary is None or not kernels or any("mhmatmul" in k for k in kernels):
        return False
    return in_part <= int(summary[1]) - len(kernels) <= 2 * in_part


def all_passed(output: str) -> bool:
    """Whether pytest's last line says so; the tools count errors of their own."""
    return re.search(r"^\d+ passed(?!.*(failed|error)).* in [\d.]+s", output, re.MULTILINE) is not None


def main(arguments: list[str]) -> int:
    """The number of tools that failed."""
    tools = [name for name in arguments if name in TOOLS] or list(TOOLS)
    for_pytest = [argument for argument in arguments if argument not in TOOLS]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        print("compute-sanitizer was found neither on PATH nor in /usr/local/cuda/bin")
        return len(tools)
    sources = "".join((TESTS / name).read_text() for name in FILES)
    if unknown := [name for name in CHOSEN if name not in sources]:
        print(f"no test is called {', '.join(unknown)}")
        return len(tools)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "MHMATMUL_DEMAND_GPU": "1"}
    failed = 0
    for tool in tools:
        command = [sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", str(FOUND), "--target-processes", "all"]
        command += [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-k",
            " or ".join(CHOSEN),
            "-p",
            "no:cacheprovider",
        ]
        command += [*(str(TESTS / name) for name in FILES), *for_pytest]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        output = result.stdout + result.stderr
        ran = re.search(r"GPU tests: (\d+) run", output)
        summary = re.search(r"(ERROR|RACECHECK) SUMMARY: .*", output)
        tests_passed = ran is not None and int(ran.group(1)) > 0 and all_passed(output)
        excused = (is_of_cublas_alone if tool == "racecheck" else is_of_others_alone)(output)
        clean = result.returncode == 0 or (result.returncode == FOUND and excused)
        good = tests_passed and clean and summary is not None
        failed += not good
        print(f"{tool}: {summary.group(0) if summary else 'no summary'}; {ran.group(0) if ran else 'no test ran'}")
        if not good:
            print(output[-20000:])
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
