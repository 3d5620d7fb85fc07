"""[ICLR24] section 4, teleporting sharpness: one teleport to flatter or sharper weights during training, and the test loss after it."""

from __future__ import annotations

from functools import partial

import torch

from teleport_fast.experiments.studies.arms_at_minima import IMAGES, QUICK_SEEDS, SEEDS, sharpness_drawn, study
from teleport_fast.experiments.studies.study import Options, Outcome
from teleport_fast.experiments.studies.trained import Data, Teleport, Weights
from teleport_fast.minima import orthant_directions, published_sharpness, teleport_to
from teleport_fast.minima.measures import RADII

__all__ = ["QUICK_SEEDS", "SEEDS", "run"]
PUBLISHED_RATE = 5e-2  # for MNIST and CIFAR-10, both ways


def run(options: Options) -> Outcome:
    """Plain SGD, the published loop, an exact teleport on all data (diagonal) and one on ten images (full), each both ways."""
    extra: dict[str, object] = {"radii": RADII, "directions": "sphere, 32 (published loop: 100, positive orthant)"}
    asked = (
        ("diagonal, flatter", "flatter (diagonal, exact) ends with a lower test loss than plain", -1),
        ("published, flatter", "flatter (published loop) ends with a lower test loss than plain", -1),
        ("diagonal, sharper", "sharper (diagonal, exact) ends with a higher test loss than plain", 1),
    )
    title = "Teleporting to flatter and sharper weights"
    return study(options, "sharpness", title, partial(_arms, options), sharpness_drawn, extra, asked)


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
