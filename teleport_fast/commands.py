"""The verbs of `python -m teleport_fast`: doctor, inspect and train."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from teleport_fast.experiments.gpt import MLPS, NORMS, POSITIONS, GPTConfig
from teleport_fast.experiments.train import Setting

SETTING = Setting()
app = typer.Typer(
    help="Symmetry teleportation for PyTorch optimizers.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of text.")]
Mlp = Annotated[str, typer.Option(help=f"MLP of the demo model: {', '.join(MLPS)}.")]
Norm = Annotated[str, typer.Option(help=f"Norm of the demo model: {', '.join(NORMS)}.")]
Positions = Annotated[str, typer.Option(help=f"Positions of the demo model: {', '.join(POSITIONS)}.")]
Context = Annotated[int, typer.Option(help="Bytes in one window.")]
Width = Annotated[int, typer.Option(help="Width of the residual stream.")]
Layers = Annotated[int, typer.Option(help="Number of blocks.")]
Heads = Annotated[int, typer.Option(help="Attention heads.")]
KvHeads = Annotated[int | None, typer.Option(help="Key and value heads; as many as heads by default.")]
Gains = Annotated[bool, typer.Option(help="Give norms a gain; train folds it into the readers, in every arm.")]
Bias = Annotated[bool, typer.Option(help="Give linear layers a bias.")]
FusedQkv = Annotated[bool, typer.Option(help="One linear layer for q, k and v.")]
Tied = Annotated[bool, typer.Option(help="Use the token embedding as the head.")]


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say which parts of the installation are there, why others are not, and what to do about it."""
    from teleport_fast.doctor import diagnose, render

    report = diagnose()
    print(json.dumps(report, indent=2) if as_json else render(report))
    raise typer.Exit(0 if report["ok"] else 1)


@app.command()
def inspect(
    factory: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:FUNCTION]",
            help="A function without arguments that returns a model, or a model and its example inputs. "
            "Default: the demo's GPT in the variant that the options name.",
            show_default=False,
        ),
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
    as_json: Json = False,
) -> None:
    """Find and prove a model's symmetries: its joints, and what was rejected and why."""
    import teleport_fast as tf

    inputs: Any = None
    if factory is None:
        from teleport_fast.experiments.gpt import GPT

        torch.manual_seed(0)
        config = _model(mlp, norm, positions, context, d_model, layers, heads, kv_heads, gains, bias, fused_qkv, tied)
        model: nn.Module = GPT(config)
    else:
        model, inputs = build(factory)
    symmetries = tf.find_symmetries(model, inputs)
    if not as_json:
        print(symmetries.explain())
        return
    joints = [
        {
            "name": joint.name,
            "kind": joint.kind,
            "group": str(joint.group),
            "heads": joint.heads,
            "width": joint.width,
            "dim": joint.dim,
            "parameters": list(joint.parameters()),
        }
        for joint in symmetries
    ]
    findings = [vars(finding) for finding in symmetries.findings]
    print(json.dumps({"joints": joints, "findings": findings, "dim": symmetries.dim}, indent=2))


@app.command()
def train(
    context_of_call: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder for comparison.png and comparison.json, or the sweep's files.")
    ] = Path("runs/demo"),
    objective: Annotated[
        str, typer.Option(help="Second arm: rotations (the default), grad_norm, grad_l1 or balance.")
    ] = "rotations",
    base: Annotated[
        str, typer.Option(help="Base optimizer of all arms: adamw, adam, sgd, adagrad or rmsprop.")
    ] = "adamw",
    arms: Annotated[
        str | None,
        typer.Option(
            help="All arms by name, separated by commas, the baseline first; they replace --objective. "
            "Besides bases and objectives: rotated, rotated-hidden, muon."
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
    model = _model(mlp, norm, positions, context, d_model, layers, heads, kv_heads, gains, bias, fused_qkv, tied)
    setting = Setting(model, steps, batch, dtype, table_lr, validate_every)
    own_size = (setting == SETTING) and seeds is None and arms is None
    if objective not in (*OBJECTIVES, "eigenbasis"):
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}; pass one of these names"
        )
    names = [base, objective] + (["random"] if control and objective != "random" else [])
    if arms is not None:
        names = [name.strip() for name in arms.split(",")]
    changes: dict[str, Any] = {"every": every, "radius": radius, "direction": direction}
    # The random control keeps its own period: it answers whether any turning helps, not how often.
    chosen = [arm_named(name, base, momentum=momentum, **({} if name == "random" else changes)) for name in names]
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


def build(factory: str) -> tuple[nn.Module, Any]:
    """Calls `MODULE:FUNCTION`; its model, and its example inputs or None.

    Raises ValueError that says which part of the name does not work.
    """
    module_name, colon, function_name = factory.partition(":")
    if not colon or not module_name or not function_name:
        raise ValueError(f"factory must look like MODULE:FUNCTION, got {factory!r}; for example mymodel:build")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise ValueError(f"factory names a module that does not import, got {factory!r}: {error}") from error
    except AttributeError:
        raise ValueError(f"factory names no function of {module_name}, got {factory!r}; check the name") from None
    built = function()
    model, inputs = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"factory must return a torch.nn.Module, got {type(model).__name__} from {factory!r}")
    return model, inputs


def numbers(name: str, listed: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """The numbers in a list separated by commas.

    >>> numbers("seeds", "0, 1", int)
    (0, 1)
    """
    try:
        return tuple(kind(part) for part in listed.split(","))
    except ValueError:
        example = "0,1" if kind is int else "0.001,0.002"
        raise ValueError(f"{name} must be numbers separated by commas, got {listed!r}; for example {example}") from None


def positive(name: str, value: int) -> int:
    """`value` if it is at least 1; ValueError otherwise."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; pass a positive integer")
    return value


def _model(
    mlp: str,
    norm: str,
    positions: str,
    context: int,
    d_model: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    gains: bool,
    bias: bool,
    fused_qkv: bool,
    tied: bool,
) -> GPTConfig:
    return GPTConfig(
        context=context,
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        mlp=mlp,
        norm=norm,
        gains=gains,
        bias=bias,
        fused_qkv=fused_qkv,
        positions=positions,
        tied=tied,
    )
