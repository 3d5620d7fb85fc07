"""Digits by a small convolutional net: three convolutions of 3 × 3, ReLU, a linear head."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from bench.convergence.network import Digits, Work

WORK, QUICK_WORK = Work(steps=150, batch=50, images=1400), Work(steps=8, batch=20, images=60)
ARMS = (
    "adamw", "adamw+clip", "adamw+reset", "adamw+balance-once", "adamw+balance-every", "adamw+grad-norm", "momentum",
    "momentum+clip", "momentum+reset", "momentum+balance-once", "momentum+balance-every", "momentum+grad-norm", "sgd",
)


def cnn() -> nn.Module:
    """1-8-16-16 channels, the last two strided: 8 × 8 pixels to 2 × 2."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for place, (before, after, stride) in enumerate(((1, 8, 1), (8, 16, 2), (16, 16, 2))):
        layers[f"conv{place}"] = nn.Conv2d(before, after, 3, padding=1, stride=stride)
        layers[f"relu{place}"] = nn.ReLU()
    layers["flat"], layers["head"] = nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(layers)


def variants(quick: bool) -> tuple[Digits, ...]:
    """One task."""
    return (Digits("digits-cnn", cnn, (1, 8, 8), QUICK_WORK if quick else WORK, ARMS),)
