"""What the studies of sharpness and of curvature share: arms that go on from one teleport, and the twenty runs of the bar."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch

from teleport_fast.data_dependent import CrossEntropy, MLPAction, RankWarning
from teleport_fast.experiments.studies.study import Cell, Claim, Curve, Options, Outcome, Panel, Sample, Table, number
from teleport_fast.experiments.studies.trained import Arm, Data, Teleport, Weights, data_of, go_on, start, train
from teleport_fast.minima import MeanCurvature, MeanSharpness, Measure, teleport_to

EPOCHS, AT, QUICK_EPOCHS, QUICK_AT = 40, 20, 8, 4
SEEDS, QUICK_SEEDS = tuple(range(10)), (0, 1)
RUNS, QUICK_RUNS, BAR_BATCH, BAR_EPOCHS = 20, 6, 10, 3
IMAGES = 200
Arms = Callable[[Data, int], dict[str, Teleport | None]]
Drawn = Callable[[MLPAction, CrossEntropy, int], Measure]


def study(
    options: Options, name: str, title: str, arms: Arms, drawn: Drawn, extra: dict[str, object], asked: Sequence[tuple[str, str, int]]
) -> Outcome:
    """The study of one measure: arms compared, the bar's twenty runs, and what is asked of arms: (arm, claim, sign as in `lower`)."""
    epochs, at = (QUICK_EPOCHS, QUICK_AT) if options.quick else (EPOCHS, AT)
    data, results, before = compare(options, arms, drawn, epochs, at)
    tables, panels = shown(results, before, name, f"{data.name}: SGD with one teleport before epoch {at} of {epochs}")
    bar, bar_claims = twenty(options, data, name, drawn)
    jump = max(abs(arm.jump) for label, run in results.items() if label.startswith("diagonal") for arm in run)
    return Outcome(
        name=name,
        title=title,
        source="arXiv 2305.13404, section 4 (figure 4) and its code",
        settings={**settings(options, data, epochs, at), **extra},
        tables=(*tables, bar), panels=panels,
        claims=(
            *bar_claims,
            Claim("diagonal teleports keep the training loss of all images, largest |ΔL|/L", number(jump), "at most 1e-6", jump <= 1e-6),
            *(lower(results, label, text, sign) for label, text, sign in asked),
        ),
    )


def compare(options: Options, arms: Arms, drawn: Drawn, epochs: int, at: int) -> tuple[Data, dict[str, list[Arm]], Sample]:
    """(the data, by arm one Arm a seed, the measure before the teleport); each seed trains once up to the teleport."""
    data, before = data_of(options), []
    results: dict[str, list[Arm]] = {}
    for seed in options.track(options.seeds, "networks"):
        weights = train(data, start(data, seed), at, seed)
        # Other images and other draws than the teleports': what is measured was not optimised.
        look = data.batch(2 * IMAGES, 9000 + seed, "v_exact")
        measure = drawn(*look(weights), 9000 + seed)
        value: Callable[[Weights], float] = lambda now: _measured(measure, now, look)  # noqa: B023, E731
        before.append(value(weights))
        for name, teleport in arms(data, seed).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RankWarning)
                arm = go_on(data, weights, epochs - at, 500 + seed, teleport, value)
            results.setdefault(name, []).append(arm)
    return data, results, Sample(tuple(before))


def _measured(measure: Measure, weights: Weights, look: Callable[[Weights], tuple[MLPAction, CrossEntropy]]) -> float:
    """The measure; inf at weights that left the numbers, or are so large that nothing can be factored."""
    if not all(bool(torch.isfinite(W).all()) for W in weights):
        return math.inf
    try:
        return measure.value(look(weights)[0])
    except torch.linalg.LinAlgError:
        return math.inf


def shown(results: dict[str, list[Arm]], before: Sample, name: str, title: str) -> tuple[tuple[Table, ...], tuple[Panel, ...]]:
    """The table (paired differences of the test loss to "plain") and the panels of training and test loss after the teleport."""
    at: list[tuple[Cell, ...]] = []
    end: list[tuple[Cell, ...]] = []
    for label, arms in results.items():
        at.append((
            label, Sample(tuple(arm.measure / value for arm, value in zip(arms, before.values, strict=True))),
            Sample(tuple(arm.jump for arm in arms)), Sample(tuple(arm.seconds for arm in arms)),
        ))
        end.append((
            label, Sample(tuple(arm.train[-1] for arm in arms)), Sample(tuple(arm.test[-1] for arm in arms)),
            _interval(difference(results, label)), Sample(tuple(arm.accuracy for arm in arms)),
        ))
    tables = (
        Table(f"{title}: at the teleport", ("", f"{name}, after / before", "training loss, change / loss", "seconds"), tuple(at)),
        Table(f"{title}: at the end", ("", "training loss", "test loss", "less plain's (95%)", "test accuracy"), tuple(end)),
    )
    curves = []
    for which in ("test", "train"):
        curves.append([
            Curve(label, tuple(map(float, range(len(arms[0].test)))), tuple(getattr(arm, which) for arm in arms))
            for label, arms in results.items()
        ])
    panels = (
        Panel("Test loss", "epochs after the teleport", "cross entropy", tuple(curves[0]), log_y=True),
        Panel("Training loss", "epochs after the teleport", "cross entropy", tuple(curves[1]), log_y=True),
    )
    return tables, panels


