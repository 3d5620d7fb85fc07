"""Curvature equals the published numbers, its closed form equals differentiation, and it is what a curve's curvature is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import teleport_fast as tf
from teleport_fast.data_dependent import Activation, MLPAction
from teleport_fast.minima import curvature_at, curve_derivatives, lie_curve, random_generators
from teleport_fast.minima.curvature_mean import curvature_of

from .conftest import Case, network, relative

PARITY = 1e-9
FORMS = [("u_exact", True), ("u_exact", False), ("v_exact", True), ("v_exact", False)]
pytestmark = pytest.mark.filterwarnings("ignore::teleport_fast.data_dependent.RankWarning")


def softened(slope: float = 0.3) -> Activation:
    """Invertible with σ'' ≠ 0: z + slope·(√(1 + z²) − 1), a quadratic equation to invert."""
    def inverse(y: Tensor) -> Tensor:
        b = y + slope
        return (b - slope * (1 - slope**2 + b.square()).sqrt()) / (1 - slope**2)

    return Activation(
        "softened",
        lambda z: z + slope * ((1 + z.square()).sqrt() - 1),
        inverse,
        lambda z: 1 + slope * z / (1 + z.square()).sqrt(),
        lambda z: slope * (1 + z.square()) ** -1.5,
    )


def by_differentiation(action: MLPAction, Ms: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    curve = lie_curve(action, Ms)
    return torch.func.jvp(lambda t: torch.func.jvp(curve, (t,), (one,))[1], (zero,), (one,))


def test_the_curve_and_its_curvature_are_the_published_ones(case: Case) -> None:
    action, Ms = MLPAction(case.weights, case.X, keep_null_space=False), case.list("M")
    first, second = curve_derivatives(action, Ms, interactions=False)
    for layer, (v, a) in enumerate(zip(first, second, strict=True)):
        assert relative(v, case[f"gamma1_{layer}"]) < PARITY
        assert relative(a, case[f"gamma2_{layer}"]) < PARITY
    assert tf.curvature(action, Ms, interactions=False) == pytest.approx(float(case["kappa_gamma12"]), rel=PARITY)


def test_the_published_second_derivative_lacks_the_terms_between_joints() -> None:
    case = Case("w7543_b6")
    action, Ms = MLPAction(case.weights, case.X), case.list("M")
    _, ours = curve_derivatives(action, Ms)
    _, differentiated = by_differentiation(action, Ms)
    assert relative(ours[1], differentiated[1]) < PARITY
    assert relative(case["gamma2_1"], differentiated[1]) > 0.1


def test_pairs_curve_as_published_in_closed_form_and_by_differentiation(case: Case) -> None:
    inputs = case.X
    for m in range(case.joints):
        V, U, M = *case.weights[m : m + 2], case[f"M_{m}"]
        action = MLPAction([V, U], inputs, form="v_exact", keep_null_space=False)
        for first, second in (curve_derivatives(action, [M]), by_differentiation(action, [M])):
            for tag, tensor in (("g1V", first[0]), ("g1U", first[1]), ("g2V", second[0]), ("g2U", second[1])):
                assert relative(tensor, case[f"exp_pair{m}_{tag}"]) < PARITY, tag
        assert tf.curvature(action, [M]) == pytest.approx(float(case[f"exp_pair{m}_kappa"]), rel=PARITY)
        zero = torch.zeros((), dtype=torch.float64)
        curve = lie_curve(action, [M])
        kappa, change = torch.func.jvp(lambda t: curvature_at(curve, t), (zero,), (torch.ones_like(zero),))  # noqa: B023
        assert float(kappa) == pytest.approx(float(case[f"exp_pair{m}_kappa"]), rel=PARITY)
        assert float(change) == pytest.approx(float(case[f"exp_pair{m}_dkappa_dt"]), rel=PARITY)
        inputs = action.activation.function(V @ inputs)


@pytest.mark.parametrize(("form", "keep"), FORMS)
@pytest.mark.parametrize(("widths", "batch"), [((9, 8, 7, 3), 4), ((7, 5, 4, 3), 20), ((7, 9, 4, 3), 6)])
@pytest.mark.parametrize("smooth", [False, True])
def test_the_closed_form_is_the_derivative(form: str, keep: bool, widths: tuple[int, ...], batch: int, smooth: bool) -> None:
    """Batches under, between and over the widths, where each pseudo-inverse turns in its own way."""
    weights, X = network(widths, batch)
    action = MLPAction(weights, X, form=form, keep_null_space=keep, activation=softened() if smooth else None)
    Ms = [M / 2 for M in random_generators(action, 1)]
    found, wanted = curve_derivatives(action, [M[0] for M in Ms]), by_differentiation(action, [M[0] for M in Ms])
    for order in (0, 1):
        for x, y in zip(found[order], wanted[order], strict=True):
            assert relative(x, y) < PARITY


@pytest.mark.parametrize("form", ["u_exact", "v_exact"])
def test_biases_move_as_the_finite_action_moves_them(form: str) -> None:
    """By central differences, along a smooth activation: a step over a kink would be seen as curvature."""
    weights, X = network((5, 6, 5, 2), 4, bias=True)
    action = MLPAction(weights, X, form=form, bias=True, activation=softened())
    Ms = [M[0] / 4 for M in random_generators(action, 1)]
    step = 1e-3
    ahead, behind = action.apply_exp(Ms, step), action.apply_exp(Ms, -step)
    first, second = curve_derivatives(action, Ms)
    for W, up, down, v, a in zip(weights, ahead, behind, first, second, strict=True):
        assert relative(v, (up - down) / (2 * step)) < 1e-5
        assert relative(a, (up - 2 * W + down) / step**2) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("form", "keep"), FORMS)
def test_the_mean_is_over_the_draws(form: str, keep: bool, bias: bool) -> None:
    action = MLPAction(*network((7, 5, 4, 3), 3, bias), form=form, keep_null_space=keep, bias=bias)
    Ms = random_generators(action, 6, torch.Generator().manual_seed(3))
    each = [tf.curvature(action, [M[i] for M in Ms]) for i in range(6)]
    assert tf.curvature(action, Ms) == pytest.approx(sum(each) / 6, rel=1e-9)
    first, second = curve_derivatives(action, Ms)
    assert [v.shape for v in first] == [a.shape for a in second] == [(6, *W.shape) for W in action.weights]
    assert max(each) > 1.05 * min(each)


def test_curvature_does_not_depend_on_speed_but_on_direction() -> None:
    action = MLPAction(*network((7, 5, 3), 4))
    [M], [N] = ([A[0] for A in random_generators(action, 1)] for _ in range(2))
    assert tf.curvature(action, [3 * M]) == pytest.approx(tf.curvature(action, [M]), rel=1e-12)
    assert tf.curvature(action, [N]) != pytest.approx(tf.curvature(action, [M]), rel=1e-3)


def test_a_straight_curve_has_no_curvature_and_a_circle_that_of_its_radius() -> None:
    t = torch.tensor(0.7, dtype=torch.float64)
    line = torch.randn(3, 4, dtype=torch.float64)
    assert float(curvature_at(lambda s: (line * s.exp(),), t)) < 1e-14
    assert float(curvature_at(lambda s: (5 * torch.stack([s.cos(), s.sin()]).unsqueeze(0),), t)) == pytest.approx(0.2)


def test_the_formula_is_the_papers_without_its_cancellation() -> None:
    v, a = torch.randn(2, 3, 4, dtype=torch.float64)
    squares = float(v.square().sum() * a.square().sum() - (v * a).sum() ** 2)
    assert float(curvature_of([v], [a])) == pytest.approx(squares**0.5 / float(v.norm()) ** 3, rel=1e-12)


def test_bad_generators_are_named() -> None:
    weights, X = network((7, 5, 4, 3), 4)
    action = MLPAction(weights, X)
    M5, M4 = torch.eye(5), torch.eye(4)
    with pytest.raises(ValueError, match=r"Ms must hold one M per hidden layer, got 1 for widths \[5, 4\]"):
        tf.curvature(action, [M5])
    with pytest.raises(ValueError, match=r"Ms\[1\] must be \(4, 4\).*got \(5, 5\)"):
        tf.curvature(action, [M5, M5])
    with pytest.raises(ValueError, match=r"Ms\[1\] must be .* as many draws as Ms\[0\]"):
        tf.curvature(action, [torch.ones(2, 5, 5), torch.ones(3, 4, 4)])
    with pytest.raises(ValueError, match=r"Ms\[0\] must be finite"):
        tf.curvature(action, [M5 * float("nan"), M4])
    with pytest.raises(ValueError, match=r"Ms must move the weights.*draw M at random"):
        tf.curvature(action, [0 * M5, 0 * M4])
    with pytest.raises(ValueError, match="recompute hidden inputs, got hidden='stale'"):
        tf.curvature(MLPAction(weights, X, hidden="stale"), [M5, M4])
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        random_generators(action, 0)
    with pytest.raises(ValueError, match="without draws here"):
        lie_curve(action, random_generators(action, 2))
    wide, X = network((7, 5, 3), 4, bias=True)
    with pytest.raises(ValueError, match=r"without biases, got bias=True; use teleport_fast\.curvature"):
        lie_curve(MLPAction(wide, X, bias=True), [M5])
