"""The examples that train: short forms of them, and what their texts promise."""

from __future__ import annotations

import json
import runpy
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from mhmatmul_ext.nn import MixtureOfDepths, Selection

EXAMPLES = Path(__file__).parents[1] / "examples"
LM = types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / "mixture_of_depths_lm.py")))
PRUNING = types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / "token_pruning.py")))
LM.main.__globals__["VALIDATION_SEQUENCES"] = 4
SMALL = ["--dim=32", "--layers=2", "--sequence=16", "--batch=2", "--steps=6", "--points=3", "--learning-rate=0.01"]


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"{i}: the cat sat on the mat, the dog sat on the log. " * 10)
    (folder / "picture.bin").write_bytes(b"no text")
    return folder


def train(text, out, *more, dtype="float32"):
    """The numbers that a run of the language model saves, without the times."""
    assert LM.main([*SMALL, "--text", str(text), "--out", str(out), "--dtype", dtype, *more]) == 0
    result = json.loads((out / f"mixture_of_depths_lm-{dtype}.json").read_text())
    for curve in result["curves"]:
        for point in curve["points"]:
            assert point.pop("seconds") >= 0
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_an_uninterrupted_one(dtype, text, tmp_path):
    whole = train(text, tmp_path / "whole", dtype=dtype)
    assert [curve["label"] for curve in whole["curves"]] == ["dense", "capacity 50.0%", "capacity 12.5%"]
    assert [point["step"] for point in whole["curves"][0]["points"]] == [0, 2, 4, 6]
    parts = tmp_path / "parts"
    stopped = train(text, parts, "--stop-after", "3", dtype=dtype)
    assert [point["step"] for point in stopped["curves"][0]["points"]] == [0, 2]
    assert train(text, parts, "--resume", dtype=dtype) == whole
    assert train(text, parts, "--resume", dtype=dtype) == whole  # nothing is left to do
    picture = (parts / f"mixture_of_depths_lm-{dtype}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_seed_gives_one_result(text, tmp_path):
    first = train(text, tmp_path / "a", "--seed", "1")
    assert train(text, tmp_path / "b", "--seed", "1") == first
    assert train(text, tmp_path / "c", "--seed", "2")["curves"] != first["curves"]


def test_every_model_spends_the_same_flops_and_learns(text, tmp_path):
    result = train(text, tmp_path, "--steps", "60", "--points", "2")
    dense, *routed = result["curves"]
    assert dense["points"][-1]["step"] == 60
    for curve in routed:
        assert curve["flops_per_step"] < dense["flops_per_step"]
        assert abs(curve["points"][-1]["flops"] - dense["points"][-1]["flops"]) <= curve["flops_per_step"]
    for curve in result["curves"]:
        assert curve["points"][-1]["loss"] < 0.6 * curve["points"][0]["loss"]


def test_flops_are_those_of_the_formula():
    """Two for each multiply-add, thrice with the gradients; of attention two products forward, five backward."""
    dim, layers, b, s = 64, 3, 2, 32
    model = LM.LanguageModel(dim, layers, 1.0)
    input = torch.zeros(b, s, dtype=torch.int64)
    products = 6 * b * s * (layers * 12 * dim**2 + 256 * dim)
    attention = layers * b * s**2 * dim * 2 * (2 + 5)
    assert LM.count_flops(model, input, input, torch.float32) == products + attention


@pytest.mark.parametrize("capacity", [1.0, 0.5])
def test_validation_is_causal(capacity):
    torch.manual_seed(0)
    model = LM.LanguageModel(64, 4, capacity).eval()
    for block in model.blocks:
        if isinstance(block, MixtureOfDepths):
            block.router.weight.data *= 20  # scores far from one half on both sides
    before = torch.randint(256, (3, 40))
    after = torch.cat([before[:, :25], torch.randint(256, (3, 15))], 1)
    first, second = model(before)[0], model(after)[0]
    torch.testing.assert_close(first[:, :25], second[:, :25])
    assert (first[:, 25:] - second[:, 25:]).abs().max() > 0.1
    if capacity < 1:  # by rank, as in training, a choice depends on what comes later
        model.train()
        assert (model(before)[0][:, :25] - model(after)[0][:, :25]).abs().max() > 1e-3


def test_attention_stays_within_sequences():
    block = LM.Block(64)
    selection = Selection.of(torch.rand(4, 9), 0.4, mask=torch.tensor([True, True, False, True])[:, None].expand(4, 9))
    lengths = selection.cu_seqlens.diff().tolist()
    assert lengths[2] == 0
    assert len(set(lengths)) > 2
    qkv = torch.randn(len(selection.indices), 3 * 64)
    heads = LM.rotate(qkv.unflatten(-1, (3, -1, LM.HEAD_DIM)), selection.positions)
    expected = [
        F.scaled_dot_product_attention(*own.permute(1, 2, 0, 3), is_causal=True).transpose(0, 1).flatten(1)
        for own in heads.split(lengths)
    ]
    torch.testing.assert_close(block.attend(qkv, selection), torch.cat(expected))


def test_rotation_makes_products_depend_on_distance():
    q, k = torch.randn(2, LM.HEAD_DIM).double()
    heads = torch.stack([q, k, k])[None, :, None].repeat(10, 1, 1, 1)
    rotated = LM.rotate(heads, torch.arange(10))
    products = rotated[:, 0, 0] @ rotated[:, 1, 0].T
    for distance in range(-9, 10):
        own = products.diagonal(distance)
        torch.testing.assert_close(own, own[:1].expand_as(own), rtol=1e-5, atol=1e-4)
    assert torch.equal(rotated[:, 2], heads[:, 2])


def test_every_tenth_file_validates(text):
    name, training, validation = LM.read(text)
    assert name == "20 files of text"
    assert bytes(validation.tolist()).startswith(b"9: the cat")
    assert bytes(validation.tolist()).count(b"19: ") == 10
    assert bytes(training.tolist()).count(b"the cat") == 180
    _, training, validation = LM.read(text / "00.txt")
    assert bytes(torch.cat([training, validation]).tolist()) == (text / "00.txt").read_bytes()
    assert len(validation) == pytest.approx(len(training) / 9, rel=0.02)


def test_standard_library_is_the_default():
    name, training, validation = LM.read(None)
    assert "standard library of Python" in name
    assert len(training) > 1e6
    assert b"import" in bytes(validation[:100_000].tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing"], "no file or folder missing"),
        (["--sequence", "100000"], "holds too few bytes for sequences of 100000"),
        (["--dim", "33"], "--dim must be a multiple of 32, got 33"),
        (["--steps", "0"], "--steps must be >= 1, got 0"),
        (["--capacities", "1", "1.5"], r"--capacities must be in (0, 1], got [1.0, 1.5]"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(arguments, message, text, tmp_path, capsys):
    try:
        status = LM.main([*SMALL, "--text", str(text), "--out", str(tmp_path / "out"), *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_only_the_same_run_is_resumed(text, tmp_path, capsys):
    train(text, tmp_path, "--stop-after", "3")
    assert LM.main([*SMALL, "--text", str(text), "--out", str(tmp_path), "--resume", "--seed", "5"]) == 2
    assert "was written with other options" in capsys.readouterr().err


def transformer():
    torch.manual_seed(0)
    return PRUNING.VisionTransformer(2, 16, 2, 3)


@pytest.mark.parametrize("keep", [1, 5, 16])
def test_pruned_tokens_are_as_if_they_had_never_been(keep):
    block = transformer().blocks[0]
    tokens, gates, scores = torch.randn(3, 17, 16), -torch.rand(3, 17), torch.rand(3, 17)
    scores[0, 0] = -1.0  # and yet the class token stays
    best = 1 + scores[:, 1:].topk(keep, 1).indices.sort(1).values
    kept = torch.cat([torch.zeros(3, 1, dtype=torch.int64), best], 1)
    expected = block(tokens.gather(1, kept[..., None].expand(-1, -1, 16)), gates.gather(1, kept))
    output, kept_gates = block.prune(tokens, gates, scores, keep)
    torch.testing.assert_close(output, expected)
    assert torch.equal(kept_gates, gates.gather(1, kept))


def test_the_router_learns_through_the_gates():
    model = transformer()
    images, labels = PRUNING.load(0)[:2]
    loss = F.cross_entropy(model(images[:32], 4, "by importance", torch.default_generator), labels[:32])
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def prune(out, *arguments):
    """The numbers that a run of the vision transformer saves."""
    assert PRUNING.main(["--dim=32", "--heads=2", "--layers=2", *arguments, "--out", str(out)]) == 0
    return json.loads((out / "token_pruning.json").read_text())


def test_pruning_learns(tmp_path):
    result = prune(tmp_path, "--epochs=6", "--patch=4", "--learning-rate=0.01", "--seeds=3")
    assert result["kept"] == [1, 2, 3, 4]
    assert set(result["accuracy"]) == {"kept by importance", "kept by ink", "kept at random"}
    for [shares] in result["accuracy"].values():
        assert shares[-1] > 0.6
        assert shares[0] < shares[-1]
    assert result["accuracy"]["kept by ink"][0][0] > result["accuracy"]["kept at random"][0][0]
    assert len(result["milliseconds"]) == 4
    assert (tmp_path / "token_pruning.png").read_bytes().startswith(b"\x89PNG")


def test_a_seed_gives_one_pruning(tmp_path):
    arguments = ["--epochs=1", "--patch=4", "--seeds"]
    first, second = (prune(tmp_path, *arguments, "3", "4")["accuracy"] for _ in range(2))
    assert first == second
    assert all(three != four for three, four in first.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--heads", "3"], "--heads must be a divisor of 64, got 3"), (["--epochs", "0"], "--epochs must be >= 1, got 0")],
)
def test_wrong_usage_of_pruning(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        PRUNING.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
