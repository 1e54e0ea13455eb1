"""What PyTorch offers its own operators, ours have: one test for each operator and feature (composability.py).

The marks are printed as a table after the run; README shows the same one.
"""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
from composability import COLUMNS, ROWS, Make, Sizes, applies, differentiable, floating
from support import peak_memory
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from mhmatmul_ext import _load, matmul_with_importance, matmul_with_multi_head, select_important

ops = torch.ops.mhmatmul
assert_close = torch.testing.assert_close
CELLS = [(row, column) for row in ROWS for column in COLUMNS if column != "DTensor" and applies(column, row)]


@pytest.fixture(autouse=True)
def _no_loops():
    """Let torch.vmap fail where it would fall back to a loop; compile anew."""
    torch._dynamo.reset()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def leaves_of(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]


def of_leaves(row, arguments):
    """The operator as a function of its differentiable operands, giving what is differentiable of its results."""

    def function(*leaves):
        given = iter(leaves)
        filled = [next(given) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in arguments]
        results = floating(row(*filled))
        return results if len(results) > 1 else results[0]

    return function


def gradients(results, arguments):
    """Of the sum of all that is differentiable, by every operand."""
    recorded = differentiable(results)
    return torch.autograd.grad(sum(r.square().sum() for r in recorded), leaves_of(arguments)) if recorded else ()