def difference(results: dict[str, list[Arm]], label: str) -> Sample:
    """Test loss at the end less plain's, by seed; inf where the arm diverged."""
    pairs = zip(results[label], results["plain"], strict=True)
    return Sample(tuple(_finite(arm.test[-1]) - plain.test[-1] for arm, plain in pairs))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _interval(sample: Sample) -> str:
    if not sample.finite:
        return str(sample)
    low, high = sample.interval
    return f"{sample.mean:+.2g} ({low:+.2g} to {high:+.2g})"


def lower(results: dict[str, list[Arm]], label: str, text: str, sign: int = -1) -> Claim:
    """Whether the arm ends with a lower (sign 1: higher) test loss than plain, beyond the 95% interval of the paired difference."""
    sample = difference(results, label)
    low, high = sample.interval
    holds = sample.finite and (high < 0 if sign < 0 else low > 0)
    return Claim(text, f"difference {_interval(sample)}", f"interval {'under' if sign < 0 else 'over'} 0", holds)


def twenty(options: Options, data: Data, name: str, drawn: Drawn) -> tuple[Table, list[Claim]]:
    """Twenty networks, ten images each, both directions: how often the measure moved the right way, on its own draws and fresh ones."""
    runs = QUICK_RUNS if options.quick else RUNS
    rows: list[tuple[Cell, ...]] = []
    claims = []
    nets: list[Weights] = [train(data, start(data, 100 + run), BAR_EPOCHS, 100 + run) for run in range(runs)]
    for direction, sign in (("descend", -1), ("ascend", 1)):
        right = fresh_right = 0
        changes, moves = [], []
        for run in options.track(range(runs), f"{name}, {direction}, {runs} runs"):
            action, loss = data.batch(BAR_BATCH, run, "u_exact")(nets[run])
            result = teleport_to(action, loss, drawn(action, loss, run), direction, 5, radius=0.2)
            there = MLPAction(result.weights, action.X)
            fresh = drawn(action, loss, 7000 + run)
            right += sign * (result.report.after - result.report.before) > 0
            fresh_right += sign * (fresh.value(there) - fresh.value(action)) > 0
            changes.append(result.report.loss_change)
            moves.append(result.report.after / result.report.before)
        rows.append((direction, float(right), float(fresh_right), max(changes), Sample(tuple(moves))))
        claims.append(Claim(
            f"{name}, {direction}: the right way in {right} of {runs} runs, {fresh_right} on fresh draws, largest |ΔL|/L {max(changes):.1e}",
            f"{right / runs:.0%}", "at least 95%, |ΔL|/L ≤ 1e-6", right >= 0.95 * runs and max(changes) <= 1e-6,
        ))
    title = f"{runs} networks after {BAR_EPOCHS} epochs, {BAR_BATCH} images, U-exact, 5 steps"
    return Table(title, ("", "right way", "right way, fresh draws", "largest |ΔL|/L", "after / before"), tuple(rows)), claims


def settings(options: Options, data: Data, epochs: int, at: int) -> dict[str, object]:
    """What the two studies report."""
    return {
        "data": data.name, "pixels": "standardised",
        "training images": len(data.labels), "widths": [len(data.X), 16, 10, data.classes], "optimizer": "SGD",
        "lr": 1e-2, "batch": 20, "epochs": epochs, "teleport before epoch": at, "images of a teleport": IMAGES, "seeds": options.seeds,
        "images of the measure": f"{2 * IMAGES} others",
    }


def sharpness_drawn(action: MLPAction, loss: CrossEntropy, seed: int) -> Measure:
    """Mean sharpness on 32 directions of the sphere."""
    return MeanSharpness.drawn(action, loss, count=32, generator=_generator(seed))


def curvature_drawn(action: MLPAction, loss: CrossEntropy, seed: int) -> Measure:
    """Mean curvature on 16 draws of M."""
    del loss
    return MeanCurvature.drawn(action, 16, _generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

