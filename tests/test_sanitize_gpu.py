"""What sanitize_gpu.py makes of the tools' words."""

from __future__ import annotations

import pytest
import sanitize_gpu

PASSED = "338 passed, 1746 deselected in 183.09s (0:03:03)"
NOTHING = "========= ERROR SUMMARY: 0 errors"
RACES = """
========= Error: Race reported between Read access at {}+0xa10
=========     and Write access at {}+0x910 [512 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
READS = """
========= Uninitialized __global__ memory read of size 2 bytes
=========     at {}+0x870
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (f"{PASSED}\n{NOTHING}", True),
        (f"{PASSED}\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", True),
        (f"1 failed, {PASSED}", False),
        ("3 passed, 1 error in 2.00s", False),
        (NOTHING, False),
    ],
)
def test_all_passed(output, expected):
    assert sanitize_gpu.all_passed(output) == expected


@pytest.mark.parametrize(("kernel", "expected"), [("nvjet_sm90_tst_64x240", True), ("mhmatmul::cuda::select", False)])
def test_races_of_cublas(kernel, expected):
    assert sanitize_gpu.is_of_cublas_alone(RACES.format(kernel, kernel)) == expected
    assert not sanitize_gpu.is_of_cublas_alone(NOTHING)


@pytest.mark.parametrize(("kernel", "expected"), [("at::native::copy", True), ("mhmatmul::cuda::select", False)])
def test_reads_of_others(kernel, expected):
    output = READS.format(kernel)
    assert sanitize_gpu.is_of_others_alone(output) == expected
    assert not sanitize_gpu.is_of_others_alone(output.replace(": 1 error", ": 2 errors")), "one was not printed"
    overflow = "========= Warning: Error buffer overflow has been detected. Some records have been dropped\n"
    for errors in (2, 3):
        in_part = overflow + output.replace(": 1 error", f": {errors} errors")
        assert sanitize_gpu.is_of_others_alone(in_part) == expected
    assert not sanitize_gpu.is_of_others_alone(overflow + output)
    assert not sanitize_gpu.is_of_others_alone(overflow + output.replace(": 1 error", ": 4 errors"))
    assert not sanitize_gpu.is_of_others_alone(NOTHING)
