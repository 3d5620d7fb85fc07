"""The verb `reproduce`: runs one study or all, shows its table and claims, and leaves JSON and a picture."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import track

from teleport_fast.experiments.arguments import numbers, positive
from teleport_fast.experiments.demo import writable_folder
from teleport_fast.experiments.picture import require_matplotlib
from teleport_fast.experiments.report import write_json
from teleport_fast.experiments.studies import NAMES, study_named, written
from teleport_fast.experiments.studies.shown import as_json, draw, print_outcome
from teleport_fast.experiments.studies.study import Options, Outcome

T = TypeVar("T")
DEFAULT_SEEDS, DEFAULT_QUICK_SEEDS = (0, 1, 2, 3, 4), (0, 1)


def reproduce(
    context_of_call: typer.Context,
    name: Annotated[str, typer.Argument(help=f"{', '.join(NAMES)}, or all.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for NAME.png and NAME.json.")] = Path("runs/papers"),
    quick: Annotated[bool, typer.Option("--quick", help="A smaller version, each study under 30 seconds.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas. Default: the study's own.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with MNIST, Fashion-MNIST or CIFAR-10 files. Default: digits.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch; at these sizes more than one only waits.")] = 1,
    out_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of text.")] = False,
) -> None:
    """Rerun an experiment of the papers: a table with mean ± sd over seeds, the claims, a PNG and a JSON."""
    names = written() if name == "all" else [name]
    modules = [study_named(each) for each in names]
    chosen = numbers("seeds", seeds, int) if seeds else None
    torch.set_num_threads(positive("threads", threads))
    if data is not None and not data.is_dir():
        raise ValueError(f"data must name a folder, got {str(data)!r}, which is none; see docs/evidence/papers.md for its files")
    require_matplotlib()
    folder = writable_folder(out)
    command = "python -m teleport_fast " + shlex.join(context_of_call.obj or [])
    console, progress = Console(), Console(stderr=True)
    results = []
    for module in modules:
        default = getattr(module, "QUICK_SEEDS", DEFAULT_QUICK_SEEDS) if quick else getattr(module, "SEEDS", DEFAULT_SEEDS)
        options = Options(quick, chosen or default, data, _say(progress), _bar(progress) if progress.is_terminal else None)
        begun = time.perf_counter()
        outcome: Outcome = module.run(options)
        everything = as_json(outcome, command, time.perf_counter() - begun)
        write_json(everything, folder / f"{outcome.name}.json")
        draw(outcome, folder / f"{outcome.name}.png")
        results.append(everything)
        if not out_json:
            print_outcome(outcome, console)
            print(f"{folder / outcome.name}.png\n{folder / outcome.name}.json")
    if out_json:
        print(json.dumps(results if name == "all" else results[0], allow_nan=False))


def _say(console: Console) -> Any:
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


def _bar(console: Console) -> Any:
    def bar(items: Iterable[T], text: str) -> Iterator[T]:
        listed = list(items)
        yield from track(listed, text, console=console)

    return bar
