"""Random calls of every public operator, compared with the specification: numbers with float64, selections exactly.

Each call also has to leave its operands alone, read nothing between or around them, and give the bits that other ways
to the same numbers give: `out=`, the rows of the dense product, the explicit gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import torch
from cases import DTYPES, OUT_LAYOUTS, Case, capabilities, cases, poison
from oracle import CHUNK, WrongError, bits, check, check_same, expected, flush
from report import Row
from torch import Tensor

import mhmatmul_ext
from mhmatmul_ext import combine, matmul_with_importance, matmul_with_multi_head, reference, select_important

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ops = torch.ops.mhmatmul


def multi_head(case: Case) -> None:
    """`matmul_with_multi_head`: result, `out=`, gradients of input, weight and bias."""
    *leading, hd, e = case.sizes
    nh, dtype = case.num_heads, case.torch_dtype
    input = case.operands[0].make((*leading, nh * hd), dtype)
    weight = case.operands[1].make((nh * hd, e), dtype)
    bias = case.operands[2].make((nh, e), dtype) if case.has_bias else None
    grad_output = case.operands[3].make((*leading, nh, e), dtype)
    rows = math.prod(leading)

    def function(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return matmul_with_multi_head(input, weight, nh, bias=bias)

    def specified(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.matmul_with_multi_head(input, weight, nh, bias=bias)

    operands = [input, weight] if bias is None else [input, weight, bias]
    output = check_differentiable(case, function, specified, operands, grad_output, (hd, e, rows, rows))
    if not output.is_contiguous():
        raise WrongError("output: not contiguous")
    if case.out:
        out = OUT_LAYOUTS[case.out](torch.full_like(output, 7.0))
        returned = matmul_with_multi_head(input, weight, nh, bias=bias, out=out)
        if returned is not out:
            raise WrongError("out: another tensor is returned")
        check_same("out", out, output)
        if case.out in ("padded", "offset by one element", "columns of a wider one"):
            written = out._base.isnan().logical_not().sum() if out._base is not None else out.numel()
            if written > out.numel():
                raise WrongError("out: written beside it")


def gathered(case: Case) -> None:
    """`gather_head_matmul` over repeated indices and -1."""
    m, t, hd, e = case.sizes
    nh, dtype = case.num_heads, case.torch_dtype
    input = case.operands[0].make((m, nh, hd), dtype)
    weight = case.operands[1].make((nh, hd, e), dtype)
    bias = case.operands[2].make((nh, e), dtype) if case.has_bias else None
    grad_output = case.operands[3].make((t, nh, e), dtype)
    indices = torch.randint(-1, m, (t,), generator=torch.Generator().manual_seed(case.seed))
    if case.seed % 3 == 0:  # none twice
        indices = torch.randperm(m, generator=torch.Generator().manual_seed(case.seed))[:t]
        indices = torch.cat([indices, indices.new_full((t - len(indices),), -1)])
    (places,) = (indices >= 0).nonzero(as_tuple=True)

    def function(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output: Tensor = ops.gather_head_matmul(input, weight, indices, bias)
        return output

    def specified(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = input[indices[places]]
        product = torch.einsum("tnd,nde->tne", rows, weight)
        product = product if bias is None else product + bias
        return product.new_zeros(t, nh, e).index_put((places,), product)

    operands = [input, weight] if bias is None else [input, weight, bias]
    most = int(indices[places].bincount().max()) if len(places) else 1
    check_differentiable(case, function, specified, operands, grad_output, (hd, e * most, t, t))


def combined(case: Case) -> None:
    """`combine` over repeated indices and -1."""
    m, d, t = case.sizes
    dtype = case.torch_dtype
    shape = (2, m // 2, d) if m % 2 == 0 and case.seed % 2 else (m, d)
    base, updates = case.operands[0].make(shape, dtype), case.operands[1].make((t, d), dtype)
    gates = case.operands[2].make((t,), dtype) if case.has_bias else None
    grad_output = case.operands[3].make(shape, dtype)
    indices = torch.randint(-1, m, (t,), generator=torch.Generator().manual_seed(case.seed))
    named = indices[indices >= 0]

    def function(base: Tensor, updates: Tensor, gates: Tensor | None = None) -> Tensor:
        return combine(base, updates, indices, gates)

    def specified(base: Tensor, updates: Tensor, gates: Tensor | None = None) -> Tensor:
        kept = updates[indices >= 0]
        if gates is not None:
            kept = gates[indices >= 0][:, None] * kept
        return base.flatten(0, -2).index_put((named,), kept, accumulate=True).view_as(base)

    operands = [base, updates] if gates is None else [base, updates, gates]
    most = 2 * int(named.bincount().max()) if len(named) else 0
    # No products of pairs here: nothing is flushed.
    output = check_differentiable(case, function, specified, operands, grad_output, (1 + most, 1, 2, d), flushes=False)
    untouched = torch.ones(m, dtype=torch.bool).index_fill(0, named, False)
    check_same("rows without an update", output.flatten(0, -2)[untouched], base.flatten(0, -2)[untouched])


def selection(case: Case) -> None:
    """`select_important`, exactly."""
    arguments = selection_arguments(case, case.operands[0].make(case.sizes, DTYPES[case.scores], scores=True))
    before = [state_of(value) for value in arguments.values()]
    check_selection(select_important(**arguments), reference.select_important(**arguments))
    if before != [state_of(value) for value in arguments.values()]:
        raise WrongError("an argument was changed")


def importance(case: Case) -> None:
    """`matmul_with_importance`: output, explicit gradients, and the same bits as the dense product and autograd."""
    b, s, hd, e = case.sizes
    nh, dtype = case.num_heads, case.torch_dtype
    input = case.operands[0].make((b, s, nh * hd), dtype)
    weight = case.operands[1].make((nh * hd, e), dtype)
    chosen = selection_arguments(case, case.operands[2].make((b, s), DTYPES[case.scores], scores=True))
    indices, _ = reference.select_important(**chosen)
    check_selection(select_important(**chosen), reference.select_important(**chosen))
    grad_output = case.operands[3].make((*indices.shape, nh, e), dtype)
    arguments = {**chosen, "num_heads": nh}

    def function(input: Tensor, weight: Tensor) -> Tensor:
        return matmul_with_importance(input, weight, **arguments)[0]

    def specified(input: Tensor, weight: Tensor) -> Tensor:
        return reference.matmul_with_importance(input, weight, **arguments)[0]

    results: list[Tensor] = []
    output = check_differentiable(
        case, function, specified, [input, weight], grad_output, (hd, e, indices.numel()), gradients=results
    )
    explicit = matmul_with_importance(input, weight, grad_output=grad_output, **arguments)
    for name, ours, other in zip(("output", "grad_input", "grad_weight"), explicit, (output, *results), strict=True):
        assert ours is not None
        check_same(f"{name} given a grad_output", ours, other)
    dense = matmul_with_multi_head(input, weight, nh).flatten(0, 1)
    kept = indices.flatten() >= 0
    check_same("rows of the dense product", output.flatten(0, -3)[kept], dense[indices.flatten()[kept]])


KINDS: dict[str, Callable[[Case], None]] = {
    "multi-head": multi_head,
    "selection": selection,
    "importance": importance,
    "gathered": gathered,
    "combine": combined,
}


def selection_arguments(case: Case, probs: Tensor) -> dict[str, Any]:
    """Threshold, places and mask for these scores."""
    found: dict[str, Any] = {"probs": probs, "top_p": case.top_p, "top_k": case.top_k, "capacity": case.capacity}
    if case.threshold:
        found["top_p"] = torch.tensor(case.top_p, dtype=DTYPES[case.threshold])
    if case.mask:
        generator = torch.Generator().manual_seed(case.seed)
        wishes = torch.randint(-2, 3, probs.shape, generator=generator).to(torch.int8)
        mask = wishes if case.mask == "int8" else wishes > -1
        around = mask.new_full((mask.shape[0] + 1, mask.shape[1] + 2), poison(mask.dtype))
        found["mask"] = around[1:, 1:-1].copy_(mask) if case.seed % 2 else mask
    return found


def check_selection(ours: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Raise unless the same tokens are selected."""
    for name, mine, other in zip(("indices", "counts or cu_seqlens"), ours, wanted, strict=True):
        check_same(name, mine, other)


