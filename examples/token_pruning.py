"""Show a small vision transformer only some tokens of scikit-learn's digits, and see what its accuracy loses.

A router scores every patch of the digit, and only the best enter the model; the class token is protected by a mask.
The first projection reads the kept rows by `matmul_with_importance`. Accuracy against tokens kept is drawn beside two
controls, each trained in its own way: the patches with most ink, and patches drawn by lot.

    python examples/token_pruning.py --patch 1 --seeds 0
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, as everybody writes it
from tqdm import tqdm

from mhmatmul_ext import matmul_with_importance, select_important
from mhmatmul_ext.nn import HeadwiseLinear

SIDE, CLASSES = 8, 10  # of the digits
BATCH = 64
SHARPNESS = 8  # of the router's scores: at 1 it learns too slowly to be of use
TIMING_ROUNDS = 21
WAYS = ("by importance", "by ink", "at random")


class Block(nn.Module):
    """Attention whose heads project their own features, and a feed-forward layer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv, self.out = HeadwiseLinear(dim, 3 * dim, heads, bias=False), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """Tokens `[b, s, dim]` to the same; a gate `[b, s]`, by its logarithm, is how much of a token others see."""
        return self.after(tokens, self.qkv(self.norms[0](tokens)), gates)

    def prune(self, tokens: Tensor, gates: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """The same for the class token and the `keep` best alone: `[b, keep + 1, dim]`, and their gates."""
        protected = torch.zeros_like(scores, dtype=torch.int8)
        protected[:, 0] = 1  # the class token stays, whatever it scores
        weight, heads = self.qkv.weight.flatten(0, 1), self.qkv.num_heads
        rows = self.norms[0](tokens)
        qkv = matmul_with_importance(rows, weight, scores, None, heads, 0.0, keep + 1, mask=protected)[0]
        indices = select_important(scores, 0.0, keep + 1, mask=protected)[0]
        sizes = (len(tokens), keep + 1)
        tokens, gates = tokens.flatten(0, 1)[indices].unflatten(0, sizes), gates.flatten()[indices].view(sizes)
        return self.after(tokens, qkv.view(*sizes, -1), gates), gates

    def after(self, tokens: Tensor, qkv: Tensor, gates: Tensor) -> Tensor:
        """What follows the first projection, `[b, s, 3 * dim]`."""
        q, k, v = qkv.unflatten(-1, (self.qkv.num_heads, -1)).transpose(1, 2).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=gates[:, None, None])
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        output: Tensor = tokens + self.down(F.gelu(self.up(self.norms[1](tokens))))
        return output


class VisionTransformer(nn.Module):
    """Patches of a digit and a class token, pruned on their way into the first block."""

    def __init__(self, patch: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.patch, self.tokens = patch, (SIDE // patch) ** 2
        self.embed = nn.Linear(patch**2, dim)
        self.positions = nn.Parameter(torch.randn(1 + self.tokens, dim) / dim**0.5)
        self.router = nn.Linear(dim, 1)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, images: Tensor, keep: int, way: str, lot: torch.Generator) -> Tensor:
        """Images `[b, 8, 8]` to logits `[b, 10]` by `keep` patches, chosen in one of the `WAYS`."""
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch).flatten(3).flatten(1, 2)
        tokens = F.pad(self.embed(patches), (0, 0, 1, 0)) + self.positions
        gates = torch.zeros(tokens.shape[:2])
        if way == "by importance":  # learned: the router gets its gradient through the gates
            routed = SHARPNESS * self.router(tokens).squeeze(-1)
            scores, gates = routed.sigmoid(), torch.cat([gates[:, :1], F.logsigmoid(routed[:, 1:])], 1)
        else:
            scores = F.pad(patches.sum(-1), (1, 0)) if way == "by ink" else torch.rand(gates.shape, generator=lot)
        first, *others = self.blocks
        tokens, gates = first.prune(tokens, gates, scores, keep)  # type: ignore[operator]
        for block in others:
            tokens = block(tokens, gates)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


Data = tuple[Tensor, Tensor, Tensor, Tensor]  # images and labels to train with, and to test with


