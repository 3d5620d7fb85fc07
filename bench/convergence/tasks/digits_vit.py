"""Digits by a small vision transformer: 16 patches of 2 × 2, pre-norm blocks without gains, so that the stream can be turned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.convergence.network import Digits, Work
from teleport_fast.experiments.gpt import MLP, GPTConfig

WIDTH, LAYERS, HEADS, PATCHES = 32, 2, 2, 16
WORK, QUICK_WORK = Work(steps=150, batch=50, images=1400), Work(steps=8, batch=20, images=60)
ARMS = ("adamw", "adamw+rotations", "adamw+random", "adamw+balance-once", "muon", "rotated", "rotated-hidden")


class Attention(nn.Module):
    """Every patch sees every other; names as in the GPT, which symmetry discovery and Rotated read."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attention, self.mlp = Attention(), MLP(GPTConfig(d_model=WIDTH, mlp="relu2"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """(batch, 64) pixels to (batch, 10) logits, from the mean over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64 // PATCHES, WIDTH, bias=False)
        self.position = nn.Parameter(0.1 * torch.randn(PATCHES, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(*x.shape[:-1], 4, 2, 4, 2).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(-2))


def variants(quick: bool) -> tuple[Digits, ...]:
    """One task."""
    return (Digits("digits-vit", ViT, (64,), QUICK_WORK if quick else WORK, ARMS),)
