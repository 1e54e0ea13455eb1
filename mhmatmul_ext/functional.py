"""The public functions. Each checks the types of its arguments and calls one operator of `torch.ops.mhmatmul`.

Sizes: `b` sequences, `s` positions, `h` hidden size, `nh` heads, `hd = h / nh`, `e` embed size, `t` kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.mhmatmul

Result = tuple[Tensor, "Tensor | None", "Tensor | None"]


def matmul_with_multi_head(
    input: Tensor,  # [..., h]
    weight: Tensor,  # [h, e]
    num_heads: int = 1,
    *,
    bias: Tensor | None = None,  # [nh, e]
    out: Tensor | None = None,  # [..., nh, e]
) -> Tensor:
    """Multiply each head of `input` by its own rows of `weight`.

    The result is `[..., nh, e]`, contiguous in that order: every element is written once, where it belongs, with no
    permutation and no copy afterwards. Half types accumulate in float32 and are rounded once, at the store.

    Args:
        input: `[..., h]`, any number of leading dimensions, any strides; float32, float16, bfloat16 or float64.
        weight: `[h, e]`, of the input's dtype and device, any strides; head `n` owns rows `n*hd` to `(n+1)*hd`.
        num_heads: how many heads `h` is split into; a divisor of `h`.
        bias: `[nh, e]`, added before the rounding.
        out: where to write, `[..., nh, e]` with stride 1 in the last dimension; it is returned. Not differentiable.

    Raises:
        TypeError: an argument of the wrong type, a dtype not taken, operands of two dtypes.
        ValueError: a wrong rank, shape or `num_heads`.
        RuntimeError: operands on different devices; `out` where gradients are recorded.

    Equivalent in plain PyTorch::

        torch.einsum("...nd,nde->...ne", input.unflatten(-1, (num_heads, -1)),
                     weight.unflatten(0, (num_heads, -1))).contiguous()

    Example:
        >>> input, weight = torch.randn(2, 5, 8), torch.randn(8, 3)
        >>> matmul_with_multi_head(input, weight, num_heads=4).shape
        torch.Size([2, 5, 4, 3])

    The operation is the absorbed projection of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section
    2.1.2) and the block-diagonal linear layer of RG-LRU (Griffin, arXiv:2402.19427).

    """
    op = "matmul_with_multi_head"
    _check_tensors(op, input=input, weight=weight)
    _check_tensors(op, optional=True, bias=bias, out=out)
    _check_ints(op, num_heads=num_heads)
    if out is not None:
        _ops._multi_head_matmul_out.default(input, weight, num_heads, bias, out)
        return out
    output: Tensor
    if bias is not None:
        output = _ops._multi_head_matmul_bias.default(input, weight, num_heads, bias)
    else:
        output = _ops.multi_head_matmul.default(input, weight, num_heads)
    return output


def select_important(
    probs: Tensor,  # [b, s]
    top_p: float | Tensor = 1.0,
    top_k: int | None = None,
    *,
    capacity: int | None = None,
    mask: Tensor | None = None,  # [b, s]
) -> tuple[Tensor, Tensor]:
    """Find the tokens whose score reaches `top_p` and is among the `top_k` highest of their sequence.

    The selection is exact, deterministic and the same on CPU and CUDA. Ties at the `top_k`-th score go to the lowest
    positions. NaN is never kept and takes no place; -0.0 equals +0.0; infinities order as numbers.

    Args:
        probs: `[b, s]`, float32, float16, bfloat16 or float64, any real values.
        top_p: a threshold in [0, 1] (not nucleus mass), rounded to the dtype of `probs` as `probs >= top_p` rounds
            it; or a 0-d tensor, whose range is not checked, which causes no recompilation and no synchronisation.
        top_k: how many tokens a sequence may keep, in [1, s]; None for `s`.
        capacity: None, or a fixed number of places per sequence for a result whose size does not depend on data.
        mask: `[b, s]` on the device of `probs`: which tokens are not left to their scores. bool: False is never kept,
            as padding. int8: negative is never kept, zero is left to its score, positive is protected: kept whatever
            its score, NaN included, and given a place before any other. Protected tokens count among the `top_k` and
            the `capacity`; where there are more of them than places, their scores decide as ever, NaN below all.

    Returns:
        Without `capacity`: `indices` `[t]` int64, `i*s + j` for each kept token, sequence after sequence, positions
        ascending, and `cu_seqlens` `[b + 1]` int32, where each sequence's tokens begin. With `capacity=c`: `indices`
        `[b, c]`, kept tokens first, padded with -1, and `counts` `[b]` int64, how many each sequence would keep; of a
        sequence with more than `c`, the `c` best stay. Neither is differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: `probs` not `[b, s]`, `top_p` outside [0, 1] or NaN, `top_k` outside [1, s], a negative
            `capacity`, a `mask` of another shape; more than 2^31 - 1 kept tokens.
        RuntimeError: `top_p` a tensor on another accelerator than `probs`; `mask` on another device.

    Equivalent in plain PyTorch (`reference.select_important` spells it out)::

        order = probs.sort(dim=1, descending=True, stable=True).indices    # NaN aside
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(s).expand_as(order))
        indices = ((probs >= top_p) & (rank < top_k)).flatten().nonzero().flatten()

    Example:
        >>> indices, cu_seqlens = select_important(torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.7, 0.7]]), 0.5, top_k=1)
        >>> indices.tolist(), cu_seqlens.tolist()
        ([0, 4], [0, 1, 2])

    Keeping a fixed number of the best tokens is Mixture-of-Depths (arXiv:2404.02258); keeping those above a threshold
    is its causal form at inference.

    """
    op = "select_important"
    _check_tensors(op, probs=probs)
    _check_selection(op, top_p, top_k, capacity)
    if mask is not None:
        probs, top_p = _masked(op, probs, top_p, top_k, capacity, mask)
    selection: tuple[Tensor, Tensor]
    if capacity is not None:
        selection = _ops.select_important_static.default(probs, _threshold(op, probs, top_p), top_k, capacity)
    elif isinstance(top_p, Tensor):
        selection = _ops._select_important_tensor.default(probs, top_p, top_k)
    else:
        selection = _ops.select_important.default(probs, top_p, top_k)
    return selection


def matmul_with_importance(
    input: Tensor,  # [b, s, h]
    weight: Tensor,  # [h, e]
    probs: Tensor,  # [b, s]
    grad_output: Tensor | None = None,  # [t, nh, e]
    num_heads: int = 1,
    top_p: float | Tensor = 1.0,
    top_k: int | None = None,
    *,
    capacity: int | None = None,
    mask: Tensor | None = None,  # [b, s]
) -> Result:
    """Multi-head matmul of the tokens that `select_important` keeps, and on request its explicit gradients.

    Each row of the output is the row that `matmul_with_multi_head` gives for that token. The output is
    differentiable by `input` and `weight` as usual. Given `grad_output`, the gradients come back beside the output
    and nothing else happens: no `.grad` is touched, no graph is kept, and it works under `torch.no_grad()` and
    `torch.inference_mode()`. What comes back then is a constant to reverse mode, `torch.func.grad` included; forward
    mode sees through it.

    Args:
        input: `[b, s, h]`, any strides; float32, float16, bfloat16 or float64.
        weight: `[h, e]`, of the input's dtype and device.
        probs: `[b, s]` scores, of any floating dtype, on the input's device.
        grad_output: gradient of the output, `[t, nh, e]` (`[b, capacity, nh, e]` with `capacity`).
        num_heads: how many heads `h` is split into; a divisor of `h`.
        top_p: threshold, as in `select_important`.
        top_k: how many tokens a sequence may keep, as in `select_important`.
        capacity: a fixed number of places per sequence, as in `select_important`; unused places are zero rows.
        mask: `[b, s]`, bool or int8: tokens never kept or protected, as in `select_important`.

    Returns:
        `(output, grad_input, grad_weight)`: `output` `[t, nh, e]` in selection order, or `[b, capacity, nh, e]`;
        `grad_input` `[b, s, h]`, zeros where a token is not kept, and `grad_weight` `[h, e]`, in the operands'
        dtype, both None without `grad_output`.

    Raises:
        TypeError: an argument of the wrong type, a dtype not taken, operands of two dtypes.
        ValueError: a wrong rank, shape, `num_heads`, `top_p`, `top_k` or `capacity`.
        RuntimeError: operands on different devices.

    Equivalent in plain PyTorch::

        indices, _ = select_important(probs, top_p, top_k, mask=mask)
        output = matmul_with_multi_head(input.flatten(0, 1)[indices], weight, num_heads)

    Example:
        >>> input, weight = torch.randn(2, 5, 4), torch.randn(4, 3)
        >>> probs = torch.tensor([[0.9, 0.1, 0.8, 0.7, 0.2], [0.0, 0.1, 0.2, 0.3, 0.4]])
        >>> output, _, _ = matmul_with_importance(input, weight, probs, num_heads=2, top_p=0.7, top_k=2)
        >>> output.shape
        torch.Size([2, 2, 3])

    Source: the token routing of Mixture-of-Depths (arXiv:2404.02258), the sparsified tokens of DynamicViT
    (arXiv:2106.02034).

    """
    op = "matmul_with_importance"
    _check_tensors(op, input=input, weight=weight, probs=probs)
    _check_tensors(op, optional=True, grad_output=grad_output)
    _check_ints(op, num_heads=num_heads)
    _check_selection(op, top_p, top_k, capacity)
    if mask is not None:
        probs, top_p = _masked(op, probs, top_p, top_k, capacity, mask)
    if grad_output is not None:
        threshold = _threshold(op, probs, top_p)
        output, grad_input, grad_weight, _ = _ops._importance_matmul_grads.default(
            input, weight, probs, grad_output, num_heads, threshold, top_k, capacity
        )
        return output, grad_input, grad_weight
    if capacity is not None or isinstance(top_p, Tensor):
        threshold = _threshold(op, probs, top_p)
        output = _ops._importance_matmul_tensor.default(input, weight, probs, num_heads, threshold, top_k, capacity)[0]
    else:
        output = _ops.importance_matmul.default(input, weight, probs, num_heads, top_p, top_k)[0]
    return output, None, None


def combine(
    base: Tensor,  # [b, s, d] or [m, d]
    updates: Tensor,  # [t, d]
    indices: Tensor,  # [t]
    gates: Tensor | None = None,  # [t]
) -> Tensor:
    """Put tokens back: add `gates[r] * updates[r]` to `base` at flat row `indices[r]`.

    The result is a new tensor, `base` untouched. Sums are taken in float32 (float64 for float64) in the order of the
    updates and rounded once, so a repeated call gives the same bits, repeated indices or not. Differentiable in
    `base`, `updates` and `gates`. Under autocast the operands are widened to the widest of their dtypes.

    Args:
        base: `[b, s, d]` or `[m, d]`, any strides; float32, float16, bfloat16 or float64.
        updates: `[t, d]`, of the dtype and device of `base`, any strides.
        indices: `[t]` int64, as `select_important` gives them: rows of `base`, counted through `b * s`. They may
            repeat, and add up; -1 adds nothing. On CUDA an index that names no row adds nothing either.
        gates: `[t]`, of the dtype and device of `base`, a factor for each update; None for ones.

    Returns:
        A tensor of the shape and dtype of `base`, contiguous.

    Raises:
        TypeError: an argument of the wrong type, a dtype not taken, operands of two dtypes.
        ValueError: a wrong rank or shape.
        IndexError: on CPU, an index outside [-1, b * s).
        RuntimeError: operands on different devices.

    Equivalent in plain PyTorch, where no index is -1::

        base.flatten(0, -2).index_add(0, indices, gates[:, None] * updates).view_as(base)

    Example:
        >>> base, updates = torch.zeros(2, 3, 1), torch.tensor([[1.0], [2.0], [3.0]])
        >>> combine(base, updates, torch.tensor([0, 4, 4]), gates=torch.tensor([1.0, 0.5, 2.0])).flatten().tolist()
        [1.0, 0.0, 0.0, 0.0, 7.0, 0.0]

    Source: the weighted return of processed tokens to the residual stream in Mixture-of-Depths (arXiv:2404.02258,
    equation 1).

    """
    op = "combine"
    _check_tensors(op, base=base, updates=updates, indices=indices)
    _check_tensors(op, optional=True, gates=gates)
    output: Tensor = _ops.combine.default(base, updates, indices, gates)
    return output


def _threshold(op: str, probs: Tensor, top_p: float | Tensor) -> Tensor:
    threshold: Tensor = top_p if isinstance(top_p, Tensor) else _ops._threshold.default(op, probs, top_p)
    return threshold


def _masked(
    op: str, probs: Tensor, top_p: float | Tensor, top_k: int | None, capacity: int | None, mask: object
) -> tuple[Tensor, float | Tensor]:
    """Scores and a threshold that select alone what the given ones select under the mask."""
    threshold = (None, top_p) if isinstance(top_p, Tensor) else (top_p, None)
    _ops._check_select.default(op, probs, *threshold, top_k, capacity)
    if not isinstance(mask, Tensor):
        raise _wrong_type(op, "mask", "a Tensor", True, mask)
    if mask.dtype not in (torch.bool, torch.int8):
        raise TypeError(f"{op}: mask must be bool or int8, got {str(mask.dtype).removeprefix('torch.')}")
    if mask.device != probs.device:
        raise RuntimeError(f"{op}: mask must be on {probs.device} as probs is, got {mask.device}")
    if mask.shape != probs.shape:
        raise ValueError(f"{op}: mask must be [b, s] = {list(probs.shape)}, got {list(mask.shape)}")
    probs = probs.detach()
    if mask.dtype == torch.bool:
        return probs.masked_fill(~mask, torch.nan), top_p
    # No score is above all others, infinity may be taken: so ranks stand for scores, protected tokens first.
    protected, reaches = mask > 0, (mask == 0) & (probs >= top_p)
    scores = probs.masked_fill(protected & probs.isnan(), -torch.inf) + 0.0  # one zero: sorts may tell -0.0 from it
    by_score = scores.sort(dim=1, descending=True, stable=True).indices
    classes = torch.where(protected, 0, torch.where(reaches, 1, 2)).gather(1, by_score)
    order = by_score.gather(1, classes.sort(dim=1, stable=True).indices)
    falling = torch.arange(probs.shape[1], 0, -1, dtype=torch.float64, device=probs.device).expand_as(order)
    ranks = torch.empty_like(probs, dtype=torch.float64).scatter(1, order, falling)
    return ranks.masked_fill(~(protected | reaches), torch.nan), 0.0


# Types are checked here, values in C++ (csrc/checks.h): a wrong type never reaches an operator's schema. Every call
# passes here, so the loops are plain and say what is wrong only when something is.


def _check_tensors(op: str, *, optional: bool = False, **values: object) -> None:
    for name, value in values.items():
        if not (isinstance(value, Tensor) or (optional and value is None)):
            raise _wrong_type(op, name, "a Tensor", optional, value)


def _check_ints(op: str, *, optional: bool = False, **values: object) -> None:
    for name, value in values.items():
        if not (type(value) is int or (optional and value is None) or _is_number(value, (int, torch.SymInt))):
            raise _wrong_type(op, name, "an int", optional, value)
        if _is_beyond_int64(value):
            raise ValueError(f"{op}: {name} must fit in 64 bits, got {value}")


def _check_selection(op: str, top_p: object, top_k: object, capacity: object) -> None:
    numbers = (int, float, torch.SymInt, torch.SymFloat)
    if not (type(top_p) is float or isinstance(top_p, Tensor) or _is_number(top_p, numbers)):
        raise _wrong_type(op, "top_p", "a number or a 0-d Tensor", False, top_p)
    if _is_beyond_int64(top_p):
        raise ValueError(f"{op}: top_p must be in [0, 1], got {top_p}")
    _check_ints(op, optional=True, top_k=top_k, capacity=capacity)


def _is_beyond_int64(value: object) -> bool:
    """An int that an operator's schema would call one of the wrong type; no compiler need guard against it."""
    return type(value) is int and not torch.compiler.is_compiling() and not -(2**63) <= value < 2**63


def _is_number(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _wrong_type(op: str, name: str, expected: str, optional: bool, value: object) -> TypeError:
    got = "None" if value is None else type(value).__name__
    return TypeError(f"{op}: {name} must be {expected}{' or None' if optional else ''}, got {got}")