def load(seed: int) -> Data:
    """scikit-learn's 1797 digits, a fifth of them for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed)
    images, test_images, labels, test_labels = map(torch.as_tensor, parts)
    return images.float() / 16, labels, test_images.float() / 16, test_labels


def train(data: Data, way: str, seed: int, options: argparse.Namespace) -> VisionTransformer:
    """A model; each step draws how many tokens to keep."""
    torch.manual_seed(seed)
    model = VisionTransformer(options.patch, options.dim, options.heads, options.layers)
    steps = options.epochs * (len(data[0]) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps)
    for _ in tqdm(range(steps), f"seed {seed}, kept {way}", leave=False, disable=None):
        batch = torch.randint(len(data[0]), (BATCH,))
        keep = int(torch.randint(1, model.tokens + 1, ()))
        loss = F.cross_entropy(model(data[0][batch], keep, way, torch.default_generator), data[1][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: VisionTransformer, data: Data, keep: int, way: str) -> float:
    """Share of the test digits that are recognised with `keep` tokens."""
    logits = model(data[2], keep, way, torch.Generator().manual_seed(keep))
    return int((logits.argmax(1) == data[3]).sum()) / len(logits)


@torch.no_grad()
def milliseconds(model: VisionTransformer, images: Tensor, keeps: list[int]) -> list[float]:
    """Of the test set, median; the numbers of tokens take turns, so that a busy machine slows them alike."""
    times: list[list[float]] = [[] for _ in keeps]
    for _ in range(TIMING_ROUNDS):
        for own, keep in zip(times, keeps, strict=True):
            begin = time.perf_counter()
            model(images, keep, "by importance", torch.default_generator)
            own.append(1e3 * (time.perf_counter() - begin))
    return [median(own) for own in times]


def plot(result: dict[str, Any], file: Path) -> None:
    """Accuracy against tokens kept, and the time of a forward pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, runs in result["accuracy"].items():
        low, high = (list(map(ends, zip(*runs, strict=True))) for ends in (min, max))
        line = left.plot(result["kept"], [100 * mean(own) for own in zip(*runs, strict=True)], marker=".", label=label)
        band = [[100 * value for value in side] for side in (low, high)]
        left.fill_between(result["kept"], *band, color=line[0].get_color(), alpha=0.15)
    left.set(xlabel=f"tokens kept of {result['tokens']}", ylabel="% of test digits recognised")
    left.legend()
    right.plot(result["kept"], result["milliseconds"], marker=".")
    right.set(xlabel=f"tokens kept of {result['tokens']}", ylabel="ms for the test set, forward", ylim=0)
    for axis in (left, right):
        axis.set(xlim=0)
        axis.grid(alpha=0.3)
    figure.suptitle(f"mean and range of {len(result['seeds'])} seeds, {result['threads']} threads", fontsize=10)
    figure.savefig(file, dpi=100)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--patch", type=int, choices=[1, 2, 4], default=2, help="side of a token, in pixels (%(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=60, help="of each training (%(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="a split and three models each (%(default)s)"
    )
    parser.add_argument("--dim", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="a divisor of --dim (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="blocks (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the highest (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("token_pruning"), help="a folder (%(default)s)")
    options = parser.parse_args(argv)
    for name in ("epochs", "dim", "heads", "layers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(options, name)}")
    if options.dim % options.heads:
        parser.error(f"--heads must be a divisor of {options.dim}, got {options.heads}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Train, prune, save numbers and picture."""
    options = parse_arguments(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[float]]] = {}
    for seed in options.seeds:
        data = load(seed)
        for way in WAYS:
            model = train(data, way, seed, options)
            kept = sorted({count for i in range(8) for count in (2**i, 3 * 2**i) if count <= model.tokens})
            shares = [accuracy(model, data, keep, way) for keep in kept]
            curves.setdefault(f"kept {way}", []).append(shares)
            print(f"seed {seed}, kept {way}: " + ", ".join(f"{k}: {a:.1%}" for k, a in zip(kept, shares, strict=True)))
    result = {"tokens": model.tokens, "kept": kept, "seeds": options.seeds, "accuracy": curves}
    result |= {"milliseconds": milliseconds(model, data[2], kept), "test digits": len(data[2])}
    sizes = ("patch", "epochs", "dim", "heads", "layers", "learning_rate")
    result |= {size: getattr(options, size) for size in sizes}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    file = options.out / f"{Path(__file__).stem}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, file.with_suffix(".png"))
    print(f"{file} and {file.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
