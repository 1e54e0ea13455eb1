"""Command line: `python -m mhmatmul_ext info`."""

from __future__ import annotations

import argparse
import platform
import signal
import sys
from typing import TYPE_CHECKING

import torch

import mhmatmul_ext
from mhmatmul_ext import _C, _load

if TYPE_CHECKING:
    from collections.abc import Iterator


def info() -> Iterator[tuple[str, str]]:
    """What is installed, what it was built with, and what it can do here; a name and a value each."""
    built = _C.build_config()
    yield "mhmatmul_ext", f"{mhmatmul_ext.__version__} in {_load.LIBRARY.parent}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield "built for torch", built["torch"]
    yield "built by", f"C++ compiler {built['compiler']}"
    if built["cuda"]:
        yield "backends", f"CPU, CUDA {built['cuda']} for architectures {built['cuda_architectures']}"
    else:
        yield "backends", f"CPU only: {built['cpu_only_because']}"
    yield "CPU capability", f"{_C.cpu_capability()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield "CUDA device", device
    for name in _operators():
        keys = [key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
        yield name, "made of other operators" if composite else ", ".join(keys)


def _operators() -> list[str]:
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mhmatmul::"))


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 0 for success and 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m mhmatmul_ext", description=mhmatmul_ext.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build configuration, backends and registered operators")
    parser.parse_args(arguments)
    for name, value in info():
        print(f"{name:<42} {value}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main())
