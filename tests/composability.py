"""Every operator with operands for it: the rows of the composability table, and how the table is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

ops = torch.ops.mhmatmul


class Sizes(NamedTuple):
    b: int = 2
    s: int = 3
    nh: int = 2
    hd: int = 4
    e: int = 5

    @property
    def h(self) -> int:
        return self.nh * self.hd

    @property
    def m(self) -> int:
        return self.b * self.s

    @property
    def t(self) -> int:
        return self.m - 1 if self.m else 0


SIZES = Sizes()


@dataclass
class Make:
    """Makes operands; those that are differentiable require grad if asked for."""

    device: str
    dtype: torch.dtype = torch.float32
    requires_grad: bool = False
    is_strided: bool = False
    scores_fill: float | None = None

    def __call__(self, *size: int) -> Tensor:
        size = (*size[:-1], 2 * size[-1]) if self.is_strided else size
        tensor = torch.randn(size, dtype=self.dtype, device=self.device)
        return (tensor[..., ::2] if self.is_strided else tensor).requires_grad_(self.requires_grad)

    def out(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def scores(self, z: Sizes) -> Tensor:
        size = (z.b, 2 * z.s) if self.is_strided else (z.b, z.s)
        scores = torch.rand(size, device=self.device)
        scores = scores if self.scores_fill is None else torch.full_like(scores, self.scores_fill)
        return scores[:, ::2] if self.is_strided else scores

    def threshold(self) -> Tensor:
        return torch.tensor(0.4, device=self.device)

    def indices(self, z: Sizes) -> Tensor:
        return torch.randint(-1, z.m, (z.t,), device=self.device)

    def distinct(self, z: Sizes) -> Tensor:
        indices = torch.randperm(z.m, device=self.device)[: z.t]
        return torch.where(indices == 1, -1, indices)


@dataclass(frozen=True)
class Row:
    """One operator."""

    name: str
    arguments: Callable[[Make, Sizes], tuple[Any, ...]]
    leaves: tuple[str, ...]  # the operators that it comes to, as dispatch modes see them
    products: tuple[int, int] = (1, 2)  # of all its rows with a weight each: by itself, and in its backward
    is_differentiable: bool = True
    is_ragged: bool = False  # sizes of results depend on data
    is_cast: bool = True  # by autocast
    op: str = field(default="")

    @property
    def writes_out(self) -> bool:
        return self.name.endswith("_out")

    def __call__(self, *arguments: Any) -> Any:
        """Call the operator; the last argument of an out form is `out`, which is the result."""
        result = getattr(ops, self.op or self.name).default(*arguments)
        return arguments[-1] if self.writes_out else result

    def make(self, make: Make, sizes: Sizes = SIZES) -> tuple[Any, ...]:
        return self.arguments(make, sizes)


def differentiable(result: Any) -> list[Tensor]:
    """The outputs that autograd recorded."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]


def floating(result: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point())


GATHER, SELECTED, STATIC = ("gather_head_matmul",), ("_importance_head_matmul",), "select_important_static"
NO_PRODUCT = (0, 0)


def selection(name: str, arguments: Callable[[Make, Sizes], tuple[Any, ...]], is_ragged: bool) -> Row:
    return Row(name, arguments, (name,), NO_PRODUCT, is_differentiable=False, is_ragged=is_ragged, is_cast=False)


def with_grad_output(t: Make, z: Sizes) -> tuple[Any, ...]:
    """Operands of explicit gradients, as many rows of grad_output as tokens are kept."""
    scores, threshold = t.scores(z), t.threshold()
    kept = ops._select_important_tensor(scores, threshold, 2)[0].shape[0]
    return t(z.b, z.s, z.h), t(z.h, z.e), scores, t(kept, z.nh, z.e), z.nh, threshold, 2, None


