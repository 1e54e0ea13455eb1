"""Every refusal: the right type and the whole text, the same for real, fake and meta tensors, and no trace left."""

from __future__ import annotations

import random
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import mhmatmul_ext
from mhmatmul_ext import combine, matmul_with_importance, matmul_with_multi_head, select_important

if TYPE_CHECKING:
    from collections.abc import Callable

ops = torch.ops.mhmatmul
ELSEWHERE = torch.device("meta")


@dataclass
class Refusal:
    function: Callable[..., Any]
    arguments: dict[str, Any]
    error: type[Exception]
    text: str

    def __str__(self) -> str:
        return self.text


def zeros(*size, dtype=torch.float32, device="cpu"):
    return torch.zeros(size, dtype=dtype, device=device)


def multi_head(error, text, **changes):
    arguments = {"input": zeros(2, 5, 4), "weight": zeros(4, 3), "num_heads": 2} | changes
    return Refusal(matmul_with_multi_head, arguments, error, f"matmul_with_multi_head: {text}")


def importance(error, text, **changes):
    arguments = {
        "input": zeros(2, 5, 4),
        "weight": zeros(4, 3),
        "probs": zeros(2, 5),
        "num_heads": 2,
    } | changes
    return Refusal(matmul_with_importance, arguments, error, f"matmul_with_importance: {text}")


def select(error, text, **changes):
    return Refusal(select_important, {"probs": zeros(2, 5)} | changes, error, f"select_important: {text}")


def head(error, text, **changes):
    arguments = {"input": zeros(6, 2, 4), "weight": zeros(2, 4, 3)} | changes
    return Refusal(ops.head_matmul, arguments, error, f"head_matmul: {text}")


def gather(error, text, **changes):
    arguments = {
        "input": zeros(6, 2, 4),
        "weight": zeros(2, 4, 3),
        "indices": zeros(7, dtype=torch.int64),
    } | changes
    return Refusal(ops.gather_head_matmul, arguments, error, f"gather_head_matmul: {text}")


def combining(error, text, **changes):
    arguments = {
        "base": zeros(2, 5, 4),
        "updates": zeros(7, 4),
        "indices": zeros(7, dtype=torch.int64),
        "gates": zeros(7),
    } | changes
    return Refusal(combine, arguments, error, f"combine: {text}")


def backward(op, error, text, **arguments):
    return Refusal(getattr(ops, op), arguments, error, f"{op}: {text}")


