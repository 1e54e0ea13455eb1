"""Keep the surprising words of a real text, project only those with several heads, and get the gradients.

Each word is scored by how badly the rest of the text predicts it. `matmul_with_importance` keeps the words
whose score reaches `top_p` and is among the `top_k` highest of their sequence, and multiplies the embeddings
of those head by head. The results are checked against `mhmatmul_ext.reference`, and timed against PyTorch.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import sys
import textwrap
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

from mhmatmul_ext import matmul_with_importance, reference, select_important

if TYPE_CHECKING:
    from collections.abc import Iterator

WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
SUFFIXES = (".md", ".rst", ".txt")
ULPS = 2  # allowed beyond twice PyTorch's error, for where PyTorch happens to be exact
BASELINE_ULPS = 64  # a baseline further off than this computes something else, and measures nothing
ROUNDS = 5  # of timing; the two sides take turns, so that a busy machine slows both

Result = tuple[Tensor, "Tensor | None", "Tensor | None"]
progress = partial(tqdm, leave=False, disable=None)  # a bar on stderr while it lasts, none if that is a file


class UserError(Exception):
    """Something that the user can put right, told in one line."""


class Parser(argparse.ArgumentParser):
    """Raises its errors, for them to be told like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise the message that argparse would print below the usage."""
        raise UserError(message)


class Call(NamedTuple):
    """The arguments of `matmul_with_importance`, in its order."""

    input: Tensor  # [b, s, h]
    weight: Tensor  # [h, e]
    probs: Tensor  # [b, s]
    grad_output: Tensor | None  # [t, nh, e]
    num_heads: int
    top_p: float
    top_k: int


def decode(name: str, data: bytes) -> str:
    """UTF-8 text, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_python_documents() -> tuple[str, str]:
    """The topics of `help()`, and the licence where it lies beside the standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python comes without pydoc_data.topics: name a file to read") from error
    name, bodies = "pydoc_data.topics", list(topics.values())
    licence = Path(os.__file__).parent / "LICENSE.txt"
    if licence.exists():
        name, bodies = f"{name} and {licence.name}", [*bodies, licence.read_text("utf-8")]
    # Topics repeat whole pages of one another: each paragraph is read once.
    paragraphs = dict.fromkeys(paragraph for body in bodies for paragraph in body.split("\n\n"))
    return f"{name} of Python {platform.python_version()}", "\n\n".join(paragraphs)


def read(source: str | None) -> tuple[str, str]:
    """Name and body of a text: a file, a folder, `-` for standard input, None for Python's own documents."""
    try:
        if source is None:
            return read_python_documents()
        if source == "-":
            return "standard input", decode("standard input", sys.stdin.buffer.read())
        path = Path(source)
        if not path.is_dir():
            return source, decode(source, path.read_bytes())
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        bodies = [decode(str(file), file.read_bytes()) for file in progress(files, "reading")]
        return f"{len(files)} text files in {source}", "\n\n".join(bodies)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or source}: {error.strerror}") from error


def surprisals(words: list[str]) -> list[float]:
    """Bits of surprise at each word, for one who knows the rest of the text and the word before.

    A bigram model whose prior, the add-half smoothed frequency of the single word, weighs 8 occurrences.
    Each word is left out of the counts that judge it, or it would predict itself.
    """
    before = ["", *words[:-1]]
    single, context, pair = Counter(words), Counter(before), Counter(zip(before, words, strict=True))

    def bits(previous: str, word: str) -> float:
        prior = (single[word] - 1 + 0.5) / (len(words) - 1 + 0.5 * len(single))
        return -math.log2((pair[previous, word] - 1 + 8 * prior) / (context[previous] - 1 + 8))

    return [bits(previous, word) for previous, word in zip(before, words, strict=True)]


def arrange(bits: list[float], s: int) -> Tensor:
    """Scores `[b, s]` in [0, 1]; what pads the last sequence scores NaN, which is never kept."""
    scores = torch.full((math.ceil(len(bits) / s), s), math.nan)
    scores.view(-1)[: len(bits)] = torch.tensor(bits) / max(bits)
    return scores


def build_call(words: list[str], probs: Tensor, options: argparse.Namespace) -> Call:
    """Embed each word by a random table and its position, and draw a weight and a gradient."""
    generator = torch.Generator().manual_seed(options.seed)
    h, nh, e, dtype = options.hidden, options.heads, options.embed, getattr(torch, options.dtype)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    ids = torch.zeros(probs.shape, dtype=torch.int64)  # padding passes for word 0; its score keeps it out
    ids.view(-1)[: len(words)] = torch.tensor([vocabulary[word] for word in words])
    table = torch.randn(len(vocabulary), h, generator=generator)
    position = 0.1 * torch.randn(probs.shape[1], h, generator=generator)
    input = (table[ids] + position).to(dtype)
    weight = (torch.randn(h, e, generator=generator) / math.sqrt(h / nh)).to(dtype)
    t = len(select_important(probs, options.top_p, options.top_k)[0])
    grad_output = torch.randn(t, nh, e, generator=generator).to(dtype)
    return Call(input, weight, probs, grad_output, nh, options.top_p, options.top_k)