class Names(TorchDispatchMode):
    """Counts the operators of this package that pass."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "mhmatmul":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def check_opcheck(row, device):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs of torch's own kernels as well
    for requires_grad in {False, not row.writes_out}:
        for is_strided, sizes in [(False, Sizes()), (True, Sizes()), (False, Sizes(b=0))]:
            make = Make(device, requires_grad=requires_grad, is_strided=is_strided)
            results = torch.library.opcheck(getattr(ops, row.op or row.name).default, row.make(make, sizes))
            assert set(results.values()) == {"SUCCESS"}


def check_reverse(row, device):
    arguments = row.make(Make(device, torch.float64, requires_grad=True))
    function, leaves = of_leaves(row, arguments), leaves_of(arguments)
    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=True)


def check_forward(row, device):
    arguments = row.make(Make(device, torch.float64, requires_grad=True))
    function, leaves = of_leaves(row, arguments), leaves_of(arguments)
    forward = {"check_forward_ad": True, "check_backward_ad": False, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, leaves, **forward)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True)


def check_func(row, device):
    arguments = row.make(Make(device, torch.float64, requires_grad=True, scores_fill=0.5), Sizes(1, 2, 2, 2, 2))
    function, leaves = of_leaves(row, arguments), tuple(leaves_of(arguments))
    operands = tuple(range(len(leaves)))

    def total(*leaves):
        results = function(*leaves)
        return sum(r.square().sum() for r in (results if isinstance(results, tuple) else (results,)))

    kernels = torch.autograd.functional  # through the operators' own backward
    assert_close(torch.func.grad(total, operands)(*leaves), torch.autograd.grad(total(*leaves), leaves))
    jacobian = kernels.jacobian(function, leaves)
    assert_close(torch.func.jacrev(function, operands)(*leaves), jacobian)
    assert_close(torch.func.jacfwd(function, operands)(*leaves), jacobian)
    assert_close(torch.func.hessian(total, operands)(*leaves), kernels.hessian(total, leaves))


def check_vmap(row, device):
    calls = [row.make(Make(device, torch.float64)) for _ in range(3)]
    tensors = [i for i, argument in enumerate(calls[0]) if isinstance(argument, torch.Tensor)]
    if row.is_ragged:  # the calls have to keep the same tokens: input and weight alone may differ
        tensors = tensors[:2]
    for batched in [*([i] for i in tensors), tensors]:
        stacked = [
            torch.stack([call[i] for call in calls], dim=-1) if i in batched else a for i, a in enumerate(calls[0])
        ]
        in_dims = tuple(-1 if i in batched else None for i in range(len(stacked)))
        expected = [row(*(call[i] if i in batched else calls[0][i] for i in range(len(call)))) for call in calls]
        got = torch.vmap(row, in_dims)(*stacked)
        nested = torch.vmap(torch.vmap(row, in_dims), tuple(0 if i in batched else None for i in range(len(stacked))))(
            *(a.unsqueeze(0) if i in batched else a for i, a in enumerate(stacked))
        )
        for ours, ours_nested, *theirs in zip(*map(tree_leaves, (got, nested, *expected)), strict=True):
            assert_close(ours, torch.stack(theirs))
            assert_close(ours_nested, torch.stack(theirs).unsqueeze(0))
    for outer, inner in itertools.permutations(tensors, 2):
        given = [torch.stack([call[i] for call in calls]) if i in (outer, inner) else a for i, a in enumerate(calls[0])]
        over_outer, over_inner = (tuple(0 if i == n else None for i in range(len(given))) for n in (outer, inner))
        got = tree_leaves(torch.vmap(torch.vmap(row, over_inner), over_outer)(*given))
        for a, b in itertools.product(range(len(calls)), repeat=2):
            mixed = [calls[{outer: a, inner: b}.get(i, 0)][i] for i in range(len(given))]
            for ours, theirs in zip(got, tree_leaves(row(*mixed)), strict=True):
                assert_close(ours[a, b], theirs)


def check_checkpoint(row, device):
    arguments = row.make(Make(device, requires_grad=True))
    with Names() as forward:
        row(*arguments)
    overloads = [getattr(ops, name).default for name in forward.counts]
    must_save = functools.partial(create_selective_checkpoint_contexts, overloads)
    calls = {
        "none": row,
        "whole": functools.partial(checkpoint, row, use_reentrant=False),
        "selective": functools.partial(checkpoint, row, use_reentrant=False, context_fn=must_save),
    }
    found, counts = {}, {}
    for name, call in calls.items():
        with Names() as names:
            found[name] = gradients(call(*arguments), arguments)
        counts[name] = names.counts
    assert_close(found["whole"], found["none"], rtol=0, atol=0)
    assert_close(found["selective"], found["none"], rtol=0, atol=0)
    assert counts["whole"] == counts["none"] + forward.counts
    assert counts["selective"] == counts["none"], "what was to be saved was computed again"


def check_compile(row, device):
    """One graph for some, none and all kept tokens, with static and dynamic sizes, forward and backward."""
    for dynamic in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(row, fullgraph=True, dynamic=dynamic, backend=counter)
        frames, operand_sizes = [], set()
        for fill in (None, 0.0, 1.0):
            arguments = row.make(Make(device, requires_grad=row.is_differentiable, scores_fill=fill))
            expected, got = row(*arguments), compiled(*arguments)
            assert_close(got, expected)
            assert_close(gradients(got, arguments), gradients(expected, arguments))
            frames.append(counter.frame_count)
            operand_sizes.add(tuple(a.shape for a in arguments if isinstance(a, torch.Tensor)))
        if len(operand_sizes) == 1:  # not where grad_output has the size of what was kept
            assert frames[0] == frames[-1], "recompiled for another number of kept tokens"


def check_compiled_autograd(row, device):
    arguments = row.make(Make(device, requires_grad=True))
    expected = gradients(row(*arguments), arguments)
    results = row(*arguments)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        found = gradients(results, arguments)
    assert_close(found, expected)


class Module(torch.nn.Module):
    """An operator, or several one after the other, as a module."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = rows

    def forward(self, arguments):
        return [row(*a) for row, a in zip(self.rows, arguments, strict=True)]


def dynamic_sizes(arguments):
    """Every size of every tensor free, as far as the operators leave it so."""
    sizes = ((a.dim() if isinstance(a, torch.Tensor) else 0) for a in arguments)
    return tuple(dict.fromkeys(range(n), torch.export.Dim.AUTO) if n else None for n in sizes)


def of_other_sizes(row, device):
    """Operands of a program exported for the usual ones, where their number of rows is no part of it."""
    usual, other = (row.make(Make(device), sizes) for sizes in (Sizes(), Sizes(b=4, s=5)))
    numbers = [[a for a in arguments if isinstance(a, int)] for arguments in (usual, other)]
    return other if numbers[0] == numbers[1] else usual


