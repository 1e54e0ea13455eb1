"""Which branches of the Python side and which lines of C++ the test suite reaches.

Builds the package once more with the compiler's counters, runs the tests on that, and prints every line that none
reached. One without a reason in REASONS is a failure: it is to be tested or removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "coverage"

CPU = Path("/proc/cpuinfo").read_text().split()
# Files, or lines by a part of their text, that no test of a machine with this CPU can reach.
REASONS = {
    "TORCH_INTERNAL_ASSERT(false": "cannot happen: the checks refuse it before",
}
if "avx512dq" not in CPU:
    REASONS |= {
        "csrc/cpu/gemm_avx512.cpp": "AVX-512, which the CPU lacks",
        "csrc/cpu/gemm_avx512.h": "AVX-512, which the CPU lacks",
        "if (avx512": "AVX-512, which the CPU lacks",
        "rest(Size<8>());": "AVX-512, whose blocks alone have more rows than that",
        "bool has_amx()": "AMX, asked for where the CPU has AVX-512",
        "if (!__get_cpuid_count(7, 0": "AMX, asked for where the CPU has AVX-512",
    }
if "avx512_bf16" not in CPU:
    REASONS |= {"csrc/cpu/gemm_avx512_bf16.cpp": "AVX-512 BF16, which the CPU lacks"}
if "avx512_bf16" not in CPU and "amx_tile" not in CPU:
    REASONS |= {"csrc/cpu/gemm_bfloat16.h": "AVX-512 BF16 and AMX, which the CPU lacks"}
if "amx_tile" not in CPU:
    REASONS |= {
        "csrc/cpu/gemm_amx.cpp": "AMX, which the CPU lacks",
        "syscall(SYS_arch_prctl": "AMX, which the CPU lacks",
    }


def run(*command: str, **environment: str) -> int:
    """A program's exit status, in the project's folder."""
    return subprocess.run(command, check=False, cwd=ROOT, env=os.environ | environment).returncode


def library() -> Path:
    """The folder of the package built with counters."""
    flags = "--coverage"  # threads may lose each other's counts, but no count goes back to zero
    environment = {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": "--coverage", "FORCE_CUDA": "0", "MAX_JOBS": "2"}
    if run(sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD), **environment):
        raise SystemExit("the build with counters failed")
    [folder] = BUILD.glob("lib.*")
    return folder


def run_tests(folder: Path, arguments: list[str]) -> int:
    """The test suite's status, counts of before forgotten."""
    for old in [*BUILD.rglob("*.gcda"), *BUILD.glob("data*")]:
        old.unlink()
    # -P: else the sources, which lack what is compiled, come before the build.
    measured = ("coverage", "run", f"--rcfile={ROOT / 'pyproject.toml'}")
    command = (sys.executable, "-P", "-m", *measured, "-m", "pytest", "-q")
    environment = {"PYTHONPATH": str(folder), "COVERAGE_FILE": str(BUILD / "data")}
    # The packaging tests build and install copies of their own, which nobody counts; and counts are written to files,
    # which no operator may do.
    left_out = ("--ignore=tests/test_packaging.py", "--deselect=tests/test_supply.py::test_use_touches_nothing")
    tests = arguments or ["tests", *left_out]
    return run(*command, *tests, **environment)


def python_side() -> list[str]:
    """Prints the coverage; what was not reached."""
    coverage, data = (sys.executable, "-m", "coverage"), {"COVERAGE_FILE": str(BUILD / "data")}
    options = (f"--rcfile={ROOT / 'pyproject.toml'}",)
    target = BUILD / "python.json"
    run(*coverage, "combine", "-q", *options, **data)
    run(*coverage, "report", *options, **data)
    run(*coverage, "json", "-q", *options, "-o", str(target), **data)
    files: dict[str, Any] = json.loads(target.read_text())["files"]
    missed = []
    for name, file in files.items():
        lines, path = Path(name).read_text().splitlines(), Path("mhmatmul_ext", Path(name).name)
        missed += [f"{path}:{line}: {lines[line - 1].strip()}" for line in file["missing_lines"]]
        missed += [f"{path}:{a}: never goes on at {b}" for a, b in file["missing_branches"]
                   if a not in file["missing_lines"] and b not in file["missing_lines"]]  # fmt: skip
    return missed


def cpp_side() -> list[str]:
    """The same of C++: a line of a template is reached when any of its instances is."""
    target = BUILD / "cpp.json"
    command = (sys.executable, "-m", "gcovr", "--root", str(ROOT), "--filter", "csrc/", "--json", str(target))
    options = ("--gcov-ignore-parse-errors=all", "--merge-mode-functions=merge-use-line-min", str(BUILD))
    if run(*command, *options):
        raise SystemExit("gcovr failed")
    missed, all_lines = [], 0
    for file in json.loads(target.read_text())["files"]:
        lines = (ROOT / file["file"]).read_text().splitlines()
        counts: dict[int, int] = {}
        for line in file["lines"]:
            counts[line["line_number"]] = counts.get(line["line_number"], 0) + line["count"]
        # A closing brace is counted where a scope is left by an exception: it is no line of its own.
        counts = {number: count for number, count in counts.items() if lines[number - 1].strip() != "}"}
        unreached = [number for number, count in sorted(counts.items()) if count == 0]
        missed += [f"{file['file']}:{number}: {lines[number - 1].strip()}" for number in unreached]
        all_lines += len(counts)
        print(f"{file['file']:40} {len(counts):5} lines, {100 * (1 - len(unreached) / max(1, len(counts))):5.1f} %")
    print(f"{'C++':40} {all_lines:5} lines, {100 * (1 - len(missed) / max(1, all_lines)):5.1f} %")
    return missed


def main() -> int:
    """Print both; 1 if a test failed or a line is missed without a reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report-only", action="store_true", help="of the counts of the last run")
    options, tests = parser.parse_known_args()
    status = 0 if options.report_only else run_tests(library(), tests)
    unexplained = 0
    for line in [*python_side(), *cpp_side()]:
        reason = next((reason for part, reason in REASONS.items() if part in line), None)
        unexplained += reason is None
        print(f"{line}  -- {reason or 'NO REASON'}")
    print(f"lines or branches without a test and without a reason: {unexplained}")
    return 1 if unexplained or status else 0


if __name__ == "__main__":
    sys.exit(main())
