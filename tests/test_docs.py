"""What the documentation shows is true: README snippets, docstring examples, and the demo run."""

from __future__ import annotations

import doctest
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.tensor.parallel
from composability import COLUMNS, ROWS, applies, markdown
from torch.distributed.tensor.experimental import local_map

import mhmatmul_ext
from mhmatmul_ext import functional, nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FUNCTIONS = ["combine", "matmul_with_multi_head", "select_important", "matmul_with_importance"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


SNIPPETS = snippets(README, "python")


def test_readme_has_snippets():
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for snippet in snippets(page.read_text(), "python"):
        exec(compile(snippet, page.name, "exec"), namespace)


def test_no_snippet_is_left_out():
    """Python is run, here or below; the shell's commands are those of the Makefile and of the tests of the package."""
    for page in PAGES:
        languages = re.findall(r"^```(\S+)", page.read_text(), re.MULTILINE)
        directives = {language for language in languages if language.startswith("{")}
        assert set(languages) - directives <= {"python", "py", "sh"}
        assert directives <= {"{include}", "{literalinclude}", "{toctree}", "{eval-rst}", "{image}"}
        assert page.name == "README.md" or not snippets(page.read_text(), "py")


def test_distributed_snippets_run():
    """On a mesh of one process, which is enough for everything but sending."""
    parallelize, local = snippets(README, "py")
    example = runpy.run_path(str(ROOT / "examples" / "tensor_parallel.py"))
    names = {**vars(torch.distributed.tensor.parallel), **vars(torch.distributed.tensor), **vars(mhmatmul_ext)}
    names |= {"local_map": local_map, "HeadParallel": example["HeadParallel"]}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        names["mesh"] = torch.distributed.init_device_mesh("cpu", (1,))
        block, batch = example["Block"](), torch.randn(2, 6, example["WIDTH"])
        expected = block(batch)
        names["block"] = block
        exec(compile(parallelize, "README.md", "exec"), names)
        torch.testing.assert_close(block(batch), expected)
        assert isinstance(block.heads.weight, torch.distributed.tensor.DTensor)

        exec(compile(local, "README.md", "exec"), names)
        operands = torch.randn(2, 100, 8), torch.randn(8, 3), torch.rand(2, 100)
        placements = names["by_batch"], names["whole"], names["by_batch"]
        placed = [
            torch.distributed.tensor.distribute_tensor(operand, names["mesh"], own)
            for operand, own in zip(operands, placements, strict=True)
        ]
        exact = functional.matmul_with_importance(*operands, num_heads=4, top_p=0.7, capacity=64)[0]
        torch.testing.assert_close(names["keep"](*placed).to_local(), exact)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_site_builds(tmp_path):
    """Without a warning, every page, with what it takes from README.md and from docstrings."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", ROOT / "docs", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = {
        "index": "Two matrix products that PyTorch lacks",
        "getting_started": "Two commands",
        "contract": "The selection is exact, deterministic and the same on CPU and CUDA",
        "speed": "the bytes decide",
        "recipes": "Monarch",
        "composability": "nothing to prove",
        "distributed": "heads",
        "trust": "planted for it",
        "contributing": "Adding a backend",
        "changelog": mhmatmul_ext.__version__,
    }
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} == set(expected)
    for page, text in expected.items():
        assert text in re.sub(r"<[^>]*>", "", (tmp_path / f"{page}.html").read_text()), page
    for picture in ("h200", "mixture_of_depths_lm-float32", "token_pruning"):
        assert (tmp_path / "_images" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


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
