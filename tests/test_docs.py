"""What the documentation shows is true: README snippets, docstring examples, and the demo run."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composability import COLUMNS, ROWS, applies, markdown

import mhmatmul_ext
from mhmatmul_ext import functional, nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FUNCTIONS = ["combine", "matmul_with_multi_head", "select_important", "matmul_with_importance"]
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_readme_has_snippets():
    assert len(SNIPPETS) >= 4


def test_readme_snippets_run():
    """In order, in one namespace, as a reader would type them."""
    namespace: dict = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), namespace)


def test_readme_shows_the_composability_table():
    cells = {(row.name, column): "✓" for row in ROWS for column in COLUMNS if applies(column, row)}
    assert "\n".join(markdown(cells)) in README


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_examples(name):
    function = getattr(functional, name)
    names = {"torch": torch} | {public: getattr(mhmatmul_ext, public) for public in mhmatmul_ext.__all__}
    examples = doctest.DocTestFinder().find(function, name, globs=names)
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(result.attempted for result in results) >= 2
    assert sum(result.failed for result in results) == 0


def test_docstring_examples_of_modules():
    names = {"torch": torch, **{name: getattr(nn, name) for name in nn.__all__}}
    examples = [example for example in doctest.DocTestFinder().find(nn, globs=names) if example.examples]
    assert len(examples) >= 4
    assert sum(doctest.DocTestRunner().run(example).failed for example in examples) == 0


def test_public_functions_and_reference_have_one_signature():
    for name in FUNCTIONS:
        ours, theirs = (getattr(module, name) for module in (functional, mhmatmul_ext.reference))
        arguments = ours.__code__.co_varnames[: ours.__code__.co_argcount + ours.__code__.co_kwonlyargcount]
        assert arguments == theirs.__code__.co_varnames[: len(arguments)]
        assert (ours.__defaults__, ours.__kwdefaults__) == (theirs.__defaults__, theirs.__kwdefaults__)


@pytest.mark.slow
def test_demo_on_a_file(tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 30 + "a zebra surprised everyone\n")
    command = [sys.executable, ROOT / "examples" / "important_words.py", text]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "zebra" in result.stdout
    assert "as fast as plain PyTorch" in result.stdout


@pytest.mark.slow
def test_demo_says_what_is_wrong(tmp_path):
    command = [sys.executable, ROOT / "examples" / "important_words.py", tmp_path / "missing.txt"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "missing.txt" in result.stderr
    assert "Traceback" not in result.stderr
