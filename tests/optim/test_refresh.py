"""What a covariance takes up: a part of the gradient's columns at a step, all of them in turn, the same after a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from teleport_fast.optim import Rotated
from teleport_fast.optim.views import LEAST_PART, part_of


@pytest.mark.parametrize("n", [0, 1, 31, 64, 95, 96, 100, 341])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_the_columns_once_each_and_none_is_narrow(n: int, parts: int) -> None:
    view = torch.arange(2 * n, dtype=torch.float32).view(2, 1, n)
    count = max(1, min(parts, n // LEAST_PART))
    found = [part_of(view, parts, turn) for turn in range(2 * count)]
    assert torch.equal(torch.cat(found[:count], -1), view) and torch.equal(torch.cat(found[count:], -1), view)
    assert all(part.shape[2] >= min(n, LEAST_PART // 2) for part in found)


def layer() -> tuple[nn.Parameter, list[torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(128, 24)), [torch.randn(128, 24) for _ in range(9)]


def test_each_step_takes_the_next_third_of_the_columns() -> None:
    p, gradients = layer()
    optimizer = Rotated([("up.weight", p)], lr=0.01, sides={"*": ("none", "stream")}, covariance_parts=3)
    expected, whole = torch.zeros(24, 24), torch.zeros(24, 24)
    bounds = [0, 32, 80, 128]
    for step, gradient in enumerate(gradients):
        p.grad = gradient
        optimizer.step()
        G = gradient[bounds[step % 3] : bounds[step % 3 + 1]]
        expected = 0.95 * expected + 0.05 * G.T @ G / G.square().sum()
        whole = 0.95 * whole + 0.05 * gradient.T @ gradient / gradient.square().sum()
    found = optimizer.state[p]["columns_covariance"][0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert float((found - whole).abs().max()) > 1e-4


def test_a_run_that_stops_within_a_turn_goes_on_to_the_bit() -> None:
    p, gradients = layer()
    optimizer = Rotated([("up.weight", p)], lr=0.01, covariance_parts=3)
    for gradient in gradients[:4]:
        p.grad = gradient
        optimizer.step()
    q = nn.Parameter(p.detach().clone())
    second, unaware = (Rotated([("up.weight", q)], lr=0.01, covariance_parts=3) for _ in range(2))
    state = copy.deepcopy(optimizer.state_dict())
    second.load_state_dict(state)
    state["state"][0]["columns_age"] += 1
    unaware.load_state_dict(state)
    for gradient in gradients[4:]:
        p.grad = q.grad = gradient
        optimizer.step()
        second.step()
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["columns_covariance"], second.state[q]["columns_covariance"])
    for gradient in gradients[4:]:
        q.grad = gradient
        unaware.step()
    assert not torch.equal(unaware.state[q]["columns_covariance"], second.state[q]["columns_covariance"])
