"""Random teleports are symmetries of the asked size, and differ from draw to draw."""

from __future__ import annotations

import math

import pytest
import torch

from teleport_fast.data_dependent import MLPAction, RankWarning, SquaredError

from .conftest import network, relative

WIDTHS, BATCH = (14, 12, 11, 3), 8


@pytest.mark.parametrize("radius", [1e-3, 0.5, 2.0])
@pytest.mark.parametrize("form", ["u_exact", "v_exact"])
def test_a_random_teleport_keeps_the_outputs_and_moves_the_weights(form: str, radius: float) -> None:
    weights, X = network(WIDTHS, BATCH, bias=True)
    action, loss_fn = MLPAction(weights, X, form=form, bias=True), SquaredError(torch.randn(3, BATCH, dtype=torch.float64))
    moved = action.random_teleport(radius, torch.Generator().manual_seed(3), loss_fn)
    assert action.report is not None and action.report.exact and action.report.loss_change is not None
    assert relative(action.outputs(moved), action.outputs()) < 1e-12
    assert abs(action.report.loss_change) <= 1e-12 * float(loss_fn(action.outputs()))
    assert min(relative(new, old) for new, old in zip(moved, weights, strict=True)) > radius / 100


def test_a_reader_left_behind_changes_the_outputs() -> None:
    """The control: the same draw on the writers alone."""
    weights, X = network(WIDTHS, BATCH)
    action = MLPAction(weights, X)
    moved = action.random_teleport(0.5)
    assert relative(action.outputs([*moved[:-1], weights[-1]]), action.outputs()) > 1e-2


def test_the_element_has_the_radius_as_the_norm_of_its_logarithm() -> None:
    weights, X = network((9, 6, 3), 4)
    moved = MLPAction(weights, X).random_teleport(0.3, torch.Generator().manual_seed(1))
    draw = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.linalg.matrix_exp(draw * (0.3 / draw.norm()))
    # U' = U g⁻¹, so the draw's own exponential undoes it.
    assert relative(moved[1] @ wanted, weights[1]) < 1e-12


def test_the_generator_decides_the_draw() -> None:
    action = MLPAction(*network(WIDTHS, BATCH))
    first, again, other = (action.random_teleport(0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert relative(first[-1], other[-1]) > 1e-2


def test_a_batch_over_the_width_is_reported_not_hidden() -> None:
    action = MLPAction(*network(WIDTHS, 40))
    with pytest.warns(RankWarning, match="batch of 40"):
        action.random_teleport(0.5)
    assert action.report is not None and not action.report.exact and action.report.output_change > 1e-6


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_a_radius_must_be_positive_and_finite(radius: float) -> None:
    with pytest.raises(ValueError, match=f"radius must be positive and finite, got {radius}"):
        MLPAction(*network(WIDTHS, BATCH)).random_teleport(radius)
