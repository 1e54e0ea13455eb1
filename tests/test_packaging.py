"""What users get: an sdist, the wheel that pip builds from it, and both in an environment of their own.

torch and what it requires are linked into that environment, not installed again; nothing else is in it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from test_docs import SNIPPETS

import mhmatmul_ext

ROOT = Path(__file__).parents[1]
NAME = f"mhmatmul_ext-{mhmatmul_ext.__version__}"
pytestmark = pytest.mark.slow


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MHMATMUL_"))}
    environment["FORCE_CUDA"] = "0"  # what is in a wheel is the same without, and the CUDA sources take ten minutes
    command = [str(part) for part in command]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert result.returncode == 0, f"{command}\n{result.stdout[-5000:]}\n{result.stderr[-5000:]}"
    return result.stdout


def requirements(name):
    """The distributions that one needs, itself included, with those of the extras that are asked for."""
    found, seen, todo = {}, set(), [(name, "")]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        distribution = importlib.metadata.distribution(name)
        found[distribution.name] = distribution
        for need in map(Requirement, distribution.requires or []):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(need.name, wanted) for wanted in ("", *need.extras)]
    return list(found.values())


def environment_with_torch(folder):
    """A fresh environment's Python; its site-packages hold links to torch and its requirements."""
    venv.create(folder, with_pip=True)
    [site] = folder.glob("lib/python*/site-packages")
    for distribution in requirements("torch"):
        tops = {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    python = folder / "bin" / "python"
    shown = run(python, "-c", "import sys, torch\nprint(torch.__version__, *sys.path, sep='\\n')", cwd=folder)
    version, *paths = shown.splitlines()
    assert version == torch.__version__
    assert not any(Path(path, "mhmatmul_ext").exists() for path in filter(None, paths))
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def sdist(folder):
    script = f"import mhmatmul_build; print(mhmatmul_build.build_sdist({str(folder)!r}))"
    tree = folder / "tree"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for file in filter(None, files):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).write_bytes((ROOT / file).read_bytes())
    return (
        folder / run(sys.executable, "-c", f"import sys; sys.path.insert(0, 'backend'); {script}", cwd=tree).split()[-1]
    )


@pytest.fixture(scope="module")
def python(folder):
    return environment_with_torch(folder / "environment")


@pytest.fixture(scope="module")
def wheel(sdist, python, folder):
    """Built by pip in its isolated environment, which brings the tools, for the torch of the target environment."""
    run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, sdist, cwd=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


def test_sdist(sdist):
    assert sdist.name == f"{NAME}.tar.gz"
    with tarfile.open(sdist) as archive:
        files = [member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()]
    ours = {"backend", "benchmarks", "csrc", "docs", "examples", "mhmatmul_ext", "tests", "trust"}
    assert {file.partition("/")[0] for file in files if "/" in file} == {*ours, "mhmatmul_ext.egg-info"}
    assert {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "docs/conf.py", "mhmatmul_ext/py.typed"} <= set(files)
    assert {"SECURITY.md", "trust/run.py", "trust/driver.cpp"} <= set(files)
    assert not [file for file in files if Path(file).suffix in (".so", ".o", ".whl", ".pt", ".pyc")]


def test_wheel(wheel):
    """The package and its metadata: no tests, no sources in C++, of us or of others, no examples."""
    assert wheel.name.startswith(f"{NAME}-cp")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        metadata = archive.read(f"{NAME}.dist-info/METADATA").decode()
        licence = archive.read(f"{NAME}.dist-info/licenses/LICENSE").decode()
    modules = {f"mhmatmul_ext/{path.name}" for path in (ROOT / "mhmatmul_ext").glob("*.py*") if path.suffix != ".pyc"}
    binaries = {file for file in files if file.endswith(".so")}
    assert len(binaries) == 2
    assert "mhmatmul_ext/libmhmatmul.so" in binaries
    package = {file for file in files if not file.startswith(f"{NAME}.dist-info/")}
    assert package == modules | binaries | {"mhmatmul_ext/py.typed"}
    assert f"\nVersion: {mhmatmul_ext.__version__}\n" in metadata
    assert re.findall(r"^Requires-Dist: ([^;]*?)$", metadata, re.MULTILINE) == ["torch<2.16,>=2.11"]
    assert licence == (ROOT / "LICENSE").read_text()


def test_a_new_user(wheel, python, folder):
    """Install, check, and everything that the README shows, typed in an empty folder."""
    empty = folder / "empty"
    empty.mkdir()
    run(python, "-m", "pip", "install", "--no-index", wheel, cwd=empty)
    text = run(python, "-m", "mhmatmul_ext", "check", cwd=empty)
    assert f"{mhmatmul_ext.__version__} in {folder}" in text
    assert text.endswith("all checks passed\n")
    (empty / "readme.py").write_text("\n".join(SNIPPETS))
    run(python, "readme.py", cwd=empty)
    assert (empty / "model.pt").stat().st_size > 0


def test_one_version():
    assert importlib.metadata.version("mhmatmul_ext") == mhmatmul_ext.__version__
    assert f"\n## {mhmatmul_ext.__version__} (" in (ROOT / "CHANGELOG.md").read_text()
    literal = re.compile(rf"""["']{re.escape(mhmatmul_ext.__version__)}["']""")
    sources = [path for pattern in ("*.py", "*.toml", "*/*.py", "*.txt") for path in ROOT.glob(pattern)]
    assert [path.name for path in sources if literal.search(path.read_text())] == ["_version.py"]
