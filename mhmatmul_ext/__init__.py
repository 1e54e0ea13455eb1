"""Head-wise and token-selective matrix multiplication for PyTorch.

`matmul_with_multi_head` multiplies each head of the input by its own matrix, `matmul_with_importance` does so for the
tokens that matter, `select_important` says which those are, `combine` puts them back. The operators are in
`torch.ops.mhmatmul`; `nn` holds modules over them, `reference` the same functions in slow, obvious PyTorch.
"""

from . import _load
from ._version import __version__

_load.load()

from . import _registrations, nn, reference  # noqa: E402
from .functional import combine, matmul_with_importance, matmul_with_multi_head, select_important  # noqa: E402

__all__ = [
    "__version__",
    "combine",
    "matmul_with_importance",
    "matmul_with_multi_head",
    "nn",
    "reference",
    "select_important",
]

del _registrations
