"""The error of every product against float64, ours and PyTorch's side by side, as a table and a picture.

For every dtype and length of the sums, on random and on adversarial operands: the largest error, in units in the last
place of the largest exact value. Ours may be twice PyTorch's plus one ulp. Then what is not an ordinary number:
overflow, NaN, infinities and subnormal numbers come out as PyTorch's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from report import Row
from torch import Tensor

from mhmatmul_ext import matmul_with_multi_head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LENGTHS = (1, 2, 16, 100, 128, 129, 512, 1000, 4096, 16384)
SHORT_LENGTHS = (1, 16, 129, 1000)
SEEDS = 3
HEADS, WIDTH = 2, 32  # of the result: WIDTH rows, where it is no single one, and WIDTH columns a head
ALLOWANCE = 1.0  # ulps
FOLDER = Path(__file__).parent / "results"


class Operands(NamedTuple):
    """Factors of sums over the last dimension of `left` and the middle one of `right`."""

    left: Tensor  # [nh, rows, K]
    right: Tensor  # [nh, K, columns]


Shape = tuple[int, int, int]  # rows, K, columns


def _draw(shape: Shape, generator: torch.Generator) -> Operands:
    rows, K, columns = shape
    sizes = (HEADS, rows, K), (HEADS, K, columns)
    return Operands(*(torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes))


def positive(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Operands:
    """Sums that only grow."""
    return Operands(*(tensor.abs() for tensor in _draw(shape, generator)))


def cancelling(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Operands:
    """Every product comes once more with the other sign, nearly, somewhere else in the sum."""
    left, right = _draw(shape, generator)
    half = shape[1] // 2
    order = torch.randperm(shape[1], generator=generator)
    left[..., half : 2 * half] = -left[..., :half] * (1 + 2.0**-6)
    right[:, half : 2 * half] = right[:, :half]
    return Operands(left[..., order], right[:, order])


def wide(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Operands:
    """Exponents all over the range in which no product overflows."""
    decades = math.log10(torch.finfo(dtype).max) / 2 - 1
    return Operands(
        *(
            tensor * 10 ** (decades * (2 * torch.rand(tensor.shape, dtype=torch.float64, generator=generator) - 1))
            for tensor in _draw(shape, generator)
        )
    )


def absorbing(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Operands:
    """A large product first, taken away at the end: what lies between is rounded beside it."""
    left, right = _draw(shape, generator)
    left[..., 0], right[:, 0] = 64.0, 64.0
    if shape[1] > 1:
        left[..., -1], right[:, -1] = -64.0, 64.0
    return Operands(left, right)


def falling(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Operands:
    """The largest products first, the worst order for a plain sum."""
    left, right = positive(shape, dtype, generator)
    scale = torch.arange(1, shape[1] + 1, dtype=torch.float64) ** -0.5
    return Operands(left * scale, right * scale[:, None])


RANDOM = "random"
DATA: dict[str, Callable[[Shape, torch.dtype, torch.Generator], Operands]] = {
    RANDOM: lambda shape, _, generator: _draw(shape, generator),
    "positive": positive,
    "cancelling": cancelling,
    "wide range": wide,
    "absorbing": absorbing,
    "falling": falling,
}


class Product(NamedTuple):
    """One of the sums that the operators take: ours and PyTorch's, from the factors that are summed over."""

    rows: int
    ours: Callable[[Operands], Tensor]  # [nh, rows, columns]
    plain: Callable[[Operands], Tensor]


def einsum(input: Tensor, weight: Tensor) -> Tensor:
    """What one writes without this package: `[rows, nh, hd]` and `[nh, hd, e]`."""
    return torch.einsum("mnd,nde->mne", input, weight)


def dense(input: Tensor, weight: Tensor) -> Tensor:
    """The same through our public function."""
    return matmul_with_multi_head(input.flatten(-2), weight.flatten(0, 1), weight.shape[0])


def output(function: Callable[[Tensor, Tensor], Tensor], operands: Operands) -> Tensor:
    """Sums over the head's width."""
    return function(operands.left.transpose(0, 1).contiguous(), operands.right).transpose(0, 1)


def grad_input(function: Callable[[Tensor, Tensor], Tensor], operands: Operands) -> Tensor:
    """Sums over the embedding."""
    grad, weight = operands.left.transpose(0, 1).contiguous(), operands.right.mT.contiguous()
    input = grad.new_zeros(len(grad), HEADS, weight.shape[1]).requires_grad_()
    return torch.autograd.grad(function(input, weight), input, grad)[0].transpose(0, 1)


