"""The moves are symmetries wherever the rank condition holds, and everything that breaks one is noticed and reported."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.data_dependent import Activation, CrossEntropy, MLPAction, RankWarning, SquaredError, leaky_relu

from .conftest import elements, network, relative

WIDTHS, BATCH = (14, 12, 11, 10, 3), 8
FORMS = ["u_exact", "v_exact"]


def square(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.square().sum()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_four_layers_stands(form: str, keep: bool, bias: bool) -> None:
    weights, X = network(WIDTHS, BATCH, bias=bias)
    action = MLPAction(weights, X, form=form, bias=bias, keep_null_space=keep)
    moved = action.apply(elements(action.widths), square)
    assert action.report is not None and action.report.exact
    before, after = float(square(action.outputs())), float(square(action.outputs(moved)))
    assert abs(after - before) / before < 1e-12
    assert relative(moved[0], weights[0]) > 0.05


def test_a_softplus_like_activation_moves_exactly() -> None:
    # z + asinh-like bend: range is the whole line, so σ⁻¹ is defined wherever g sends it.
    bend = Activation("sinh", torch.sinh, torch.asinh, torch.cosh, torch.sinh)
    weights, X = network(WIDTHS, BATCH)
    action = MLPAction([W * 0.5 for W in weights], X, activation=bend)
    moved = action.apply(elements(action.widths, size=0.1))
    assert relative(action.outputs(moved), action.outputs()) < 1e-12


def test_a_sequential_with_biases_is_moved_in_place_and_answers_the_same() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(14, 12), torch.nn.LeakyReLU(0.2), torch.nn.Linear(12, 11), torch.nn.LeakyReLU(0.2), torch.nn.Linear(11, 3)
    ).double()
    inputs = torch.randn(8, 14, dtype=torch.float64)
    before, bias = model(inputs).detach(), model[0].bias.detach().clone()
    action = MLPAction.from_sequential(model, inputs)
    action.write_(model, action.apply(elements(action.widths)))
    assert relative(model(inputs), before) < 1e-12
    assert relative(model[0].bias, bias) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_stale_inputs_move_the_loss(form: str) -> None:
    weights, X = network(WIDTHS, BATCH)
    action = MLPAction(weights, X, form=form, hidden="stale")
    moved = action.apply(elements(action.widths))
    assert action.report is not None and not action.report.exact
    # V-exact with all of the batch in the row space still answers the same: only its pseudo-inverse is of the wrong matrix.
    assert relative(action.outputs(moved), action.outputs()) > 1e-3


def test_a_reader_that_is_not_moved_back_changes_the_outputs() -> None:
    weights, X = network(WIDTHS, BATCH)
    action = MLPAction(weights, X)
    moved = action.apply(elements(action.widths))
    assert relative(action.outputs([*moved[:-1], weights[-1]]), action.outputs()) > 1e-2


def test_the_first_order_inverse_is_marked_and_moves_the_outputs() -> None:
    weights, X = network(WIDTHS, BATCH)
    action = MLPAction(weights, X)
    Ts = [0.1 * torch.randn(k, k, dtype=torch.float64) for k in action.widths]
    action.apply_first_order(Ts)
    assert action.report is not None and not action.report.exact
    assert action.report.output_change > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_over_the_width_is_warned_of_with_what_it_costs(form: str) -> None:
    weights, X = network((7, 6, 5, 3), 40)
    action = MLPAction(weights, X, form=form)
    with pytest.warns(RankWarning, match="batch of 40"):
        moved = action.apply(elements(action.widths), square)
    report = action.report
    assert report is not None and not report.exact and report.loss_change is not None
    assert report.loss_change == pytest.approx(float(square(action.outputs(moved)) - square(action.outputs())))
    assert abs(report.loss_change) > 1e-3


def test_what_the_batch_does_not_see_is_kept() -> None:
    weights, X = network(WIDTHS, BATCH)
    eyes = [torch.eye(k, dtype=torch.float64) for k in WIDTHS[1:-1]]
    assert relative(MLPAction(weights, X).apply(eyes)[0], weights[0]) < 1e-13
    assert relative(MLPAction(weights, X, keep_null_space=False).apply(eyes)[0], weights[0]) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_new_gradients_need_no_backward(form: str) -> None:
    weights, X = network(WIDTHS, BATCH)
    loss = SquaredError(torch.ones(3, BATCH, dtype=torch.float64))
    action = MLPAction(weights, X, form=form)
    gs = elements(action.widths)
    leaves = [W.requires_grad_() for W in action.apply(gs)]
    wanted = torch.autograd.grad(loss(action.outputs(leaves)), leaves)
    for found, gradient in zip(action.moved_gradients(gs, loss), wanted, strict=True):
        assert relative(found, gradient) < 1e-10


def test_a_rank_deficient_batch_is_found() -> None:
    weights, X = network(WIDTHS, BATCH)
    X[:, 1] = 2 * X[:, 0]
    action = MLPAction(weights, X)
    with pytest.warns(RankWarning, match=r"ranks \[7"):
        action.apply(elements(action.widths))
    assert action.report is not None and action.report.ranks[0] == BATCH - 1 and action.report.factorisations[0] == "svd"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative_slope": 0.0}, "negative_slope must be positive, got 0.0"),
        ({"form": "w_exact"}, "form must be"),
        ({"hidden": "old"}, "hidden must be"),
        ({"X": torch.full((7, 4), float("nan"), dtype=torch.float64)}, "X must be finite"),
        ({"X": torch.ones(6, 4, dtype=torch.float64)}, r"weights\[0\] must be \(out, 6\) because X has rows 6"),
        ({"X": torch.ones(7, 4)}, "must be torch.float32"),
        ({"weights": [torch.ones(5, 7, dtype=torch.float64)]}, "at least two layers"),
        ({"weights": [torch.ones(5, 7).double(), torch.full((3, 5), float("inf")).double()]}, r"weights\[1\] must be finite"),
    ],
)
def test_bad_networks_are_refused(change: dict[str, object], message: str) -> None:
    weights, X = network((7, 5, 3), 4)
    with pytest.raises(ValueError, match=message):
        MLPAction(**{"weights": weights, "X": X, **change})  # type: ignore[arg-type]


def test_bad_elements_labels_and_activations_are_refused() -> None:
    action = MLPAction(*network((7, 5, 3), 4))
    with pytest.raises(ValueError, match=r"gs\[0\] must be \(5, 5\)"):
        action.apply([torch.eye(4)])
    with pytest.raises(ValueError, match="one element per hidden layer"):
        action.apply([])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, got 0\.\.3"):
        action.lie_gradient(CrossEntropy(torch.tensor([0, 1, 2, 3])))
    with pytest.raises(ValueError, match=r"gs\[0\] must be finite, got NaN or infinity; take a smaller step"):
        action.apply([torch.full((5, 5), float("nan"))])
    with pytest.raises(ValueError, match=r"labels must be \(batch,\) of integers, got \(4,\) of torch.float32; pass class indices"):
        CrossEntropy(torch.ones(4))
    with pytest.raises(ValueError, match=r"one class per column of Y, got 3 for Y \(3, 4\)"):
        action.lie_gradient(CrossEntropy(torch.tensor([0, 1, 2])))
    with pytest.raises(ValueError, match=r"targets must be of Y's shape, got \(3, 5\) for Y \(3, 4\)"):
        action.lie_gradient(SquaredError(torch.zeros(3, 5, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"scalar of the outputs, got shape \(4,\); reduce it"):
        action.lie_gradient(lambda Y: Y.square().sum(0))
    with pytest.raises(ValueError, match="loss_fn must be a function of the outputs, got str"):
        action.lie_gradient("mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="square is not invertible"):
        Activation("square", torch.square, torch.sqrt, lambda z: 2 * z)
    with pytest.raises(ValueError, match=r"flat is not invertible: its derivative is 0 on \[-4, 4\]"):
        Activation("flat", lambda z: z, lambda z: z, torch.zeros_like)
    with pytest.raises(ValueError, match="derivative of identity is off"):
        Activation("identity", lambda z: z, lambda z: z, lambda z: 0 * z + 2)
    with pytest.raises(ValueError, match="ReLU has no known inverse"):
        MLPAction.from_sequential(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)), torch.ones(2, 3))
    assert leaky_relu(0.3).name == "leaky_relu(0.3)"


def test_a_move_without_a_loss_says_nothing_of_its_change() -> None:
    action = MLPAction(*network((7, 5, 3), 4))
    action.apply(elements(action.widths))
    assert action.report is not None and action.report.loss_change is None
    with pytest.raises(ValueError, match="inverse must be 'exact' or 'first_order', got 'newton'"):
        action.apply(elements(action.widths), inverse="newton")
