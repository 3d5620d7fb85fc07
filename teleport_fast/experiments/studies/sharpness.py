"""[ICLR24] section 4, teleporting sharpness: one teleport to flatter or sharper weights during training, and the test loss after it."""

from __future__ import annotations

import torch

from teleport_fast.experiments.studies.arms_at_minima import (
    AT,
    EPOCHS,
    IMAGES,
    QUICK_AT,
    QUICK_EPOCHS,
    QUICK_SEEDS,
    SEEDS,
    compare,
    lower,
    settings,
    sharpness_drawn,
    shown,
    twenty,
)
from teleport_fast.experiments.studies.study import Claim, Options, Outcome, number
from teleport_fast.experiments.studies.trained import Data, Teleport, Weights
from teleport_fast.minima import orthant_directions, published_sharpness, teleport_to
from teleport_fast.minima.measures import RADII

__all__ = ["QUICK_SEEDS", "SEEDS", "run"]
PUBLISHED_RATE = 5e-2  # for MNIST and CIFAR-10, both ways


def run(options: Options) -> Outcome:
    """Plain SGD, the published loop, an exact teleport on all data (diagonal) and one on ten images (full), each both ways."""
    epochs, at = (QUICK_EPOCHS, QUICK_AT) if options.quick else (EPOCHS, AT)
    data, results, before = compare(options, lambda data, seed: _arms(options, data, seed), sharpness_drawn, epochs, at)
    tables, panels = shown(results, before, "sharpness", f"{data.name}: SGD with one teleport before epoch {at} of {epochs}")
    bar, bar_claims = twenty(options, data, "sharpness", sharpness_drawn)
    jump = max(abs(arm.jump) for label, arms in results.items() if label.startswith("diagonal") for arm in arms)
    return Outcome(
        name="sharpness",
        title="Teleporting to flatter and sharper weights",
        source="arXiv 2305.13404, section 4 (figure 4) and its code",
        settings={**settings(options, data, epochs, at), "radii": RADII, "directions": "sphere, 32 (published loop: 100, positive orthant)"},
        tables=(*tables, bar), panels=panels,
        claims=(
            *bar_claims,
            Claim("diagonal teleports keep the training loss of all images, largest |ΔL|/L", number(jump), "at most 1e-6", jump <= 1e-6),
            lower(results, "diagonal, flatter", "flatter (diagonal, exact) ends with a lower test loss than plain"),
            lower(results, "published, flatter", "flatter (published loop) ends with a lower test loss than plain"),
            lower(results, "diagonal, sharper", "sharper (diagonal, exact) ends with a higher test loss than plain", sign=1),
        ),
    )


def _arms(options: Options, data: Data, seed: int) -> dict[str, Teleport | None]:
    many, few = data.batch(IMAGES, seed, "v_exact"), data.batch(10, seed, "u_exact")
    arms: dict[str, Teleport | None] = {"plain": None}
    for label, direction in (("flatter", "descend"), ("sharper", "ascend")):

        def published(weights: Weights, direction: str = direction) -> Weights:
            action, loss = many(weights)
            generator = torch.Generator().manual_seed(seed)
            steps = 3 if options.quick else 10
            draws = torch.stack(list(orthant_directions(weights, steps * len(RADII) * 100, generator)))
            draws = draws.reshape(steps, len(RADII), 100, -1)
            return published_sharpness(action, loss, PUBLISHED_RATE, draws, RADII, direction == "ascend").weights

        def diagonal(weights: Weights, direction: str = direction) -> Weights:
            action, loss = many(weights)
            measure = sharpness_drawn(action, loss, seed)
            return teleport_to(action, loss, measure, direction, 10, radius=0.1, subgroup="diagonal").weights

        def full(weights: Weights, direction: str = direction) -> Weights:
            action, loss = few(weights)
            return teleport_to(action, loss, sharpness_drawn(action, loss, seed), direction, 10, radius=0.1).weights

        arms |= {f"published, {label}": published, f"diagonal, {label}": diagonal, f"full on 10 images, {label}": full}
    return arms
