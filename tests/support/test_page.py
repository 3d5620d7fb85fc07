"""docs/support.md has a row for every test of the matrix and a column for every optimizer, and no cell without an answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "support.md"


def table() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (lines[0], *lines[2:])]


def rows() -> list[str]:
    """The rows that the tests beside this file name, in any order."""
    return [row for file in HERE.glob("test_*.py") for row in re.findall(r'^@pytest\.mark\.support\("([^"]+)"\)', file.read_text(), re.M)]


def test_the_page_is_of_these_tests_and_these_optimizers(request: pytest.FixtureRequest) -> None:
    columns = request.config.pluginmanager.get_plugin(str(HERE / "conftest.py"))
    names: Any = columns.COLUMNS if columns is not None else None
    head, *body = table()
    assert names is not None and [cell.strip("`") for cell in head[-len(names) :]] == list(names)
    assert sorted(row[0] for row in body) == sorted(rows()), "run python tests/support/write_page.py"
    assert len({row[0] for row in body}) == len(body) >= 30


def test_every_cell_is_tested_or_refused_and_its_remark_is_there() -> None:
    _, *body = table()
    remarks = set(re.findall(r"^(\d+)\. \S", PAGE.read_text(), re.M))
    for row, *cells in body:
        for cell in cells:
            match = re.fullmatch(r"(yes|refused)(?: \((\d+)\))?", cell)
            assert match, f"{row}: {cell!r}"
            assert match[2] is None or match[2] in remarks, f"{row}: {cell!r}"
            assert match[1] == "yes" or match[2], f"{row}: a refusal without its reason"
