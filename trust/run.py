"""Tries everything that trust in this package rests on, in short forms, and prints one table of what was found.

Each check is a module of this folder, which can be run alone and longer, or a file of tests. Fails if one found
something or tried nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import accuracy
import fuzz
import growth
import sanitize
from report import Row

TESTS = Path(__file__).parents[1] / "tests"


def run_tests(what: str, *names: str) -> list[Row]:
    """One row of some test files; the tests that could not be run are named, too."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *(str(TESTS / name) for name in names)]
        # In the folder of the tests: the package's own folder, without its library, is not to be found first.
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [element for case in cases for element in case.iter("skipped")]
    if result.returncode:
        print(result.stdout[-10000:], result.stderr[-2000:], file=sys.stderr)
    found = f"{len(failed)} failed, {failed[0]} first" if failed else "nothing"
    if result.returncode and not failed:
        found = f"pytest ended with {result.returncode}"
    if skipped:
        found += f"; {len(skipped)} not run: {skipped[0].get('message')}"
    tried = len(cases) - len(skipped)
    return [Row(what, tried, "tests", found, result.returncode == 0 and tried > 0)]


def checks(short: bool) -> list[tuple[str, Callable[[], list[Row]]]]:
    """What is tried, in order."""
    return [
        ("fuzzing", lambda: fuzz.rows(short)),
        ("sanitizers", lambda: sanitize.rows(short)),
        ("bits", lambda: run_tests("the same bits every time", "test_bits.py")),
        ("accuracy", lambda: accuracy.rows(short)),
        ("faults", lambda: run_tests("memory, interrupts, forks, threads, changed inputs", "test_faults.py")),
        ("sizes", lambda: run_tests("more elements than 32 bits count", "test_size.py")),
        ("growth", lambda: growth.rows(short)),
        ("errors", lambda: run_tests("refusals: type, text, no trace", "test_errors.py")),
        ("supply", lambda: run_tests("files, network, dependencies", "test_supply.py")),
    ]


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = ["| tried | how many | found | |", "|---|---|---|---|"]
    for row in rows:
        found = " ".join(row.found.split()).replace("|", "/")
        lines.append(f"| {row.what} | {row.tried} {row.unit} | {found} | {'✓' if row.passed else '✗'} |")
    return "\n".join(lines)


def main() -> int:
    """Run them; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="the long forms")
    parser.add_argument("--only", nargs="+", help="some of: " + ", ".join(name for name, _ in checks(True)))
    options = parser.parse_args()
    rows, began = [], time.monotonic()
    for name, check in checks(not options.long):
        if options.only and name not in options.only:
            continue
        start = time.monotonic()
        try:
            rows += check() or [Row(name, 0, "cases", "it tried nothing", False)]
        except Exception as error:  # a check that breaks is a failure in the table, not its end
            rows.append(Row(name, 0, "cases", f"it broke: {error}", False))
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    failed = sum(not row.passed for row in rows)
    print(f"\n{len(rows)} kinds of checks in {time.monotonic() - began:.0f} s, {failed or 'none'} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
