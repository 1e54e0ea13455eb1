"""Runs the CPU kernels in trust/driver.cpp with the tools that see what tests cannot.

Guard pages around every operand show that not one byte outside is read or written; AddressSanitizer and
UndefinedBehaviorSanitizer look into the scratch memory and the arithmetic as well, ThreadSanitizer at what threads
share. A tool counts as run only after it caught the defects planted for it. `--valgrind` runs memcheck instead,
which sees what is read before it is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from report import Row

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "trust"
COMMON = ("-std=c++20", "-g1", "-pthread", "-fno-omit-frame-pointer")
CAPABILITIES = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
AVX512 = ("gemm_avx512", "gemm_avx512_bf16", "gemm_amx")
KERNELS = ("gemm", "gemm_portable", "gemm_avx2", *AVX512)
OUTSIDE = ("read-behind", "read-before", "write-behind", "write-before")
JOBS = 2


class Tool(NamedTuple):
    """How the driver is built and run, and what has to be seen in what it says of the defects planted for it."""

    name: str
    what: str
    flags: tuple[str, ...]
    planted: dict[str, str]
    cases: int  # for each instruction set
    short_cases: int
    callers: int = 1
    before: tuple[str, ...] = ()  # the driver's command


TOOLS = (
    Tool(
        "guard",
        "kernels between guard pages",
        ("-O3",),
        dict.fromkeys(OUTSIDE, "outside of"),
        cases=4000,
        short_cases=500,
    ),
    Tool(
        "address",
        "under AddressSanitizer and UBSan",
        ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        dict.fromkeys((*OUTSIDE, "scratch"), "AddressSanitizer: ") | {"overflow": "signed integer overflow"},
        cases=1000,
        short_cases=150,
    ),
    Tool(
        "thread",
        "under ThreadSanitizer",
        ("-O1", "-fsanitize=thread"),
        {"race": "ThreadSanitizer: data race"},
        cases=400,
        short_cases=60,
        callers=2,
    ),
)
VALGRIND = Tool(
    "valgrind",
    "under Valgrind's memcheck",
    ("-O1",),
    {"uninitialised": "depends on uninitialised value"},
    cases=60,
    short_cases=10,
    before=("valgrind", "-q", "--error-exitcode=99", "--exit-on-first-error=yes"),
)


class Failure(Exception):  # noqa: N818 -- what was found, not an error of this program
    """What a tool found, or why it did not run."""


def run(tool: Tool, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The driver's answer under a tool."""
    command = [*tool.before, str(BUILD / tool.name / "driver"), *arguments]
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def headers() -> Path:
    """torch's, of which the kernels need those of the half types."""
    package = importlib.util.find_spec("torch")
    if package is None or not package.submodule_search_locations:
        raise Failure("torch, whose headers define the half types, is not installed")
    return Path(package.submodule_search_locations[0], "include")


def build(tool: Tool) -> None:
    """Compile, unless nothing changed; without the instruction sets that this machine lacks."""
    compiler, folder = shutil.which("c++") or "g++", BUILD / tool.name
    folder.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / "trust" / "driver.cpp", *(ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in KERNELS)]
    include = ["-w", "-I", str(ROOT / "csrc"), "-isystem", str(headers())]
    if not re.search(r"\bavx512bw\b", Path("/proc/cpuinfo").read_text()):
        sources = [source for source in sources if source.stem not in AVX512]
        include.append("-DLACKS_AVX512")
    inputs = [*sources, Path(__file__), *(ROOT / "trust").glob("*.h"), *(ROOT / "csrc").rglob("*.h")]
    driver, newest = folder / "driver", max(path.stat().st_mtime for path in inputs)
    if driver.exists() and driver.stat().st_mtime > newest:
        return

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        command = [compiler, *COMMON, *tool.flags, *include, "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise Failure(f"{source.name} does not compile: {result.stderr[-2000:]}")
        return str(target)

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, sources))
    link = [compiler, *COMMON, *tool.flags, *objects, "-o", str(driver)]
    result = subprocess.run(link, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Failure(f"the driver does not link: {result.stderr[-2000:]}")


def check_planted(tool: Tool) -> None:
    """A tool that misses what is planted for it did not run."""
    for defect, sign in tool.planted.items():
        result = run(tool, "--plant", defect)
        if result.returncode == 0 or sign not in result.stdout + result.stderr:
            raise Failure(f"{tool.name} missed the planted {defect}: {result.stderr[-500:] or 'not a word'}")


def count(result: subprocess.CompletedProcess[str], of: str) -> int:
    """How many cases the driver ran, by what it says at its end."""
    if result.returncode:
        # A sanitizer says what it found first, the driver which case it was last.
        lines = [line for line in result.stderr.splitlines() if re.search(r"ERROR|WARNING|error:|driver:|==", line)]
        print(result.stdout + result.stderr, file=sys.stderr)
        raise Failure(f"{of}: {lines[0] if lines else f'ended with {result.returncode}'}")
    return sum(int(number) for number in re.findall(r"^ran (\d+) ", result.stdout, re.MULTILINE))


def run_cases(tool: Tool, short: bool) -> tuple[int, list[str]]:
    """Cases that ran well, and the instruction sets that they ran with."""
    cases, tried, here = tool.short_cases if short else tool.cases, 0, []
    for capability in CAPABILITIES:
        if tool is VALGRIND and capability in CAPABILITIES[2:]:
            continue  # valgrind knows no such instructions
        arguments = ("--cases", str(cases), "--callers", str(tool.callers))
        result = run(tool, "--capability", capability, *arguments)
        if f"lacking {capability}" in result.stdout:
            continue
        done = count(result, capability)
        if done < cases:
            raise Failure(f"{capability}: {done} of {cases} cases were run")
        here.append(capability)
        tried += done
    return tried, here


def check(tool: Tool, short: bool) -> list[Row]:
    """The rows of one tool."""
    try:
        if tool.before and not shutil.which(tool.before[0]):
            raise Failure(f"{tool.before[0]} is not installed")
        build(tool)
        check_planted(tool)
        tried, here = run_cases(tool, short)
        table = [Row(f"{tool.what} ({', '.join(here)})", tried, "cases", "nothing", True)]
        if tool.name in ("guard", "address"):
            sizes = count(run(tool, "--sizes"), "large sizes")
            if not sizes:
                raise Failure("no case of large sizes was run")
            what = "index arithmetic beyond 2^31, " + ("to the page" if tool.name == "guard" else "under UBSan")
            table.append(Row(what, sizes, "cases", "nothing", True))
        return table
    except Failure as failure:
        return [Row(tool.what, 0, "cases", str(failure), False)]


def rows(short: bool) -> list[Row]:
    """What each tool found."""
    return [row for tool in TOOLS for row in check(tool, short)]


def main() -> int:
    """Print them; 1 if a tool found something or did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer cases")
    parser.add_argument("--valgrind", action="store_true", help="memcheck instead of the sanitizers")
    options = parser.parse_args()
    table = check(VALGRIND, options.short) if options.valgrind else rows(options.short)
    for row in table:
        print(f"{row.what}: {row.tried} {row.unit}, found {row.found}")
    return 0 if all(row.passed for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
