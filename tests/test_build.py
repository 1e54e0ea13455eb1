"""The binaries, the build and the installation."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

import mhmatmul_ext
from mhmatmul_ext import _C, _load
from mhmatmul_ext.__main__ import main

ROOT = Path(__file__).parents[1]
OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mhmatmul::"))
CONTRACT = {
    "head_matmul(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "multi_head_matmul(Tensor input, Tensor weight, SymInt num_heads) -> Tensor",
    "select_important(Tensor probs, float top_p=1., SymInt? top_k=None) -> (Tensor indices, Tensor cu_seqlens)",
    "gather_head_matmul(Tensor input, Tensor weight, Tensor indices, Tensor? bias=None) -> Tensor",
    "combine(Tensor base, Tensor updates, Tensor indices, Tensor? gates=None) -> Tensor",
    "select_important_static(Tensor probs, Tensor top_p, SymInt? top_k, SymInt capacity) -> "
    "(Tensor indices, Tensor counts)",
    "importance_matmul(Tensor input, Tensor weight, Tensor probs, SymInt num_heads, float top_p=1., "
    "SymInt? top_k=None) -> (Tensor output, Tensor indices, Tensor cu_seqlens)",
}


def has_kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def run(*command, **kwargs):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_schemas_are_those_of_the_contract():
    names = [name.removeprefix("mhmatmul::") for name in OPERATORS]
    public = {str(getattr(torch.ops.mhmatmul, name).default._schema) for name in names if not name.startswith("_")}
    assert public == {f"mhmatmul::{schema}" for schema in CONTRACT}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_kernels(name):
    if has_kernel(name, "CompositeImplicitAutograd"):
        return  # made of operators that are in this list as well
    assert has_kernel(name, "Meta")
    assert has_kernel(name, "Autograd")
    if has_kernel(name, "CompositeExplicitAutograd"):
        return  # the same for every device
    assert has_kernel(name, "CPU")
    if _C.build_config()["cuda"]:
        assert has_kernel(name, "CUDA")


def test_operators_library_holds_no_python_symbol():
    symbols = run("nm", "--dynamic", "--undefined-only", _load.LIBRARY)
    assert "c10" in symbols
    assert not re.findall(r"\b_?Py[A-Z]\w*|THPVariable\w*", symbols)
    assert "torch_python" not in run("readelf", "--dynamic", _load.LIBRARY)


def test_one_thread_pool():
    """The library runs on torch's OpenMP runtime, in parallel, and brings none of its own."""
    needed = run("readelf", "--dynamic", _load.LIBRARY)
    runtimes = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp.so" in line}
    assert "omp.so" in needed
    assert len(runtimes) == 1, runtimes