def check_export(row, device, tmp_path):
    arguments = row.make(Make(device))
    dynamic = dynamic_sizes(arguments)
    for strict in (False, True):
        program = torch.export.export(Module(row), ([arguments],), dynamic_shapes=([dynamic],), strict=strict)
        torch.export.save(program, tmp_path / "program.pt2")
        for exported in (program.run_decompositions({}), torch.export.load(tmp_path / "program.pt2")):
            assert "mhmatmul." in str(exported.graph)
            for call in (arguments, of_other_sizes(row, device)):
                assert_close(exported.module()([call]), Module(row)([call]))


def check_autocast(row, device):
    arguments = row.make(Make(device))
    compiled = torch.compile(row, fullgraph=True, backend="aot_eager")
    without = floating(row(*arguments))
    # torch 2.11's on-disk cache of compiled graphs does not tell one autocast dtype from another
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    for region in (torch.bfloat16, torch.float16):
        with uncached, torch.autocast(device, dtype=region):
            expected, got = row(*arguments), compiled(*arguments)
        assert_close(got, expected, rtol=0, atol=0)
        for result in floating(expected)[:1]:
            assert result.dtype == (region if row.is_cast else without[0].dtype)


def check_meta(row, device):
    """Shapes, strides and dtypes of fake tensors, and of meta tensors where no size depends on data, are the real."""
    for is_strided in (False, True):
        arguments = row.make(Make(device, is_strided=is_strided))
        real = tree_leaves(row(*arguments))
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            from_tensor = functools.partial(mode.from_tensor, static_shapes=True)
            fakes = [tree_leaves(row(*tree_map_only(torch.Tensor, from_tensor, arguments)))]
        if not row.is_ragged:
            fakes.append(tree_leaves(row(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments))))
        for fake in fakes:
            for got, expected in zip(fake, real, strict=True):
                assert (got.dtype, got.dim(), got.stride()) == (expected.dtype, expected.dim(), expected.stride())
                for size, true_size in zip(got.shape, expected.shape, strict=True):
                    assert size == true_size if isinstance(size, int) else row.is_ragged


def check_flop(row, device):
    z = Sizes()
    arguments = row.make(Make(device, requires_grad=row.is_differentiable))
    with FlopCounterMode(display=False) as forward:
        results = row(*arguments)
    with FlopCounterMode(display=False) as backward:
        gradients(results, arguments)
    if row.is_ragged:
        rows = results[0].shape[0]
    elif "capacity" in row.name:
        rows = z.b * 2
    else:
        rows = z.t if "gather" in row.name else z.m
    assert rows > 0
    product = 2 * rows * z.h * z.e
    assert (forward.get_total_flops(), backward.get_total_flops()) == tuple(n * product for n in row.products)


def check_names(row, device):
    """Dispatch modes and the profiler see the operators by name."""
    arguments = row.make(Make(device))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with Names() as names, torch.profiler.profile(activities=activities) as profile:
        row(*arguments)
    assert set(names.counts) == set(row.leaves)
    assert {f"mhmatmul::{leaf}" for leaf in row.leaves} <= {event.key for event in profile.key_averages()}


@pytest.fixture(scope="session")
def aotinductor(tmp_path_factory):
    """What a package of all operators gave in a process that has their library alone, operator by operator."""

    @functools.cache
    def results(device):
        folder = tmp_path_factory.mktemp(f"aoti-{device}")
        arguments = [row.make(Make(device)) for row in ROWS]
        dynamic = [dynamic_sizes(a) for a in arguments]
        with torch.no_grad():
            program = torch.export.export(Module(*ROWS), (arguments,), dynamic_shapes=(dynamic,))
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "all.pt2"))
        arguments = [of_other_sizes(row, device) for row in ROWS]
        torch.save(arguments, folder / "arguments.pt")
        script = (
            f"import sys, torch\ntorch.ops.load_library({str(_load.LIBRARY)!r})\n"
            f"torch.save(torch._inductor.aoti_load_package({package!r})(torch.load('arguments.pt')), 'results.pt')\n"
            f"assert 'mhmatmul_ext' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {
            row.name: (got, row(*a))
            for row, a, got in zip(ROWS, arguments, torch.load(folder / "results.pt"), strict=True)
        }

    return results


