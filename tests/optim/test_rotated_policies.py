"""What Rotated does to second moments at a turn, and what a gradient's Gram is divided by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT
from teleport_fast.optim import Rotated

BETAS = (0.9, 0.98)
NAME = "blocks.0.attention.q"


def stepped(gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], policy: str) -> dict[str, Tensor]:
    """Moments and bases of one matrix around the step that turns, and its gradient there, in the turned basis."""
    optimizer = Rotated(gpt.named_parameters(), lr=0.0, symmetries=symmetries, betas=BETAS, every=3, second_moments=policy)
    train(gpt, optimizer, 2)
    matrix = gpt.get_submodule(NAME).weight
    state = optimizer.state[matrix]
    before = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq", "rows_basis", "columns_basis")}
    train(gpt, optimizer, 1, first=2)
    rows, columns = torch.block_diag(*state["rows_basis"]), state["columns_basis"][0]
    turn_rows = rows @ torch.block_diag(*before["rows_basis"]).T
    turn_columns = columns @ before["columns_basis"][0].T
    assert matrix.grad is not None
    return {
        "gradient": rows @ matrix.grad @ columns.T,
        "first": turn_rows @ before["exp_avg"] @ turn_columns.T,
        "kept": before["exp_avg_sq"],
        "projected": turn_rows.square() @ before["exp_avg_sq"] @ turn_columns.square().T,
        "exp_avg": state["exp_avg"].clone(),
        "exp_avg_sq": state["exp_avg_sq"].clone(),
        "step": state["step"].clone(),
    }


@pytest.mark.parametrize("policy", ["keep", "project", "reset"])
def test_second_moments_at_a_turn(
    policy: str, gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None]
) -> None:
    found = stepped(gpt, symmetries, train, policy)
    zero = torch.zeros_like(found["kept"])
    old = {"keep": found["kept"], "project": found["projected"], "reset": zero}
    first = zero if policy == "reset" else found["first"]
    torch.testing.assert_close(found["exp_avg"], BETAS[0] * first + (1 - BETAS[0]) * found["gradient"])
    for name, second in old.items():
        expected = BETAS[1] * second + (1 - BETAS[1]) * found["gradient"].square()
        assert torch.allclose(found["exp_avg_sq"], expected, rtol=1e-10, atol=0) == (name == policy)
    assert int(found["step"]) == (1 if policy == "reset" else 3)


@pytest.mark.parametrize("normalise", ["tensor", "joint", "none"])
def test_a_shared_basis_may_weigh_its_matrices_by_their_gradients(
    normalise: str, gpt: GPT, symmetries: tf.Symmetries, loss_of: Callable[..., Tensor]
) -> None:
    optimizer = Rotated(gpt.named_parameters(), lr=0.0, symmetries=symmetries, stream="site", normalise=normalise)
    loss_of(gpt, 0).backward()
    optimizer.step()
    gradients = [gpt.get_submodule(f"blocks.0.attention.{name}").weight.grad for name in "qkv"]
    grams = [gradient.T @ gradient for gradient in gradients if gradient is not None]
    sizes = [float(gram.trace()) for gram in grams]
    weights = {"tensor": [1 / size for size in sizes], "joint": [1 / sum(sizes)] * 3, "none": [1.0] * 3}[normalise]
    expected = 0.05 * sum(gram * weight for gram, weight in zip(grams, weights, strict=True))
    torch.testing.assert_close(optimizer.state[gpt.get_submodule(NAME).weight]["columns_covariance"][0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_moments": "drop"}, "second_moments must be one of keep, reset, project, got 'drop'; 'keep'"),
        ({"normalise": "all"}, "normalise must be one of tensor, joint, none, got 'all'; 'tensor'"),
    ],
)
def test_unknown_policies_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rotated([("up.weight", torch.nn.Parameter(torch.ones(3, 2)))], **options)
