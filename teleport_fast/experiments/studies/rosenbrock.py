"""[NeurIPS22], test functions: Rosenbrock's under SO(2): gradient descent with a teleport every hundred steps."""

from __future__ import annotations

from teleport_fast.experiments.studies.plane import ROSENBROCK, Point, descend, ways
from teleport_fast.experiments.studies.study import Claim, Curve, Options, Outcome, Panel, Sample, Table, number

START: Point = (-1.0, -1.0)
RATE, STEPS, EVERY, ANGLE_RATE = 1e-3, 1000, 100, 0.1
BAR, PLAIN = 5e-8, 0.11
SEEDS = QUICK_SEEDS = tuple(range(10))
POINTS = 10


def run(options: Options) -> Outcome:
    """A thousand steps at lr 1e-3, a teleport before every hundredth: as published, with a line search, to the highest gradient."""
    rows, curves = [], []
    for name, way in options.track(ways(ROSENBROCK, ANGLE_RATE).items(), "Rosenbrock, four ways"):
        at = () if name == "plain" else range(EVERY - 1, STEPS, EVERY)
        losses = [[ROSENBROCK.loss(p) for p in descend(ROSENBROCK, START, RATE, STEPS, at, way, seed)] for seed in options.seeds]
        end = Sample(tuple(run[-1] for run in losses))
        rows.append((name, end.median, min(end.values), max(end.values), end))
        curves.append(Curve(name, tuple(range(0, STEPS + 1, POINTS)), tuple(tuple(run[::POINTS]) for run in losses)))
    median = {str(row[0]): row[1] for row in rows}
    claims = [
        Claim(f"{name}, median of {len(options.seeds)} seeds", f"loss {number(median[name])}", f"at most {BAR:g}", median[name] <= BAR)
        for name in ("published loop", "line search", "highest gradient")
    ]
    plain = median["plain"]
    claims.append(Claim("plain gradient descent", f"loss {number(plain)}", f"{PLAIN:g}", abs(plain - PLAIN) < 0.005))
    return Outcome(
        name="rosenbrock",
        title="Rosenbrock's function: ten teleports",
        source="arXiv 2205.10637, experiments on test functions",
        settings={
            "start": START, "lr": RATE, "steps": STEPS, "teleport every": EVERY, "lr of the angle": ANGLE_RATE,
            "first angle": "π × uniform, one a teleport", "seeds": options.seeds,
        },
        tables=(
            Table(
                f"Loss after {STEPS} steps at lr {RATE:g} from (-1, -1); {len(options.seeds)} seeds",
                ("", "median", "lowest", "highest", "mean ± sd"),
                tuple(rows),
            ),
        ),
        panels=(Panel(f"Teleport before every {EVERY}th step", "step", "loss", tuple(curves), log_y=True),),
        claims=tuple(claims),
    )
