"""Writes docs/support.md from the outcomes of the tests beside this file: `python tests/support/write_page.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "support.md"
PACKAGES = ("torch", "schedulefree", "transformers", "peft", "accelerate", "lightning")
HEAD = """# What works with which optimizer

Every cell is the outcome of tests in `tests/support`, written by `python tests/support/write_page.py`: **yes** was tested and works,
**refused** is an error that says what to do, checked too. `attach` (or `Teleport`) is put around the first eight; `tf.optim.AdamW` and
`tf.optim.Rotated` move by themselves. All of it ran on a CPU{versions};
nothing on a GPU, where `capturable` and CUDA graphs belong.
A step that a CUDA graph captures is refused, since it would replay without its schedule. Rows of many ranks ran in two processes over
gloo; more layouts and four ranks are in [distributed.md](distributed.md) and [optimizers.md](optimizers.md).

"""


class Outcomes:
    """Collects, for every row and column, what its tests found."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, set[str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = {str(name): str(value) for name, value in report.user_properties}
        if "row" not in found or (report.when != "call" and report.passed):
            return
        if report.failed:
            text = "**fails**"
        elif report.skipped:
            text = "not run"
        else:
            text = f"refused: {found['refused']}" if "refused" in found else "yes"
            text += f": {found['note']}" if "note" in found else ""
        self.cells.setdefault(found["row"], {}).setdefault(found["column"], set()).add(text)


def render(cells: dict[str, dict[str, set[str]]]) -> str:
    """The table, and below it the remarks that its cells number."""
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    remarks: list[str] = []
    lines = ["| | " + " | ".join(f"`{column}`" for column in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row, found in cells.items():
        shown = []
        for column in columns:
            texts = sorted(found.get(column, {"**missing**"}))
            kind, _, remark = texts[0].partition(": ")
            if len(texts) > 1:
                kind, remark = "**fails**" if any("fails" in text for text in texts) else kind, ", ".join(texts)
            if remark and remark not in remarks:
                remarks.append(remark)
            shown.append(kind + (f" ({remarks.index(remark) + 1})" if remark else ""))
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{i}. {remark}" for i, remark in enumerate(remarks, 1))]) + "\n"


def main() -> int:
    from importlib.metadata import version

    # a missing one stops here: its rows would read "not run"
    found = [f"{package} {version(package).partition('+')[0]}" for package in PACKAGES]
    outcomes = Outcomes()
    status = int(pytest.main([str(HERE), "-q", "-p", "no:cacheprovider"], plugins=[outcomes]))
    versions = f" with {', '.join(found[:-1])} and {found[-1]}"
    PAGE.write_text(HEAD.format(versions=versions) + render(outcomes.cells))
    print(PAGE)
    return status


if __name__ == "__main__":
    sys.exit(main())
