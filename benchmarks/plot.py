"""Draw what gpu.py measured: the share of the floor that each way reaches, shape by shape. Needs matplotlib."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from command import Parser, UserError, exit_code

MODES = ("graph cold", "graph hot", "mixed cold", "stream cold", "eager cold", "eager hot")


def load(path: Path) -> dict[str, Any]:
    """The record of a run on a GPU."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(record, dict) or "gpu" not in record.get("environment", {}):
        raise UserError(f"{path} is not a record of gpu.py")
    return record


def find_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        raise UserError("matplotlib is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def draw_kind(axes: Any, kind: str, timings: list[dict[str, Any]]) -> None:
    """Bars of all ways, grouped by shape."""
    shapes = list(dict.fromkeys(t["shape"] for t in timings))
    names = list(dict.fromkeys(t["name"] for t in timings))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        own = [t for t in timings if t["name"] == name]
        places = [shapes.index(t["shape"]) + (i - (len(names) - 1) / 2) * width for t in own]
        label = f"{name} (mhmatmul_ext)" if own[0]["ours"] else name
        axes.bar(places, [100 * t["of floor"] for t in own], width, label=label, hatch=None if own[0]["ours"] else "//")
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_ylim(0, 110)  # a copy, which computes nothing, may be far beyond
    axes.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
    axes.set_ylabel("% of the floor")
    axes.set_title(kind, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def plot(argv: list[str] | None) -> None:
    """Read, draw, write."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0], epilog="Defaults are in parentheses.")
    add = parser.add_argument
    add("record", type=Path, metavar="JSON", help="written by gpu.py")
    add("picture", type=Path, metavar="PICTURE", help="to write, .png or .svg")
    add("--dtype", default="bfloat16", metavar="NAME", help="(%(default)s)")
    add("--mode", choices=MODES, default=MODES[0], help="(%(default)s)")
    options = parser.parse_args(argv)
    if options.picture.suffix not in (".png", ".svg"):
        raise UserError(f"the picture must end in .png or .svg, got {options.picture}")
    if not options.picture.parent.is_dir():
        raise UserError(f"there is no folder {options.picture.parent}")
    record = load(options.record)
    timings = [t for t in record["timings"] if (t["dtype"], t["mode"]) == (options.dtype, options.mode)]
    if not timings:
        raise UserError(f"{options.record} has no times of {options.dtype}, {options.mode}")
    pyplot = find_pyplot()
    kinds = list(dict.fromkeys(t["kind"] for t in timings))
    figure, all_axes = pyplot.subplots(len(kinds), squeeze=False, figsize=(14, 3.5 * len(kinds)), layout="constrained")
    for axes, kind in zip(all_axes[:, 0], kinds, strict=True):
        draw_kind(axes, kind, [t for t in timings if t["kind"] == kind])
    here = record["environment"]
    title = f"{here['gpu']}, torch {here['torch']}, {options.dtype}, {options.mode} L2, commit {here['commit']}"
    figure.suptitle(title)
    figure.savefig(options.picture, dpi=120)
    print(f"Written: {options.picture}")


def main(argv: list[str] | None = None) -> int:
    """Draw."""
    return exit_code(Path(__file__).name, lambda: plot(argv))


if __name__ == "__main__":
    raise SystemExit(main())
