"""[ICLR24] section 4, teleporting curvature: one teleport to more or less curved weights during training, and the test loss after it."""

from __future__ import annotations

import torch

from teleport_fast.experiments.studies.arms_at_minima import IMAGES, QUICK_SEEDS, SEEDS, curvature_drawn, study
from teleport_fast.experiments.studies.study import Options, Outcome
from teleport_fast.experiments.studies.trained import Data, Teleport, Weights
from teleport_fast.minima import published_curvature, teleport_to

__all__ = ["QUICK_SEEDS", "SEEDS", "run"]
# For MNIST: the length along M is lr dκ/dt; so many teleports, each on new images.
PUBLISHED = {"ascend": (2e-1, 10), "descend": (5e-2, 5)}
SLOWER = 1e-2


def run(options: Options) -> Outcome:
    """Plain SGD, the published loop at its lr and at a hundredth, an exact teleport on all data (diagonal), one on ten images (full)."""
    extra: dict[str, object] = {"M": "standard normal, 16 (published loop: uniform, a new one each teleport)"}
    asked = (
        ("diagonal, more curved", "more curved (diagonal, exact) ends with a lower test loss than plain", -1),
        ("diagonal, less curved", "less curved (diagonal, exact) ends with a higher test loss than plain", 1),
        ("published at lr/100, more curved", "more curved (published loop at lr/100) ends with a lower test loss than plain", -1),
        ("published at lr/100, less curved", "less curved (published loop at lr/100) ends with a higher test loss than plain", 1),
    )
    return study(options, "curvature", "Teleporting to more and less curved weights", _arms, curvature_drawn, extra, asked)


def _arms(data: Data, seed: int) -> dict[str, Teleport | None]:
    many, few = data.batch(IMAGES, seed, "v_exact"), data.batch(10, seed, "u_exact")
    arms: dict[str, Teleport | None] = {"plain": None}
    for label, direction in (("more curved", "ascend"), ("less curved", "descend")):

        def published(weights: Weights, direction: str = direction, share: float = 1.0) -> Weights:
            rate, count = PUBLISHED[direction]
            generator = torch.Generator().manual_seed(seed)
            for index in range(count):
                action, _ = data.batch(IMAGES, 100 * seed + index, "v_exact")(weights)
                k = action.widths[1]
                M = torch.rand(k, k, generator=generator, dtype=torch.float64)
                try:
                    moved = published_curvature(action, share * rate, [M], direction == "ascend").weights
                except torch.linalg.LinAlgError:  # weights of 1e80: left where they are
                    return weights
                if not all(bool(torch.isfinite(W).all()) for W in moved):
                    return moved
                weights = moved
            return weights

        def slower(weights: Weights, direction: str = direction) -> Weights:
            return published(weights, direction, SLOWER)

        def diagonal(weights: Weights, direction: str = direction) -> Weights:
            action, loss = many(weights)
            measure = curvature_drawn(action, loss, seed)
            return teleport_to(action, loss, measure, direction, 10, radius=0.1, subgroup="diagonal").weights

        def full(weights: Weights, direction: str = direction) -> Weights:
            action, loss = few(weights)
            return teleport_to(action, loss, curvature_drawn(action, loss, seed), direction, 10, radius=0.1).weights

        arms |= {f"published, {label}": published, f"published at lr/100, {label}": slower, f"diagonal, {label}": diagonal,
                 f"full on 10 images, {label}": full}
    return arms