def grad_weight(function: Callable[[Tensor, Tensor], Tensor], operands: Operands) -> Tensor:
    """Sums over the tokens."""
    input, grad = operands.left.permute(2, 0, 1).contiguous(), operands.right.transpose(0, 1).contiguous()
    weight = input.new_zeros(HEADS, input.shape[2], grad.shape[2]).requires_grad_()
    return torch.autograd.grad(function(input, weight), weight, grad)[0]


PRODUCTS = {
    "output": Product(WIDTH, lambda o: output(dense, o), lambda o: output(einsum, o)),
    "output, one row": Product(1, lambda o: output(dense, o), lambda o: output(einsum, o)),
    "grad_input": Product(WIDTH, lambda o: grad_input(dense, o), lambda o: grad_input(einsum, o)),
    "grad_weight": Product(WIDTH, lambda o: grad_weight(dense, o), lambda o: grad_weight(einsum, o)),
}


def exact_product(operands: Operands) -> np.ndarray[Any, Any]:
    """In float64; in long double where the operands are float64 themselves."""
    left, right = operands
    product: np.ndarray[Any, Any]
    if left.dtype == torch.float64:
        product = np.matmul(left.numpy().astype(np.longdouble), right.numpy().astype(np.longdouble))
    else:
        product = torch.bmm(left.double(), right.double()).numpy()
    return product


class Comparison(NamedTuple):
    """The largest errors over several draws."""

    dtype: str
    product: str
    length: int
    data: str
    ours: float  # ulps of the largest exact value
    plain: float

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return self.ours / (2 * self.plain + ALLOWANCE)


def ulps(result: Tensor, exact: np.ndarray[Any, Any]) -> float:
    """The largest error, infinite for NaN."""
    if result.isnan().any():
        return math.inf
    error = np.abs(result.double().numpy().astype(exact.dtype) - exact).max() / np.abs(exact).max()
    return float(error) / torch.finfo(result.dtype).eps


def compare(dtype: torch.dtype, name: str, length: int, data: str) -> Comparison:
    """Ours and PyTorch's on the same operands."""
    product = PRODUCTS[name]
    columns = WIDTH if product.rows > 1 else 8 * WIDTH
    ours = plain = 0.0
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        drawn = DATA[data]((product.rows, length, columns), dtype, generator)
        operands = Operands(*(tensor.to(dtype) for tensor in drawn))
        exact = exact_product(operands)
        if not np.abs(exact).max():
            continue
        ours = max(ours, ulps(product.ours(operands), exact))
        plain = max(plain, ulps(product.plain(operands), exact))
    return Comparison(str(dtype).removeprefix("torch."), name, length, data, ours, plain)


def compare_all(lengths: Iterable[int]) -> Iterator[Comparison]:
    """Every dtype, product, length and kind of data, on one thread, whose bits are those of any number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in DTYPES:
        for name in PRODUCTS:
            for length in lengths:
                for data in DATA:
                    yield compare(dtype, name, length, data)
    torch.set_num_threads(before)


def same_or_nan(ours: Tensor, plain: Tensor) -> Tensor:
    """Where they are one number, or both NaN; zeros have no sign here."""
    return (ours == plain) | (ours.isnan() & plain.isnan())


def special_numbers(dtype: torch.dtype) -> Tensor:
    """Zeros, infinities, NaN, the limits of the dtype and what lies around them."""
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    found = [0.0, 1.0, 1 + limits.eps, 1.5, 3.0, smallest, 3 * smallest, limits.smallest_normal - smallest, limits.tiny]
    found += [limits.max, limits.max / 2, limits.max * (1 - limits.eps), limits.max**0.5, limits.tiny**0.5, math.inf]
    values = torch.tensor([*found, *(-x for x in found), math.nan], dtype=torch.float64).to(dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        return values
    return torch.cat([values, torch.arange(-(1 << 15), 1 << 15, 16).to(torch.int16).view(dtype)])


def check_special(dtype: torch.dtype) -> tuple[int, int]:
    """Products of special numbers, alone and beside another in a sum: how many, and how many are not PyTorch's."""
    values, few = special_numbers(dtype), special_numbers(dtype)[:31]
    tried = wrong = 0
    for beside in (None, 0.0, 1.0, -math.inf, math.nan):
        left, right = values[:, None], few[None]
        if beside is not None:
            left = torch.cat([left, torch.full_like(left, beside)], 1)
            right = torch.cat([right, torch.ones_like(right)])
        ours = matmul_with_multi_head(left, right)[:, 0]
        plain = left @ right  # einsum multiplies single columns elsewhere, where no subnormal number is taken for zero
        tried += ours.numel()
        wrong += int((~same_or_nan(ours, plain)).sum())
    return tried, wrong


