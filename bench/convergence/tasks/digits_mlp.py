"""Digits by an MLP with two hidden layers of 64, from torch's own start."""

from __future__ import annotations

import itertools
from collections import OrderedDict

from torch import nn

from bench.convergence.network import Digits, Work

WIDTHS = (64, 64, 64, 10)
WORK, QUICK_WORK = Work(steps=200, batch=50, images=1400), Work(steps=12, batch=20, images=60)
PEERS = ("muon", "soap", "shampoo", "sam", "schedule-free", "rotated")
ARMS = (
    "adamw", "adamw+clip", "adamw+reset", "adamw+balance-once", "adamw+balance-every", "adamw+grad-norm", "adamw+grad-l1", *PEERS,
    "momentum", "momentum+clip", "momentum+reset", "momentum+balance-once", "momentum+balance-every", "momentum+grad-norm",
    "momentum+level-set", "sgd", "sgd+grad-norm", "sgd+level-set",
)


def mlp() -> nn.Module:
    """64-64-64-10 with ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for place, (before, after) in enumerate(itertools.pairwise(WIDTHS[:-1])):
        layers[f"layer{place}"], layers[f"relu{place}"] = nn.Linear(before, after), nn.ReLU()
    layers["head"] = nn.Linear(*WIDTHS[-2:])
    return nn.Sequential(layers)


def variants(quick: bool) -> tuple[Digits, ...]:
    """One task."""
    return (Digits("digits-mlp", mlp, (64,), QUICK_WORK if quick else WORK, ARMS),)
