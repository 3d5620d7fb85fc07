"""SO(2) on Booth's and Rosenbrock's functions: the recorded numbers of the published code, and the bars of the two studies."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import numpy
import pytest

from teleport_fast.experiments.studies import booth, rosenbrock
from teleport_fast.experiments.studies.plane import (
    BOOTH,
    ROSENBROCK,
    Plane,
    descend,
    highest,
    published,
    searched,
    ways,
)
from teleport_fast.experiments.studies.study import Options

RECORDED = numpy.load(Path(__file__).resolve().parents[2] / "fixtures" / "so2.npz")
PLANES = [("ros", ROSENBROCK), ("booth", BOOTH)]
TRACES = [key for key in RECORDED.files if "_trace_" in key]
CLOSE = 1e-9


def plane_of(key: str) -> Plane:
    return dict(PLANES)[key.split("_")[0]]


def near(found: float, wanted: float, scale: float = 0.0) -> bool:
    return abs(found - wanted) <= CLOSE * max(abs(wanted), scale, 1.0)


@pytest.mark.parametrize(("key", "plane"), PLANES)
def test_the_action_is_the_recorded_one_and_keeps_the_loss(key: str, plane: Plane) -> None:
    start = tuple(map(float, RECORDED[f"{key}_x0y0"]))
    for theta, x, y, loss, J in RECORDED[f"{key}_action_table"]:
        moved = plane.act(start, theta)
        assert near(moved[0], x) and near(moved[1], y)
        assert plane.loss(moved) == pytest.approx(loss, rel=CLOSE)
        assert plane.squared_norm(moved) == pytest.approx(J, rel=CLOSE)
    # Negative control: a turn of the point itself, not of its residuals, is no symmetry.
    c, s = math.cos(0.5), math.sin(0.5)
    turned = (c * start[0] - s * start[1], s * start[0] + c * start[1])
    assert abs(plane.loss(turned) - plane.loss(start)) > 1e-3 * plane.loss(start)


@pytest.mark.parametrize("key", TRACES)
def test_every_step_of_the_recorded_ascents_is_ours(key: str) -> None:
    plane, rate = plane_of(key), float(key.split("_lr")[1].split("_")[0])
    start = tuple(map(float, RECORDED[f"{key.split('_')[0]}_x0y0"]))
    trace = RECORDED[key]
    for (theta, x, y, loss, J), (following, *_) in itertools.pairwise(trace):
        here = plane.act(start, theta)
        assert near(here[0], x, 20) and near(here[1], y, 20)
        assert plane.loss(here) == pytest.approx(loss, rel=CLOSE) and plane.squared_norm(here) == pytest.approx(J, rel=CLOSE)
        first, second = published(plane, start, theta, rate, 2)
        # The recorded angle is folded into (-π, π], so an error of the move itself is what can be compared.
        assert abs(math.remainder(second - following, 2 * math.pi)) <= CLOSE * max(1.0, abs(second - first))
    assert tuple(trace[-1, 1:3]) == pytest.approx(tuple(RECORDED[key.replace("_trace_theta_x_y_loss_gradsq", "_xy_out")]), rel=CLOSE)


@pytest.mark.parametrize(("key", "plane"), PLANES)
def test_every_step_of_the_recorded_runs_is_ours(key: str, plane: Plane) -> None:
    rate = {"ros": rosenbrock.RATE, "booth": booth.RATE}[key]
    for kind in ("gd", "tele"):
        points = RECORDED[f"{key}_{kind}_xy"]
        rows = RECORDED[f"{key}_tele_points_epoch_x_y"] if kind == "tele" else []
        teleported = {int(epoch): (float(x), float(y)) for epoch, x, y in rows}
        for index, (before, after) in enumerate(itertools.pairwise(points)):
            here = teleported.get(index, tuple(map(float, before)))
            assert plane.loss(here) == pytest.approx(plane.loss(tuple(map(float, before))), rel=CLOSE)
            assert plane.loss(here) == pytest.approx(RECORDED[f"{key}_{kind}_loss"][index], rel=CLOSE)
            assert plane.step(here, rate) == pytest.approx(tuple(after), rel=CLOSE)


@pytest.mark.parametrize("plane", [BOOTH, ROSENBROCK], ids=["booth", "rosenbrock"])
def test_gradient_and_slope_are_the_derivatives(plane: Plane) -> None:
    at, theta, step = (random.uniform(-2, 2), random.uniform(-2, 2)), random.uniform(0, 6), 1e-6
    for axis in range(2):
        ahead, behind = ([value + (axis == index) * sign * step for index, value in enumerate(at)] for sign in (1, -1))
        slope = (plane.loss(tuple(ahead)) - plane.loss(tuple(behind))) / (2 * step)
        assert plane.gradient(at)[axis] == pytest.approx(slope, rel=1e-6, abs=1e-5)
    ahead, behind = (plane.squared_norm(plane.act(at, theta + sign * step)) for sign in (1, -1))
    here = plane.act(at, theta)
    assert plane.slope(here) == pytest.approx((ahead - behind) / (2 * step), rel=1e-5, abs=1e-6 * plane.squared_norm(here))


@pytest.mark.parametrize("plane", [BOOTH, ROSENBROCK], ids=["booth", "rosenbrock"])
def test_the_search_loses_no_ground_and_the_highest_is_the_orbits_highest(plane: Plane) -> None:
    at, theta = (random.uniform(-2, 2), random.uniform(-2, 2)), random.uniform(0, math.pi)
    norms = [plane.squared_norm(plane.act(at, angle)) for angle in searched(plane, at, theta, 0.1)]
    assert all(after >= before for before, after in itertools.pairwise(norms)) and norms[-1] > norms[0]
    top = plane.act(at, highest(plane, at))
    assert plane.squared_norm(top) >= max(plane.squared_norm(plane.act(at, random.uniform(0, 7))) for _ in range(2000))
    assert abs(plane.slope(top)) <= 1e-9 * plane.squared_norm(top)


def test_booth_is_solved_by_one_teleport_and_one_step() -> None:
    start, rate, way = booth.START, booth.ONE_STEP_RATE, ways(BOOTH, booth.ANGLE_RATE)["highest gradient"]
    end = descend(BOOTH, start, rate, 1, (0,), way, 0)[-1]
    assert BOOTH.loss(end) < booth.BAR == 1e-25
    # Negative controls: neither the step alone nor a teleport to another angle.
    assert BOOTH.loss(descend(BOOTH, start, rate, 1, (), way, 0)[-1]) > 1
    assert BOOTH.loss(descend(BOOTH, start, rate, 1, (0,), lambda at, theta: highest(BOOTH, at) + 0.1, 0)[-1]) > 1e-2


def test_rosenbrocks_medians_are_under_the_bar_and_plain_descent_is_not() -> None:
    outcome = rosenbrock.run(Options(seeds=tuple(range(10))))
    medians = {row[0]: row[1] for row in outcome.tables[0].rows}
    assert medians["plain"] == pytest.approx(0.1113, abs=1e-4)
    assert all(medians[name] <= 5e-8 for name in ("published loop", "line search", "highest gradient"))
    assert all(claim.holds for claim in outcome.claims)
