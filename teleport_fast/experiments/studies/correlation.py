"""[ICLR24] section 4, table 1: sharpness and curvature of many trained networks against their generalization gap and test loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from teleport_fast.data_dependent import CrossEntropy, MLPAction
from teleport_fast.data_dependent.reference import forward
from teleport_fast.experiments.studies.pearson import Correlation, correlate
from teleport_fast.experiments.studies.study import Cell, Claim, Curve, Options, Outcome, Panel, Table
from teleport_fast.experiments.studies.trained import BATCH, RATE, SIGMA, Data, Weights, data_of, start, train_many
from teleport_fast.minima import (
    MeanCurvature,
    MeanSharpness,
    curvature,
    hessian_spectrum,
    orthant_directions,
    random_generators,
    sphere_directions,
)
from teleport_fast.minima.measures import RADII

SEEDS, QUICK_SEEDS = tuple(range(100)), tuple(range(12))
EPOCHS, QUICK_EPOCHS = 40, 10
SMALL = tuple(k / 100 for k in range(2, 21, 2))  # the published .001 to .2 for MNIST
DIRECTIONS, IMAGES, BATCHES = 20, 200, 5
# The second set of networks: each seed draws one of each.
RATES, SIZES = (3e-3, 1e-2, 3e-2, 1e-1), (10, 20, 50)
SETS = ("seeds alone", "lr and batch size too")
CONTROL = "training loss (control)"
PUBLISHED_SHARPNESS, PUBLISHED_CURVATURE = "sharpness, positive orthant (published)", "curvature, published form"
EXCESS, WIDE, CURVATURE = "sharpness less training loss, sphere, t ≤ .2", "sharpness less training loss, sphere, t ≤ .9", "curvature, all terms"


def run(options: Options) -> Outcome:
    """Pearson's r over one network a seed, twice: seeds alone differ, as published, and lr and batch size differ as well."""
    data = data_of(options)
    epochs = QUICK_EPOCHS if options.quick else EPOCHS
    tables, panels, claims = [], [], []
    for which in SETS:
        values: dict[str, list[float]] = {}
        gaps, tests, trains = [], [], []
        for weights in options.track(_trained(data, options.seeds, epochs, which), f"networks measured, {which}"):
            found = data.train(weights), data.test(weights)
            gaps.append(found[1] - found[0])
            tests.append(found[1])
            trains.append(found[0])
            for name, value in _measured(data, weights, found[0]).items():
                values.setdefault(name, []).append(value)
        rows: list[tuple[Cell, ...]] = []
        results: dict[str, Correlation] = {}
        with_test: dict[str, Correlation] = {}
        for name, measured in values.items():
            results[name], with_test[name] = correlate(measured, gaps), correlate(measured, tests)
            beyond = "" if name == CONTROL else str(correlate(measured, tests, trains))
            rows.append((name, str(results[name]), str(with_test[name]), beyond))
        tables.append(Table(f"{len(gaps)} networks, {which}: Pearson's r (95% bootstrap interval)",
                            ("", "gap (test less training loss)", "test loss", "test loss, training loss held fixed"), tuple(rows)))
        for name in (PUBLISHED_SHARPNESS, PUBLISHED_CURVATURE):
            panels.append(Panel(which, name, "generalization gap", (Curve(name, tuple(values[name]), (tuple(gaps),)),), scatter=True))
        claims.append(_claim(f"{which}: {PUBLISHED_SHARPNESS} goes with the test loss", with_test[PUBLISHED_SHARPNESS], 1))
        for name, sign in ((PUBLISHED_SHARPNESS, 1), (EXCESS, 1), (PUBLISHED_CURVATURE, -1), (CURVATURE, -1)):
            claims.append(_claim(f"{which}: {name} goes {'with' if sign > 0 else 'against'} the gap", results[name], sign))
    return Outcome(
        name="correlation",
        title="Sharpness, curvature and the generalization gap",
        source="arXiv 2305.13404, section 4 (table 1, figures 10 and 11) and its code",
        settings={
            "data": data.name, "pixels": "standardised",
            "widths": [len(data.X), 16, 10, data.classes], "optimizer": "SGD", "lr": 1e-2, "batch": 20, "epochs": epochs,
            "second set's lr": RATES, "second set's batch": SIZES, "radii": SMALL, "wide radii": RADII, "directions": DIRECTIONS,
            "images a batch": IMAGES, "batches": BATCHES, "seeds": len(options.seeds), "bootstrap": "10,000 draws of pairs, percentiles",
        },
        tables=tuple(tables), panels=tuple(panels), claims=tuple(claims),
    )


