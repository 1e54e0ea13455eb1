"""Loading the operators' library, after checking that it was built for the torch that is running."""

from __future__ import annotations

from pathlib import Path

import torch

from . import _C

LIBRARY = Path(__file__).resolve().with_name("libmhmatmul.so")
REINSTALL = "reinstall with `pip install --force-reinstall --no-deps --no-cache-dir <the mhmatmul_ext source>`"


def _release(version: str) -> str:
    return version.partition("+")[0]


def mismatch(built: _C.BuildConfig, running_torch: str, running_cuda: str | None) -> str | None:
    """One sentence on why a library built so must not be loaded into this torch, or None."""
    if _release(built["torch"]) != _release(running_torch):
        return (
            f"mhmatmul_ext was built for torch {_release(built['torch'])}, "
            f"running {_release(running_torch)}: {REINSTALL}"
        )
    if built["cuda"] is not None and built["cuda"] != running_cuda:
        running = f"CUDA {running_cuda}" if running_cuda else "no CUDA"
        return (
            f"mhmatmul_ext was built for torch {_release(built['torch'])} with CUDA {built['cuda']}, "
            f"running one with {running}: {REINSTALL}"
        )
    return None


def load() -> None:
    """Load the operators into `torch.ops.mhmatmul`.

    Raises:
        ImportError: the library is missing, was built for another torch, or another copy of it is loaded already.

    """
    if reason := mismatch(_C.build_config(), torch.__version__, torch.version.cuda):
        raise ImportError(reason)
    if not LIBRARY.exists():
        raise ImportError(f"mhmatmul_ext lacks its operators' library {LIBRARY}: {REINSTALL}")
    if str(LIBRARY) not in torch.ops.loaded_libraries and _operators_exist():
        raise ImportError(
            f"the mhmatmul operators are registered already, by another library than {LIBRARY}: "
            "load only one copy of mhmatmul_ext in a process"
        )
    torch.ops.load_library(LIBRARY)
    _C.bind(str(LIBRARY))


def _operators_exist() -> bool:
    return any(name.startswith("mhmatmul::") for name in torch._C._dispatch_get_all_op_names())