I64, HALF = torch.int64, torch.float16
FLOATS = "float32, float16, bfloat16 or float64"
REFUSALS = [
    # types
    multi_head(TypeError, "input must be a Tensor, got list", input=[1.0]),
    multi_head(TypeError, "weight must be a Tensor, got None", weight=None),
    multi_head(TypeError, "bias must be a Tensor or None, got float", bias=1.0),
    multi_head(TypeError, "out must be a Tensor or None, got str", out="out"),
    multi_head(TypeError, "num_heads must be an int, got float", num_heads=2.0),
    multi_head(TypeError, "num_heads must be an int, got bool", num_heads=True),
    importance(TypeError, "probs must be a Tensor, got None", probs=None),
    importance(TypeError, "grad_output must be a Tensor or None, got int", grad_output=1),
    importance(TypeError, "top_k must be an int or None, got float", top_k=2.0),
    importance(TypeError, "capacity must be an int or None, got str", capacity="2"),
    importance(TypeError, "top_p must be a number or a 0-d Tensor, got None", top_p=None),
    select(TypeError, "top_p must be a number or a 0-d Tensor, got str", top_p="0.5"),
    select(TypeError, "probs must be a Tensor, got tuple", probs=(0.5,)),
    combining(TypeError, "base must be a Tensor, got None", base=None),
    combining(TypeError, "indices must be a Tensor, got list", indices=[0]),
    combining(TypeError, "gates must be a Tensor or None, got float", gates=1.0),
    select(TypeError, "mask must be a Tensor or None, got list", mask=[True]),
    # dtypes
    select(TypeError, "mask must be bool or int8, got float32", mask=zeros(2, 5)),
    importance(TypeError, f"probs must be {FLOATS}, got int64", probs=zeros(2, 5, dtype=I64),
               mask=zeros(2, 5, dtype=torch.bool)),
    combining(TypeError, f"base must be {FLOATS}, got int64", base=zeros(2, 5, 4, dtype=I64)),
    combining(TypeError, "updates must be float32 as base is, got float16", updates=zeros(7, 4, dtype=HALF)),
    combining(TypeError, "gates must be float32 as base is, got float16", gates=zeros(7, dtype=HALF)),
    combining(TypeError, "indices must be int64, got int32", indices=zeros(7, dtype=torch.int32)),
    multi_head(TypeError, f"input must be {FLOATS}, got int64", input=zeros(2, 5, 4, dtype=I64)),
    multi_head(TypeError, f"input must be {FLOATS}, got complex64", input=zeros(2, 5, 4, dtype=torch.complex64)),
    multi_head(TypeError, "weight must be float32 as input is, got float16", weight=zeros(4, 3, dtype=HALF)),
    multi_head(TypeError, "bias must be float32 as input is, got float64", bias=zeros(2, 3, dtype=torch.float64)),
    multi_head(TypeError, "out must be float32 as input is, got bfloat16", out=zeros(2, 5, 2, 3, dtype=torch.bfloat16)),
    importance(TypeError, f"probs must be {FLOATS}, got bool", probs=zeros(2, 5, dtype=torch.bool)),
    importance(TypeError, "weight must be float32 as input is, got float16", weight=zeros(4, 3, dtype=HALF)),
    importance(TypeError, "grad_output must be float32 as input is, got float16",
               grad_output=zeros(0, 2, 3, dtype=HALF)),
    select(TypeError, f"probs must be {FLOATS}, got int64", probs=zeros(2, 5, dtype=I64)),
    select(TypeError, f"top_p must be {FLOATS}, got int64", top_p=torch.tensor(1)),
    gather(TypeError, "indices must be int64, got int32", indices=zeros(7, dtype=torch.int32)),
    # shapes
    multi_head(ValueError, "input must be [..., h], got []", input=zeros()),
    multi_head(ValueError, "weight must be [h, e] = [4, e], got [5, 3]", weight=zeros(5, 3)),
    multi_head(ValueError, "weight must be [h, e] = [4, e], got [4]", weight=zeros(4)),
    multi_head(ValueError, "weight must be [h, e] = [4, e], got [2, 2, 3]", weight=zeros(2, 2, 3)),
    multi_head(ValueError, "bias must be [nh, e] = [2, 3], got [3]", bias=zeros(3)),
    multi_head(ValueError, "bias must be [nh, e] = [2, 3], got [3, 2]", bias=zeros(3, 2)),
    multi_head(ValueError, "out must be [..., nh, e] = [2, 5, 2, 3], got [10, 2, 3]", out=zeros(10, 2, 3)),
    multi_head(ValueError, "out must be [..., nh, e] = [2, 5, 2, 3], got [2, 5, 3, 2]", out=zeros(2, 5, 3, 2)),
    multi_head(ValueError, "out must have stride 1 in its last dimension, got 2", out=zeros(2, 5, 2, 6)[..., ::2]),
    importance(ValueError, "input must be [b, s, h], got [10, 4]", input=zeros(10, 4)),
    importance(ValueError, "probs must be [b, s] = [2, 5], got [2, 6]", probs=zeros(2, 6)),
    importance(ValueError, "probs must be [b, s] = [2, 5], got [10]", probs=zeros(10)),
    importance(ValueError, "weight must be [h, e] = [4, e], got [3, 4]", weight=zeros(3, 4)),
    importance(ValueError, "grad_output must be [t, nh, e] = [t, 2, 3], got [4, 3]", grad_output=zeros(4, 3)),
    importance(ValueError, "grad_output must be [t, nh, e] = [t, 2, 3], got [0, 2, 4]", grad_output=zeros(0, 2, 4)),
    importance(ValueError, "grad_output must be [b, c, nh, e] = [2, 3, 2, 3], got [2, 2, 2, 3]",
               grad_output=zeros(2, 2, 2, 3), capacity=3),
    select(ValueError, "probs must be [b, s], got [5]", probs=zeros(5)),
    select(ValueError, "top_p must be a number or a 0-d tensor, got a tensor [1]", top_p=zeros(1)),
    head(ValueError, "input must be [..., nh, hd], got [4]", input=zeros(4)),
    head(ValueError, "weight must be [nh, hd, e] = [2, 4, e], got [2, 5, 3]", weight=zeros(2, 5, 3)),
    head(ValueError, "bias must be [nh, e] = [2, 3], got [2, 4]", bias=zeros(2, 4)),
    gather(ValueError, "input must be [m, nh, hd], got [1, 6, 2, 4]", input=zeros(1, 6, 2, 4)),
    gather(ValueError, "indices must be [t], got [7, 1]", indices=zeros(7, 1, dtype=I64)),
    backward("_head_matmul_wgrad", ValueError, "input must be [..., nh, hd] = [6, 2, hd], got [5, 2, 4]",
             grad_output=zeros(6, 2, 3), input=zeros(5, 2, 4)),
    backward("_head_matmul_backward", ValueError, "weight must be [nh, hd, e] = [2, 4, 3], got [2, 4, 5]",
             grad_output=zeros(6, 2, 3), input=zeros(6, 2, 4), weight=zeros(2, 4, 5)),
    backward("_gather_head_matmul_dgrad", ValueError, "m must be >= 0, got -1",
             grad_output=zeros(7, 2, 3), weight=zeros(2, 4, 3), indices=zeros(7, dtype=I64), m=-1),
    backward("_gather_head_matmul_wgrad", ValueError, "grad_output must be [t, nh, e] = [7, nh, e], got [6, 2, 3]",
             grad_output=zeros(6, 2, 3), input=zeros(6, 2, 4), indices=zeros(7, dtype=I64)),
    backward("_gather_head_matmul_backward", ValueError, "input must be [m, nh, hd] = [m, 2, hd], got [6, 3, 4]",
             grad_output=zeros(7, 2, 3), input=zeros(6, 3, 4), weight=zeros(2, 4, 3), indices=zeros(7, dtype=I64)),
    combining(ValueError, "base must be [b, s, d] or [m, d], got [4]", base=zeros(4)),
    combining(ValueError, "base must be [b, s, d] or [m, d], got [1, 2, 5, 4]", base=zeros(1, 2, 5, 4)),
    combining(ValueError, "indices must be [t], got [7, 1]", indices=zeros(7, 1, dtype=I64)),
    combining(ValueError, "updates must be [t, d] = [7, 4], got [6, 4]", updates=zeros(6, 4)),
    combining(ValueError, "updates must be [t, d] = [7, 4], got [7, 1, 4]", updates=zeros(7, 1, 4)),
    combining(ValueError, "gates must be [t] = [7], got [7, 1]", gates=zeros(7, 1)),
    backward("_combine_updates_grad", ValueError, "grad_output must be [b, s, d] or [m, d], got [4]",
             grad_output=zeros(4), indices=zeros(7, dtype=I64), gates=None),
    backward("_combine_gates_grad", ValueError, "updates must be [t, d] = [7, 4], got [7, 3]",
             grad_output=zeros(5, 4), updates=zeros(7, 3), indices=zeros(7, dtype=I64)),
    select(ValueError, "mask must be [b, s] = [2, 5], got [5]", mask=zeros(5, dtype=torch.bool)),
    importance(ValueError, "mask must be [b, s] = [2, 5], got [2, 6]", mask=zeros(2, 6, dtype=torch.int8)),
    importance(ValueError, "top_k must be in [1, s] = [1, 5], got 6", top_k=6, mask=zeros(2, 5, dtype=torch.int8)),
    # values
    multi_head(ValueError, "num_heads must be >= 1 and divide h = 4, got 3", num_heads=3),
    multi_head(ValueError, "num_heads must be >= 1 and divide h = 4, got 0", num_heads=0),
    multi_head(ValueError, "num_heads must be >= 1 and divide h = 4, got -2", num_heads=-2),
    importance(ValueError, "num_heads must be >= 1 and divide h = 4, got 3", num_heads=3),
    importance(ValueError, "top_p must be in [0, 1], got 1.5", top_p=1.5),
    importance(ValueError, "top_p must be in [0, 1], got nan", top_p=float("nan")),
    importance(ValueError, "top_p must be in [0, 1], got -0.5", top_p=-0.5, capacity=2),
    importance(ValueError, "top_p must be in [0, 1], got 2", top_p=2, grad_output=zeros(0, 2, 3)),
    importance(ValueError, "top_k must be in [1, s] = [1, 5], got 0", top_k=0),
    importance(ValueError, "top_k must be in [1, s] = [1, 5], got 6", top_k=6, top_p=torch.tensor(0.5)),
    importance(ValueError, "capacity must be >= 0, got -1", capacity=-1),
    select(ValueError, "top_p must be in [0, 1], got -0.1", top_p=-0.1),
    select(ValueError, "top_p must be in [0, 1], got 1.5", top_p=1.5, capacity=1),
    select(ValueError, "top_k must be in [1, s] = [1, 5], got 6", top_k=6),
    select(ValueError, "top_k must be in [1, s] = [1, 0], got 1", top_k=1, probs=zeros(2, 0)),
    select(ValueError, "capacity must be >= 0, got -3", capacity=-3),
    # devices
    multi_head(RuntimeError, "weight must be on cpu as input is, got meta", weight=zeros(4, 3, device=ELSEWHERE)),
    multi_head(RuntimeError, "bias must be on cpu as input is, got meta", bias=zeros(2, 3, device=ELSEWHERE)),
    multi_head(RuntimeError, "out must be on cpu as input is, got meta", out=zeros(2, 5, 2, 3, device=ELSEWHERE)),
    importance(RuntimeError, "probs must be on cpu as input is, got meta", probs=zeros(2, 5, device=ELSEWHERE)),
    importance(RuntimeError, "grad_output must be on cpu as input is, got meta",
               grad_output=zeros(0, 2, 3, device=ELSEWHERE)),
    head(RuntimeError, "weight must be on cpu as input is, got meta", weight=zeros(2, 4, 3, device=ELSEWHERE)),
    gather(RuntimeError, "indices must be on cpu as input is, got meta", indices=zeros(7, dtype=I64, device=ELSEWHERE)),
    combining(RuntimeError, "updates must be on cpu as base is, got meta", updates=zeros(7, 4, device=ELSEWHERE)),
    combining(RuntimeError, "gates must be on cpu as base is, got meta", gates=zeros(7, device=ELSEWHERE)),
    combining(RuntimeError, "indices must be on cpu as base is, got meta",
              indices=zeros(7, dtype=I64, device=ELSEWHERE)),
    select(RuntimeError, "mask must be on cpu as probs is, got meta",
           mask=zeros(2, 5, dtype=torch.bool, device=ELSEWHERE)),
    select(RuntimeError, "top_p must be on cpu or cpu as probs is, got meta",
           top_p=torch.zeros((), device=ELSEWHERE)),
]  # fmt: skip


