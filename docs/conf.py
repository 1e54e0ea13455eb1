"""Sphinx. Pages are sections of README.md and CONTRIBUTING.md, the API is the docstrings, the picture is drawn anew."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mhmatmul_ext import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "2026-11-28-h200.json"

project, release, version = "mhmatmul_ext", __version__, __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme, html_title, html_show_copyright = "furo", f"mhmatmul_ext {__version__}", False
html_static_path, html_css_files = ["style"], ["tables.css"]
exclude_patterns = ["generated/*.md"]
napoleon_custom_sections = ["Shapes"]
default_role = "code"  # a single backtick
autodoc_typehints, autodoc_member_order = "none", "bysource"  # types stand in the signatures' descriptions
autodoc_inherit_docstrings = False


def draw(app: Sphinx) -> None:
    """The picture of the speed on a GPU, from the committed record."""
    picture = Path(app.srcdir, "generated", "h200.png")
    picture.parent.mkdir(exist_ok=True)
    subprocess.run([sys.executable, ROOT / "benchmarks" / "plot.py", RECORD, picture], check=True)


def link_sources(app: Sphinx, path: Path, docname: str, content: list[str]) -> None:
    """Files of the repository that an included page links to can be downloaded from the site."""
    content[0] = re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:)", r"\1path:../", content[0])


def setup(app: Sphinx) -> None:
    """Draw before the pages are read."""
    app.connect("builder-inited", draw)
    app.connect("include-read", link_sources)
