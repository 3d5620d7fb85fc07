"""Null-space teleportation keeps every layer's outputs on the batch, gains gradient there, and says where it cannot."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from teleport_fast.minima.point import Closure
from teleport_fast.peers import null_space_teleport
from teleport_fast.peers.inputs import collecting, input_basis, movable, project
from teleport_fast.peers.null_space import _Space
from teleport_fast.peers.oracle import Oracle


def problem(
    widths: tuple[int, ...] = (6, 15, 12, 3), batch: int = 5, dtype: torch.dtype = torch.float64, bias: bool = True
) -> tuple[nn.Sequential, Tensor, Closure]:
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after, bias=bias), nn.Tanh()]
    model = nn.Sequential(*parts[:-1]).to(dtype)
    inputs, labels = torch.randn(batch, widths[0], dtype=dtype), torch.randint(widths[-1], (batch,))
    return model, inputs, lambda: nn.functional.cross_entropy(model(inputs), labels)


def layer_outputs(model: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    found = []
    with torch.no_grad():
        for module in model:
            inputs = module(inputs)
            if isinstance(module, nn.Linear):
                found.append(inputs)
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("bias", [True, False])
def test_every_layers_outputs_stay_and_the_gradient_grows(bias: bool) -> None:
    model, inputs, loss_fn = problem(bias=bias)
    before, weights = layer_outputs(model, inputs), [p.detach().clone() for p in model.parameters()]
    result = null_space_teleport(loss_fn, model, 5)
    assert result.free == {"0": 1 + bias, "2": 10 + bias, "4": 7 + bias}
    assert max(relative(a, b) for a, b in zip(layer_outputs(model, inputs), before, strict=True)) < 1e-12
    assert result.loss_change <= 1e-12
    assert result.gain > 2
    assert relative(torch.cat([p.detach().flatten() for p in model.parameters()]), torch.cat([w.flatten() for w in weights])) > 1e-2


def test_a_step_without_the_projection_moves_the_outputs() -> None:
    """The control: the same weights moved by as much in a direction that the inputs see."""
    model, inputs, loss_fn = problem()
    before, weight = layer_outputs(model, inputs), model[2].weight.detach().clone()
    null_space_teleport(loss_fn, model, 1, layers=["2"])
    length = float((model[2].weight.detach() - weight).norm())
    kept = relative(layer_outputs(model, inputs)[-1], before[-1])
    direction = torch.randn_like(weight)
    with torch.no_grad():
        model[2].weight.copy_(weight + direction * (length / direction.norm()))
    assert kept < 1e-12 < 1e-3 < relative(layer_outputs(model, inputs)[-1], before[-1])


def test_the_direction_is_the_gradient_of_the_log_norm_in_the_null_spaces() -> None:
    model, _, loss_fn = problem()
    oracle, (layers, _) = Oracle(loss_fn, list(model.parameters())), movable(model, None)
    with collecting(model, layers):
        oracle.evaluate()
    space, start, norm = _Space(oracle, layers, None, 1.0), oracle.flat(), oracle.square**0.5
    direction = space.project(oracle.hvp(oracle.gradient) / oracle.square)
    for _ in range(3):
        move, logs = space.project(torch.randn_like(direction)), []
        for t in (1e-5, -1e-5):
            oracle.place(start + t * move)
            oracle.evaluate()
            logs.append(0.5 * math.log(oracle.square / norm**2))
        assert (logs[0] - logs[1]) / 2e-5 == pytest.approx(float(direction @ move), rel=1e-6)


def test_float32_keeps_the_loss_to_its_own_rounding() -> None:
    model, _, loss_fn = problem(dtype=torch.float32)
    result = null_space_teleport(loss_fn, model, 5)
    assert result.loss_change <= 1e-5
    assert result.gain > 2


def test_a_first_layer_alone_has_nothing_to_gain() -> None:
    """Moving it where no input looks changes no activation, so no gradient."""
    model, _, loss_fn = problem(widths=(20, 15, 3))
    result = null_space_teleport(loss_fn, model, 5, layers=["0"])
    assert result.free == {"0": 16}
    assert (result.steps, result.gain) == ((), 1)
    assert "first layer" in result.stopped


def test_a_batch_as_large_as_the_widths_leaves_no_room() -> None:
    model, _, loss_fn = problem(batch=40)
    result = null_space_teleport(loss_fn, model, 5)
    assert set(result.free.values()) == {0}
    assert "no layer has a null space" in result.stopped
    assert result.hvps == 0


def test_with_less_energy_there_is_room_and_a_loss_that_moves() -> None:
    model, _, loss_fn = problem(batch=40)
    result = null_space_teleport(loss_fn, model, 3, energy=0.9)
    assert max(result.free.values()) > 0
    assert result.gain > 1
    assert result.loss_change > 1e-9


def test_more_steps_never_end_lower_and_the_cap_holds() -> None:
    norms = []
    for steps in (0, 1, 3, 8):
        torch.manual_seed(3)
        model, _, loss_fn = problem()
        result = null_space_teleport(loss_fn, model, steps, cap=1e4)
        assert result.gradient_norm_after**2 <= 1e4
        norms.append(result.gradient_norm_after)
    assert norms == sorted(norms)
    assert norms[-1] > norms[0]


def test_tied_layers_see_the_inputs_of_both_and_shared_embeddings_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 9), nn.Linear(9, 4, bias=False)
            self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)
            self.head.weight = self.embedding.weight
            self.second.weight = self.first.weight
            self.second.bias = self.first.bias
            self.unused = nn.Linear(9, 9)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.second(input=torch.tanh(self.first(self.embedding(tokens))))))

    model = Tied().double()
    tokens = torch.tensor([[0, 1], [2, 1]])
    before = model(tokens).detach()
    result = null_space_teleport(lambda: nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()), model, 3)
    assert result.free == {"first": 4}
    assert "Embedding" in result.skipped["head"]
    assert result.skipped["unused"] == "loss_fn does not call it"
    assert relative(model(tokens).detach(), before) < 1e-12
    assert result.gain > 1


@pytest.mark.parametrize(("samples", "n", "rank"), [(3, 8, 3), (8, 8, 8), (12, 8, 8), (6, 8, 2), (12, 8, 2), (1, 8, 1), (0, 8, 0)])
def test_the_basis_has_the_inputs_rank_and_holds_them(samples: int, n: int, rank: int) -> None:
    X = torch.randn(samples, rank, dtype=torch.float64) @ torch.randn(rank, n, dtype=torch.float64)
    Q = input_basis(X)
    assert Q.shape == (n, rank)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(rank, dtype=torch.float64))
    left = project(X, Q)
    assert float(left.norm()) <= 1e-13 * max(1.0, float(X.norm()))


def test_rank_tolerance_decides_what_counts_as_unseen() -> None:
    X = torch.diag(torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64))
    assert [input_basis(X, tolerance).shape[1] for tolerance in (None, 1e-6, 1e-2)] == [3, 2, 1]
    assert [input_basis(X, None, energy).shape[1] for energy in (1.0, 0.99999, 0.5)] == [3, 1, 1]


def test_a_loss_that_is_not_the_same_twice_is_not_moved_on() -> None:
    model, inputs, _ = problem()
    noisy = nn.Sequential(model, nn.Dropout(0.5))
    before = [p.detach().clone() for p in model.parameters()]
    result = null_space_teleport(lambda: noisy(inputs).square().mean(), noisy, 2)
    assert "keeps the loss" in result.stopped
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -2}, "steps must not be negative, got -2"),
        ({"energy": 0.0}, "energy must be over 0 and at most 1, got 0.0"),
        ({"energy": 1.5}, "energy must be over 0 and at most 1, got 1.5"),
        ({"rank_tolerance": 1.0}, "rank_tolerance must be at least 0 and under 1, got 1.0"),
        ({"layers": ["9"]}, r"layers must name torch.nn.Linear modules of the model, got \['9'\]; there are \['0', '2', '4'\]"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    model, _, loss_fn = problem()
    with pytest.raises(ValueError, match=message):
        null_space_teleport(loss_fn, model, **arguments)  # type: ignore[arg-type]


def test_models_without_a_layer_to_move_are_refused() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module"):
        null_space_teleport(lambda: w.square().sum(), [w])  # type: ignore[arg-type]
    frozen = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    frozen[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"got none; skipped: \{'0': 'its weight is frozen'\}"):
        null_space_teleport(lambda: frozen(torch.ones(1, 2)).sum(), frozen)