# Python's own integers are longer than an operator's; a compiler is told by the schema, in PyTorch's words.
REFUSALS_OF_LENGTH = [
    multi_head(ValueError, f"num_heads must fit in 64 bits, got {2**63}", num_heads=2**63),
    importance(ValueError, f"top_k must fit in 64 bits, got {-(2**70)}", top_k=-(2**70)),
    select(ValueError, f"capacity must fit in 64 bits, got {2**64}", capacity=2**64),
    select(ValueError, f"top_p must be in [0, 1], got {10**400}", top_p=10**400),
    select(ValueError, f"top_p must be in [0, 1], got {-(2**63) - 1}", top_p=-(2**63) - 1, capacity=2),
]


def indices(*values):
    return torch.tensor(values)


# Known only from the data, so neither to a tracer nor to a kernel that runs on another device.
REFUSALS_OF_DATA = [
    importance(ValueError, "grad_output must be [t, nh, e] = [10, 2, 3], got [9, 2, 3]",
               grad_output=zeros(9, 2, 3), top_p=0.0),
    gather(IndexError, "indices must be in [-1, m) = [-1, 6), got -2 at position 0", indices=indices(-2, 0)),
    gather(IndexError, "indices must be in [-1, m) = [-1, 6), got 6 at position 1", indices=indices(0, 6, 7)),
    gather(IndexError, "indices must be in [-1, m) = [-1, 0), got 0 at position 0", input=zeros(0, 2, 4),
           indices=indices(0)),
    backward("_gather_head_matmul_dgrad", IndexError, "indices must be in [-1, m) = [-1, 4), got 4 at position 0",
             grad_output=zeros(1, 2, 3), weight=zeros(2, 4, 3), indices=indices(4), m=4),
    backward("_gather_head_matmul_wgrad", IndexError, "indices must be in [-1, m) = [-1, 6), got -9 at position 0",
             grad_output=zeros(1, 2, 3), input=zeros(6, 2, 4), indices=indices(-9)),
    backward("_gather_head_matmul_backward", IndexError, "indices must be in [-1, m) = [-1, 6), got 6 at position 0",
             grad_output=zeros(1, 2, 3), input=zeros(6, 2, 4), weight=zeros(2, 4, 3), indices=indices(6)),
    combining(IndexError, "indices must be in [-1, m) = [-1, 10), got 10 at position 6",
              indices=indices(0, 1, 2, 3, 4, -1, 10)),
    backward("_combine_updates_grad", IndexError, "indices must be in [-1, m) = [-1, 5), got 5 at position 0",
             grad_output=zeros(5, 4), indices=indices(5), gates=None),
    backward("_combine_gates_grad", IndexError, "indices must be in [-1, m) = [-1, 5), got -2 at position 0",
             grad_output=zeros(5, 4), updates=zeros(1, 4), indices=indices(-2)),
]  # fmt: skip