def check_aoti(row, device, aotinductor):
    got, expected = aotinductor(device)[row.name]
    assert_close(tree_leaves(got), tree_leaves(expected))


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


@pytest.mark.parametrize(("row", "column"), CELLS, ids=[f"{row.name}-{column}" for row, column in CELLS])
def test_cell(row, column, device, request, tmp_path, record_property):
    record_property("composability", (row.name, column))
    check = CHECKS[column.lower().replace(" ", "_")]
    extra = {"tmp_path": tmp_path} if column == "export" else {}
    if column == "AOTI":
        extra["aotinductor"] = request.getfixturevalue("aotinductor")
    check(row, device, **extra)


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize(("vary_top_k", "graphs"), [(False, 1), (True, 2)])
def test_thresholds_recompile_nothing(vary_top_k, graphs, capacity, device):
    """One graph for all values of a 0-d tensor top_p; a second, with a symbol, once top_k changes."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(input, weight, probs, top_p, top_k):
        return matmul_with_importance(input, weight, probs, None, 2, top_p, top_k, capacity=capacity)[0]

    compiled = torch.compile(function, fullgraph=True, backend=counter)

    input, weight, probs = (torch.rand(size, device=device) for size in [(2, 30, 8), (8, 3), (2, 30)])
    for i in range(20):
        operands = input, weight, probs, torch.tensor(i / 20, device=device), i + 2 if vary_top_k else 9
        assert_close(compiled(*operands), function(*operands))
    assert counter.frame_count == graphs


COPIED = {
    "multi head": lambda x, w, p, t: matmul_with_multi_head(x, w, 2),
    "bias": lambda x, w, p, t: matmul_with_multi_head(x, w, 2, bias=w.detach()[:2]),
    "importance": lambda x, w, p, t: matmul_with_importance(x, w, p, None, 2, t)[0],
    "importance, capacity": lambda x, w, p, t: matmul_with_importance(x, w, p, None, 2, t, capacity=3)[0],
}


@pytest.mark.parametrize("name", COPIED)
def test_inductor_adds_no_copy(name, device):
    """Operands and results pass as they are, strided ones too: around the operators no kernel is generated."""
    projection, packed = torch.randn(2, 5, 24, device=device), torch.randn(3, 8, device=device)
    input, weight = projection[..., 8:16].requires_grad_(), packed.t().requires_grad_()
    probs, threshold = torch.rand(2, 5, device=device), torch.tensor(0.4, device=device)
    compiled = torch.compile(COPIED[name], fullgraph=True)

    def forward_and_backward():
        output = compiled(input, weight, probs, threshold)
        return output, torch.autograd.grad(output, (input, weight), torch.ones_like(output))

    _, codes = run_and_get_code(forward_and_backward)
    assert len(codes) == 2
    assert all("torch.ops.mhmatmul." in code for code in codes)
    for copy in ("async_compile.cpp", "async_compile.triton", ".copy_(", "clone"):
        assert not any(copy in code for code in codes), copy


LINEAR = [
    (row, i)
    for row in ROWS
    if row.is_differentiable
    for i in range(len(leaves_of(row.make(Make("cpu", requires_grad=True)))))
]


@pytest.mark.parametrize(("row", "place"), LINEAR, ids=[f"{row.name}-{i}" for row, i in LINEAR])
def test_nothing_is_saved_that_no_gradient_needs(row, place, device):
    """The operators are linear in each operand: a gradient asked for alone reads the others, not its own operand."""
    arguments = row.make(Make(device, requires_grad=True))
    alone = leaves_of(arguments)[place]
    for leaf in leaves_of(arguments):
        leaf.requires_grad_(leaf is alone)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        results = row(*arguments)
    assert alone.data_ptr() not in saved
    assert torch.autograd.grad(sum(r.sum() for r in differentiable(results)), alone)[0].shape == alone.shape


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("gathered", [False, True])
def test_backward_allocates_only_the_gradients_asked_for(needs, gathered, device):
    input, weight = torch.randn(1024, 2, 64, device=device), torch.randn(2, 64, 128, device=device)
    indices = torch.arange(1024, device=device)
    leaves = [t.requires_grad_() for t, need in zip((input, weight), needs, strict=True) if need]
    call = (lambda x, w: ops._gather_distinct_head_matmul(x, w, indices)) if gathered else ops.head_matmul
    call(input, weight).sum().backward()  # what a first call sets up
    output = call(input, weight)
    gradient = torch.randn_like(output)
    used = peak_memory(device, lambda: torch.autograd.grad(output, leaves, gradient))
    asked_for = sum(leaf.nbytes for leaf in leaves)
    assert asked_for <= used
    if not (gathered and device == "cuda"):  # where rows may be gathered into a buffer first
        assert used <= asked_for + 32 * 1024, "more than the gradients and a few small buffers"


BY_INDEX = {"gather", "importance", "combine"}
DENSE = [row for row in ROWS if row.is_differentiable and not BY_INDEX & set(row.name.split("_"))]


@pytest.mark.parametrize("row", DENSE, ids=[row.name for row in DENSE])
def test_batched_gradients_without_a_loop(row, device):
    """is_grads_batched goes through a vmap of its own, older than torch.func's, with rules of its own."""
    arguments = row.make(Make(device, torch.float64, requires_grad=True))
    results, leaves = differentiable(row(*arguments)), leaves_of(arguments)
    batches = [torch.randn(3, *result.shape, dtype=result.dtype, device=device) for result in results]
    torch._C._debug_only_display_vmap_fallback_warnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batched = torch.autograd.grad(results, leaves, batches, is_grads_batched=True, retain_graph=True)
    finally:
        torch._C._debug_only_display_vmap_fallback_warnings(False)
    for i in range(3):
        single = torch.autograd.grad(results, leaves, [batch[i] for batch in batches], retain_graph=True)
        assert_close([gradient[i] for gradient in batched], list(single))


