"""The verb `report`: from a run's folder to a page in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="What train --out wrote, or a folder with a teleporter's history as JSON.")
    ],
    out: Annotated[Path | None, typer.Option(help="The page to write. Default: report.html in RUN_DIR.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of text.")] = False,
) -> None:
    """Write one self-contained HTML page about a run: curves, teleports, spectra, joints, settings."""
    path = write(run_dir, out)
    print(json.dumps({"page": str(path), "bytes": path.stat().st_size}) if as_json else path)


def write(run_dir: Path, out: Path | None = None) -> Path:
    """The page about a run's folder, written to `out` or to report.html in the folder; its path.

    Errors: ValueError for a folder without a run and a page that cannot be written; ModuleNotFoundError without matplotlib.
    """
    from teleport_fast.experiments.picture import require_matplotlib
    from teleport_fast.report.page import render
    from teleport_fast.report.read import read_folder

    require_matplotlib()
    path = run_dir / "report.html" if out is None else out
    found = read_folder(run_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(render(found), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"out must be a file that can be written, got {str(path)!r}: {error.strerror}") from None
    return path