def plain_selection(probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Indices of the kept tokens; which of the ties at the k-th score win, `topk` leaves open."""
    scores = probs.masked_fill(probs.isnan(), -math.inf)
    kth = scores.topk(top_k, dim=1).values[:, -1:]
    above, tied = scores > kth, scores == kth
    best = above | (tied & (tied.cumsum(dim=1) <= top_k - above.sum(dim=1, keepdim=True)))
    return (best & (scores >= top_p)).flatten().nonzero().flatten()


def plain_pytorch(
    input: Tensor,
    weight: Tensor,
    probs: Tensor,
    grad_output: Tensor | None,
    num_heads: int,
    top_p: float,
    top_k: int,
) -> Result:
    """`matmul_with_importance` in plain PyTorch, with gradients by autograd."""
    if grad_output is not None:
        input, weight = input.detach().requires_grad_(), weight.detach().requires_grad_()
    rows = input.flatten(0, 1).index_select(0, plain_selection(probs, top_p, top_k))
    head_dim = weight.shape[0] // num_heads
    heads, weights = rows.view(-1, num_heads, head_dim), weight.view(num_heads, head_dim, -1)
    output = torch.einsum("tnd,nde->tne", heads, weights).contiguous()
    if grad_output is None:
        return output, None, None
    grad_input, grad_weight = torch.autograd.grad(output, (input, weight), grad_output)
    return output.detach(), grad_input, grad_weight


def relative_error(result: Tensor | None, exact: Tensor | None) -> float:
    """The largest error over the largest magnitude; infinite for a result that is missing or misshapen."""
    if result is None or exact is None or result.shape != exact.shape:
        return math.inf
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


def check(call: Call) -> list[str]:
    """Compare selection, output and gradients with the reference, print the errors, return what is wrong."""
    wrong = []
    selection = (call.probs, call.top_p, call.top_k)
    ours, expected = select_important(*selection), reference.select_important(*selection)
    if not (torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])):
        wrong.append("the selection is not the reference's")
    if not torch.equal(plain_selection(*selection), expected[0]):
        wrong.append("plain PyTorch's selection is not the reference's")

    assert call.grad_output is not None
    input, weight, grad_output = (x.double() for x in (call.input, call.weight, call.grad_output))
    in_float64 = call._replace(input=input, weight=weight, grad_output=grad_output)
    runs = [
        (matmul_with_importance, call),
        (plain_pytorch, call),
        (reference.matmul_with_importance, in_float64),
    ]
    results = [function(*arguments) for function, arguments in progress(runs, "checking")]
    eps = torch.finfo(call.input.dtype).eps
    print("\nResults, and their largest error against the float64 reference, relative to its largest magnitude")
    print(f"  {'':<13}{'shape':<17}{'error':>9}{'allowed':>10}{'plain PyTorch':>16}")
    names = ("output", "grad_input", "grad_weight")
    for name, result, plain, exact in zip(names, *results, strict=True):
        error, plain_error = relative_error(result, exact), relative_error(plain, exact)
        allowed = 2 * plain_error + ULPS * eps
        shape = None if result is None else list(result.shape)
        print(f"  {name:<13}{shape!s:<17}{error:>9.1e}{allowed:>10.1e}{plain_error:>16.1e}")
        if not plain_error <= BASELINE_ULPS * eps:  # NaN is wrong too
            wrong.append(f"plain PyTorch's {name} is off by {plain_error:.1e}")
        if not error <= allowed:
            wrong.append(f"{name} is off by {error:.1e}, allowed is {allowed:.1e}")
    return wrong


def print_speed(call: Call) -> None:
    """Print how fast the package is as a multiple of plain PyTorch, by the medians of alternating rounds."""
    threads = torch.get_num_threads()
    print(f"\nSpeed in {str(call.input.dtype).removeprefix('torch.')} with {threads} threads")
    forward = call._replace(grad_output=None)
    for label, arguments in {"forward": forward, "forward + both gradients": call}.items():
        sides = [{"f": f, "x": arguments} for f in (matmul_with_importance, plain_pytorch)]
        timers = [Timer("f(*x)", globals=side, num_threads=threads) for side in sides]
        runs = progress(timers * ROUNDS, "timing")
        times = [timer.blocked_autorange(min_run_time=0.2).median for timer in runs]
        ratio = median(times[1::2]) / median(times[::2])
        print(f"  selection + {label:<26}{ratio:.2f}x as fast as plain PyTorch")


def mark(passage: str, kept: Iterator[bool]) -> str:
    """Put each kept word between control characters, of one column each, for lines to be cut alike."""
    return WORD.sub(lambda match: f"\1{match[0]}\2" if next(kept) else match[0], passage)


def print_passages(body: str, spans: list[tuple[int, int]], kept: set[int], s: int) -> None:
    """Print three sequences from over the text, with the kept words highlighted where they stand."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = ("\033[1;33m", "\033[0m") if colour else ("[", "]")
    b = math.ceil(len(spans) / s)
    for i in sorted({b // 5, b * 2 // 5, b * 5 // 6}):
        places = range(i * s, min((i + 1) * s, len(spans)))
        passage = body[spans[places[0]][0] : spans[places[-1]][1]]
        passage = "".join(c if c.isprintable() else " " for c in passage)
        passage = textwrap.fill(mark(" ".join(passage.split()), (j in kept for j in places)), 98)
        print(f"\nSequence {i + 1} of {b}")
        print(textwrap.indent(passage, "  ").replace("\1", begin).replace("\2", end))


def print_most_surprising(words: list[str], bits: list[float]) -> None:
    """Print the most surprising words; those after "the" would fill the list, so one for each word before."""
    after = {words[i - 1]: i for i in sorted(range(1, len(words)), key=lambda i: (bits[i], -i))}
    print("\nThe most surprising words, each after another word")
    for i in sorted(after.values(), key=lambda i: (-bits[i], i))[:10]:
        print(f"  {bits[i]:4.1f} bits  {words[i - 1]} {words[i]}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line and check its values."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0], epilog="Defaults are in parentheses.")
    add = parser.add_argument
    add("source", nargs="?", help=f"file, folder of {' '.join(SUFFIXES)} files, or - (Python's own documents)")
    add("--top-p", type=float, default=0.4, metavar="P", help="least score of a kept word (%(default)s)")
    add("--top-k", type=int, metavar="N", help="most words kept of a sequence (an eighth of them)")
    add("--words-per-sequence", type=int, default=64, metavar="N", help="length of a sequence (%(default)s)")
    add("--max-words", type=int, default=60_000, metavar="N", help="words to read at most (%(default)s)")
    add("--hidden", type=int, default=512, metavar="N", help="size of a word's embedding (%(default)s)")
    add("--heads", type=int, default=8, metavar="N", help="a divisor of --hidden (%(default)s)")
    add("--embed", type=int, default=64, metavar="N", help="size of each head's result (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of all that is drawn by lot (%(default)s)")
    options = parser.parse_args(argv)

    if options.top_k is None:
        options.top_k = max(1, options.words_per_sequence // 8)
    for name in ("words_per_sequence", "top_k", "max_words", "hidden", "heads", "embed"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.top_k > options.words_per_sequence:
        raise UserError(f"--top-k must be at most {options.words_per_sequence}, got {options.top_k}")
    if not 0 <= options.top_p <= 1:
        raise UserError(f"--top-p must be in [0, 1], got {options.top_p}")
    if options.hidden % options.heads:
        raise UserError(f"--heads must be a divisor of {options.hidden}, got {options.heads}")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be in [0, 2**63), got {options.seed}")
    return options


def demo(options: argparse.Namespace) -> int:
    """Read, score, select, project, check and time; 0 when the results are right, else 1."""
    name, body = read(options.source)
    spans = [match.span() for match in islice(WORD.finditer(body), options.max_words)]
    words = [body[start:end].casefold() for start, end in spans]
    n, different = len(words), len(set(words))
    if different < 2:
        raise UserError(f"at least two different words are needed, got {different} from {name}")
    bits = surprisals(words)
    call = build_call(words, arrange(bits, options.words_per_sequence), options)
    kept = select_important(call.probs, call.top_p, call.top_k)[0].tolist()
    b, s = call.probs.shape
    print(f"Read {n:,} words, {different:,} of them different, from {name}")
    print(f"  in {b:,} sequences of {s}; a score is the surprise over the highest, {max(bits):.1f} bits")
    share = f"{len(kept):,} ({len(kept) / n:.1%})"
    print(f"Kept {share}: a score of at least {call.top_p:g}, at most {call.top_k} a sequence")
    print_passages(body, spans, set(kept), s)
    print_most_surprising(words, bits)
    if wrong := check(call):
        print(f"FAILED: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    print_speed(call)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the demo. Exit codes: 0 all right, 1 wrong results, 2 an error of the user."""
    try:
        status = demo(parse_arguments(argv))
        sys.stdout.flush()
    except UserError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # such as `head`, which has read enough; what is left must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    raise SystemExit(main())
