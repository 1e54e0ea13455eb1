"""Builds the operators' library (no Python symbol in it) and `_C`, the small module that tells about it.

Environment: FORCE_CUDA=1 demands the CUDA sources, FORCE_CUDA=0 leaves them out; without it they are built when nvcc
and a torch with CUDA of the same major version are there. TORCH_CUDA_ARCH_LIST chooses architectures, else those of
torch itself; CUTLASS's headers come from the nvidia-cutlass package or from CUTLASS_PATH. torch is imported only when
there is something to build, so that an sdist needs none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent
OPERATORS = "mhmatmul_ext.libmhmatmul"  # built as mhmatmul_ext/libmhmatmul.so
TORCH_SINCE, TORCH_BELOW = (2, 11), (2, 16)  # also in pyproject.toml and the backend; tests/test_build.py compares them
BUILD_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def sources(*patterns: str) -> list[str]:
    """The files below csrc/ that match, relative to the project."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


# The same lists stand in CMakeLists.txt; tests/test_build.py compares them.
CPU_SOURCES = ["*.cpp", "autograd/*.cpp", "composite/*.cpp", "cpu/*.cpp"]
CUDA_SOURCES = ["cuda/*.cpp", "cuda/*.cu"]


def find_cuda_home() -> str | None:
    """The toolkit's folder; where nvcc is a wrapper script, the real compiler says where it lives."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and (nvcc := shutil.which("nvcc")):
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
        home = top.group(1) if top else str(Path(nvcc).resolve().parents[1])
    return str(Path(home).resolve()) if home and (Path(home) / "bin" / "nvcc").exists() else None


def toolkit_version(cuda_home: str) -> str:
    """Major and minor version, as nvcc says it."""
    text = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise SystemExit(f"cannot read the version of {cuda_home}/bin/nvcc from:\n{text}")
    return match.group(1)


def why_cpu_only(torch_cuda: str | None, cuda_home: str | None) -> str | None:
    """One phrase for why the CUDA sources cannot or shall not be built; None when they will be."""
    if os.environ.get("FORCE_CUDA") == "0":
        return "FORCE_CUDA=0"
    if torch_cuda is None:
        return "this torch is built without CUDA"
    if cuda_home is None:
        return "no nvcc was found (PATH, CUDA_HOME)"
    toolkit = toolkit_version(cuda_home)
    if toolkit.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {toolkit}, torch of CUDA {torch_cuda}: their major versions differ"
    return None


def nvidia_folders(kind: str) -> list[str]:
    """The `include` or `lib` folders of the nvidia packages that torch was installed with."""
    import torch

    return sorted(str(p) for p in (Path(torch.__file__).parents[1] / "nvidia").glob(f"*/{kind}") if p.is_dir())


def cublas_link(cuda_home: str) -> list[str]:
    """Linker arguments for cuBLAS of the toolkit, or of torch's packages, which carry no unversioned libcublas.so."""
    for folder in (f"{cuda_home}/lib64", f"{cuda_home}/lib", *nvidia_folders("lib")):
        found = [sorted(Path(folder).glob(f"{name}.so*")) for name in ("libcublas", "libcublasLt")]
        if all(found):
            return [f"-L{folder}", *(f"-l:{libraries[0].name}" for libraries in found)]
    raise SystemExit("cuBLAS was found neither in the CUDA toolkit nor in torch's nvidia packages")


def cutlass_headers() -> str:
    """CUTLASS's include folder: of CUTLASS_PATH, or of the nvidia-cutlass package, which carries the headers."""
    if home := os.environ.get("CUTLASS_PATH"):
        folder = Path(home, "include")
    else:
        package = importlib.util.find_spec("cutlass_library")
        places = (package.submodule_search_locations or []) if package else []
        folder = Path(*places[:1], "source", "include")
    if not (folder / "cute" / "tensor.hpp").exists():
        raise SystemExit(
            f"CUTLASS's headers, cute/tensor.hpp first, are not in {folder}: "
            "pip install nvidia-cutlass, or set CUTLASS_PATH to a checkout of CUTLASS"
        )
    return str(folder)


def unsupported_torch(version: str) -> str | None:
    """One sentence on why nothing can be built for this torch, or None."""
    release = tuple(int(number) for number in version.split(".")[:2])
    if TORCH_SINCE <= release < TORCH_BELOW:
        return None
    since, below = (".".join(map(str, bound)) for bound in (TORCH_SINCE, TORCH_BELOW))
    return f"mhmatmul_ext needs torch>={since},<{below}, found {version}: install such a torch and build again"


