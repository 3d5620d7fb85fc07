"""The demo GPT's options on the command line, which `train` and `inspect` share."""

from __future__ import annotations

from typing import Annotated

import typer

from teleport_fast.experiments.gpt import MLPS, NORMS, POSITIONS, GPTConfig

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


def gpt_config(
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
    """The configuration that the options name; GPTConfig says what is wrong with one."""
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
