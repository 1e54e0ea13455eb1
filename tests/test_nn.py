"""The modules: PyTorch's conventions, foreign state dicts, routing, gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

from mhmatmul_ext import combine, reference, select_important
from mhmatmul_ext.nn import HeadwiseLinear, MixtureOfDepths, Selection

LAYOUTS = ["hde", "hed"]


def dense(layer, input):
    """The layer written out: the whole block-diagonal matrix, in plain PyTorch."""
    blocks = layer.weight if layer.weight_layout == "hde" else layer.weight.mT
    output = input @ torch.block_diag(*blocks)
    return output if layer.bias is None else output + layer.bias


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (2, 0)])
def test_headwise_linear(layout, bias, leading, device):
    layer = HeadwiseLinear(8, 12, 4, bias=bias, weight_layout=layout, device=device, dtype=torch.float64)
    input = torch.randn(*leading, 8, dtype=torch.float64, device=device, requires_grad=True)
    output, expected = layer(input), dense(layer, input)
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected)
    leaves = [input, *layer.parameters()]
    for got, wanted in zip(
        torch.autograd.grad(output.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_parameters_start_as_those_of_a_linear_layer():
    layer = HeadwiseLinear(512, 1024, 8)
    linear = nn.Linear(64, 128)
    assert layer.weight.abs().max() <= linear.weight.abs().max() * 1.01
    assert layer.weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.05)
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dicts_of_others(layout):
    """Flat, RecurrentGemma's names and shapes, xLSTM's; nested in a model, strictly."""
    layer = HeadwiseLinear(8, 12, 4, weight_layout=layout)
    weight, bias = torch.randn(4, 2, 3), torch.randn(4, 3)
    stored = weight if layout == "hde" else weight.mT.contiguous()
    input = torch.randn(5, 8)
    expected = torch.einsum("mnd,nde->mne", input.unflatten(-1, (4, 2)), weight).add(bias).flatten(-2)
    for state in (
        {"weight": weight.flatten(0, 1), "bias": bias.flatten()},
        {"w": stored, "b": bias},
        {"weight": stored, "bias": bias.flatten()},
    ):
        model, given = nn.Sequential(copy.deepcopy(layer)), {f"0.{name}": value for name, value in state.items()}
        names = set(given)
        assert model.load_state_dict(given).missing_keys == []
        torch.testing.assert_close(model(input), expected)
        assert set(given) == names, "the caller's state dict was changed"
        assert set(model.state_dict()) == {"0.weight", "0.bias"}
    with pytest.raises(RuntimeError, match=r"size mismatch for weight"):
        layer.load_state_dict({"weight": torch.randn(4, 7, 3), "bias": bias})


def test_conventions_of_modules():
    layer = HeadwiseLinear(8, 12, 4)
    input = torch.randn(2, 8)
    assert repr(layer) == (
        "HeadwiseLinear(in_features=8, out_features=12, num_heads=4, bias=True, weight_layout='hde')"
    )
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(input), layer(input))
        assert twin.weight is not layer.weight
    skipped = nn.utils.skip_init(HeadwiseLinear, 8, 12, 4, weight_layout="hed", dtype=torch.bfloat16)
    assert skipped.weight.shape == (4, 3, 2)
    assert skipped.weight.dtype == torch.bfloat16
    assert HeadwiseLinear(8, 12, 4, device="meta").weight.is_meta
    doubled = copy.deepcopy(layer)

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(doubled, "weight", Doubled())
    torch.testing.assert_close(doubled(input) - layer.bias, 2 * (layer(input) - layer.bias))
    nn.init.zeros_(layer.weight)
    assert torch.equal(layer(input), layer.bias.expand(2, 12))


@pytest.mark.parametrize("compiled", [False, True])
def test_training_step_in_autocast(compiled, device):
    model = nn.Sequential(nn.Linear(6, 8), HeadwiseLinear(8, 12, 4)).to(device)
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    input, target = torch.randn(64, 6, device=device), torch.randn(64, 12, device=device)
    losses = []
    for _ in range(5):
        with torch.autocast(device, dtype=torch.bfloat16):
            output = run(input)
        assert output.dtype == torch.bfloat16
        losses.append((output.float() - target).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((8, 12, 3), ValueError, "in_features must be a multiple of num_heads = 3, got 8"),
        ((9, 11, 3), ValueError, "out_features must be a multiple of num_heads = 3, got 11"),
        ((8, 12, 0), ValueError, "num_heads must be >= 1, got 0"),
        ((8, 12.0, 4), TypeError, "out_features must be an int, got float"),
        ((8, 12, True), TypeError, "num_heads must be an int, got bool"),
        ((8, 12, 4, True, "dhe"), ValueError, 'weight_layout must be "hde" or "hed", got \'dhe\''),
    ],
)
def test_headwise_linear_refuses(arguments, error, text):
    with pytest.raises(error) as caught:
        HeadwiseLinear(*arguments)
    assert str(caught.value) == f"HeadwiseLinear: {text}"


@pytest.mark.parametrize("shape", [(), (7,), (2, 12)])
def test_headwise_linear_refuses_an_input(shape):
    text = rf"^HeadwiseLinear: input must be \[..., in_features\] = \[..., 8\], got \[{', '.join(map(str, shape))}\]$"
    with pytest.raises(ValueError, match=text):
        HeadwiseLinear(8, 12, 4)(torch.randn(shape))


def test_selection_as_nested_tensor(device):
    probs = torch.rand(4, 9, device=device)
    probs[2] = 0
    rows = torch.randn(4, 9, 2, 8, device=device)
    selection = Selection.of(probs, 0.3, 5)
    indices, cu_seqlens = select_important(probs, 0.3, 5)
    assert torch.equal(selection.indices, indices)
    assert torch.equal(selection.cu_seqlens, cu_seqlens)
    assert selection.max_seqlen == 5
    assert selection.positions.tolist() == [index % 9 for index in indices.tolist()]
    kept = rows.flatten(0, 1)[indices]
    nested = selection.nested(kept)
    assert nested.values().data_ptr() == kept.data_ptr()
    sequences = nested.unbind()
    assert [len(sequence) for sequence in sequences] == cu_seqlens.diff().tolist()
    attended = nn.functional.scaled_dot_product_attention(*[nested.transpose(1, 2)] * 3).transpose(1, 2)
    for got, sequence in zip(attended.unbind(), sequences, strict=True):
        by_head = sequence.transpose(0, 1)
        weights = (by_head @ by_head.mT / 8**0.5).softmax(-1)
        torch.testing.assert_close(got, (weights @ by_head).transpose(0, 1))


def test_nested_tensor_of_other_rows_is_refused():
    selection = Selection.of(torch.tensor([[0.9, 0.1, 0.8]]), 0.5)
    for shape in [(1, 4), (3, 4), ()]:
        text = rf"^Selection\.nested: rows must be \[t, \.\.\.\], t = 2, got \[{', '.join(map(str, shape))}\]$"
        with pytest.raises(ValueError, match=text):
            selection.nested(torch.randn(shape))


def written_out(layer, input, top_k, mask=None):
    """Mixture-of-Depths, sequence by sequence."""
    scores = torch.sigmoid(input @ layer.router.weight[0])
    indices, _ = reference.select_important(scores, 0.0, top_k, mask=mask)
    rows = list(input.flatten(0, 1).unbind())
    for index in indices.tolist():
        rows[index] = rows[index] + scores.flatten()[index] * layer.block(rows[index])
    return torch.stack(rows).view_as(input)


@pytest.mark.parametrize("masked", [False, True])
def test_mixture_of_depths(masked, device):
    layer = MixtureOfDepths(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), 8, capacity=0.3).to(device)
    input = torch.randn(3, 10, 8, device=device, requires_grad=True)
    mask = torch.randint(-1, 2, (3, 10), dtype=torch.int8, device=device) if masked else None
    output, expected = layer(input, mask), written_out(layer, input, 3, mask)
    torch.testing.assert_close(output, expected)
    leaves = [input, *layer.parameters()]
    assert layer.router.weight in set(leaves)
    for got, wanted in zip(
        torch.autograd.grad(output.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


class Attention(nn.Module):
    """Causal attention among the kept tokens of a sequence; rotates nothing, but adds positions."""

    def forward(self, tokens, selection):
        keyed = tokens + selection.positions[:, None]
        output = []
        for begin, end in zip(selection.cu_seqlens[:-1], selection.cu_seqlens[1:], strict=True):
            rows = keyed[begin:end]
            assert len(rows) <= selection.max_seqlen
            output.append(nn.functional.scaled_dot_product_attention(*[rows[None]] * 3, is_causal=True)[0])
        return torch.cat(output)


def test_a_block_that_takes_the_selection_and_causal_inference():
    """With top_p in evaluation mode no output depends on a later token; with top_k it does."""
    layer = MixtureOfDepths(Attention(), 8, top_k=4, top_p=0.5)
    input = torch.randn(2, 12, 8)
    changed = input.clone()
    changed[:, 7:] = 3 * torch.randn(2, 5, 8)
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn(1, 8))
        assert not torch.equal(layer(input)[:, :7], layer(changed)[:, :7])
        layer.eval()
        torch.testing.assert_close(layer(input)[:, :7], layer(changed)[:, :7])


@pytest.mark.parametrize("wrap", [lambda block: torch.compile(block, backend="eager"), checkpoint_wrapper])
def test_a_wrapped_block_gets_the_selection(wrap):
    layer = MixtureOfDepths(Attention(), 8, top_k=4)
    input = torch.randn(2, 12, 8, requires_grad=True)
    wrapped = MixtureOfDepths(wrap(Attention()), 8, top_k=4)
    wrapped.router = layer.router
    torch.testing.assert_close(wrapped(input), layer(input))
    plain = nn.Sequential(nn.Linear(8, 8))
    assert MixtureOfDepths(wrap(plain), 8, top_k=4)(input).shape == input.shape


def test_auxiliary_loss_teaches_the_threshold():
    """After training with it, scores above a half are about those of the best tokens."""
    layer = MixtureOfDepths(nn.Linear(9, 9), 9, capacity=0.25, top_p=0.5)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(150):
        input = torch.randn(16, 32, 9)
        input[..., 8] = 1  # for a bias of the router
        _, routing = layer(input, return_routing=True)
        routing.auxiliary_loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.eval()
    kept = len(layer.route(input).selection.indices) / (16 * 32)
    assert 0.1 < kept < 0.4


def test_modes():
    block, input = nn.Identity(), torch.randn(2, 5, 4)
    for numbers, training, kept in [
        ({"capacity": 0.5}, True, 6), ({"capacity": 0.5}, False, 6), ({"top_k": 9}, True, 10),
        ({"top_p": 0.0}, True, 10), ({"top_p": 0.0}, False, 10), ({"top_p": 1.0, "top_k": 2}, True, 4),
        ({"top_p": 1.0, "top_k": 2}, False, 0),
    ]:  # fmt: skip
        layer = MixtureOfDepths(block, 4, **numbers).train(training)
        output, routing = layer(input, return_routing=True)
        assert len(routing.selection.indices) == kept
        assert output.shape == input.shape
        assert routing.auxiliary_loss().isfinite()
    assert torch.equal(layer(input), input)
    for capacity, kept in [(0.07, 7), (0.071, 8), (1e-12, 1), (1.0, 100)]:
        selection = MixtureOfDepths(block, 4, capacity=capacity).route(torch.randn(1, 100, 4)).selection
        assert len(selection.indices) == selection.max_seqlen == kept
    assert MixtureOfDepths(block, 4, capacity=0.5)(torch.randn(2, 0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_residual_stream(dtype):
    layer = MixtureOfDepths(nn.Linear(8, 8), 8, capacity=0.5)
    with torch.autocast("cpu", dtype=dtype):
        output = layer(torch.randn(2, 6, 8))
    assert output.dtype == torch.float32
    output.sum().backward()
    assert layer.router.weight.grad is not None
    half = copy.deepcopy(layer).to(dtype)
    assert half(torch.randn(2, 6, 8, dtype=dtype)).dtype == dtype


def test_compiled_whole():
    layer = MixtureOfDepths(nn.Linear(8, 8), 8, capacity=0.5, top_p=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for training in (True, False):
        layer.train(training)
        for _ in range(2):
            input = torch.randn(2, 6, 8)
            torch.testing.assert_close(compiled(input), layer(input))


@pytest.mark.parametrize(
    ("numbers", "error", "text"),
    [
        ({}, TypeError, "one of capacity, top_k and top_p must be given"),
        ({"capacity": 0.5, "top_k": 1}, ValueError, "capacity and top_k must not both be given"),
        ({"capacity": 0.0}, ValueError, "capacity must be in (0, 1], got 0.0"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1, got 0"),
        ({"top_p": 1.5}, ValueError, "top_p must be in [0, 1], got 1.5"),
        ({"top_p": float("nan")}, ValueError, "top_p must be in [0, 1], got nan"),
        ({"top_p": "0.5"}, TypeError, "top_p must be a number or None, got str"),
        ({"capacity": True}, TypeError, "capacity must be a number or None, got bool"),
        ({"top_k": 2.5}, TypeError, "top_k must be an int or None, got float"),
        ({"top_k": 1, "dim": "8"}, TypeError, "dim must be an int, got str"),
        ({"top_k": 1, "block": None}, TypeError, "block must be a Module, got NoneType"),
    ],
)
def test_mixture_of_depths_refuses(numbers, error, text):
    with pytest.raises(error) as caught:
        MixtureOfDepths(**{"block": nn.Identity(), "dim": 8, **numbers})
    assert str(caught.value) == f"MixtureOfDepths: {text}"


def test_modules_tell_their_numbers():
    block = torch.nn.Linear(8, 8)
    assert MixtureOfDepths(block, 8, capacity=0.5).extra_repr() == "dim=8, capacity=0.5"
    assert MixtureOfDepths(block, 8, top_p=0.7).extra_repr() == "dim=8, top_p=0.7"


def test_modules_refuse_inputs():
    for module in (HeadwiseLinear(8, 12, 4), MixtureOfDepths(nn.Identity(), 8, top_k=1)):
        with pytest.raises(TypeError, match=r": input must be a Tensor, got list$"):
            module([1.0] * 8)
    with pytest.raises(ValueError, match=r"^MixtureOfDepths: input must be \[b, s, dim\] = \[b, s, 8\], got \[2, 8\]"):
        MixtureOfDepths(nn.Identity(), 8, top_k=1)(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"^combine: updates must be \[t, d\] = \[2, 8\], got \[2, 4\]"):
        MixtureOfDepths(nn.Linear(8, 4), 8, top_k=1)(torch.randn(2, 3, 8))


def test_combine_is_the_way_back():
    input, probs = torch.randn(2, 6, 4), torch.rand(2, 6)
    selection = Selection.of(probs, 0.5, mask=torch.ones(2, 6, dtype=torch.bool))
    kept = input.flatten(0, 1)[selection.indices]
    restored = combine(torch.zeros_like(input), kept, selection.indices)
    assert torch.equal(restored, input * (probs >= 0.5)[..., None])
