"""Two-dimensional losses whose highest gradient on every level set is known, for what a step does there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Point = tuple[float, float]
Function = Callable[[float], float]


@dataclass(frozen=True)
class Separable:
    """L(x, y) = f(x) + h(y), both with their minimum 0 at 0; f, f', f'', h, h', h''.

    Where f'' ≥ h'' all over, J rises with |x| along a level set: its maximum is where the level set meets the x-axis, and there
    ∇L = (f', 0) is an eigenvector of the Hessian diag(f'', h'').
    """

    name: str
    f: tuple[Function, Function, Function]
    h: tuple[Function, Function, Function]

    def loss(self, at: Point) -> float:
        """L."""
        return self.f[0](at[0]) + self.h[0](at[1])

    def gradient(self, at: Point) -> Point:
        """∇L."""
        return self.f[1](at[0]), self.h[1](at[1])

    def squared_norm(self, at: Point) -> float:
        """J = ‖∇L‖²."""
        return sum(value * value for value in self.gradient(at))

    def rayleigh(self, at: Point) -> float:
        """λ = gᵀHg/gᵀg."""
        (a, b), J = self.gradient(at), self.squared_norm(at)
        return (a * a * self.f[2](at[0]) + b * b * self.h[2](at[1])) / J

    def residual(self, at: Point) -> float:
        """‖Hg − λg‖/‖Hg‖."""
        (a, b), rate = self.gradient(at), self.rayleigh(at)
        p, q = a * self.f[2](at[0]), b * self.h[2](at[1])
        return math.hypot(p - rate * a, q - rate * b) / math.hypot(p, q)

    def on_axis(self, level: float, axis: int = 0) -> Point:
        """The point of the axis at this level with the larger ‖∇L‖, by bisection."""
        ends = [self._root(level, axis, side) for side in (1.0, -1.0)]
        points = [(end, 0.0) if axis == 0 else (0.0, end) for end in ends]
        return max(points, key=self.squared_norm)

    def highest(self, level: float) -> Point:
        """The point of the level set with the largest ‖∇L‖, of the two axes and a grid between."""
        candidates = [self.on_axis(level, 0), self.on_axis(level, 1)]
        reach = [abs(self._root(level, 0, side)) for side in (1.0, -1.0)]
        for index in range(1, 60):
            for side, width in zip((1.0, -1.0), reach, strict=True):
                x = side * width * index / 60
                rest = level - self.f[0](x)
                if rest > 0:
                    candidates += [(x, self._root(rest, 1, sign)) for sign in (1.0, -1.0)]
        return max(candidates, key=self.squared_norm)

    def _root(self, level: float, axis: int, side: float) -> float:
        function = (self.f if axis == 0 else self.h)[0]
        low, high = 0.0, side
        while function(high) < level:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            if middle in (low, high):
                break
            low, high = (middle, high) if function(middle) < level else (low, middle)
        return low if abs(function(low) - level) < abs(function(high) - level) else high

    def step(self, at: Point, rate: float) -> Point:
        """w − rate ∇L."""
        a, b = self.gradient(at)
        return at[0] - rate * a, at[1] - rate * b


def axis_steps(
    problem: Separable, start: Point, share: float, steps: int, teleport: bool = True
) -> Iterator[tuple[float, float]]:
    """(‖w'‖ before the step, ‖w‖ after it) of steps of length share/λ, each from the x-axis's end of its level set if `teleport`."""
    at = start
    for _ in range(steps):
        at = problem.on_axis(problem.loss(at)) if teleport else at
        before = math.hypot(*at)
        at = problem.step(at, share / problem.rayleigh(at))
        yield before, math.hypot(*at)


def flow(problem: Separable, start: Point, until: float, width: float = 0.01) -> Iterator[tuple[float, Point]]:
    """(time, point) of ẇ = −∇L by the classical Runge-Kutta method."""

    def down(at: Point, along: Point, share: float) -> Point:
        a, b = problem.gradient((at[0] + share * along[0], at[1] + share * along[1]))
        return -a, -b

    at, time = start, 0.0
    while time < until:
        yield time, at
        k1 = down(at, (0.0, 0.0), 0.0)
        k2 = down(at, k1, width / 2)
        k3 = down(at, k2, width / 2)
        k4 = down(at, k3, width)
        at = (at[0] + width / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0]), at[1] + width / 6 * (k1[1] + 2 * k2[1] + 2 * k3[1] + k4[1]))
        time += width


def bowl(y_curvature: float = 0.2) -> Separable:
    """½x² + ½(x − sin x) + ½ μ y²: f'' = 1 + ½ sin x, so μ = y_curvature, β = 1.5 and the Hessian's Lipschitz constant is G = ½."""
    return Separable(
        "bowl, Lipschitz Hessian",
        (lambda x: 0.5 * x * x + 0.5 * _x_less_sin(x), lambda x: x + _half_square(x), lambda x: 1 + 0.5 * math.sin(x)),
        _square(y_curvature),
    )


def _x_less_sin(x: float) -> float:
    """x − sin x without its cancellation near 0."""
    if abs(x) > 0.1:
        return x - math.sin(x)
    return x**3 / 6 * (1 - x * x / 20 * (1 - x * x / 42 * (1 - x * x / 72)))


def _half_square(x: float) -> float:
    """½(1 − cos x) without cancellation."""
    return math.sin(x / 2) ** 2


def _square(curvature: float) -> tuple[Function, Function, Function]:
    return lambda y: 0.5 * curvature * y * y, lambda y: curvature * y, lambda y: curvature


def kinked(y_curvature: float = 0.2) -> Separable:
    """Outside: ½x² + |x|^2.5 has no Lipschitz Hessian at 0: f'' = 1 + 3.75 √|x|."""
    return Separable(
        "|x|^2.5, Hessian not Lipschitz",
        (lambda x: 0.5 * x * x + abs(x) ** 2.5, lambda x: x + math.copysign(2.5 * abs(x) ** 1.5, x), lambda x: 1 + 3.75 * abs(x) ** 0.5),
        _square(y_curvature),
    )


def quadratic() -> Separable:
    """½ · 1 · x² + ½ · 0.1 · y²."""
    return Separable("quadratic", _square(1.0), _square(0.1))


def ridge() -> Separable:
    """½x² + 0.05 y² + 0.9 log cosh y: h'' in (0.1, 1], so ∇L on the x-axis has the largest curvature there is, β = 1, all along."""
    return Separable(
        "0.9 log cosh y: the axis keeps β",
        _square(1.0),
        (lambda y: 0.05 * y * y + 0.9 * _log_cosh(y), lambda y: 0.1 * y + 0.9 * math.tanh(y), lambda y: 0.1 + 0.9 / math.cosh(y) ** 2),
    )


def _log_cosh(y: float) -> float:
    y = abs(y)
    return y + math.log1p(math.exp(-2 * y)) - math.log(2) if y > 1e-3 else 0.5 * y * y * (1 - y * y / 6)


def quartic() -> Separable:
    """Outside: ½x² + y⁴. High up the y-axis is the steepest, and an eigenvector; its curvature 12y² falls to 0 on the way down."""
    return Separable("½x² + y⁴", _square(1.0), (lambda y: y**4, lambda y: 4 * y**3, lambda y: 12 * y * y))
