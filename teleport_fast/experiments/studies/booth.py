"""[NeurIPS22], test functions: Booth's under SO(2): gradient descent with one teleport, and one step after one teleport."""

from __future__ import annotations

import math

from teleport_fast.experiments.studies.plane import BOOTH, Point, descend, ways
from teleport_fast.experiments.studies.study import Claim, Curve, Options, Outcome, Panel, Sample, Table, number

START: Point = (5.0, -5.0)
RATE, STEPS, TELEPORT_AT, ANGLE_RATE = 0.08, 10, 4, 1e-3
ONE_STEP_RATE, BAR = 1 / 18, 1e-25
SEEDS = QUICK_SEEDS = tuple(range(10))


def run(options: Options) -> Outcome:
    """Ten steps at lr 0.08 with a teleport before the fifth, and one step at lr 1/18, which is one over the largest curvature."""
    rows, curves, best = [], [], math.inf
    for name, way in options.track(ways(BOOTH, ANGLE_RATE).items(), "Booth, four ways"):
        at = () if name == "plain" else (TELEPORT_AT,)
        losses = [tuple(map(BOOTH.loss, descend(BOOTH, START, RATE, STEPS, at, way, seed))) for seed in options.seeds]
        ends = [BOOTH.loss(descend(BOOTH, START, ONE_STEP_RATE, 1, at and (0,), way, seed)[-1]) for seed in options.seeds]
        end, one = Sample(tuple(run[-1] for run in losses)), Sample(tuple(ends))
        best = max(one.values)
        rows.append((name, end, end.median, one, one.median))
        curves.append(Curve(name, tuple(range(STEPS + 1)), tuple(losses)))
    return Outcome(
        name="booth",
        title="Booth's function: one teleport",
        source="arXiv 2205.10637, experiments on test functions",
        settings={
            "start": START, "lr": RATE, "steps": STEPS, "teleport before step": TELEPORT_AT + 1, "lr of the angle": ANGLE_RATE,
            "one step's lr": ONE_STEP_RATE, "first angle": "π × uniform", "seeds": options.seeds,
        },
        tables=(
            Table(
                f"Loss from (5, -5); {len(options.seeds)} first angles",
                ("", f"{STEPS} steps at lr {RATE:g}", "median", "1 step at lr 1/18", "median"),
                tuple(rows),
            ),
        ),
        panels=(Panel(f"Teleport before step {TELEPORT_AT + 1}", "step", "loss", tuple(curves), log_y=True),),
        claims=(
            Claim("one teleport to the highest gradient and one step at lr 1/18", f"loss {number(best)}", f"under {BAR:g}", best < BAR),
        ),
    )
