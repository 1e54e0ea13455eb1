"""Where a run took place, and its results as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import mhmatmul_ext

FOLDER = Path(__file__).parent / "results"


def cpu_name() -> str:
    """The model, as Linux names it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this clone, with `-dirty` after changes; `unknown` outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def environment() -> dict[str, object]:
    """Machine and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "capability": mhmatmul_ext._C.cpu_capability(),
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "mhmatmul_ext": mhmatmul_ext.__version__,
        "compiler": mhmatmul_ext._C.build_config()["compiler"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit(),
    }


def gpu_environment() -> dict[str, object]:
    """The current device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "bytes of L2": properties.L2_cache_size,
        "bytes of memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "built for": mhmatmul_ext._C.build_config()["cuda_architectures"],
    }


def default_path(device: str) -> Path:
    """Such as `results/2026-01-31-cpu-avx2.json`."""
    return FOLDER / f"{datetime.date.today().isoformat()}-{device}.json"


def gpu_path(kind: str = "") -> Path:
    """The same for the current GPU, such as `results/2026-01-31-gpu-nvidia-h200-bfloat16-sizes.json`."""
    return default_path("-".join(["gpu", *torch.cuda.get_device_name().lower().split(), *kind.split()]))


def write(path: Path, record: dict[str, object]) -> None:
    """Write it; what is not finite is an error."""
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