def test_operators_library_serves_without_the_package(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(
        f"import sys, torch\n"
        f"torch.ops.load_library({str(_load.LIBRARY)!r})\n"
        f"output = torch.ops.mhmatmul.multi_head_matmul(torch.ones(2, 5, 4), torch.ones(4, 3), 2)\n"
        f"assert (output == 2).all() and 'mhmatmul_ext' not in sys.modules\n"
    )
    run(sys.executable, script, cwd=tmp_path)


def test_a_second_copy_is_refused(tmp_path):
    copy = shutil.copy(_load.LIBRARY, tmp_path / "second.so")
    script = tmp_path / "twice.py"
    script.write_text(
        f"import torch\ntorch.ops.load_library({str(copy)!r})\n"
        "try:\n    import mhmatmul_ext\nexcept ImportError as error:\n    print(error)\n"
    )
    assert "load only one copy of mhmatmul_ext in a process" in run(sys.executable, script, cwd=tmp_path)


@pytest.mark.parametrize(
    ("built", "running", "expected"),
    [
        (("2.13.0+cpu", None), ("2.13.0+cpu", None), None),
        (("2.13.0+cpu", None), ("2.13.0+cu130", "13.0"), None),  # CPU kernels are the same in both
        (("2.11.0+cu130", "13.0"), ("2.11.0+cu130", "13.0"), None),
        (("2.13.0", None), ("2.15.0", None), "mhmatmul_ext was built for torch 2.13.0, running 2.15.0: reinstall with"),
        (("2.11.0", "13.0"), ("2.11.0", "12.8"), "with CUDA 13.0, running one with CUDA 12.8: reinstall with"),
        (("2.11.0", "13.0"), ("2.11.0", None), "with CUDA 13.0, running one with no CUDA: reinstall with"),
    ],
)
def test_another_torch_is_refused_in_a_sentence(built, running, expected):
    reason = _load.mismatch({**_C.build_config(), "torch": built[0], "cuda": built[1]}, *running)
    assert reason is None if expected is None else expected in reason


def test_a_missing_library_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(_load, "LIBRARY", tmp_path / "libmhmatmul.so")
    with pytest.raises(ImportError, match=r"lacks its operators' library .*libmhmatmul\.so: "):
        _load.load()


def test_the_check_comes_before_loading(tmp_path):
    script = tmp_path / "mismatch.py"
    script.write_text(
        "import torch\ntorch.__version__ = '9.9.0'\n"
        "try:\n    import mhmatmul_ext\nexcept ImportError as error:\n    print(error)\n"
        "print(any(n.startswith('mhmatmul::') for n in torch._C._dispatch_get_all_op_names()))\n"
    )
    message, loaded = run(sys.executable, script, cwd=tmp_path).splitlines()
    assert re.fullmatch(r"mhmatmul_ext was built for torch [\d.]+, running 9\.9\.0: reinstall with .*", message)
    assert loaded == "False"


def test_capability_can_be_forced(capability):
    assert _C.cpu_capability() == capability
    with pytest.raises(ValueError, match="name must be an instruction set of this machine, got 'mmx'"):
        _C.set_cpu_capability("mmx")
    assert _C.cpu_capability() == capability


@pytest.mark.parametrize("variable", ["MHMATMUL_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY"])
@pytest.mark.parametrize(("value", "expected"), [("default", "portable"), ("nonsense", _C.cpu_capability())])
def test_capability_by_environment(variable, value, expected, tmp_path):
    script = "import mhmatmul_ext; print(mhmatmul_ext._C.cpu_capability())"
    assert run(sys.executable, "-c", script, cwd=tmp_path, env=os.environ | {variable: value}).strip() == expected


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in [
        mhmatmul_ext.__version__,
        torch.__version__,
        _C.build_config()["torch"],
        "CPU capability",
        *OPERATORS,
    ]:
        assert expected in text


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["inform"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_cuda_library_has_code_for_the_architectures():
    """Needs a CUDA build; cuobjdump comes with torch's triton."""
    architectures = _C.build_config()["cuda_architectures"]
    if not architectures:
        pytest.skip("built without CUDA")
    triton = pytest.importorskip("triton", reason="no triton to take cuobjdump from")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = run(cuobjdump, "--list-elf", _load.LIBRARY)
    for architecture in re.findall(r"(\d+)\.(\d+)", architectures):
        assert f"sm_{''.join(architecture)}" in listing
    kernels = run(cuobjdump, "--dump-elf-symbols", _load.LIBRARY)
    for kernel in ["select_kernel", "copy_rows_kernel", "zero_rows_kernel", "sum_rows_kernel", "combine_rows_kernel"]:
        assert kernel in kernels


@pytest.mark.slow
def test_cmake_builds_the_same_sources(tmp_path):
    prefix = torch.utils.cmake_prefix_path
    if torch.version.cuda and not Path(CUDA_HOME or "", "include", "cublas_v2.h").exists():
        pytest.skip("find_package(Torch) of a CUDA torch needs the whole CUDA toolkit")
    sooner = ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=")  # neither optimised nor described to a debugger
    run("cmake", "-S", ROOT, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}", *sooner)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    compiled = {str(Path(command["file"]).relative_to(ROOT)) for command in commands}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
    assert compiled == {path for path in expected if not path.startswith(("csrc/cuda/", "csrc/python/"))}

    run("cmake", "--build", tmp_path, "--parallel", os.cpu_count())
    script = tmp_path / "load.py"
    script.write_text(
        f"import torch\ntorch.ops.load_library({str(tmp_path / 'libmhmatmul.so')!r})\n"
        "assert torch.ops.mhmatmul.multi_head_matmul(torch.ones(5, 4), torch.ones(4, 3), 2).eq(2).all()\n"
    )
    run(sys.executable, script, cwd=tmp_path)


def test_installed_files():
    """The package and its metadata, nothing of tests, sources or examples."""
    files = {str(file) for file in importlib.metadata.files("mhmatmul_ext") or []}
    if any("__editable__" in file for file in files):
        pytest.skip("installed in place")
    metadata = f"mhmatmul_ext-{mhmatmul_ext.__version__}.dist-info"
    assert {file.partition("/")[0] for file in files} == {"mhmatmul_ext", metadata}
    assert {"mhmatmul_ext/py.typed", "mhmatmul_ext/_C.pyi", "mhmatmul_ext/libmhmatmul.so"} <= files
    endings = {Path(file).suffix for file in files if file.startswith("mhmatmul_ext/")}
    assert endings <= {".py", ".pyi", ".pyc", ".typed", ".so"}
    assert f"{metadata}/licenses/LICENSE" in files
    licence = importlib.metadata.distribution("mhmatmul_ext").locate_file(f"{metadata}/licenses/LICENSE")
    assert Path(licence).read_text() == (ROOT / "LICENSE").read_text()
    assert importlib.metadata.metadata("mhmatmul_ext")["License-Expression"] == "Apache-2.0"


@pytest.mark.slow
def test_sdist_needs_no_torch(tmp_path):
    script = (
        "import sys; sys.path.insert(0, 'backend'); sys.modules['torch'] = None\n"
        "import mhmatmul_build\n"
        f"print(mhmatmul_build.build_sdist({str(tmp_path)!r}))\n"
    )
    source = shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so")
    )
    name = run(sys.executable, "-c", script, cwd=source).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers()}
    assert {"setup.py", "backend/mhmatmul_build.py", "csrc/ops.cpp", "csrc/cuda/select.cu", "csrc/checks.h"} <= files
    assert {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "mhmatmul_ext/py.typed", "mhmatmul_ext/nn.py"} <= files
    assert not any(file.endswith(".so") for file in files)


