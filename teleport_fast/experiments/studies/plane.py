"""Two functions of the plane that are u² + v² in other coordinates, on which SO(2) acts: Rosenbrock's and Booth's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

Point = tuple[float, float]
Way = Callable[[Point, float], float]
STEPS = 10
GRID = 720
HALVINGS = 40


@dataclass(frozen=True)
class Plane:
    """L = u² + v² at (x, y): residuals (u, v), their inverse, Jacobian (u_x, u_y, v_x, v_y), and L's Hessian (xx, xy, yy).

    g_θ·(x, y) has the residuals (u cos θ − v sin θ, u sin θ + v cos θ), so L stays ([NeurIPS22], symmetries of the test functions).

    >>> x, y = BOOTH.act((5.0, -5.0), math.pi / 2)
    >>> round(x, 9), round(y, 9), round(BOOTH.loss((x, y)), 9)
    (-7.0, 7.0, 144.0)
    """

    residuals: Callable[[Point], Point]
    point: Callable[[Point], Point]
    jacobian: Callable[[Point], tuple[float, float, float, float]]
    hessian: Callable[[Point], tuple[float, float, float]]

    def loss(self, at: Point) -> float:
        """L."""
        u, v = self.residuals(at)
        return u * u + v * v

    def gradient(self, at: Point) -> Point:
        """∇L = 2 (u_x u + v_x v, u_y u + v_y v)."""
        (u, v), (ux, uy, vx, vy) = self.residuals(at), self.jacobian(at)
        return 2 * (ux * u + vx * v), 2 * (uy * u + vy * v)

    def squared_norm(self, at: Point) -> float:
        """J = ‖∇L‖²."""
        a, b = self.gradient(at)
        return a * a + b * b

    def act(self, at: Point, theta: float) -> Point:
        """g_θ·(x, y)."""
        (u, v), c, s = self.residuals(at), math.cos(theta), math.sin(theta)
        return self.point((c * u - s * v, s * u + c * v))

    def slope(self, at: Point) -> float:
        """dJ/dθ = 2 ∇Lᵀ H dp/dθ, dp/dθ the Jacobian's inverse times (−v, u)."""
        (u, v), (ux, uy, vx, vy), (a, b) = self.residuals(at), self.jacobian(at), self.gradient(at)
        xx, xy, yy = self.hessian(at)
        det = ux * vy - uy * vx
        x, y = (-vy * v - uy * u) / det, (vx * v + ux * u) / det
        return 2 * (a * (xx * x + xy * y) + b * (xy * x + yy * y))

    def step(self, at: Point, lr: float) -> Point:
        """One step of gradient descent."""
        a, b = self.gradient(at)
        return at[0] - lr * a, at[1] - lr * b


ROSENBROCK = Plane(
    lambda p: (10 * (p[0] * p[0] - p[1]), p[0] - 1),
    lambda r: (r[1] + 1, (r[1] + 1) ** 2 - r[0] / 10),
    lambda p: (20 * p[0], -10.0, 1.0, 0.0),
    lambda p: (1200 * p[0] * p[0] - 400 * p[1] + 2, -400 * p[0], 200.0),
)
BOOTH = Plane(
    lambda p: (p[0] + 2 * p[1] - 7, 2 * p[0] + p[1] - 5),
    lambda r: (1 + (2 * r[1] - r[0]) / 3, 3 + (2 * r[0] - r[1]) / 3),
    lambda p: (1.0, 2.0, 2.0, 1.0),
    lambda p: (10.0, 8.0, 10.0),
)


def published(plane: Plane, at: Point, theta: float, lr: float, steps: int = STEPS) -> list[float]:
    """The angles of the published loop: θ ← θ + lr dJ/dθ at a fixed lr, the last update not used."""
    angles = [theta]
    while len(angles) < steps:
        angles.append(angles[-1] + lr * plane.slope(plane.act(at, angles[-1])))
    return angles


def searched(plane: Plane, at: Point, theta: float, lr: float, steps: int = STEPS) -> list[float]:
    """The same ascent with steps of at most 1 rad, halved until J does not fall: J ends no lower than at the first angle."""
    angles = [theta]
    for _ in range(steps):
        here = plane.act(at, angles[-1])
        slope, J = plane.slope(here), plane.squared_norm(here)
        move = max(-1.0, min(1.0, lr * slope))
        for _ in range(HALVINGS):
            if plane.squared_norm(plane.act(at, angles[-1] + move)) >= J:
                angles.append(angles[-1] + move)
                break
            move /= 2
    return angles


def highest(plane: Plane, at: Point, grid: int = GRID) -> float:
    """The angle of the orbit's largest ‖∇L‖: the best of a grid, then bisection of dJ/dθ between its neighbours."""
    width = 2 * math.pi / grid
    best = max((width * index for index in range(grid)), key=lambda theta: plane.squared_norm(plane.act(at, theta)))
    low, high = best - width, best + width
    for _ in range(64):
        middle = (low + high) / 2
        if plane.slope(plane.act(at, middle)) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def ways(plane: Plane, lr: float) -> dict[str, Way]:
    """How the angle is found from a point and a first angle, by name; "plain" does not teleport."""
    return {
        "plain": lambda at, theta: 0.0,
        "published loop": lambda at, theta: published(plane, at, theta, lr)[-1],
        "line search": lambda at, theta: searched(plane, at, theta, lr)[-1],
        "highest gradient": lambda at, theta: highest(plane, at),
    }


def first_angles(seed: int) -> Iterator[float]:
    """Angles drawn evenly from 0 to π, one a teleport, as published."""
    stream = random.Random(seed)
    while True:
        yield math.pi * stream.random()


def descend(plane: Plane, start: Point, lr: float, steps: int, at: Container[int], way: Way, seed: int) -> list[Point]:
    """The points of gradient descent, the start first; before a step whose number is in `at`, the point is teleported."""
    points, angles = [start], first_angles(seed)
    for index in range(steps):
        here = points[-1]
        if index in at:
            here = plane.act(here, way(here, next(angles)))
        points.append(plane.step(here, lr))
    return points