def state_of(value: Any) -> Any:
    """To tell whether it was changed."""
    return (value._version, bits(value).numpy().tobytes()) if isinstance(value, Tensor) else value


def check_differentiable(
    case: Case,
    function: Callable[..., Tensor],
    specified: Callable[..., Tensor],
    operands: list[Tensor],
    grad_output: Tensor,
    terms: tuple[int, ...],
    flushes: bool = True,
    gradients: list[Tensor] | None = None,
) -> Tensor:
    """The result and the gradients of every operand are right, and no operand is changed; the result."""
    before = [state_of(tensor) for tensor in (*operands, grad_output)]
    leaves = [tensor.detach().requires_grad_() for tensor in operands]
    output = function(*leaves)
    found = torch.autograd.grad(output, leaves, grad_output)
    plain = function(*operands)
    check_same("output without autograd", plain, output.detach())
    if before != [state_of(tensor) for tensor in (*operands, grad_output)]:
        raise WrongError("an operand was changed")
    for tensor, gradient in zip(operands, found, strict=True):
        if gradient.shape != tensor.shape or gradient.dtype != tensor.dtype:
            raise WrongError(f"gradient {tuple(gradient.shape)} {gradient.dtype} of an operand {tuple(tensor.shape)}")

    torch.set_num_threads(1)  # what follows is not under test
    flushes &= case.capability in ("amx", "avx512_bf16") and case.dtype == "bfloat16"
    prepare = flush if flushes else torch.Tensor.clone
    wanted = expected(
        specified, [prepare(tensor) for tensor in operands], prepare(grad_output), terms[: 1 + len(found)]
    )
    names = ("output", *(f"gradient of operand {i}" for i in range(len(found))))
    for name, result, right in zip(names, (plain, *found), wanted, strict=True):
        check(name, result, right, flushes)
    if case.transform == "backward twice":
        check_twice(case, function, specified, operands, grad_output)
    elif case.transform:
        others = transformed(case, function, operands, grad_output)
        for name, result, right in zip(names, others, wanted, strict=False):
            check(f"{name}, {case.transform}", result, right._replace(terms=CHUNK * right.terms))  # sums in any order
    if gradients is not None:
        gradients += found
    return plain


