"""Train a byte-level language model on real text, dense and with Mixture-of-Depths, each with the same FLOPs.

Every other block sees only a share of the tokens, the capacity. All models spend the FLOPs of the dense one, so those
that spend less on a step take more steps. The validation loss is causal: blocks choose tokens by their own score, as
in generation, not by rank as in training; the loss with the training's choice, which looks ahead, is saved beside it.

    python examples/mixture_of_depths_lm.py --dtype bfloat16
    python examples/mixture_of_depths_lm.py --text my/notes --steps 2000 --resume
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, as everybody writes it
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from mhmatmul_ext.nn import MixtureOfDepths, Selection

HEAD_DIM = 32
DENSE = 1.0  # the capacity of a model without routers
AUXILIARY = 0.01  # weight of the routers' loss
VALIDATION_SEQUENCES = 64
OUTSIDE_THE_LIBRARY = {"site-packages", "test", "tests"}  # installed by others, or not written to be read

aten: Any = torch.ops.aten
ATTENTION_FLOPS = {  # of the CPU's kernels, which FlopCounterMode leaves out
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class UserError(Exception):
    """Something that the user can put right, told in one line."""


class Block(nn.Module):
    """Attention and a feed-forward layer; the result is what is to be added to the tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, tokens: Tensor, selection: Selection) -> Tensor:
        """Tokens `[t, dim]` of several sequences, in order; each attends to those before it in its own."""
        attended = self.out(self.attend(self.qkv(self.norms[0](tokens)), selection))
        update: Tensor = attended + self.down(F.gelu(self.up(self.norms[1](tokens + attended))))
        return update

    def attend(self, qkv: Tensor, selection: Selection) -> Tensor:
        """Causal attention `[t, 3 * dim]` to `[t, dim]`; places left over lie at the end, where no token looks."""
        b, n = len(selection.cu_seqlens) - 1, selection.max_seqlen
        lengths = selection.cu_seqlens.diff().long()
        before = (torch.arange(b) * n - selection.cu_seqlens[:-1]).repeat_interleave(lengths, output_size=len(qkv))
        places = torch.arange(len(qkv)) + before
        heads = rotate(qkv.unflatten(-1, (3, -1, HEAD_DIM)), selection.positions)
        padded = heads.new_zeros(b * n, *heads.shape[1:]).index_copy(0, places, heads)
        q, k, v = padded.unflatten(0, (b, n)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.transpose(1, 2).flatten(0, 1).index_select(0, places).flatten(1)


def rotate(heads: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) for the queries and keys of `[t, 3, nh, hd]`."""
    frequencies = 1e4 ** -torch.linspace(0, 1, HEAD_DIM // 2 + 1)[:-1]
    angles = (positions[:, None] * frequencies)[:, None, None]
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads[:, :2].chunk(2, -1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
    return torch.cat([rotated, heads[:, 2:]], 1)


class LanguageModel(nn.Module):
    """Predicts the next byte; every other block is routed unless the capacity is 1."""

    def __init__(self, dim: int, layers: int, capacity: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(
            MixtureOfDepths(Block(dim), dim, capacity=capacity, top_p=0.5) if i % 2 and capacity < DENSE else Block(dim)
            for i in range(layers)
        )
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes `[b, s]` to logits `[b, s, 256]`, and the routers' own loss."""
        tokens, auxiliary = self.embed(input), torch.zeros(())
        every = Selection.of(torch.zeros(input.shape), 0.0)
        for block in self.blocks:
            if isinstance(block, MixtureOfDepths):
                tokens, routing = block(tokens, return_routing=True)
                auxiliary = auxiliary + routing.auxiliary_loss()
            else:
                tokens = tokens + block(tokens.flatten(0, 1), every).view_as(tokens)
        return self.head(self.norm(tokens)), auxiliary


def read(source: Path | None) -> tuple[str, Tensor, Tensor]:
    """Name of the text, training and validation bytes: every tenth file of a folder validates, of a file its end."""
    if source is not None and source.is_file():
        data = torch.frombuffer(bytearray(source.read_bytes()), dtype=torch.uint8)
        return source.name, data[: -len(data) // 10], data[-len(data) // 10 :]
    folder = source or Path(os.__file__).parent
    if not folder.is_dir():
        raise UserError(f"--text: no file or folder {source}")
    suffixes = {".py"} if source is None else {".md", ".py", ".rst", ".txt"}
    names = sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    if source is None:
        names = [path for path in names if not OUTSIDE_THE_LIBRARY & set(path.relative_to(folder).parts)]
    bodies = [path.read_bytes() for path in tqdm(names, "reading", leave=False, disable=None)]
    parts = (b"".join(body for i, body in enumerate(bodies) if (i % 10 == 9) == last) for last in (False, True))
    training, validation = (torch.frombuffer(bytearray(part or b"\n"), dtype=torch.uint8) for part in parts)
    name = f"the standard library of Python {platform.python_version()}" if source is None else folder.name
    return f"{len(names)} files of {name}", training, validation


def windows(text: Tensor, starts: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Bytes `[b, s]` and the bytes that follow each."""
    rows = text[starts[:, None] + torch.arange(s + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, input: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats per byte, and the routers' loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits, auxiliary = model(input)
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten()), auxiliary


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Losses on the same windows every time: causal, and with the training's choice of tokens."""
    starts = torch.linspace(0, len(text) - options.sequence - 1, VALIDATION_SEQUENCES).long()
    losses = {}
    for name, training in {"loss": False, "loss, chosen by rank": True}.items():
        model.train(training)
        parts = [
            loss_of(model, *windows(text, some, options.sequence), options.dtype)[0]
            for some in starts.split(options.batch)
        ]
        losses[name] = torch.stack(parts).mean().item()
    return losses


def count_flops(model: nn.Module, input: Tensor, target: Tensor, dtype: torch.dtype) -> int:
    """Of one training step, forward and backward; the same for every step."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        torch.stack(loss_of(model.train(), input, target, dtype)).sum().backward()
    model.zero_grad()
    flops: int = counter.get_total_flops()
    return flops


def learning_rate(done: float, highest: float) -> float:
    """For a share of the FLOPs done: up for a twentieth, then down by a cosine to a tenth."""
    return highest * min(20 * done + 0.01, 0.55 + 0.45 * math.cos(math.pi * done))


def train(capacity: float, texts: tuple[Tensor, Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """One curve. Of `--seed`, options and text every number in it follows, but for the times."""
    torch.manual_seed(options.seed)
    model = LanguageModel(options.dim, options.layers, capacity)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(options.seed)
    draw_starts = partial(torch.randint, len(texts[0]) - options.sequence, (options.batch,), generator=generator)
    sample = windows(texts[0], torch.arange(options.batch), options.sequence)
    flops = count_flops(model, *sample, options.dtype)
    dense = LanguageModel(options.dim, options.layers, DENSE)
    steps = round(options.steps * count_flops(dense, *sample, options.dtype) / flops)
    due = {round(steps * i / options.points) for i in range(options.points + 1)}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "points": []}

    file = options.out / f"checkpoint-{capacity:g}-{options.name}.pt"
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("out", "resume", "stop_after")}
    if options.resume and file.exists():
        saved = torch.load(file)
        if saved["settings"] != settings:
            raise UserError(f"--resume: {file} was written with other options; repeat them, or leave --resume out")
        state = saved["state"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])

    label = "dense" if capacity == DENSE else f"capacity {capacity:.1%}"
    bar = tqdm(total=steps, initial=state["step"], desc=label, leave=False, disable=None)
    while True:
        step = state["step"]
        if step in due and (not state["points"] or state["points"][-1]["step"] < step):
            point = {"step": step, "flops": step * flops, "seconds": state["seconds"]}
            state["points"].append(point | validate(model, texts[1], options))
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved = {"settings": settings, "state": state, "generator": generator.get_state(), **parts}
            torch.save(saved, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)  # a checkpoint is whole or not there
            bar.set_postfix(validation=f"{state['points'][-1]['loss']:.3f}")
        if step >= min(steps, options.stop_after or steps):
            break
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, options.learning_rate)
        loss, auxiliary = loss_of(model.train(), *windows(texts[0], draw_starts(), options.sequence), options.dtype)
        optimizer.zero_grad()
        (loss + AUXILIARY * auxiliary).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state["step"], state["seconds"] = step + 1, state["seconds"] + time.perf_counter() - begin
        bar.update()
    bar.close()
    print(f"{label:>16}: {state['step']} steps in {state['seconds']:.0f} s, loss {state['points'][-1]['loss']:.3f}")
    return {"label": label, "capacity": capacity, "flops_per_step": flops, "points": state["points"]}


def plot(curves: list[dict[str, Any]], title: str, file: Path) -> None:
    """Validation loss against wall time and against FLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (key, unit, name) in zip(
        axes, [("seconds", 1, "seconds of training"), ("flops", 1e12, "TFLOP")], strict=True
    ):
        for curve in curves:
            points = curve["points"][1:]  # without the untrained model's
            axis.plot([p[key] / unit for p in points], [p["loss"] for p in points], label=curve["label"], marker=".")
        axis.set(xlabel=name, xlim=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats per byte")
    axes[1].legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=100)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, help="a file or a folder (the standard library's sources)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 by autocast")
    parser.add_argument(
        "--capacities", type=float, nargs="+", default=[DENSE, 0.5, 0.125], help="%(default)s; 1: dense"
    )
    parser.add_argument(
        "--steps", type=int, default=700, help="of the dense model; the others get its FLOPs (%(default)s)"
    )
    parser.add_argument("--points", type=int, default=14, help="of each curve, with a checkpoint each (%(default)s)")
    parser.add_argument("--dim", type=int, default=128, help=f"a multiple of {HEAD_DIM} (%(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="blocks (%(default)s)")
    parser.add_argument("--sequence", type=int, default=256, help="bytes (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the highest (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mixture_of_depths_lm"), help="a folder (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="leave each model there, to be resumed")
    options = parser.parse_args(argv)
    for name in ("steps", "points", "dim", "layers", "sequence", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(options, name)}")
    if options.dim % HEAD_DIM:
        parser.error(f"--dim must be a multiple of {HEAD_DIM}, got {options.dim}")
    if not all(0 < capacity <= 1 for capacity in options.capacities):
        parser.error(f"--capacities must be in (0, 1], got {options.capacities}")
    options.name, options.dtype = options.dtype, getattr(torch, options.dtype)
    return options


def main(argv: list[str] | None = None) -> int:
    """Train every model, save numbers and picture. Exit codes: 0 done, 2 an error of the user."""
    options = parse_arguments(argv)
    try:
        name, *texts = read(options.text)
        if min(map(len, texts)) <= options.sequence + 1:
            raise UserError(f"--text: {name} holds too few bytes for sequences of {options.sequence}")
        options.out.mkdir(parents=True, exist_ok=True)
        print(f"{len(texts[0]):,} bytes to learn and {len(texts[1]):,} to validate, {name}")
        curves = [train(capacity, (texts[0], texts[1]), options) for capacity in options.capacities]
        title = f"{name}, {options.name}, {torch.get_num_threads()} threads"
        about = {"text": name, "dtype": options.name, "torch": torch.__version__, "threads": torch.get_num_threads()}
        sizes = ("steps", "dim", "layers", "sequence", "batch", "learning_rate", "seed")
        about |= {size: getattr(options, size) for size in sizes}
        result = options.out / f"{Path(__file__).stem}-{options.name}.json"
        result.write_text(json.dumps(about | {"curves": curves}, indent=1) + "\n")
        plot(curves, title, result.with_suffix(".png"))
        print(f"{result} and {result.with_suffix('.png').name}")
    except UserError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last point", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