def test_vmap_refuses_what_it_cannot_hold(device):
    input, weight, probs = (torch.rand(size, device=device) for size in [(3, 2, 5, 8), (8, 3), (3, 2, 5)])
    for top_p in (0.5, torch.tensor(0.5, device=device)):
        with pytest.raises(RuntimeError, match=r"^select_important: the number of kept tokens .* give capacity="):
            torch.vmap(lambda x, p, top_p=top_p: matmul_with_importance(x, weight, p, None, 2, top_p))(input, probs)
    out = torch.zeros(3, 2, 5, 2, 3, device=device)
    with pytest.raises(RuntimeError, match=r"^matmul_with_multi_head: out= is not supported under torch\.func"):
        torch.vmap(lambda x, o: matmul_with_multi_head(x, weight, 2, out=o))(input, out)
    assert (out == 0).all()


def test_vmap_of_the_static_selection_is_exact(device):
    """One threshold for each call, scores that only just reach it, NaN and infinities, as one call after the other."""
    probs = torch.tensor([0.5, math.nan, -0.0, math.inf, 0.25, -math.inf], device=device).repeat(4, 3, 1)
    thresholds = torch.tensor([0.5, 0.0, math.nextafter(0.5, 1), 1.0], dtype=torch.float64, device=device)
    batched = torch.vmap(lambda p, t: select_important(p, t, 3, capacity=4))(probs, thresholds)
    for i, threshold in enumerate(thresholds):
        for got, expected in zip(batched, select_important(probs[i], threshold, 3, capacity=4), strict=True):
            assert torch.equal(got[i], expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8])
def test_vmap_of_masked_selections_is_exact(dtype, device):
    """Over the mask, the scores, and both."""
    probs = torch.rand(4, 2, 6, device=device)
    mask = torch.randint(-1, 2, (4, 2, 6), device=device).to(dtype)
    for dims in [(0, 0), (0, None), (None, 0)]:
        given = [a if dim == 0 else a[0] for a, dim in zip((probs, mask), dims, strict=True)]
        batched = torch.vmap(lambda p, m: select_important(p, 0.4, 3, capacity=4, mask=m), dims)(*given)
        for i in range(4):
            p, m = (a[i] if dim == 0 else a for a, dim in zip(given, dims, strict=True))
            for got, expected in zip(batched, select_important(p, 0.4, 3, capacity=4, mask=m), strict=True):
                assert torch.equal(got[i], expected)
