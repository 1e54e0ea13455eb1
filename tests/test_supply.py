"""Importing the package reads nothing but itself; its operators open no file, no socket and no process at all."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import mhmatmul_ext

ROOT, TESTS = Path(__file__).parents[1], Path(__file__).parent
PACKAGE = Path(mhmatmul_ext.__file__).parent

IMPORT = """
import json, os, sys
import torch
seen = []
def hook(event, arguments):
    family = event.partition(".")[0]
    harmless = ("os.listdir", "os.scandir", "import", "compile", "exec", "marshal.loads")
    if family in ("open", "socket", "subprocess", "ctypes", "os", "shutil") and event not in harmless:
        seen.append((event, *map(str, arguments)))
sys.addaudithook(hook)
os.access("/begin", 0)
import mhmatmul_ext
os.access("/end", 0)
del hook
print(json.dumps(seen))
"""

# Kills the process, every thread of it, at a call that opens, changes or starts something. In the order of the lists:
# open, creat, openat, openat2; unlink, unlinkat, rename, renameat, renameat2, mkdir, mkdirat, link, symlink, truncate;
# socket, socketpair, connect, bind, sendto, sendmsg; execve, execveat.
SECCOMP = """
import ctypes, struct
CALLS = [2, 85, 257, 437, 87, 263, 82, 264, 316, 83, 258, 86, 88, 76, 41, 53, 42, 49, 44, 46, 59, 322]
LOAD_CALL, IS_EQUAL, ANSWER, KILL, ALLOW = 0x20, 0x15, 0x06, 0x80000000, 0x7FFF0000

def forbid():
    steps = [(LOAD_CALL, 0, 0, 0)]
    steps += [(IS_EQUAL, len(CALLS) - place, 0, call) for place, call in enumerate(CALLS)]
    steps += [(ANSWER, 0, 0, ALLOW), (ANSWER, 0, 0, KILL)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0, "no new privileges"
    NR_SECCOMP, SET_FILTER, ALL_THREADS = 317, 1, 1
    assert libc.syscall(NR_SECCOMP, SET_FILTER, ALL_THREADS, program) == 0, ctypes.get_errno()
"""

USE = """
import sys, torch
import mhmatmul_ext
from mhmatmul_ext import nn
from test_faults import everything, operands
input, weight, probs = operands(rows=2000)
block = torch.nn.Linear(64, 64)
layer, router = nn.HeadwiseLinear(64, 32, num_heads=4), nn.MixtureOfDepths(block, dim=64, capacity=0.25, top_p=0.5)
torch.nn.Linear(64, 2)(input).sum().backward()  # starts the threads that torch computes on, autograd's as well
forbid()
everything(input, weight, probs)
everything(input.bfloat16(), weight.bfloat16(), probs)
weight.requires_grad_()
everything(input, weight, probs)[0].sum().backward()
layer(input).sum().backward()
router(input).sum().backward()
if sys.argv[1:]:
    open("/dev/null")
print("untouched", flush=True)
"""


def known_places():
    """The package, what is installed beside torch, and where Python looks for its own modules."""
    standard = Path(sysconfig.get_path("stdlib"))
    archive = standard.parent / f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    return str(PACKAGE), str(Path(torch.__file__).parents[1]), str(standard), str(archive)


def run(command, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=TESTS, **options)


@pytest.mark.slow
def test_import_touches_only_itself():
    """As Python sees it: nothing but modules and this package is read, nothing is written, sent or started."""
    result = run([sys.executable, "-c", IMPORT])
    assert result.returncode == 0, result.stderr
    for event, *arguments in json.loads(result.stdout):
        assert event in ("open", "ctypes.dlopen", "ctypes.dlsym"), (event, arguments)
        if event == "open":
            path, mode = arguments[:2]
            assert path.startswith(known_places()), path
            assert mode in ("r", "rb", "None"), (path, mode)
        if event == "ctypes.dlopen":
            assert arguments[0] in ("None", str(PACKAGE / "libmhmatmul.so")), arguments


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_import_touches_only_itself_by_the_kernel_s_account(tmp_path):
    """As the kernel sees it, libraries in C included."""
    log = tmp_path / "log"
    command = ["strace", "-f", "-qq", "-e", "trace=%file,%network,execve", "-o", log, sys.executable, "-c", IMPORT]
    result = run(command)
    if "ptrace" in result.stderr:
        pytest.skip("strace may not trace here")
    assert result.returncode == 0, result.stderr
    between = log.read_text().partition('"/begin"')[2].partition('"/end"')[0].splitlines()[1:-1]
    assert any("libmhmatmul.so" in line for line in between)
    for line in between:
        opened = re.search(r'(?:open|openat|creat)\((?:AT_FDCWD, )?"([^"]*)", (\S+)\).*= \d', line)
        assert not re.search(r"\b(socket|connect|sendto|execve|unlink|rename|mkdir)\w*\(", line), line
        if opened:
            assert "O_RDONLY" in opened.group(2), line
            looks_for_modules = opened.group(1) == "." and "O_DIRECTORY" in opened.group(2)
            assert looks_for_modules or opened.group(1).startswith(known_places()), line


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter knows the numbers of x86-64")
def test_use_touches_nothing():
    """A filter in the kernel kills the process that opens a file or a socket; it is shown to kill, too."""
    result = run([sys.executable, "-c", SECCOMP + USE])
    assert (result.returncode, result.stdout) == (0, "untouched\n"), result.stderr
    result = run([sys.executable, "-c", SECCOMP + USE, "and open a file"])
    assert result.returncode != 0
    assert result.stdout == ""


def test_dependencies_are_those_that_were_tested():
    """One dependency; the range that the metadata gives is the one that README.md says was tested."""
    text = (ROOT / "pyproject.toml").read_text()
    [dependency] = re.findall(r'^dependencies = \["([^"]*)"\]', text, re.MULTILINE)
    requirement = Requirement(dependency)
    assert requirement.name == "torch"
    readme = " ".join((ROOT / "README.md").read_text().split())
    tested = re.search(r"Built and tested with torch ([\d., and]*), the operators on CPU with (\S+) as well", readme)
    assert tested is not None
    versions = re.findall(r"\d+\.\d+\.\d+", " ".join(tested.groups()))
    assert len(versions) >= 2
    assert all(version in requirement.specifier for version in versions)
    lowest, highest = (sorted(versions, key=lambda v: [int(n) for n in v.split(".")])[i] for i in (0, -1))
    minor = [int(number) for number in highest.split(".")[:2]]
    expected = SpecifierSet(f">={lowest.rpartition('.')[0]},<{minor[0]}.{minor[1] + 1}")
    assert requirement.specifier == expected