ROWS = [
    Row("head_matmul", lambda t, z: (t(z.b, z.s, z.nh, z.hd), t(z.nh, z.hd, z.e), t(z.nh, z.e)), ("head_matmul",)),
    Row(
        "_head_matmul_out",
        lambda t, z: (t(z.b, z.s, z.nh, z.hd), t(z.nh, z.hd, z.e), t(z.nh, z.e), t.out(z.b, z.s, z.nh, z.e)),
        ("_head_matmul_out",),
        (1, 0),
        is_differentiable=False,
        is_cast=False,
    ),
    Row(
        "_head_matmul_wgrad",
        lambda t, z: (t(z.b, z.s, z.nh, z.e), t(z.b, z.s, z.nh, z.hd)),
        ("_head_matmul_wgrad",),
        is_cast=False,
    ),
    Row(
        "_head_matmul_backward",
        lambda t, z: (t(z.b, z.s, z.nh, z.e), t(z.b, z.s, z.nh, z.hd), t(z.nh, z.hd, z.e)),
        ("_head_matmul_backward",),
        (2, 4),
        is_cast=False,
    ),
    Row("multi_head_matmul", lambda t, z: (t(z.b, z.s, z.h), t(z.h, z.e), z.nh), ("head_matmul",)),
    Row(
        "_multi_head_matmul_bias",
        lambda t, z: (t(z.b, z.s, z.h), t(z.h, z.e), z.nh, t(z.nh, z.e)),
        ("head_matmul",),
    ),
    Row(
        "_multi_head_matmul_out",
        lambda t, z: (t(z.b, z.s, z.h), t(z.h, z.e), z.nh, t(z.nh, z.e), t.out(z.b, z.s, z.nh, z.e)),
        ("_head_matmul_out",),
        (1, 0),
        is_differentiable=False,
        is_cast=False,
    ),
    Row(
        "gather_head_matmul",
        lambda t, z: (t(z.m, z.nh, z.hd), t(z.nh, z.hd, z.e), t.indices(z), t(z.nh, z.e)),
        GATHER,
    ),
    Row(
        "_gather_distinct_head_matmul",
        lambda t, z: (t(z.m, z.nh, z.hd), t(z.nh, z.hd, z.e), t.distinct(z)),
        GATHER,
    ),
    Row(
        "_gather_head_matmul_dgrad",
        lambda t, z: (t(z.t, z.nh, z.e), t(z.nh, z.hd, z.e), t.indices(z), z.m),
        ("_gather_head_matmul_dgrad",),
        is_cast=False,
    ),
    Row(
        "_gather_head_matmul_wgrad",
        lambda t, z: (t(z.t, z.nh, z.e), t(z.m, z.nh, z.hd), t.indices(z)),
        ("_gather_head_matmul_wgrad",),
        is_cast=False,
    ),
    Row(
        "_gather_head_matmul_backward",
        lambda t, z: (t(z.t, z.nh, z.e), t(z.m, z.nh, z.hd), t(z.nh, z.hd, z.e), t.indices(z)),
        ("_gather_head_matmul_backward",),
        (2, 4),
        is_cast=False,
    ),
    Row(
        "combine",
        lambda t, z: (t(z.b, z.s, z.e), t(z.t, z.e), t.indices(z), t(z.t)),
        ("combine",),
        NO_PRODUCT,
        is_cast=False,
    ),
    Row(
        "_combine_updates_grad",
        lambda t, z: (t(z.b, z.s, z.e), t.indices(z), t(z.t)),
        ("_combine_updates_grad",),
        NO_PRODUCT,
        is_cast=False,
    ),
    Row(
        "_combine_gates_grad",
        lambda t, z: (t(z.b, z.s, z.e), t(z.t, z.e), t.indices(z)),
        ("_combine_gates_grad",),
        NO_PRODUCT,
        is_cast=False,
    ),
    selection("select_important", lambda t, z: (t.scores(z), 0.4, 2), is_ragged=True),
    selection("_select_important_tensor", lambda t, z: (t.scores(z), t.threshold(), 2), is_ragged=True),
    Row(
        "_importance_head_matmul",
        lambda t, z: (t(z.m, z.nh, z.hd), t(z.nh, z.hd, z.e), t.scores(z), None, t.threshold(), 2),
        SELECTED,
        is_ragged=True,
    ),
    selection(STATIC, lambda t, z: (t.scores(z), t.threshold(), 2, 3), is_ragged=False),
    Row(
        "importance_matmul",
        lambda t, z: (t(z.b, z.s, z.h), t(z.h, z.e), t.scores(z), z.nh, 0.4, 2),
        SELECTED,
        is_ragged=True,
    ),
    Row(
        "_importance_matmul_tensor",
        lambda t, z: (t(z.b, z.s, z.h), t(z.h, z.e), t.scores(z), z.nh, t.threshold(), 2, None),
        SELECTED,
        is_ragged=True,
    ),
    Row(
        "_importance_matmul_tensor, capacity",
        lambda t, z: (t(z.b, z.s, z.h), t(z.h, z.e), t.scores(z), z.nh, t.threshold(), 2, 2),
        (STATIC, *GATHER),
        op="_importance_matmul_tensor",
    ),
    Row(
        "_importance_matmul_grads",
        with_grad_output,
        (*SELECTED, "_gather_head_matmul_backward"),
        (3, 0),
        is_differentiable=False,
        is_ragged=True,
    ),
    Row(
        "_importance_matmul_grads, capacity",
        lambda t, z: (
            t(z.b, z.s, z.h), t(z.h, z.e), t.scores(z), t(z.b, 2, z.nh, z.e), z.nh, t.threshold(), 2, 2,
        ),
        (STATIC, *GATHER, "_gather_head_matmul_backward"),
        (3, 0),
        is_differentiable=False,
        op="_importance_matmul_grads",
    ),
]  # fmt: skip
COLUMNS = [
    "opcheck", "reverse", "forward", "func", "vmap", "checkpoint", "compile", "compiled autograd", "export", "AOTI",
    "autocast", "meta", "FLOP", "names", "DTensor",
]  # fmt: skip
NOTHING_TO_PROVE = "\u2013"


def applies(column: str, row: Row) -> bool:
    """Whether there is anything to prove."""
    if column in ("reverse", "forward", "func", "checkpoint", "compiled autograd"):
        return row.is_differentiable
    if column == "vmap":
        return not row.writes_out and not (row.is_ragged and row.products == NO_PRODUCT)
    if column == "DTensor":
        return not row.is_ragged and not row.writes_out
    if column == "FLOP":
        return row.products[0] > 0
    return True


def markdown(marks: dict[tuple[str, str], str]) -> list[str]:
    """The table as lines, given the marks of (row, column); what is not given and applies shows as blank."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{':-:|' * len(COLUMNS)}"]
    for row in ROWS:
        cells = [marks.get((row.name, column), "" if applies(column, row) else NOTHING_TO_PROVE) for column in COLUMNS]
        lines.append(f"| `{row.name}` | {' | '.join(cells)} |".replace(", capacity`", "`, capacity"))
    return lines
