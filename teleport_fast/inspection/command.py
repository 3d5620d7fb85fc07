"""The verbs `inspect` and `canonicalize`: a model's joints as a table and a picture; its weights at the balanced point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from teleport_fast.experiments import gpt_options as gpt
from teleport_fast.inspection.source import Source, load
from teleport_fast.inspection.table import COLUMNS, Inspection, inspection

# A table that is piped or wider than the window keeps one line a joint.
WIDEST = 400

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of text.")]
Config = Annotated[Path | None, typer.Option(help="A transformers config.json to build from, with random weights.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a config names; read it first.")]


def inspect(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATH|MODULE:FUNCTION]",
            help="A folder with a transformers config.json (weights are read if they are there), the config file, or a "
            "function without arguments that returns a model, or a model and its example inputs. "
            "Default: the demo's GPT in the variant that the options name.",
            show_default=False,
        ),
    ] = None,
    config: Config = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the joints into this .png, .svg or .pdf file.")] = None,
    trust_remote_code: Trust = False,
    mlp: gpt.Mlp = "relu2",
    norm: gpt.Norm = "rms",
    positions: gpt.Positions = "learned",
    context: gpt.Context = 128,
    d_model: gpt.Width = 128,
    layers: gpt.Layers = 4,
    heads: gpt.Heads = 4,
    kv_heads: gpt.KvHeads = None,
    gains: gpt.Gains = False,
    bias: gpt.Bias = False,
    fused_qkv: gpt.FusedQkv = False,
    tied: gpt.Tied = False,
    as_json: Json = False,
) -> None:
    """Find and prove a model's symmetries: its joints, and what was rejected and why."""
    import teleport_fast as tf

    if source is None and config is None:
        from teleport_fast.experiments.gpt import GPT

        torch.manual_seed(0)
        variant = (mlp, norm, positions, context, d_model, layers, heads, kv_heads, gains, bias, fused_qkv, tied)
        loaded = Source(GPT(gpt.gpt_config(*variant)))
    else:
        loaded = load(source or str(config), config, trust_remote_code)
    symmetries = tf.find_symmetries(loaded.model, loaded.inputs)
    if picture is not None:
        from teleport_fast.inspection.picture import draw

        draw(loaded.model, symmetries, picture)
    table = inspection(loaded.model, symmetries)
    if as_json:
        print(json.dumps(table.as_dict(), indent=2))
    else:
        show(table)
        if picture is not None:
            print(picture)


def canonicalize(
    source: Annotated[
        str, typer.Argument(metavar="PATH|MODULE:FUNCTION", help="As for inspect: a transformers folder, or a function.")
    ],
    out: Annotated[
        Path, typer.Option(help="Where the weights go: a folder for a transformers folder, else a .safetensors file.")
    ],
    weights: Annotated[
        Path | None, typer.Option(help="A .safetensors file to read into the model that the function returns.")
    ] = None,
    kind: Annotated[str, typer.Option(help="The canonical form: balance.")] = "balance",
    check: Annotated[bool, typer.Option("--check", help="Prove it: outputs before and after, on the model in float64.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Move a checkpoint to its balanced point, where each joint's two sides share the scale; the function stays the same."""
    import teleport_fast as tf
    from teleport_fast.canonical import canonicalize as to_canonical
    from teleport_fast.inspection.proof import compare
    from teleport_fast.inspection.weights import copy_beside, load_, save

    loaded = load(source, None, trust_remote_code)
    if weights is not None:
        load_(loaded.model, weights)
    target = out / "model.safetensors" if loaded.folder is not None else out
    symmetries = tf.find_symmetries(loaded.model, loaded.inputs)
    before = compare(loaded.model, loaded.inputs) if check else None
    report = to_canonical(loaded.model, symmetries, kind)
    note: dict[str, Any] = {"canonicalize": report.metadata(), "version": tf.__version__}
    if before is not None:
        note["check"] = before(loaded.model)
    save(loaded.model, target, note)
    if loaded.folder is not None:
        copy_beside(loaded.folder, out)
    if as_json:
        print(json.dumps({**note, "out": str(target)}, indent=2))
    else:
        shrunk = report.squared_norm_after / report.squared_norm_before
        print(f"{_joints(report.joints)} balanced in {report.sweeps} sweeps: squared norm of their weights ×{shrunk:.4f}")
        for name, reason in report.left_out.items():
            print(f"left out {name}: {reason}")
        if before is not None:
            print(f"outputs deviate by {note['check']['deviation']:.1e} in float64 (at most {note['check']['tolerance']:.0e})")
        print(target)
    if before is not None and not note["check"]["ok"]:
        raise typer.Exit(1)


def show(table: Inspection) -> None:
    """Print the joints, then what was rejected or skipped and why, then the total."""
    console = Console(width=WIDEST, highlight=False)
    rows = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        rows.add_column(column, no_wrap=True, justify="left" if column in ("joint", "kind", "group") else "right")
    for joint in table.joints:
        rows.add_row(*joint.cells())
    console.print(rows)
    for finding in table.findings:
        if finding["status"] != "found":
            console.print(f"{finding['status']}: {finding['name']} ({finding['kind']}): {finding['reason']}", markup=False)
    console.print(
        f"{_joints(len(table.joints))}, {table.dim:,} continuous dimensions, {table.share:.2%} of {table.parameters:,} parameters"
    )


def _joints(count: int) -> str:
    return f"{count} joint{'s'[: count != 1]}"
