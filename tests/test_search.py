"""Searches stay in their ball, never lose ground, and meet their closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teleport_fast.search import (
    check_radius,
    diagonal_extremum,
    exponential,
    geodesic_descent,
    geometric_mean,
    lie_step,
    trust_region_ascent,
)
from teleport_fast.symmetry import DenseGroup, GeneralLinear, Rotary
from teleport_fast.symmetry.bucket import Element

STRETCHING = [GeneralLinear(5), Rotary(6, rotary=6), Rotary(7, rotary=4, layout="interleaved")]
stretching = pytest.mark.parametrize("group", STRETCHING, ids=str)


def grams(width: int, heads: int = 3, seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, width, dtype=torch.float64)[:, None]
    factors = [
        torch.randn(heads, width, rank or 2 * width, generator=generator, dtype=torch.float64) * s
        for s in (scale, scale.flip(0))
    ]
    return factors[0] @ factors[0].mT, factors[1] @ factors[1].mT


def objective(g: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
    """J(P) = tr(P⁻¹S₊) + tr(P S₋) per head, P = gᵀg."""
    p = g.mT @ g
    return (torch.linalg.inv(p) * plus).sum((1, 2)) + (p * minus).sum((1, 2))


def ones(heads: int, group: DenseGroup) -> Tensor:
    return group.identity(heads, torch.float64)


def test_exponential_gives_the_element_with_its_inverse_transpose() -> None:
    algebra = torch.randn(3, 4, 4, dtype=torch.float64)
    element = exponential(algebra)
    assert element.g_inverse_t is not None
    torch.testing.assert_close(element.g, torch.linalg.matrix_exp(algebra))
    torch.testing.assert_close(element.g_inverse_t, torch.linalg.inv(element.g).mT)


@stretching
def test_a_lie_step_climbs_in_the_group_and_its_mirror_descends(group: DenseGroup) -> None:
    plus, minus = grams(group.width)
    step = lie_step(group, minus - plus, 0.01)
    torch.testing.assert_close(group.factor_norm(step), torch.tensor(0.01, dtype=torch.float64))
    torch.testing.assert_close(group.project(step), step)
    start = objective(ones(3, group), plus, minus)
    assert bool((objective(exponential(step).g, plus, minus) > start).all())
    down = lie_step(group, minus - plus, 0.01, sign=-1.0)
    assert bool((objective(exponential(down).g, plus, minus) < start).all())


@stretching
@pytest.mark.parametrize("radius", [0.05, 0.5, 2.0])
def test_ascent_never_falls_and_stays_in_the_ball(group: DenseGroup, radius: float) -> None:
    plus, minus = grams(group.width)
    least = objective(ones(3, group), plus, minus)
    for steps in (1, 2, 4, 8):
        element, used = trust_region_ascent(group, plus, minus, radius, steps)
        reached = objective(element.g, plus, minus)
        assert bool((reached >= least * (1 - 1e-12)).all())
        if steps == 1:
            assert bool((reached > least).all())
            least = reached  # shorter geodesics follow the gradient more closely
        assert float(used) == pytest.approx(radius)
        assert used.dtype == torch.float64
        assert bool((distance(element.g, group) <= radius * (1 + 1e-9)).all())
        assert element.g_inverse_t is not None
        torch.testing.assert_close(element.g_inverse_t, torch.linalg.inv(element.g).mT)
        torch.testing.assert_close(group.project(element.g), element.g)


def distance(g: Tensor, group: DenseGroup) -> Tensor:
    """The geodesic distance of g from the rotations, ‖½ log gᵀg‖ of the largest factor, per head."""
    values, vectors = torch.linalg.eigh(g.mT @ g)
    logarithm = (vectors * values.log().unsqueeze(-2) / 2) @ vectors.mT
    return torch.stack([group.factor_norm(head) for head in logarithm.split(1)])


@pytest.mark.parametrize("search", [trust_region_ascent, geodesic_descent])
def test_nothing_moves_without_a_slope(search: Callable[..., tuple[Element, Tensor]]) -> None:
    group, zero = GeneralLinear(4), torch.zeros(2, 4, 4, dtype=torch.float64)
    same = grams(4, 2)[0]
    for plus, minus in ((zero, zero), (same, same)):
        element, used = search(group, plus, minus, 0.5)
        torch.testing.assert_close(element.g, ones(2, group))
        assert float(used) == pytest.approx(0.0, abs=1e-6)


def test_a_head_without_a_slope_stays_while_others_climb() -> None:
    group = GeneralLinear(4)
    plus, minus = grams(4, 2)
    minus[0] = plus[0]
    element, used = trust_region_ascent(group, plus, minus, 0.5)
    assert float(used) == 0.5
    assert torch.equal(element.g[0], torch.eye(4, dtype=torch.float64))
    assert float((element.g[1] - torch.eye(4)).norm()) > 0.1


@given(width=st.integers(1, 8), heads=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_the_geometric_mean_balances_the_two_grams(width: int, heads: int, seed: int) -> None:
    plus, minus = grams(width, heads, seed)
    p = torch.linalg.matrix_exp(geometric_mean(plus, minus, ridge=0.0))
    assert float((p @ minus @ p - plus).norm() / plus.norm()) < 1e-8


@stretching
def test_descent_reaches_a_minimum_that_every_perturbation_raises(group: DenseGroup) -> None:
    plus, minus = grams(group.width)
    element, _ = geodesic_descent(group, plus, minus, math.inf)
    lowest = objective(element.g, plus, minus)
    assert bool((lowest < objective(ones(3, group), plus, minus)).all())
    for _ in range(10):
        noise = torch.randn(3, group.width, group.width, dtype=torch.float64)
        stretch = exponential(lie_step(group, noise + noise.mT, 0.05)).g
        assert bool((objective(stretch @ element.g, plus, minus) > lowest).all())


def test_the_minimum_over_gl_is_the_nuclear_norm_of_the_product() -> None:
    """min J = 2 tr (S₋^½ S₊ S₋^½)^½: what the geometric mean gives, from the singular values alone."""
    plus, minus = grams(5)
    element, _ = geodesic_descent(GeneralLinear(5), plus, minus, math.inf)
    roots = torch.linalg.eigvals(plus @ minus).real.clamp_min(0).sqrt().sum(1)
    torch.testing.assert_close(objective(element.g, plus, minus), 2 * roots, rtol=1e-6, atol=0)


@stretching
def test_a_bounded_descent_goes_part_of_the_way_and_still_descends(group: DenseGroup) -> None:
    plus, minus = grams(group.width)
    last = objective(ones(3, group), plus, minus)
    for radius in (0.1, 0.3, 1.0, 10.0):
        element, used = geodesic_descent(group, plus, minus, radius)
        assert float(used) <= radius * (1 + 1e-9)
        reached = objective(element.g, plus, minus)
        assert bool((reached <= last * (1 + 1e-12)).all())
        last = reached


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_deficient_and_zero_grams_give_finite_elements(dtype: torch.dtype) -> None:
    group, zero = GeneralLinear(6), torch.zeros(3, 6, 6, dtype=dtype)
    thin, other = (gram.to(dtype) for gram in grams(6, rank=2))
    for plus, minus in ((thin, other), (thin, thin), (thin, zero), (zero, thin), (zero, zero)):
        for radius in (0.5, math.inf):
            element, used = geodesic_descent(group, plus, minus, radius)
            assert element.g.dtype == used.dtype == dtype
            assert bool(torch.isfinite(element.g).all())
            before = objective(group.identity(3, torch.float64), plus.double(), minus.double())
            assert bool((objective(element.g.double(), plus.double(), minus.double()) <= before * (1 + 1e-5)).all())
        ascended, _ = trust_region_ascent(group, plus, minus, 0.5)
        assert bool(torch.isfinite(ascended.g).all())
    assert float(geometric_mean(thin, zero).abs().max()) == 0.0


entries = st.floats(0, 1e4, allow_nan=False).map(lambda x: 0.0 if x < 1e-6 else x)


@given(
    a=entries,
    b=entries,
    powers=st.sampled_from([(2.0, 2.0), (1.0, 1.0), (2.0, 4.0), (4.0, 2.0), (1.0, 2.0)]),
    radius=st.sampled_from([0.05, 0.3, 2.0]),
    descend=st.booleans(),
)
@settings(max_examples=40)
def test_a_diagonals_extremum_is_the_best_of_a_grid(
    a: float, b: float, powers: tuple[float, float], radius: float, descend: bool
) -> None:
    p, q = powers
    found = diagonal_extremum(*tensors(a, p, b, q), radius, descend)
    t = torch.linspace(-radius, radius, 801, dtype=torch.float64)
    values = a * (-p * t).exp() + b * (q * t).exp()
    reached = float(a * (-p * found).exp() + b * (q * found).exp())
    assert float(found.abs()) <= radius
    best = float(values.min() if descend else values.max())
    assert reached <= best * (1 + 1e-12) if descend else reached >= best * (1 - 1e-12)


def tensors(a: float, p: float, b: float, q: float) -> tuple[Tensor, float, Tensor, float]:
    return torch.tensor([[a]], dtype=torch.float64), p, torch.tensor([[b]], dtype=torch.float64), q


def test_relu_squared_balances_where_its_two_slopes_cancel() -> None:
    """d/dt a e^{−2t} + b e^{4t} = 0 at t = ln(a/2b)/6."""
    t = diagonal_extremum(*tensors(3.0, 2.0, 0.1, 4.0), math.inf, descend=True)
    assert float(t) == pytest.approx(math.log(3.0 / 0.2) / 6)


def test_empty_sides_stay_under_an_infinite_ball_and_go_to_the_end_of_a_finite_one() -> None:
    a, b = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert diagonal_extremum(a, 2.0, b, 2.0, math.inf, descend=True).tolist() == [[0, 0, 0]]
    assert diagonal_extremum(a, 2.0, b, 2.0, 0.5, descend=True).tolist() == [[0.5, -0.5, 0]]
    assert diagonal_extremum(a, 2.0, b, 2.0, 0.5, descend=False).tolist() == [[-0.5, 0.5, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("p", "q"), [(2.0, 2.0), (2.0, 6.0)])
def test_an_unbounded_descent_keeps_the_squares_of_its_factors_normal(dtype: torch.dtype, p: float, q: float) -> None:
    tiny = torch.finfo(dtype).tiny
    a, b = torch.tensor([[1 / tiny / 8, tiny]], dtype=dtype), torch.tensor([[tiny, 1 / tiny / 8]], dtype=dtype)
    t = diagonal_extremum(a, p, b, q, math.inf, descend=True)
    squares = (2 * max(p, q) * t).exp()
    assert bool((t.abs() > 5).all())
    assert bool(squares.isfinite().all()) and bool((squares >= tiny).all())


@pytest.mark.parametrize("radius", [1e-30, 0.3, 300.0])
def test_the_right_end_is_chosen_at_any_radius(radius: float) -> None:
    a, b = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    t = diagonal_extremum(a, 2.0, b, 2.0, radius, descend=False)
    torch.testing.assert_close(t, torch.tensor([[-radius, radius]]))


@pytest.mark.parametrize("radius", [0.0, -0.5, float("nan")])
def test_a_radius_that_is_not_positive_is_refused_everywhere(radius: float) -> None:
    group, (plus, minus) = GeneralLinear(3), grams(3)
    calls: list[Callable[[], object]] = [
        lambda: check_radius(radius),
        lambda: trust_region_ascent(group, plus, minus, radius),
        lambda: geodesic_descent(group, plus, minus, radius),
        lambda: diagonal_extremum(plus[0], 2.0, minus[0], 2.0, radius, descend=True),
        lambda: diagonal_extremum(plus[0], 2.0, minus[0], 2.0, radius, descend=False),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"radius must be positive, got {radius}; 0.5 is the usual choice"):
            call()


def test_an_ascent_without_a_bound_and_one_without_steps_are_refused() -> None:
    plus, minus = grams(3)
    with pytest.raises(ValueError, match=r"radius must be finite for an ascent, got inf; .* grows without bound"):
        trust_region_ascent(GeneralLinear(3), plus, minus, math.inf)
    with pytest.raises(ValueError, match="radius must be finite for an ascent"):
        diagonal_extremum(plus[0], 2.0, minus[0], 2.0, math.inf, descend=False)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0; 4 is the default"):
        trust_region_ascent(GeneralLinear(3), plus, minus, 0.5, steps=0)
