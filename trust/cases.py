"""What fuzzing draws: sizes at the edges of the kernels' blocks, values, and layouts of the same values in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import mhmatmul_ext

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Nothing, one, primes, and what lies around register blocks, panels, chunks, blocks and tasks (csrc/cpu/gemm_tuning.h).
SIZES = [1, 2, 0, 3, 5, 6, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193]
SIZES += [255, 257, 383, 384, 385, 509, 511, 512, 513, 1023, 1025, 1535, 1536, 1537, 3079]
WORK = (
    1 << 10,
    1 << 12,
    1 << 12,
    1 << 14,
    1 << 14,
    1 << 14,
    1 << 16,
    1 << 16,
    1 << 18,
    1 << 20,
)  # multiply-adds, at most
LARGE = 1 << 16  # of them a case counts as large


def capabilities() -> tuple[str, ...]:
    """The instruction sets that this machine runs, the best first."""
    before = mhmatmul_ext._C.cpu_capability()
    found = []
    for name in ("amx", "avx512_bf16", "avx512", "avx2", "portable"):
        try:
            mhmatmul_ext._C.set_cpu_capability(name)
        except ValueError:
            continue
        found.append(name)
    mhmatmul_ext._C.set_cpu_capability(before)
    return tuple(found)


def _normal(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=generator)


def _chosen(*choices: float) -> Callable[[tuple[int, ...], torch.dtype, torch.Generator], Tensor]:
    def choose(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        places = torch.randint(len(choices), size, generator=generator)
        return torch.tensor(choices, dtype=torch.float64)[places]

    return choose


def _with_specials(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Mostly ordinary numbers: one NaN in a sum hides all else."""
    specials = _chosen(math.nan, math.inf, -math.inf, -0.0, 0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny)
    is_special = torch.rand(size, generator=generator) < 0.02
    return torch.where(is_special, specials(size, dtype, generator), _normal(size, dtype, generator))


def _huge(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.finfo(dtype).max * (1 - 2 * torch.rand(size, dtype=torch.float64, generator=generator))


def _wide(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Exponents all over the range of the dtype, products in range."""
    decades = math.log10(torch.finfo(dtype).max) / 2 - 1
    exponents = decades * (1 - 2 * torch.rand(size, dtype=torch.float64, generator=generator))
    return _normal(size, dtype, generator) * 10**exponents


def _subnormal(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.finfo(dtype).tiny * _normal(size, dtype, generator)


VALUES: dict[str, Callable[[tuple[int, ...], torch.dtype, torch.Generator], Tensor]] = {
    "normal": _normal,
    "all equal": lambda size, _, __: torch.full(size, 0.75, dtype=torch.float64),
    "two values": _chosen(-1.0, 0.5),
    "whole numbers": _chosen(*range(-3, 4)),
    "zeros of both signs": _chosen(0.0, -0.0),
    "subnormal": _subnormal,
    "huge": _huge,
    "wide range": _wide,
    "with NaN and infinities": _with_specials,
}
SCORES = VALUES | {
    "normal": lambda size, _, generator: torch.rand(size, dtype=torch.float64, generator=generator),
    "two values": _chosen(0.25, 0.75),
    "few values": _chosen(math.nan, math.inf, -math.inf, -0.0, 0.0, 0.5, 0.7, 1.0, 5e-324),
}


def poison(dtype: torch.dtype) -> Any:
    """What lies between and around an operand's elements: whoever reads it is found out."""
    if dtype.is_floating_point:
        return math.nan
    return torch.iinfo(dtype).max if dtype != torch.bool else True


def _padded(tensor: Tensor) -> Tensor:
    around = tensor.new_full([size + 3 for size in tensor.shape], poison(tensor.dtype))
    inside = around[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return inside.copy_(tensor)


def _offset(tensor: Tensor) -> Tensor:
    around = tensor.new_full((tensor.numel() + 2,), poison(tensor.dtype))
    return around[1:-1].view(tensor.shape).copy_(tensor)


def _every_other(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, poison(tensor.dtype))], -1)[..., 0]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def _reversed(tensor: Tensor) -> Tensor:
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def _columns_of_more(tensor: Tensor) -> Tensor:
    """A slice of a fused projection."""
    beside = torch.full_like(tensor, poison(tensor.dtype))
    return torch.cat([beside, tensor, beside], -1)[..., tensor.shape[-1] : 2 * tensor.shape[-1]]


def _negated_lazily(tensor: Tensor) -> Tensor:
    """As the imaginary part of a conjugate: the memory holds the opposite numbers."""
    return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor


# Expanded ones are other values; all else keeps them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": _transposed,
    "dimensions reversed": _reversed,
    "padded": _padded,
    "offset by one element": _offset,
    "every other column": _every_other,
    "columns of a wider one": _columns_of_more,
    "rows expanded": lambda tensor: tensor[:1].expand_as(tensor),
    "columns expanded": lambda tensor: tensor[..., :1].expand_as(tensor),
    "one element expanded": lambda tensor: tensor[(slice(0, 1),) * tensor.dim()].expand_as(tensor),
    "negated lazily": _negated_lazily,
}
OUT_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # the last stride is 1
    "contiguous": LAYOUTS["contiguous"],
    "padded": _padded,
    "offset by one element": _offset,
    "columns of a wider one": _columns_of_more,
    "heads first": lambda tensor: tensor.movedim(-2, 0).contiguous().movedim(0, -2),
    "negated lazily": _negated_lazily,
}