def with_hopper_features(architectures: str) -> str:
    """An architecture list in which 9.0 is 9.0a: wgmma and setmaxnreg are in no other code.

    PTX for 9.0a serves no later architecture, so where 9.0's was asked for, 8.0's is built.
    """
    names = architectures.replace(" ", ";").split(";")
    changed = ["9.0a" if name in ("9.0", "9.0a") else "9.0a;8.0+PTX" if name == "9.0+PTX" else name for name in names]
    return ";".join(name for name in changed if name)


def build_arguments() -> dict[str, Any]:
    """What setup() needs to compile; prints the configuration."""
    cuda_home = find_cuda_home()
    if cuda_home is not None:
        os.environ["CUDA_HOME"] = cuda_home  # before torch.utils.cpp_extension makes its own guess

    import torch

    if reason := unsupported_torch(torch.__version__):
        raise SystemExit(reason)
    cpu_only_because = why_cpu_only(torch.version.cuda, cuda_home)
    if cpu_only_because and os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"FORCE_CUDA=1, but {cpu_only_because}")

    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    architectures = ""
    # -fopenmp: at::parallel_for is a header over OpenMP and runs on one thread without it. The OpenMP runtime that is
    # linked bears the name of torch's own, which is loaded by then, so there is one thread pool.
    optimise = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    common: dict[str, Any] = {
        "name": OPERATORS,
        "py_limited_api": True,  # leaves libtorch_python out of the link
        "include_dirs": [str(ROOT / "csrc")],
        "extra_link_args": ["-fopenmp"],
    }
    if cpu_only_because:
        operators = CppExtension(sources=sources(*CPU_SOURCES), extra_compile_args=optimise, **common)
    else:
        assert cuda_home is not None
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            flags = re.findall(r"sm_(\d+?)(\d)\b", torch._C._cuda_getArchFlags() or "")
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{major}.{minor}" for major, minor in flags) + "+PTX"
        architectures = with_hopper_features(os.environ["TORCH_CUDA_ARCH_LIST"])
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        common["extra_link_args"] += cublas_link(cuda_home)
        has_headers = Path(cuda_home, "include", "cublas_v2.h").exists()
        common["include_dirs"] += [] if has_headers else nvidia_folders("include")
        common["include_dirs"].append(cutlass_headers())
        operators = CUDAExtension(
            sources=sources(*CPU_SOURCES, *CUDA_SOURCES),
            define_macros=[("MHMATMUL_BUILT_FOR_SM90A", None)] if "9.0a" in architectures.split(";") else [],
            extra_compile_args={"cxx": optimise, "nvcc": ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]},
            **common,
        )

    configuration = {
        "MHMATMUL_TORCH_VERSION": torch.__version__,
        "MHMATMUL_CUDA_VERSION": "" if cpu_only_because else torch.version.cuda,
        "MHMATMUL_CUDA_ARCHITECTURES": architectures,
        "MHMATMUL_CPU_ONLY_BECAUSE": cpu_only_because or "",
    }
    introspection = Extension(
        "mhmatmul_ext._C",
        sources(*["python/*.cpp"]),
        include_dirs=[pybind11.get_include()],
        define_macros=[(name, f'"{value}"') for name, value in configuration.items()],
        extra_compile_args=["-O1", "-fvisibility=hidden"],
    )

    class BuildExt(BuildExtension):
        def get_ext_filename(self, fullname: str) -> str:
            """The operators' library is no Python module and carries no Python tag."""
            filename = Path(super().get_ext_filename(fullname))  # type: ignore[no-untyped-call]
            library = OPERATORS.rpartition(".")[2]
            return str(filename.with_name(f"{library}.so") if filename.name.startswith(library) else filename)

    print("mhmatmul_ext is built with:", flush=True)
    print(f"  torch          {torch.__version__} in {Path(torch.__file__).parent}")
    print(
        f"  CUDA           {f'no: {cpu_only_because}' if cpu_only_because else f'{torch.version.cuda} by {cuda_home}'}"
    )
    print(f"  architectures  {architectures or '-'}")
    print(f"  sources        {len(operators.sources)} files", flush=True)
    return {"ext_modules": [operators, introspection], "cmdclass": {"build_ext": BuildExt}}


if __name__ == "__main__":
    setup(**(build_arguments() if BUILD_COMMANDS & set(sys.argv) else {}))
