"""Command line: `python -m mhmatmul_ext info|check|bench`."""

from __future__ import annotations

import argparse
import math
import platform
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import mhmatmul_ext
from mhmatmul_ext import _C, _bench, _load
from mhmatmul_ext._check import checks

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


def check() -> int:
    """Compare this installation with the reference; 1 if anything differs."""
    failed = 0
    for name, value in info():
        if not name.startswith("mhmatmul::"):
            print(f"{name:<42} {value}")
    for name, fault in checks():
        failed += fault is not None
        print(f"{'ok' if fault is None else 'FAILED':<8}{name}{'' if fault is None else f': {fault}'}", flush=True)
    print(f"{failed} checks failed" if failed else "all checks passed")
    return int(failed > 0)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mhmatmul_ext",
        description=mhmatmul_ext.__doc__,
        epilog="Exit codes: 0 all right, 1 a result is wrong, 2 wrong usage.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=description, epilog=parser.epilog)

    add(
        "info", "versions, build configuration, backends and registered operators",
        "Print what is installed, what it was built with, what it can do on this machine, and every operator with the "
        "devices that it has kernels for.",
    )  # fmt: skip
    add(
        "check", "compare this installation with the reference, in seconds; for bug reports",
        "Compare values, gradients and selections in every dtype, on every device here, with the reference in plain "
        "PyTorch. Takes seconds; paste what it prints into bug reports.",
    )  # fmt: skip
    bench = add(
        "bench", "speed against plain PyTorch and against the machine's limits",
        "Time the forward product beside plain PyTorch's ways to write it, after comparing every result with float64, "
        "and tell which share of the machine's limits it reaches.",
    )  # fmt: skip
    bench.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default %(default)s)")
    bench.add_argument("--dtype", choices=list(_bench.DTYPES), default="float32", help="(default %(default)s)")
    bench.add_argument(
        "--shapes", nargs="+", default=_bench.SHAPES, metavar="ROWSxHEADSxINxOUT",
        help=f"rows, heads, and a head's inputs and outputs (default {' '.join(_bench.SHAPES)})",
    )  # fmt: skip
    bench.add_argument(
        "--opponents", nargs="+", choices=list(_bench.OPPONENTS), default=list(_bench.OPPONENTS), metavar="NAME",
        help=f"of {', '.join(_bench.OPPONENTS)} (default all)",
    )  # fmt: skip
    bench.add_argument(
        "--seconds", type=_duration, default=0.5, help="how long to time each, at least (default %(default)s)"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw them there; needs matplotlib")
    return parser.parse_args(arguments)


def _duration(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return seconds


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 0 for success, 1 for a wrong result and 2 for wrong usage."""
    options = parse(arguments)
    try:
        if options.command == "check":
            return check()
        if options.command == "bench":
            _bench.bench(options)
        else:
            for name, value in info():
                print(f"{name:<42} {value}")
    except _bench.UserError as error:
        print(f"python -m mhmatmul_ext {options.command}: error: {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main())
