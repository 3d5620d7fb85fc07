"""Everything the documentation shows is run: ```python blocks of README.md and docs/, and the docstrings' examples.

The blocks of one file run in order in one namespace, as a reader would type them. `<!-- no-run: the reason -->` on the
line before a block skips it; the reason is mandatory.
"""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import teleport_fast as tf

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "teleport_fast"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!--\s*no-run:(?P<reason>[^>]*)-->\s*\n)?"
    r"^(?P<indent>[ \t]*)```python[ \t]*\n(?P<code>.*?)^[ \t]*```",
    re.M | re.S,
)
OPTIONAL = {"triton", "transformers", "lightning", "accelerate", "tensorboard", "pandas", "matplotlib", "sklearn", "typer", "rich"}


def blocks(text: str) -> list[tuple[int, str, str | None]]:
    """(line number, code, reason not to run or None) of each python block of a page."""
    found = []
    for match in BLOCK.finditer(text):
        indent, reason = match["indent"], match["reason"]
        code = "\n".join(line.removeprefix(indent) for line in match["code"].splitlines()) + "\n"
        found.append((text.count("\n", 0, match.start("code")), code, None if reason is None else reason.strip()))
    return found


def run(path: Path, text: str) -> int:
    """Runs a page's blocks in one namespace; the number that ran. A traceback names the page and its own line."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for line, code, reason in blocks(text):
        if reason is None:
            exec(compile("\n" * line + code, str(path), "exec", dont_inherit=True), namespace)
            ran += 1
    return ran


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def modules_with_examples() -> list[str]:
    """Dotted names of the package's modules whose source holds a doctest prompt."""
    files = [path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text()]
    # Path.rglob does not enter symlinks on every Python version, so the kernels' own folder is read as well.
    files += [PACKAGE / "kernels" / path.name for path in (ROOT / "kernels").glob("*.py") if ">>> " in path.read_text()]
    return sorted({".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.read_text())], ids=title)
def test_every_python_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    assert run(page, text) == sum(reason is None for _, _, reason in blocks(text))


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_a_block_is_skipped_only_with_a_reason(page: Path) -> None:
    unexplained = [line for line, _, reason in blocks(page.read_text()) if reason is not None and len(reason) < 10]
    assert not unexplained, f"{page.name}: blocks at lines {unexplained} say no-run without a reason"


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples_print_what_they_say(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in OPTIONAL:
            pytest.skip(f"{name} needs {error.name}, which is not installed")
        raise
    # As numpy's docstrings take np for granted, ours take torch and tf; anything else is imported by the example.
    names, flags = {"torch": torch, "tf": tf}, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(module, extraglobs=names, optionflags=flags)
    assert result.attempted > 0, f"{name} has a prompt that doctest does not find: is it in a docstring?"
    assert result.failed == 0, f"{name}: {result.failed} of {result.attempted} examples failed, see the output above"


def test_the_readme_shows_code_that_runs() -> None:
    assert any(reason is None for _, _, reason in blocks((ROOT / "README.md").read_text()))


def test_a_wrong_block_fails_with_the_page_and_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "# Title\n\n```python\na = 1\n```\nthen\n```python\nassert a == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        run(page, text)
    frame = caught.traceback[-1]
    assert (str(frame.path), frame.lineno + 1) == (str(page), 8)


def test_a_no_run_comment_skips_one_block_only(tmp_path: Path) -> None:
    text = "<!-- no-run: the weights are not public -->\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n"
    assert run(tmp_path / "page.md", text) == 1
