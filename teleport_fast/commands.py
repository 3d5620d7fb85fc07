"""The verbs of `python -m teleport_fast`: doctor, inspect, canonicalize, train, report and reproduce."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from teleport_fast.experiments.arguments import numbers, positive
from teleport_fast.experiments.gpt_options import (
    Bias,
    Context,
    FusedQkv,
    Gains,
    Heads,
    KvHeads,
    Layers,
    Mlp,
    Norm,
    Positions,
    Tied,
    Width,
    gpt_config,
)
from teleport_fast.experiments.studies.command import reproduce
from teleport_fast.experiments.train import Setting
from teleport_fast.inspection.command import canonicalize, inspect
from teleport_fast.report.command import report

SETTING = Setting()
app = typer.Typer(
    help="Symmetry teleportation for PyTorch optimizers.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of text.")]


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say which parts of the installation are there, why others are not, and what to do about it."""
    from teleport_fast.doctor import diagnose, render

    report = diagnose()
    print(json.dumps(report, indent=2) if as_json else render(report))
    raise typer.Exit(0 if report["ok"] else 1)


@app.command()
def train(
    context_of_call: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder for comparison.png and comparison.json, or the sweep's files.")
    ] = Path("runs/demo"),
    objective: Annotated[
        str, typer.Option(help="Second arm: rotations (the default, shown beside rotated), grad_norm, grad_l1 or balance.")
    ] = "rotations",
    base: Annotated[
        str, typer.Option(help="Base optimizer of all arms: adamw, adam, sgd, adagrad or rmsprop.")
    ] = "adamw",
    arms: Annotated[
        str | None,
        typer.Option(
            help="All arms by name, separated by commas, the baseline first; they replace --objective. "
            "Besides bases and objectives: rotated, rotated-hidden, muon. Settings follow a name after colons: "
            "rotations:every=1:decay=0.8, rotated:stream=site; an unknown one names all that there are."
        ),
    ] = None,
    control: Annotated[bool, typer.Option(help="Add random rotations, on the first seed.")] = True,
    steps: Annotated[int, typer.Option(help="Training steps of one run.")] = SETTING.steps,
    batch: Annotated[int, typer.Option(help="Windows in one batch.")] = SETTING.batch,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, separated by commas. Default: 0,1; for --sweep: 100,101.")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="Folder of text to train on. Default: the standard library's sources.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    lr: Annotated[float | None, typer.Option(help="Learning rate of the baseline. Default: recorded sweep.")] = None,
    teleport_lr: Annotated[
        float | None, typer.Option(help="Learning rate of the other arms. Default: recorded sweep.")
    ] = None,
    table_lr: Annotated[
        float | None, typer.Option(help="Learning rate of embeddings and head in all arms. Default: the base's own.")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Steps between teleports of the second arm.")] = None,
    radius: Annotated[float | None, typer.Option(help="Largest distance of one move of the second arm.")] = None,
    direction: Annotated[str | None, typer.Option(help="ascend or descend the objective of the second arm.")] = None,
    momentum: Annotated[
        float | None,
        typer.Option(help="Decay of the first moment in all arms: beta1, or momentum. Default: each arm's own."),
    ] = None,
    mlp: Mlp = "relu2",
    norm: Norm = "rms",
    positions: Positions = "learned",
    context: Context = 128,
    d_model: Width = 128,
    layers: Layers = 4,
    heads: Heads = 4,
    kv_heads: KvHeads = None,
    gains: Gains = False,
    bias: Bias = False,
    fused_qkv: FusedQkv = False,
    tied: Tied = False,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = SETTING.validate_every,
    minutes: Annotated[
        float | None,
        typer.Option(help="Leave out runs that do not fit. Default: 3 at the demo's own setting."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch. Default: torch's choice.")] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Tune each arm's learning rate on a grid that grows at its edges; resumable."),
    ] = False,
    rates: Annotated[
        str | None, typer.Option(help="With --sweep: the grid to begin with, separated by commas. Default: six rates.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a GPT on real text with and without teleportation, on the same batches, and show the difference."""
    from teleport_fast.experiments.arms import OBJECTIVES, arm_named
    from teleport_fast.experiments.demo import Request, run_comparison, run_sweep

    if threads is not None:
        torch.set_num_threads(positive("threads", threads))
    model = gpt_config(mlp, norm, positions, context, d_model, layers, heads, kv_heads, gains, bias, fused_qkv, tied)
    setting = Setting(model, steps, batch, dtype, table_lr, validate_every)
    own_size = (setting == SETTING) and seeds is None and arms is None
    if objective.partition(":")[0] not in (*OBJECTIVES, "eigenbasis"):
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}; pass one of these names"
        )
    flagship = ["rotated"] if (base, objective) == ("adamw", "rotations") else []
    names = [base, objective, *flagship] + (["random"] if control and objective != "random" else [])
    if arms is not None:
        names = [name.strip() for name in arms.split(",")]
    changes: dict[str, Any] = {"every": every, "radius": radius, "direction": direction}
    # The random control keeps its own period: it answers whether any turning helps, not how often.
    chosen = [arm_named(name, base, momentum=momentum, **({} if name.startswith("random") else changes)) for name in names]
    request = Request(
        arms=tuple(chosen),
        seeds=numbers("seeds", seeds, int) if seeds else ((100, 101) if sweep else (0, 1)),
        control_once=arms is None and not sweep,
        setting=setting,
        folder=folder,
        out=out,
        rates=numbers("rates", rates, float) if rates else None,
        lr=lr,
        teleport_lr=teleport_lr,
        minutes=minutes if minutes is not None else (3.0 if own_size and not sweep else None),
        command="python -m teleport_fast " + shlex.join(context_of_call.obj or []),
    )
    code = (run_sweep if sweep else run_comparison)(request, Console(stderr=True), as_json)
    raise typer.Exit(code)


app.command()(inspect)
app.command()(canonicalize)
app.command()(report)
app.command()(reproduce)