@pytest.mark.parametrize(
    ("cuda", "requirements"),
    [("None", "[]"), ("'13.0'", "['nvidia-cutlass==4.2.*']"), (None, "['torch>=2.11,<2.16', 'nvidia-cutlass==4.2.*']")],
    ids=["torch without CUDA", "torch with CUDA", "no torch"],
)
def test_build_requires_what_is_missing(cuda, requirements, tmp_path):
    if cuda:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(f"cuda: Optional[str] = {cuda}\n")
    script = (
        "import os, sys, sysconfig; sys.path.insert(0, 'backend')\n"
        "for name in ('CUTLASS_PATH', 'MHMATMUL_TORCH_DIR'): os.environ.pop(name, None)\n"
        "sysconfig.get_path = lambda *_, **__: sys.argv[1]\n"
        "import mhmatmul_build\nprint(mhmatmul_build._requirements())\n"
    )
    assert run(sys.executable, "-c", script, tmp_path, cwd=ROOT).strip() == requirements


@pytest.mark.parametrize(
    ("version", "is_supported"),
    [("2.10.1+cpu", False), ("2.11.0", True), ("2.15.3+cu130", True), ("2.16.0a0+git1", False), ("3.0.0", False)],
)
def test_torch_outside_the_range_is_refused_in_a_sentence(version, is_supported, tmp_path):
    setup = runpy.run_path(str(ROOT / "setup.py"))
    stated = f"torch>={'{}.{}'.format(*setup['TORCH_SINCE'])},<{'{}.{}'.format(*setup['TORCH_BELOW'])}"
    for file in ("pyproject.toml", "backend/mhmatmul_build.py", "README.md"):
        assert stated in (ROOT / file).read_text(), file
    sentence = f"mhmatmul_ext needs {stated}, found {version}: install such a torch and build again"
    assert setup["unsupported_torch"](version) == (None if is_supported else sentence)


def test_building_stops_for_another_torch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.10.0'\n")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith("mhmatmul_ext needs torch>=2.11")


@pytest.mark.parametrize(
    ("asked", "built"),
    [
        ("9.0", "9.0a"),
        ("8.0;9.0", "8.0;9.0a"),
        ("8.0 9.0a 12.0+PTX", "8.0;9.0a;12.0+PTX"),
        ("9.0+PTX", "9.0a;8.0+PTX"),
    ],
)
def test_hopper_is_built_with_its_own_features(asked, built):
    assert runpy.run_path(str(ROOT / "setup.py"))["with_hopper_features"](asked) == built


@pytest.mark.parametrize(
    ("environment", "torch_cuda", "toolkit", "reason"),
    [
        ({"FORCE_CUDA": "0"}, "13.0", "13.0", "FORCE_CUDA=0"),
        ({}, None, "13.0", "this torch is built without CUDA"),
        ({}, "13.0", None, r"no nvcc was found \(PATH, CUDA_HOME\)"),
        ({}, "13.0", "12.8", "nvcc is of CUDA 12.8, torch of CUDA 13.0: their major versions differ"),
        ({}, "13.0", "13.2", None),
    ],
)
def test_why_cpu_only(environment, torch_cuda, toolkit, reason, tmp_path, monkeypatch):
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if toolkit:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {toolkit}, V{toolkit}.1'\n")
        nvcc.chmod(0o755)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    got = setup["why_cpu_only"](torch_cuda, str(tmp_path) if toolkit else None)
    assert (got is None) if reason is None else re.fullmatch(reason, got)


def test_forced_cuda_that_cannot_be_is_an_error(tmp_path):
    environment = os.environ | {"FORCE_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert re.search(
        "^FORCE_CUDA=1, but (this torch is built without CUDA|no nvcc was found)", result.stderr, re.MULTILINE
    )
    assert not list(tmp_path.iterdir())