@dataclass(frozen=True)
class Operand:
    """How one operand is made."""

    values: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    def make(self, size: tuple[int, ...], dtype: torch.dtype, scores: bool = False) -> Tensor:
        """The same every time."""
        generator = torch.Generator().manual_seed(self.seed)
        values = (SCORES if scores else VALUES)[self.values](size, dtype, generator)
        largest = torch.finfo(dtype).max
        finite = values.clamp(-largest, largest)  # `to` would round what is near the largest number to infinity
        return LAYOUTS[self.layout](torch.where(values.isinf(), values, finite).to(dtype))


@dataclass(frozen=True)
class Case:
    """All that a run of one kind of check depends on; its repr makes it again."""

    kind: str
    dtype: str = "float32"
    capability: str = "portable"
    threads: int = 1
    sizes: tuple[int, ...] = ()  # by kind
    num_heads: int = 1
    operands: tuple[Operand, ...] = ()  # by kind; see fuzz.py
    has_bias: bool = False
    out: str | None = None
    scores: str = "float32"  # dtype of the scores
    top_p: float = 0.5
    threshold: str | None = None  # dtype of a tensor for it
    top_k: int | None = None
    capacity: int | None = None
    mask: str | None = None
    transform: str | None = None
    seed: int = 0  # of indices and masks

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the operands."""
        return DTYPES[self.dtype]

    @property
    def work(self) -> int:
        """Multiply-adds, or scores."""
        return math.prod(self.sizes) * self.num_heads

    def tags(self) -> list[tuple[str, str]]:
        """What it is one of, for the count."""
        size = "empty" if 0 in self.sizes else "large" if self.work > LARGE else "a one" if 1 in self.sizes else "other"
        found = [("kind", self.kind), ("dtype", self.dtype), ("instructions", self.capability), ("sizes", size)]
        found += [("threads", str(self.threads))]
        found += [("layout", layout) for layout in {operand.layout for operand in self.operands}]
        found += [("values", values) for values in {operand.values for operand in self.operands}]
        if self.kind in ("selection", "importance"):
            found += [("selection", "capacity" if self.capacity is not None else "of any size")]
            found += [("selection", f"{self.mask} mask" if self.mask else "no mask")]
            found += [("selection", "threshold a tensor" if self.threshold else "threshold a number")]
        if self.transform:
            found += [("transform", self.transform)]
        if self.out:
            found += [("out=", self.out)]
        return found


def operands(values: dict[str, Any] = VALUES) -> st.SearchStrategy[Operand]:
    """Ordinary numbers and layouts in half of the operands, so that one strange thing meets ordinary ones too."""
    return st.builds(
        Operand,
        st.just("normal") | st.sampled_from(list(values)),
        st.just("contiguous") | st.sampled_from(list(LAYOUTS)),
        st.integers(0, 1 << 16),
    )


@st.composite
def sizes(draw: st.DrawFn, count: int, most: int) -> tuple[int, ...]:
    """So many sizes whose product is bounded; the first one drawn has the most room, and may be any of them."""
    found = [0] * count
    smallest = draw(st.sampled_from([1, 1, 1, 0]))
    for place in draw(st.permutations(range(count))):
        allowed = [size for size in SIZES if smallest <= size <= most]
        found[place] = draw(st.sampled_from(allowed))
        most //= max(1, found[place])
    return tuple(found)


@st.composite
def selections(draw: st.DrawFn, s: int) -> dict[str, Any]:
    """Threshold, number of places, mask."""
    threshold = draw(st.none() | st.sampled_from(list(DTYPES)))
    thresholds = st.sampled_from([0.5, 0.0, 1.0, 0.7, 0.75, 1 / 3, 5e-324, 1 - 2.0**-53]) | st.floats(0, 1)
    if threshold:
        thresholds |= st.sampled_from([-1.0, 2.0, 1e30, -1e30, math.inf, -math.inf, math.nan, -0.0])
    return {
        "scores": draw(st.sampled_from(list(DTYPES))),
        "top_p": draw(thresholds),
        "threshold": threshold,
        "top_k": draw(st.none() | st.integers(1, s)) if s else None,
        "capacity": draw(st.none() | st.sampled_from([0, 1, s // 2, s, s + 3])),
        "mask": draw(st.none() | st.sampled_from(["bool", "int8"])),
    }


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...], machine: tuple[str, ...]) -> Case:
    """One case of one of the kinds, on one of the machine's instruction sets."""
    kind = draw(st.sampled_from(kinds))
    work = draw(st.sampled_from(WORK))
    case: dict[str, Any] = {
        "dtype": draw(st.sampled_from(list(DTYPES))),
        "capability": draw(st.sampled_from(machine)),
        "threads": draw(st.sampled_from([1, 2, 3])),
        "seed": draw(st.integers(0, 1 << 16)),
    }
    if kind == "selection":
        b, s = draw(sizes(2, min(work, 1 << 12)))  # the specification is slow
        return Case(kind, sizes=(b, s), operands=(draw(operands(SCORES)),), **case, **draw(selections(s)))
    if work <= 1 << 14 and case["dtype"] in ("float32", "float64"):  # PyTorch's products there: half types round twice
        case["transform"] = draw(st.sampled_from([None, None, None, "vjp", "vmap", "backward twice"]))
    if kind == "combine":
        chosen = draw(sizes(3, min(work, 1 << 16)))  # m, d, t
        drawn = tuple(draw(st.tuples(*[operands()] * 4)))  # base, updates, gates, grad_output
        return Case(kind, sizes=chosen, operands=drawn, has_bias=draw(st.booleans()), **case)
    case["num_heads"] = draw(st.sampled_from([1, 2, 3, 4, 7, 16]))
    work = max(1, work // case["num_heads"])
    if kind == "importance":
        b, s, hd, e = draw(sizes(4, work))
        drawn = draw(st.tuples(operands(), operands(), operands(SCORES), operands()))
        return Case(kind, sizes=(b, s, hd, e), operands=drawn, **case, **draw(selections(s)))
    drawn = tuple(draw(st.tuples(*[operands()] * 4)))  # input, weight, bias, grad_output
    case["has_bias"] = draw(st.booleans())
    if kind == "gathered":
        return Case(kind, sizes=draw(sizes(4, work)), operands=drawn, **case)  # m, t, hd, e
    rank = draw(st.integers(0, 3))
    case["out"] = draw(st.none() | st.sampled_from(list(OUT_LAYOUTS)))
    return Case(kind, sizes=draw(sizes(rank + 2, work)), operands=drawn, **case)  # ..., hd, e