def check_twice(
    case: Case,
    function: Callable[..., Tensor],
    specified: Callable[..., Tensor],
    operands: list[Tensor],
    grad_output: Tensor,
) -> None:
    """The gradient of one operand is differentiated again, by the others and by the gradient that it was made of."""
    place = case.seed % len(operands)
    leaves = [tensor.detach().requires_grad_() for tensor in (*operands, grad_output)]
    cotangent = torch.randn(operands[place].shape, generator=torch.Generator().manual_seed(case.seed)).to(grad_output)

    def gradient(function: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        *given, grad_output = leaves
        return torch.autograd.grad(function(*given), given[place], grad_output, create_graph=True)[0]

    first = gradient(function, *leaves)
    found = torch.autograd.grad(first, leaves, cotangent, allow_unused=True) if first.requires_grad else [None]
    anything = CHUNK * (1 + math.prod(case.sizes))  # terms of sums of sums
    wanted = expected(
        lambda *leaves: gradient(specified, *leaves),
        [*operands, grad_output],
        cotangent,
        [anything] * (2 + len(operands)),
    )
    for i, (result, right) in enumerate(zip(found, wanted[1:], strict=False)):
        if result is None:
            result = torch.zeros_like(leaves[i])
        check(f"gradient of operand {i} in that of operand {place}", result, right)


def transformed(
    case: Case, function: Callable[..., Tensor], operands: list[Tensor], grad_output: Tensor
) -> Sequence[Tensor]:
    """The result and its gradients under a transform of torch.func, where formulas replace kernels."""
    if case.transform == "vjp":
        output, pull_back, *_ = torch.func.vjp(function, *operands)
        return output, *pull_back(grad_output)
    if case.kind == "importance" and case.capacity is None:  # of a size that depends on data
        return ()
    twice = torch.func.vmap(function)(*(torch.stack([tensor, tensor]) for tensor in operands))
    return (twice[1],)


def run(case: Case) -> None:
    """Raise unless all is right with it."""
    before = torch.get_num_threads(), mhmatmul_ext._C.cpu_capability()
    torch.set_num_threads(case.threads)
    mhmatmul_ext._C.set_cpu_capability(case.capability)
    try:
        KINDS[case.kind](case)
    finally:
        torch.set_num_threads(before[0])
        mhmatmul_ext._C.set_cpu_capability(before[1])


def fuzz(
    count: int, seed: int | None = None, kinds: tuple[str, ...] = tuple(KINDS), shrink: bool = True
) -> Counter[tuple[str, str]]:
    """Try so many cases, the same at every run unless a seed is given; how many of which kind there were."""
    counts: Counter[tuple[str, str]] = Counter()

    @hypothesis.settings(
        max_examples=count,
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])],
    )
    @hypothesis.given(cases(kinds, capabilities()))
    def try_one(case: Case) -> None:
        counts.update(case.tags())
        run(case)

    if seed is not None:
        try_one = hypothesis.seed(seed)(try_one)
    was_poisoned = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        try_one()
    finally:
        torch.use_deterministic_algorithms(was_poisoned)
    return counts


def rows(short: bool) -> list[Row]:
    """For `make trust`."""
    counts: Counter[tuple[str, str]] = Counter()
    try:
        counts = fuzz(500 if short else 20_000)
        found = "nothing"
    except Exception as error:
        found = " ".join(str(error).split())
    tried = sum(n for (group, _), n in counts.items() if group == "kind")
    return [Row("random calls against the specification", tried, "cases", found, found == "nothing")]


def table(counts: Counter[tuple[str, str]]) -> str:
    """A line for each group of kinds."""
    groups = dict.fromkeys(group for group, _ in counts)
    lines = []
    for group in groups:
        members = sorted(((n, name) for (of, name), n in counts.items() if of == group), reverse=True)
        lines.append(f"{group + ':':<14}" + ", ".join(f"{name} {n}" for n, name in members))
    return "\n".join(lines)


def main() -> int:
    """Try them, tell what was tried."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=2000, help="how many cases (%(default)s)")
    parser.add_argument("--seed", type=int, help="other cases than at the last run")
    parser.add_argument("--output", type=Path, metavar="JSON", help="where to write the counts")
    options = parser.parse_args()
    start = time.perf_counter()
    counts = fuzz(options.count, options.seed)
    seconds = time.perf_counter() - start
    tried = sum(n for (group, _), n in counts.items() if group == "kind")
    print(f"{tried} cases in {seconds:.0f} s, nothing found\n{table(counts)}")
    if options.output:
        record: dict[str, Any] = {"cases": tried, "found": 0, "seed": options.seed, "seconds": round(seconds)}
        record["torch"] = torch.__version__
        for (group, name), n in counts.items():
            record.setdefault(group, {})[name] = n
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
