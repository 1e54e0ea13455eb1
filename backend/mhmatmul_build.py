"""Build backend: setuptools, compiling against the torch of the environment that pip installs into.

An extension compiled against one torch does not load in another, so the torch that pip would put into its isolated
build environment is the wrong one. Inside pip's hooks `sysconfig` still names the target environment; its
site-packages are appended (not prepended: the isolated setuptools stays first) so that `import torch` finds that one.
`MHMATMUL_TORCH_DIR` names a folder holding `torch` where this cannot work (`uv pip install`, `python -m build`).
"""

import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks not redefined below)


def _folder_with_torch() -> "str | None":
    folders = [
        os.environ.get("MHMATMUL_TORCH_DIR"),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    ]
    return next((f for f in folders if f and (Path(f) / "torch" / "version.py").is_file()), None)


_CUTLASS = "nvidia-cutlass==4.2.*"  # its headers, for a torch with CUDA
_TORCH = _folder_with_torch()
if _TORCH is not None and _TORCH not in sys.path:
    sys.path.append(_TORCH)


def _requirements() -> "list[str]":
    if _TORCH is None:
        return ["torch>=2.11,<2.16", _CUTLASS]
    has_cuda = re.search(r"^cuda.*= '", (Path(_TORCH) / "torch" / "version.py").read_text(), re.MULTILINE)
    return [_CUTLASS] if has_cuda and "CUTLASS_PATH" not in os.environ else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()