def table(comparisons: list[Comparison]) -> str:
    """Per dtype and length: random operands, and the worst of the adversarial ones, ours beside PyTorch's."""
    lines = [f"{'':<10}{'length':>7}   random: ours  PyTorch   adversarial, worst: ours   PyTorch  of the allowed"]
    for dtype in dict.fromkeys(c.dtype for c in comparisons):
        for length in dict.fromkeys(c.length for c in comparisons):
            own = [c for c in comparisons if (c.dtype, c.length) == (dtype, length)]
            worst = max(own, key=lambda c: c.share)
            hard = max((c for c in own if c.data != RANDOM), key=lambda c: c.share)
            random = [max(values) for values in zip(*((c.ours, c.plain) for c in own if c.data == RANDOM), strict=True)]
            lines.append(
                f"{dtype:<10}{length:>7}{random[0]:>15.3g}{random[1]:>9.3g}{hard.ours:>28.3g}{hard.plain:>10.3g}"
                f"{worst.share:>9.0%} {worst.product}, {worst.data}"
            )
    return "\n".join(lines)


def draw(comparisons: list[Comparison], path: Path) -> None:
    """Errors over the length of the sums, a panel for each dtype."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    dtypes = list(dict.fromkeys(c.dtype for c in comparisons))
    lengths = list(dict.fromkeys(c.length for c in comparisons))
    figure, panels = pyplot.subplots(2, 2, figsize=(13, 8), layout="constrained", sharex=True)
    for axes, dtype in zip(panels.flat, dtypes, strict=False):
        for color, data in zip(("C0", "C1", "C2", "C3", "C4", "C5"), DATA, strict=True):
            for style, who in (("-", "ours"), (":", "plain")):
                errors = [
                    max(getattr(c, who) for c in comparisons if (c.dtype, c.data, c.length) == (dtype, data, length))
                    for length in lengths
                ]
                label = f"{data}{', PyTorch' if who == 'plain' else ''}"
                axes.plot(lengths, [max(error, 1e-2) for error in errors], style, color=color, label=label)
        axes.set(xscale="log", yscale="log", title=dtype, ylabel="error, ulps of the largest value")
        axes.set_xlabel("length of the sums")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle("Largest error against float64 (long double for float64), all products; dotted: PyTorch")
    figure.savefig(path, dpi=120)


def rows(short: bool) -> list[Row]:
    """For `make trust`."""
    comparisons = list(compare_all(SHORT_LENGTHS if short else LENGTHS))
    worst = max(comparisons, key=lambda c: c.share)
    found = f"at most {worst.share:.0%} of what is allowed, twice PyTorch's error and {ALLOWANCE:.0f} ulp"
    specials = [check_special(dtype) for dtype in DTYPES]
    tried, wrong = (sum(counts) for counts in zip(*specials, strict=True))
    return [
        Row("error against float64", len(comparisons), "comparisons", found, worst.share <= 1),
        Row(
            "overflow, NaN, subnormals as PyTorch's",
            tried,
            "products",
            f"{wrong} differ" if wrong else "nothing",
            not wrong,
        ),
    ]


def main() -> int:
    """Compare, print, draw; fails where ours is worse than allowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="fewer lengths")
    parser.add_argument("--output", type=Path, metavar="STEM", help="where to write .json and .png")
    options = parser.parse_args()
    comparisons = list(compare_all(SHORT_LENGTHS if options.short else LENGTHS))
    print(table(comparisons))
    worst = max(comparisons, key=lambda c: c.share)
    ratio = max((c.ours / c.plain for c in comparisons if c.plain > ALLOWANCE), default=0.0)
    print(f"{len(comparisons)} comparisons; the worst reaches {worst.share:.0%} of what is allowed: {worst}")
    print(f"Where PyTorch errs by more than {ALLOWANCE:.0f} ulp, we err at most {ratio:.2f} times as much")
    failed = worst.share > 1
    for dtype in DTYPES:
        tried, wrong = check_special(dtype)
        print(f"{str(dtype)[6:]}: {tried} products of special numbers, {wrong} not as PyTorch's")
        failed |= wrong > 0
    if options.output:
        record = [c._replace(ours=float(f"{c.ours:.3g}"), plain=float(f"{c.plain:.3g}"))._asdict() for c in comparisons]
        text = ",\n".join(json.dumps(entry) for entry in record)
        options.output.with_suffix(".json").write_text(f"[\n{text}\n]\n")
        draw(comparisons, options.output.with_suffix(".png"))
    print("FAILED" if failed else "passed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