def global_state():
    """What a call could leave changed beside its arguments."""
    return {
        "torch's random numbers": torch.get_rng_state().tolist(),
        "Python's": random.getstate(),
        "numpy's": str(np.random.get_state()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "transforms": torch._C._are_functorch_transforms_active(),
        "dispatch": (str(torch._C._dispatch_tls_local_include_set()), str(torch._C._dispatch_tls_local_exclude_set())),
        "subnormal numbers": (torch.tensor(1e-40) * 1).item(),
        "instructions": mhmatmul_ext._C.cpu_capability(),
    }


@contextmanager
def no_trace_left(arguments):
    """Arguments and all that is global are as before."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    before = [(tensor._version, tensor.grad, tensor.clone()) for tensor in tensors]
    state = global_state()
    yield
    for tensor, (version, grad, value) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert tensor.grad is grad
        assert tensor.is_meta or torch.equal(tensor, value)
    assert global_state() == state


def assert_refused(refusal, arguments):
    with pytest.raises(refusal.error, match=f"^{re.escape(refusal.text)}") as caught:
        refusal.function(**arguments)
    assert type(caught.value) is refusal.error
    assert str(caught.value).split("\n")[0] == refusal.text


@pytest.mark.parametrize("refusal", [*REFUSALS, *REFUSALS_OF_DATA, *REFUSALS_OF_LENGTH], ids=lambda r: str(r)[:150])
def test_refused_on_cpu_and_no_trace_left(refusal):
    with no_trace_left(refusal.arguments):
        assert_refused(refusal, refusal.arguments)


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_refused_under_compile_and_no_trace_left(refusal):
    """The compiler tells in an error of its own, as of PyTorch's operators, which one it met while tracing."""
    torch._dynamo.reset()
    with no_trace_left(refusal.arguments), pytest.raises(Exception, match=re.escape(refusal.text)) as caught:
        torch.compile(refusal.function, backend="eager")(**refusal.arguments)
    if isinstance(caught.value, torch._dynamo.exc.TorchRuntimeError):
        assert f"got {refusal.error.__name__}({refusal.text[:20]!r}"[:-1] in str(caught.value)
    else:
        assert type(caught.value) is refusal.error


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_refused_while_tracing(refusal, mode):
    state = global_state()
    with mode(), FakeTensorMode() as fake:
        assert_refused(refusal, tree_map_only(torch.Tensor, fake.from_tensor, refusal.arguments))
    assert global_state() == state


def moved(arguments, device):
    """The tensors on another device, strides and all; those that are elsewhere already stay there."""

    def move(tensor):
        if tensor.is_meta:
            return tensor
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return copy.copy_(tensor)

    return tree_map_only(torch.Tensor, move, arguments)


@pytest.mark.parametrize("refusal", [r for r in REFUSALS if r.error is not RuntimeError], ids=str)
def test_refused_on_meta(refusal):
    assert_refused(refusal, moved(refusal.arguments, "meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_refused_on_cuda(refusal):
    text = refusal.text.replace("on cpu as", "on cuda:0 as").replace("on cpu or cpu", "on cpu or cuda:0")
    assert_refused(replace(refusal, text=text), moved(refusal.arguments, "cuda"))


EMPTIED = {
    "input": lambda gone: ops.head_matmul(gone(6, 2, 4), zeros(2, 4, 3)),
    "weight": lambda gone: ops.head_matmul(zeros(6, 2, 4), gone(2, 4, 3)),
    "bias": lambda gone: ops.head_matmul(zeros(6, 2, 4), zeros(2, 4, 3), gone(2, 3)),
    "out": lambda gone: matmul_with_multi_head(zeros(6, 4), zeros(4, 3), 2, out=gone(6, 2, 3)),
    "grad_output": lambda gone: ops._head_matmul_wgrad(gone(6, 2, 3), zeros(6, 2, 4)),
    "input of wgrad": lambda gone: ops._head_matmul_wgrad(zeros(6, 2, 3), gone(6, 2, 4)),
    "gathered": lambda gone: ops.gather_head_matmul(gone(6, 2, 4), zeros(2, 4, 3), indices(0)),
    "indices": lambda gone: ops.gather_head_matmul(zeros(6, 2, 4), zeros(2, 4, 3), gone(5, dtype=I64)),
    "probs": lambda gone: select_important(gone(2, 5), 0.0),
    "top_p": lambda gone: select_important(zeros(2, 5), gone()),
    "base": lambda gone: combine(gone(5, 4), zeros(1, 4), indices(0)),
    "updates": lambda gone: combine(zeros(5, 4), gone(1, 4), indices(0)),
}


@pytest.mark.parametrize("operand", EMPTIED)
def test_a_storage_that_was_emptied_is_refused(operand):
    def gone(*size, dtype=torch.float32):
        tensor = torch.zeros(size, dtype=dtype)
        tensor.untyped_storage().resize_(0)
        return tensor

    with pytest.raises(RuntimeError, match="not allocated yet"):
        EMPTIED[operand](gone)


def test_none_for_a_tensor_reaches_the_checks():
    with pytest.raises(TypeError, match="head_matmul: input must be a Tensor, got None"):
        ops.head_matmul(None, zeros(2, 4, 3))


def test_there_are_enough():
    assert len(REFUSALS) >= 60
    assert len({str(refusal) for refusal in REFUSALS}) > 50