def _claim(text: str, found: Correlation, sign: int) -> Claim:
    holds = found.low > 0 if sign > 0 else found.high < 0
    return Claim(text, f"r = {found}", f"interval {'over' if sign > 0 else 'under'} 0", holds)


def _trained(data: Data, seeds: Sequence[int], epochs: int, which: str) -> list[Weights]:
    """One network a seed; in the second set each seed has one of RATES and of SIZES, in turn."""
    if which == SETS[0]:
        return train_many(data, [start(data, seed) for seed in seeds], epochs, seeds, [RATE] * len(seeds), BATCH)
    found: dict[int, Weights] = {}
    for number, size in enumerate(SIZES):
        group = [seed for seed in seeds if seed // len(RATES) % len(SIZES) == number]
        if group:
            moved = [1000 + seed for seed in group]
            rates = [RATES[seed % len(RATES)] for seed in group]
            ends = train_many(data, [start(data, seed) for seed in moved], epochs, moved, rates, size)
            found |= dict(zip(group, ends, strict=True))
    return [found[seed] for seed in seeds]


def _measured(data: Data, weights: Weights, loss: float) -> dict[str, float]:
    """The measures of one network, by name, all on the same images and draws for every network."""
    batches: list[Callable[[Weights], tuple[MLPAction, CrossEntropy]]] = [data.batch(IMAGES, k, "u_exact") for k in range(BATCHES)]
    actions = [batch(weights) for batch in batches]
    whole, of_whole = data.batch(2 * IMAGES, BATCHES, "u_exact")(weights)
    generator = torch.Generator().manual_seed(1)
    orthant = torch.stack(list(orthant_directions(weights, DIRECTIONS, generator)))
    half = torch.stack(list(sphere_directions(weights, DIRECTIONS // 2, generator)))
    sphere = torch.cat([half, -half])
    drawn = torch.Generator().manual_seed(2)
    uniform = [torch.rand(k, k, generator=drawn, dtype=torch.float64) for k in whole.widths]
    Ms = random_generators(whole, 8, drawn)
    leaves = [W.clone().requires_grad_() for W in weights]
    spectrum = hessian_spectrum(lambda: of_whole(forward(leaves, whole.X, SIGMA)[-1]), leaves, 1, generator=drawn, tolerance=1e-4)
    few, of_few = actions[0]
    at_few = float(of_few(few.outputs()))
    return {
        CONTROL: loss,
        PUBLISHED_SHARPNESS: MeanSharpness(of_few, SMALL, orthant).value(few),
        EXCESS: MeanSharpness(of_few, SMALL, sphere).value(few) - at_few,
        WIDE: MeanSharpness(of_few, RADII, sphere).value(few) - at_few,
        "largest Hessian eigenvalue": float(spectrum.eigenvalues[0]),
        PUBLISHED_CURVATURE: sum(
            curvature(MLPAction(weights, action.X, keep_null_space=False), [M / M.norm() for M in uniform], interactions=False)
            for action, _ in actions
        ) / BATCHES,
        CURVATURE: sum(MeanCurvature(Ms).value(action) for action, _ in actions) / BATCHES,
    }
