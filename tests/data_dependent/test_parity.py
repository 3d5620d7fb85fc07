"""Actions, gradients, Lie-algebra gradients and teleports equal the published code's numbers to 1e-9, step by step."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from teleport_fast.data_dependent import MLPAction, RankWarning, leaky_relu, reference

from .conftest import Case, relative

pytestmark = pytest.mark.filterwarnings("ignore::teleport_fast.data_dependent.RankWarning")
PARITY = 1e-9


def check_weights(case: Case, tag: str, weights: list[Tensor], names: list[str]) -> None:
    for name, weight in zip(names, weights, strict=True):
        assert relative(weight, case[f"{tag}_{name}"]) < PARITY, (tag, name)


def check_network(case: Case, tag: str, weights: list[Tensor], bound: float = PARITY) -> None:
    """Weights, then both losses, gradients and J at them: a loss is what the whole network gives, not a pair."""
    for m, weight in enumerate(weights):
        assert relative(weight, case[f"{tag}_W_{m}"]) < bound, (tag, m)
    action = MLPAction(weights, case.X, form="v_exact")
    eyes = [torch.eye(k, dtype=torch.float64) for k in action.widths]
    for name, loss in case.losses.items():
        assert relative(loss(action.outputs()), case[f"{tag}_{name}_loss"]) < bound
        gradients = action.moved_gradients(eyes, loss)
        assert relative(sum(G.square().sum() for G in gradients), case[f"{tag}_{name}_gradsq"]) < bound
        for m, gradient in enumerate(gradients):
            assert relative(gradient, case[f"{tag}_{name}_grad_{m}"]) < 10 * bound, (tag, name, m)


def inputs_of(case: Case) -> list[Tensor]:
    return reference.forward(case.weights, case.X, leaky_relu(0.1))


def test_losses_and_gradients_at_the_start(case: Case) -> None:
    for name, loss in case.losses.items():
        action = MLPAction(case.weights, case.X)
        assert relative(loss(action.outputs()), case[f"init_{name}_loss"]) < PARITY
        leaves = [W.clone().requires_grad_() for W in case.weights]
        for m, gradient in enumerate(torch.autograd.grad(loss(action.outputs(leaves)), leaves)):
            assert relative(gradient, case[f"init_{name}_grad_{m}"]) < PARITY


def test_pairs_move_as_published(case: Case) -> None:
    inputs = inputs_of(case)
    for m in range(case.joints):
        V, U = case.weights[m : m + 2]
        T, g, M = case[f"T_{m}"], case[f"g_{m}"], case[f"M_{m}"]
        u_exact = MLPAction([V, U], inputs[m], keep_null_space=False)
        v_exact = MLPAction([V, U], inputs[m], form="v_exact", keep_null_space=False)
        for tag in ("eq8_T", "l2t_usingT"):
            check_weights(case, f"pair{m}_{tag}", u_exact.apply_first_order([T]), ["V", "U"])
        check_weights(case, f"pair{m}_l2t_g", u_exact.apply([g]), ["V", "U"])
        check_weights(case, f"pair{m}_iclr_T", v_exact.apply_first_order([T]), ["V", "U"])
        check_weights(case, f"pair{m}_large_g", v_exact.apply([g]), ["V", "U"])
        check_weights(case, f"pair{m}_exp_tM", v_exact.apply_exp([M], 0.3), ["V", "U"])


def test_networks_move_as_published(case: Case) -> None:
    Ts, gs = case.list("T"), case.list("g")
    small = [0.01 * T / T.norm() for T in Ts]
    recomputed = MLPAction(case.weights, case.X, keep_null_space=False)
    stale = MLPAction(case.weights, case.X, keep_null_space=False, hidden="stale")
    check_network(case, "net22_T", stale.apply_first_order(Ts))
    check_network(case, "netl2t_T", recomputed.apply_first_order(Ts))
    check_network(case, "netl2t_Tmag01", recomputed.apply_first_order(small))
    check_network(case, "netl2t_g", recomputed.apply(gs))
    v_exact = MLPAction(case.weights, case.X, form="v_exact", keep_null_space=False, hidden="stale")
    check_network(case, "net24_T", v_exact.apply_first_order(Ts))
    check_network(case, "net24_g", v_exact.apply(gs))
    draws = [torch.eye(len(R), dtype=R.dtype) + 0.01 * R / R.norm() for R in case.list("rand24_rand")]
    check_network(case, "rand24", v_exact.apply(draws))


def test_the_reference_path_has_the_published_lie_gradients(case: Case) -> None:
    stale = inputs_of(case)[:-1]
    for name, loss in case.losses.items():
        for kind, form, inputs in (("lie22", "u_exact", None), ("lie24", "v_exact", stale)):
            value, J, gradients = reference.lie_gradient(
                case.weights, case.X, loss, form, leaky_relu(0.1), keep_null_space=False, total=True, inputs=inputs
            )
            assert value == pytest.approx(float(case[f"{kind}_{name}_loss"]), rel=PARITY)
            assert pytest.approx(float(case[f"{kind}_{name}_J"]), rel=PARITY) == J
            for m, gradient in enumerate(gradients):
                assert relative(gradient, case[f"{kind}_{name}_dJdT_{m}"]) < PARITY


def test_the_closed_form_has_the_published_lie_gradients_where_these_are_right(case: Case) -> None:
    for name, loss in case.losses.items():
        u_exact = MLPAction(case.weights, case.X, keep_null_space=False).lie_gradient(loss)
        assert relative(u_exact[0], case[f"lie22_{name}_dJdT_0"]) < PARITY
        v_exact = MLPAction(case.weights, case.X, form="v_exact", keep_null_space=False).lie_gradient(loss)
        for m, gradient in enumerate(v_exact):
            assert relative(gradient, case[f"lie24_{name}_dJdT_{m}"]) < PARITY


def test_the_published_lie_gradient_is_wrong_past_the_first_joint(case: Case) -> None:
    for m, gradient in enumerate(MLPAction(case.weights, case.X).lie_gradient(case.losses["mse"])[1:], 1):
        assert relative(gradient, case[f"lie22_mse_dJdT_{m}"]) > 0.05


@pytest.mark.parametrize("variant", ["up", "down", "cap", "paperlr"])
def test_v_exact_teleports_follow_the_published_steps(case: Case, variant: str) -> None:
    tag = f"tele24_{variant}"
    # Ill conditioned from the third step on: rounding of the pseudo-inverse grows by a decade or so a step.
    ill = case.name == "w7543_b6" and variant in ("up", "paperlr")
    action = MLPAction(case.weights, case.X, form="v_exact", keep_null_space=False)
    result = action.teleport(
        case.losses["ce"], int(case[f"{tag}_steps"]), float(case[f"{tag}_lr"]), float(case[f"{tag}_cap"]),
        not bool(case[f"{tag}_reverse"]), parity=True,
    )
    applied = [step for step in result.report.steps if step.T]
    assert len(applied) == int(case[f"{tag}_applied_steps"])
    losses = torch.tensor([step.loss for step in result.report.steps], dtype=torch.float64)
    assert losses.shape == case[f"{tag}_loss_trace"].shape
    compared = 3 if ill else len(applied)
    assert relative(losses[:compared], case[f"{tag}_loss_trace"][:compared]) < PARITY
    for k, step in enumerate(applied[:compared]):
        for m, T in enumerate(step.T):
            assert relative(T, case[f"{tag}_Ttrace_{m}"][k]) < PARITY, (k, m)
    if not ill:
        check_network(case, tag, result.weights)


@pytest.mark.parametrize(("tag", "code"), [("tele22", "neurips22"), ("telel2t", "l2t")])
def test_u_exact_teleports_follow_the_published_steps(case: Case, tag: str, code: str) -> None:
    action = MLPAction(case.weights, case.X, keep_null_space=False)
    result = action.teleport(case.losses["mse"], int(case[f"{tag}_steps"]), float(case[f"{tag}_lr"]), parity=code)
    for k, step in enumerate(result.report.steps):
        for m, T in enumerate(step.T):
            assert relative(T, case[f"{tag}_Ttrace_{m}"][k]) < PARITY, (k, m)
    check_network(case, tag, result.weights)


def test_the_published_teleport_moves_the_loss_and_the_report_says_so() -> None:
    case = Case("w7543_b20")
    action = MLPAction(case.weights, case.X, keep_null_space=False)
    with pytest.warns(RankWarning, match=r"loss .* -> "):
        report = action.teleport(case.losses["mse"], 5, float(case["tele22_lr"]), parity=True).report
    assert not report.exact
    assert report.loss_change is not None and abs(report.loss_change) > 1e-3


def test_recorded_numbers_are_read_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Case("w653_b4").weights) == 2
