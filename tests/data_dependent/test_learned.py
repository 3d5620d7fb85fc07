"""Learned teleportation: the differentiable move is the exact action, training follows its derivative and helps on fresh tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teleport_fast.data_dependent import MLPAction
from teleport_fast.data_dependent.learned import KINDS, MetaOptimizer, Tasks, descend, run, train

from .conftest import relative


@pytest.fixture(autouse=True)
def one_thread(same_seed_and_settings: None) -> None:
    """At these sizes a second thread only waits."""
    torch.set_num_threads(1)


def draw(count: int = 3, n: int = 5, slope: float = 0.1) -> Tasks:
    return Tasks.draw(count, n, torch.Generator().manual_seed(7), slope)


def opinionated(kind: str, n: int = 5) -> MetaOptimizer:
    """An optimizer whose heads are not 0, as they are before training."""
    optimizer = MetaOptimizer(n, kind, lr=1e-3, hidden=6).double()
    for name, parameter in optimizer.named_parameters():
        if "heads" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return optimizer


def element(tasks: Tasks, size: float = 0.2) -> Tensor:
    T = torch.randn_like(tasks.U)
    return T * (size / T.flatten(1).norm(dim=1).reshape(-1, 1, 1))


@pytest.mark.parametrize("slope", [0.1, 1.0])
def test_the_move_is_the_exact_action_and_keeps_every_loss(slope: float) -> None:
    tasks = draw(slope=slope)
    T = element(tasks)
    U, V = tasks.act(tasks.U, tasks.V, T)
    for index in range(len(T)):
        action = MLPAction([tasks.V[index], tasks.U[index]], tasks.X[index], slope)
        moved = action.apply([torch.eye(5, dtype=torch.float64) + T[index]])
        assert relative(V[index], moved[0]) < 1e-10 and relative(U[index], moved[1]) < 1e-10
    before, after = tasks.loss_and_gradients(tasks.U, tasks.V)[0], tasks.loss_and_gradients(U, V)[0]
    torch.testing.assert_close(after, before, rtol=1e-10, atol=0)
    # Negative control: the published first-order inverse.
    wrong = tasks.loss_and_gradients(tasks.U - tasks.U @ T, V)[0]
    assert float(((wrong - before) / before).abs().min()) > 1e-4


def test_the_tasks_gradients_are_those_of_autograd() -> None:
    tasks = draw()
    U, V = tasks.U.requires_grad_(), tasks.V.requires_grad_()
    loss, G_U, G_V = tasks.loss_and_gradients(U, V)
    wanted = torch.autograd.grad(loss.sum(), [U, V])
    assert relative(G_U, wanted[0]) < 1e-12 and relative(G_V, wanted[1]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_back_propagation_is_the_derivative_of_the_third_loss(kind: str) -> None:
    """The third loss is the first to feel the first element, through the gradient at the teleported point."""
    tasks = draw()
    optimizer = opinionated(kind)

    def third() -> Tensor:
        state = optimizer.start(tasks)
        for _ in range(2):
            # As in training, later features are constants, so only the first step's heads are followed.
            _, state = optimizer.step(tasks, state)
            state.memory = dict.fromkeys(state.memory)
        return optimizer.step(tasks, state)[0].log().sum()

    name = "local" if kind == "update" else "element"
    weight = optimizer.lstms[name].heads[0].bias
    (gradient,) = torch.autograd.grad(third(), [weight])
    assert float(gradient.norm()) > 0
    if kind.startswith("update"):
        return  # its second step's update depends on the features, which training holds constant
    direction, values = torch.randn_like(weight), []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(step * direction)
            values.append(float(third()))
            weight.sub_(step * direction)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(gradient.flatten() @ direction.flatten()), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_helps_on_fresh_tasks(kind: str) -> None:
    torch.manual_seed(0)
    optimizer = MetaOptimizer(4, kind, lr=3e-4, hidden=12)
    fresh = draw(16, 4)
    before = run(optimizer, fresh, 15)
    history = list(train(optimizer, 15, 4, 15, 5, 1e-2, torch.Generator().manual_seed(1)))
    after = run(optimizer, fresh, 15)
    assert len(history) == 15
    torch.testing.assert_close(after[0], before[0])
    assert float(after[-1].log().mean()) < float(before[-1].log().mean()) - 0.2


def test_training_is_the_same_twice() -> None:
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        optimizer = MetaOptimizer(3, "rate+element", lr=1e-3)
        list(train(optimizer, 2, 2, 12, 5, generator=torch.Generator().manual_seed(1)))
        ends.append(torch.cat([p.detach().flatten() for p in optimizer.parameters()]))
    assert torch.equal(*ends)


def test_untrained_it_is_gradient_descent() -> None:
    tasks = draw()
    for kind in ("rate+element", "rate"):
        torch.testing.assert_close(run(MetaOptimizer(5, kind, lr=1e-3), tasks, 9), descend(tasks, 9, 1e-3), rtol=1e-9, atol=0)
    assert torch.equal(run(MetaOptimizer(5, "update"), tasks, 1)[1], tasks.loss_and_gradients(tasks.U, tasks.V)[0])


def test_an_exact_teleport_is_first_seen_one_step_later() -> None:
    tasks = draw()
    losses, plain = run(opinionated("rate+element"), tasks, 2), descend(tasks, 2, 1e-3)
    torch.testing.assert_close(losses[:2], plain[:2], rtol=1e-9, atol=0)
    assert float(((losses[2] - plain[2]) / plain[2]).abs().max()) > 1e-3


def test_descent_is_torchs_sgd() -> None:
    tasks = draw(1)
    leaves = [tasks.U.clone().requires_grad_(), tasks.V.clone().requires_grad_()]
    optimizer = torch.optim.SGD(leaves, lr=1e-3, momentum=0.5)
    wanted = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = tasks.loss_and_gradients(*leaves)[0].sum()
        loss.backward()
        wanted.append(float(loss.detach()))
        optimizer.step()
    assert descend(tasks, 5, 1e-3, 0.5).flatten().tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "luck"}, "kind must be one of rate"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"radius": 1.0}, "radius must be between 0 and 1, got 1.0"),
        ({"n": 0}, "n and hidden must be at least 1, got 0"),
    ],
)
def test_bad_optimizers_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaOptimizer(**{"n": 5, **arguments})  # type: ignore[arg-type]


def test_bad_tasks_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="count and n must be at least 1, got 0 and 20"):
        Tasks.draw(0)
    with pytest.raises(ValueError, match="tasks must be of size 4 like the optimizer, got 5"):
        run(MetaOptimizer(4), draw())
    with pytest.raises(ValueError, match="unroll must be at least 1, got 0"):
        list(train(MetaOptimizer(4), 1, unroll=0))
    with pytest.raises(ValueError, match=r"meta_lr must be positive, got 0\.0"):
        list(train(MetaOptimizer(4), 1, meta_lr=0.0))
