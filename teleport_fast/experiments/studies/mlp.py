"""[NeurIPS22] multi-layer regression: gradient descent and AdaGrad on a 5-6-7-8 network and four samples, one teleport at step 5."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teleport_fast.data_dependent import RankWarning, SquaredError, reset_state_, teleport_
from teleport_fast.experiments.stack import OPTIMIZERS
from teleport_fast.experiments.studies.study import Cell, Claim, Curve, Options, Outcome, Panel, Sample, Table, number

WIDTHS, SAMPLES, STEPS, TELEPORT_AT = (5, 6, 7, 8), 4, 300, 5
SEEDS, QUICK_SEEDS = (0, 1, 2, 3, 4), (0, 1)
RELEASED = {"SGD": (1e-4, 1e-7, 8), "AdaGrad": (1e-1, 1e-5, 2)}
FACTORS = (1.0, 3.0, 10.0)
EXACT, RISE, DIVERGED = 1e-12, 10.0, 1e12
# Without a cap of its own the exact ascent takes ‖∇L‖² up a thousandfold, where lr 1e-4 diverges; 10 is the published loop's order.
# Arm: (how it moves, what becomes of the state); carried and projected differ in AdaGrad's sums.
ARMS: dict[str, dict[str, tuple[str, str]]] = {
    "SGD": {"plain": ("", ""), "published loop": ("published", "keep"), "teleport": ("ours", "keep")},
    "AdaGrad": {
        "plain": ("", ""), "reset only": ("", "reset"), "published loop": ("published", "keep"),
        "published loop + reset": ("published", "reset"), "teleport + reset": ("ours", "reset"),
        "teleport + carried": ("ours", "keep"), "teleport + projected": ("ours", "project"),
    },
}


@dataclass(frozen=True)
class Run:
    """Losses before every step and at the end; the loss before and after the teleport, and how far ‖∇L‖² rose in it."""

    losses: tuple[float, ...]
    before: float
    after: float
    rise: float

    @property
    def end(self) -> float:
        """The last loss; inf of a training that left 1e12."""
        return self.losses[-1]


def problem(seed: int) -> tuple[nn.Sequential, Tensor, SquaredError]:
    """Weights, inputs (samples, 5) and targets (8, samples), all even in 0..1, float64, as published.

    >>> [type(layer).__name__ for layer in problem(0)[0]]
    ['Linear', 'LeakyReLU', 'Linear', 'LeakyReLU', 'Linear']
    """
    stream = torch.Generator().manual_seed(12345 * seed * seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(WIDTHS):
        linear = nn.Linear(before, after, bias=False, dtype=torch.float64)
        linear.weight = nn.Parameter(torch.rand(after, before, generator=stream, dtype=torch.float64))
        layers += [linear, nn.LeakyReLU(0.1)]
    inputs = torch.rand(WIDTHS[0], SAMPLES, generator=stream, dtype=torch.float64).mT.contiguous()
    return nn.Sequential(*layers[:-1]), inputs, SquaredError(torch.rand(WIDTHS[-1], SAMPLES, generator=stream, dtype=torch.float64))


def train(optimizer: str, arm: str, lr: float, seed: int) -> Run:
    """One training of 300 steps."""
    model, inputs, loss_fn = problem(seed)
    _, teleport_lr, steps = RELEASED[optimizer]
    moves, state = ARMS[optimizer][arm]
    stepper = OPTIMIZERS[optimizer](list(model.parameters()), lr)
    losses: list[float] = []
    before = after = rise = math.nan
    for step in range(STEPS + 1):
        if step == TELEPORT_AT and state == "reset" and not moves:
            reset_state_(stepper, model)
        if step == TELEPORT_AT and moves and loss_fn(model(inputs).mT).item() < DIVERGED:
            options: dict[str, Any] = {"parity": "neurips22"} if moves == "published" else {"cap": RISE * _squared_norm(model, inputs, loss_fn)}
            policy, second = ("carry", "project") if state == "project" else (state, "keep")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RankWarning)
                try:
                    report = teleport_(
                        model, inputs, loss_fn, stepper, state=policy, second_moments=second, steps=steps, lr=teleport_lr, **options
                    )
                except torch.linalg.LinAlgError:
                    # The published loop left the finite numbers within its steps.
                    losses.append(math.inf)
                    break
            before, after = report.loss_before or math.nan, report.loss_after or math.nan
            rise = report.objective_after / report.objective_before
        stepper.zero_grad()
        loss = loss_fn(model(inputs).mT)
        losses.append(loss.item() if loss.item() < DIVERGED else math.inf)
        if losses[-1] == math.inf:
            break
        loss.backward()
        stepper.step()
    return Run(tuple(losses), before, after, rise)


def _squared_norm(model: nn.Sequential, inputs: Tensor, loss_fn: SquaredError) -> float:
    gradients = torch.autograd.grad(loss_fn(model(inputs).mT), list(model.parameters()))
    return sum(float(gradient.square().sum()) for gradient in gradients)


def run(options: Options) -> Outcome:
    """All arms at the released learning rates, then each at its own best of three."""
    factors = (1.0,) if options.quick else FACTORS
    planned = [(optimizer, arm, factor) for optimizer in RELEASED for arm in ARMS[optimizer] for factor in factors]
    runs: dict[tuple[str, str, float], list[Run]] = {}
    for optimizer, arm, factor in options.track(planned, f"regression: {len(planned)} times {len(options.seeds)} trainings"):
        lr = RELEASED[optimizer][0] * factor
        runs[optimizer, arm, factor] = [train(optimizer, arm, lr, seed) for seed in options.seeds]
    released = {key: made for key, made in runs.items() if key[2] == 1}
    best = {}
    for optimizer, arm, _ in released:
        factor = min(factors, key=lambda f: Sample(tuple(r.end for r in runs[optimizer, arm, f])).mean)
        best[optimizer, arm, factor] = runs[optimizer, arm, factor]
    tables, claims = [_table("released learning rates", released)], _claims("released", released)
    if not options.quick:
        tables.append(_table(f"each arm's best of {', '.join(f'{f:g}' for f in FACTORS)} times the released rate", best))
        claims += _claims("best", best)
    claims += _losses_kept(released)
    panels = [
        Panel(f"{optimizer}, lr {RELEASED[optimizer][0]:g}", "step", "loss", tuple(
            Curve(arm, tuple(range(0, STEPS + 1, 2)), tuple(made.losses[::2] for made in released[optimizer, arm, 1.0]))
            for arm in ARMS[optimizer]
        ), log_y=True)
        for optimizer in RELEASED
    ]
    settings: dict[str, object] = {
        "widths": WIDTHS, "samples": SAMPLES, "steps": STEPS, "teleport before step": TELEPORT_AT,
        "rise of ‖∇L‖² at most": RISE, "dtype": "float64",
        "released lr, teleport lr, teleport steps": RELEASED, "seeds": options.seeds,
    }
    return Outcome(
        "mlp", "Multi-layer regression: one teleport", "arXiv 2205.10637, multi-layer neural network", settings,
        tuple(tables), tuple(panels), tuple(claims),
    )


def _ends(made: list[Run]) -> Sample:
    return Sample(tuple(each.end for each in made))


def _table(title: str, runs: dict[tuple[str, str, float], list[Run]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for (optimizer, arm, factor), made in runs.items():
        moved = all(math.isfinite(each.after) for each in made)
        change = Sample(tuple(100 * (each.after / each.before - 1) for each in made)) if moved else "–"
        rise = Sample(tuple(each.rise for each in made)).median if moved else "–"
        rows.append((f"{optimizer}, {arm}", f"{RELEASED[optimizer][0] * factor:g}", _ends(made), change, rise))
    columns = ("", "lr", f"loss after {STEPS} steps", "loss change at the teleport, %", "rise of ‖∇L‖², median")
    return Table(f"{title}; mean ± sd over seeds", columns, tuple(rows))


def _claims(rates: str, runs: dict[tuple[str, str, float], list[Run]]) -> list[Claim]:
    """Paired over the seeds, each arm against the same handling of the state without a move."""
    by = {(optimizer, arm): made for (optimizer, arm, _), made in runs.items()}
    claims = []
    for (optimizer, arm), made in by.items():
        moves, state = ARMS[optimizer][arm]
        if not moves:
            continue
        against = "reset only" if state == "reset" else "plain"
        pairs = zip(by[optimizer, against], made, strict=True)
        ratio = Sample(tuple(math.log10(base.end / own.end) if 0 < own.end < math.inf else -math.inf for base, own in pairs))
        low, high = ratio.interval if ratio.finite else (-math.inf, math.inf)
        claims.append(Claim(
            f"{optimizer}, {rates} rates: {arm} ends with a lower loss than {against}",
            f"by {ratio} decades, 95% interval {number(low)} to {number(high)}", "interval above 0", low > 0,
        ))
    return claims


def _losses_kept(runs: dict[tuple[str, str, float], list[Run]]) -> list[Claim]:
    ours = [abs(r.after / r.before - 1) for (o, arm, _), made in runs.items() if ARMS[o][arm][0] == "ours" for r in made]
    theirs = [f"{r.before:.4g} to {r.after:.4g}" for r in runs["SGD", "published loop", 1.0]]
    fall = all(r.after < r.before for r in runs["SGD", "published loop", 1.0])
    return [
        Claim(
            "the exact teleport keeps the loss", f"changed by at most {number(max(ours))} of itself", f"at most {EXACT:g}", max(ours) <= EXACT
        ),
        Claim("SGD's published loop changes the loss at the teleport itself", "; ".join(theirs), "falls for every seed", fall),
    ]
