"""Modules over the operators: a per-head linear layer, and Mixture-of-Depths around a block.

Sizes: `b` sequences, `s` positions, `nh` heads, `t` kept tokens.
"""

from __future__ import annotations

import inspect
import math
from types import NoneType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .functional import combine, select_important

__all__ = ["HeadwiseLinear", "MixtureOfDepths", "Routing", "Selection"]

WeightLayout = Literal["hde", "hed"]


class HeadwiseLinear(nn.Module):
    """A linear layer for each head: a block-diagonal matrix, of which only the blocks are stored and multiplied.

    Head `n` of the input, features `n * in_features / num_heads` on, is multiplied by a matrix of its own and gives
    head `n` of the output; `output.unflatten(-1, (num_heads, -1))` has the heads apart.

    Args:
        in_features: size of the input's last dimension, all heads together; a multiple of `num_heads`.
        out_features: likewise of the output.
        num_heads: how many heads, that is blocks.
        bias: whether to add a bias.
        weight_layout: `"hde"` for a weight `[nh, in_features / nh, out_features / nh]`, as RecurrentGemma stores it;
            `"hed"` for the last two swapped, as xLSTM does. Neither costs a copy.
        device: where to create the parameters.
        dtype: their dtype: float32, float16, bfloat16 or float64.

    Shapes:
        input `[..., in_features]`, output `[..., out_features]`, contiguous. `weight` as above, `bias`
        `[out_features]`.

    Raises:
        TypeError: a size that is no int; an input of another dtype than the parameters.
        ValueError: sizes that `num_heads` does not divide; an unknown `weight_layout`; an input whose last dimension is
            not `in_features`.
        RuntimeError: an input on another device than the parameters.

    A state dict may hold the weight as the flat `[in_features, out_features / nh]` of `matmul_with_multi_head`, the
    bias as `[nh, out_features / nh]`, and their names may be RecurrentGemma's `w` and `b`. The parameters start as
    those of `torch.nn.Linear` with the same number of inputs per head.

    Equivalent in plain PyTorch, for `"hde"`::

        heads = input.unflatten(-1, (num_heads, -1))
        output = torch.einsum("...nd,nde->...ne", heads, weight).flatten(-2) + bias

    Example:
        >>> layer = HeadwiseLinear(8, 12, num_heads=4)
        >>> layer(torch.randn(2, 5, 8)).shape, layer.weight.shape
        (torch.Size([2, 5, 12]), torch.Size([4, 2, 3]))

    Source: the block-diagonal gates of RG-LRU (Griffin, arXiv:2402.19427, section 2.4) and the head-wise projections of
    xLSTM (arXiv:2405.04517).

    """

    __constants__ = ["in_features", "num_heads", "out_features", "weight_layout"]  # noqa: RUF012, as PyTorch's modules
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int,
        bias: bool = True,
        weight_layout: WeightLayout = "hde",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes("HeadwiseLinear", num_heads, in_features=in_features, out_features=out_features)
        if weight_layout not in ("hde", "hed"):
            raise ValueError(f'HeadwiseLinear: weight_layout must be "hde" or "hed", got {weight_layout!r}')
        self.in_features, self.out_features, self.num_heads = in_features, out_features, num_heads
        self.weight_layout = weight_layout
        block = (in_features // num_heads, out_features // num_heads)
        sizes = (num_heads, *(block if weight_layout == "hde" else block[::-1]))
        self.weight = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, uniformly within the square root of the inverse of the inputs per head."""
        bound = math.sqrt(self.num_heads / self.in_features) if self.in_features else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply each head of `[..., in_features]` by its matrix: `[..., out_features]`."""
        _check_types("HeadwiseLinear", "a Tensor", (Tensor,), input=input)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"HeadwiseLinear: input must be [..., in_features] = [..., {self.in_features}], got {list(input.shape)}"
            )
        weight = self.weight if self.weight_layout == "hde" else self.weight.mT
        heads = input.unflatten(-1, (self.num_heads, weight.shape[1]))
        bias = None if self.bias is None else self.bias.view(self.num_heads, weight.shape[2])
        output: Tensor = torch.ops.mhmatmul.head_matmul.default(heads, weight, bias)
        return output.flatten(-2)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_heads={self.num_heads}, "
            f"bias={self.bias is not None}, weight_layout={self.weight_layout!r}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, other in (("weight", "w"), ("bias", "b")):
            if prefix + other in state_dict and prefix + name not in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + other)
        weight, bias = (state_dict.get(prefix + name) for name in ("weight", "bias"))
        e = self.out_features // self.num_heads
        if isinstance(weight, Tensor) and weight.shape == (self.in_features, e):
            blocks = weight.unflatten(0, (self.num_heads, self.in_features // self.num_heads))
            state_dict[prefix + "weight"] = blocks if self.weight_layout == "hde" else blocks.mT
        if isinstance(bias, Tensor) and bias.shape == (self.num_heads, e):
            state_dict[prefix + "bias"] = bias.flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Selection(NamedTuple):
    """Which tokens of `[b, s]` were kept, as variable-length attention takes it."""

    indices: Tensor
    """`[t]` int64, rows of `[b * s, ...]`."""
    cu_seqlens: Tensor
    """`[b + 1]` int32, where each sequence's tokens begin among the kept ones."""
    max_seqlen: int
    """As many as a sequence may keep, `top_k`, or `s` without it; known without waiting for the device."""
    positions: Tensor
    """`[t]` int64, each token's position in its own sequence."""

    @classmethod
    def of(
        cls, probs: Tensor, top_p: float | Tensor = 1.0, top_k: int | None = None, *, mask: Tensor | None = None
    ) -> Selection:
        """Select as `mhmatmul_ext.select_important` does; the same arguments, the same errors.

        Example:
            >>> selection = Selection.of(torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.7, 0.7]]), 0.5, top_k=2)
            >>> selection.positions.tolist(), selection.max_seqlen
            ([0, 2, 1, 2], 2)

        """
        indices, cu_seqlens = select_important(probs, top_p, top_k, mask=mask)
        s = probs.shape[1]
        return cls(indices, cu_seqlens, s if top_k is None else top_k, indices % max(s, 1))

    def nested(self, rows: Tensor) -> Tensor:
        """The kept tokens' rows `[t, ...]` as a jagged nested tensor `[b, *, ...]`, with no copy.

        `torch.nn.functional.scaled_dot_product_attention` takes it, by its plain kernel and without `is_causal`: the
        fused ones refuse sequences that may be empty. `.values()` gives the rows back.

        Example:
            >>> selection = Selection.of(torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.7, 0.1]]), 0.5)
            >>> [tuple(sequence.shape) for sequence in selection.nested(torch.randn(3, 4)).unbind()]
            [(2, 4), (1, 4)]

        """
        if rows.dim() == 0 or rows.shape[0] != self.indices.shape[0]:
            raise ValueError(
                f"Selection.nested: rows must be [t, ...], t = {len(self.indices)}, got {list(rows.shape)}"
            )
        nested: Tensor = torch.nested.nested_tensor_from_jagged(
            rows, self.cu_seqlens, min_seqlen=0, max_seqlen=self.max_seqlen
        )
        return nested


class Routing(NamedTuple):
    """How `MixtureOfDepths` has routed."""

    logits: Tensor
    """`[b, s]` float32 or float64, before the sigmoid; differentiable."""
    selection: Selection
    """The tokens that went through the block."""

    def auxiliary_loss(self) -> Tensor:
        """Binary cross-entropy between the router's scores and what was selected, a scalar.

        It teaches the router to score selected tokens above a half and the others below: what makes `top_p=0.5`
        choose at inference about the tokens that `top_k` chose in training (arXiv:2404.02258, section 3.5).
        """
        ones = torch.ones_like(self.selection.indices, dtype=self.logits.dtype)
        chosen = torch.zeros_like(self.logits).flatten().index_copy(0, self.selection.indices, ones)
        return nn.functional.binary_cross_entropy_with_logits(self.logits.flatten(), chosen)


class MixtureOfDepths(nn.Module):
    """Send only the tokens that a learned router chooses through a block; the others pass unchanged.

    Every token is scored by `sigmoid(input @ router)`. In training the `top_k` best of each sequence are taken. The
    block's result for a token, weighted by its score, is added to the token, and that weight is how the router learns.
    The block returns what is to be added, with no residual connection of its own around the whole.

    Which tokens are among the `top_k` depends on tokens that come later: a language model cannot generate that way.
    With `top_p` given, evaluation mode takes the tokens whose own score reaches it instead, which is causal, but
    another selection than the one trained with: train with `Routing.auxiliary_loss`, and compare the two before relying
    on it. Without `top_p`, evaluation selects as training does.

    Args:
        block: called with the kept tokens `[t, dim]`, sequence after sequence, positions ascending, and gives
            `[t, dim]`. If its `forward` has a parameter `selection`, it gets the `Selection` under that name, to attend
            within sequences and to know positions; so does one inside `torch.compile` or another wrapper. It must cope
            with `t = 0` where `top_p` may select nothing.
        dim: features of a token.
        capacity: share of a sequence's tokens to take, in (0, 1]: a `top_k` of `capacity * s`, rounded up.
        top_k: how many tokens of a sequence to take, all of a shorter one. Not together with `capacity`.
        top_p: score in [0, 1] from which on tokens are taken: in evaluation mode, and in training too where neither
            `capacity` nor `top_k` is given.
        device: where to create the router's weight.
        dtype: its dtype.

    Shapes:
        input `[b, s, dim]`, output the same. `forward(input, mask=None, return_routing=False)`: `mask` `[b, s]` as in
        `select_important`; with `return_routing` the result is `(output, Routing)`.

    Raises:
        TypeError: none of `capacity`, `top_k` and `top_p` given, or an argument of the wrong type.
        ValueError: one of them out of range, or both of the first two; an input that is not `[b, s, dim]`; a block that
            does not give `[t, dim]`.

    Example:
        >>> block = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
        >>> layer = MixtureOfDepths(block, dim=8, capacity=0.25)
        >>> output, routing = layer(torch.randn(2, 12, 8), return_routing=True)
        >>> output.shape, routing.selection.cu_seqlens.tolist()
        (torch.Size([2, 12, 8]), [0, 3, 6])

    Source: Mixture-of-Depths, arXiv:2404.02258.

    """

    def __init__(
        self,
        block: nn.Module,
        dim: int,
        *,
        capacity: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if capacity is None and top_k is None and top_p is None:
            raise TypeError("MixtureOfDepths: one of capacity, top_k and top_p must be given")
        _check_types("MixtureOfDepths", "a number or None", (int, float, NoneType), capacity=capacity, top_p=top_p)
        _check_types("MixtureOfDepths", "an int or None", (int, NoneType), top_k=top_k)
        _check_types("MixtureOfDepths", "an int", (int,), dim=dim)
        _check_types("MixtureOfDepths", "a Module", (nn.Module,), block=block)
        if capacity is not None and top_k is not None:
            raise ValueError("MixtureOfDepths: capacity and top_k must not both be given")
        if capacity is not None and not 0 < capacity <= 1:
            raise ValueError(f"MixtureOfDepths: capacity must be in (0, 1], got {capacity}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"MixtureOfDepths: top_k must be >= 1, got {top_k}")
        if top_p is not None and not 0 <= top_p <= 1:
            raise ValueError(f"MixtureOfDepths: top_p must be in [0, 1], got {top_p}")
        self.dim, self.capacity, self.top_k, self.top_p = dim, capacity, top_k, top_p
        self.block = block
        self.router = nn.Linear(dim, 1, bias=False, device=device, dtype=dtype)
        self._takes_selection = _takes_selection(block)

    def route(self, input: Tensor, mask: Tensor | None = None) -> Routing:
        """Score the tokens of `[b, s, dim]` and select."""
        _check_types("MixtureOfDepths", "a Tensor", (Tensor,), input=input)
        if input.dim() != 3 or input.shape[-1] != self.dim:
            raise ValueError(
                f"MixtureOfDepths: input must be [b, s, dim] = [b, s, {self.dim}], got {list(input.shape)}"
            )
        logits = self.router(input).squeeze(-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # sigmoids of half types tie
        by_rank = self.capacity is not None or self.top_k is not None
        if by_rank and (self.training or self.top_p is None):
            top_p, top_k = 0.0, self._places(input.shape[1])
        else:
            assert self.top_p is not None
            top_p, top_k = self.top_p, None
        return Routing(logits, Selection.of(logits.sigmoid(), top_p, top_k, mask=mask))

    def forward(
        self, input: Tensor, mask: Tensor | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Route `[b, s, dim]`, apply the block to the chosen tokens, and add its results to them."""
        routing = self.route(input, mask)
        indices = routing.selection.indices
        tokens = input.flatten(0, 1).index_select(0, indices)
        updates = self.block(tokens, selection=routing.selection) if self._takes_selection else self.block(tokens)
        gates = routing.logits.flatten().index_select(0, indices).sigmoid().to(input.dtype)
        output = combine(input, updates, indices, gates)
        return (output, routing) if return_routing else output

    def extra_repr(self) -> str:
        """The constructor's numbers."""
        numbers = {"dim": self.dim, "capacity": self.capacity, "top_k": self.top_k, "top_p": self.top_p}
        return ", ".join(f"{name}={number}" for name, number in numbers.items() if number is not None)

    def _places(self, s: int) -> int | None:
        """`top_k` for sequences of `s` tokens; None for empty ones, which have no place to give."""
        if s == 0:
            return None
        if self.top_k is not None:
            return min(s, self.top_k)
        assert self.capacity is not None
        return max(1, math.ceil(self.capacity * s - 1e-9))  # 0.07 * 100 is 7.000000000000001


def _takes_selection(block: nn.Module) -> bool:
    """Whether the block's `forward`, or that of the one module it wraps, has a parameter of that name."""
    parameters = inspect.signature(block.forward).parameters
    inner = list(block.children())
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return "selection" in parameters or (passes_on and len(inner) == 1 and _takes_selection(inner[0]))


def _check_types(name: str, expected: str, types: tuple[type, ...], **values: object) -> None:
    for argument, value in values.items():
        if not isinstance(value, types) or isinstance(value, bool):
            raise TypeError(f"{name}: {argument} must be {expected}, got {type(value).__name__}")


def _check_sizes(name: str, num_heads: object, **sizes: object) -> None:
    _check_types(name, "an int", (int,), num_heads=num_heads, **sizes)
    assert isinstance(num_heads, int)
    if num_heads < 1:
        raise ValueError(f"{name}: num_heads must be >= 1, got {num_heads}")
    for argument, size in sizes.items():
        assert isinstance(size, int)
        if size < 0 or size % num_heads:
            raise ValueError(f"{name}: {argument} must be a multiple of num_heads = {num_heads}, got {size}")
