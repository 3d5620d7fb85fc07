"""Learned teleportation ([ICLR24], learning to teleport): LSTMs that give a task's learning rate or update, and its group element.

A task is min ½‖Y − U σ(V X)‖² with n × n matrices, entries uniform on [0, 1) as published; a batch of tasks is one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teleport_fast.data_dependent.activation import Activation, leaky_relu

KINDS = ("rate+element", "update+element", "update", "rate")


@dataclass(frozen=True)
class Tasks:
    """X, Y, the first U and V, and X⁻¹, each (tasks, n, n), float64; σ, whose slope 1 makes the network linear.

    >>> Tasks.draw(3, 20, torch.Generator().manual_seed(0)).U.shape
    torch.Size([3, 20, 20])
    """

    X: Tensor
    Y: Tensor
    U: Tensor
    V: Tensor
    X_inverse: Tensor
    activation: Activation

    @classmethod
    def draw(cls, count: int, n: int = 20, generator: torch.Generator | None = None, negative_slope: float = 0.1) -> Tasks:
        """`count` fresh tasks; ValueError for counts or sizes under 1."""
        if count < 1 or n < 1:
            raise ValueError(f"count and n must be at least 1, got {count} and {n}; published are tasks of n = 20")
        X, Y, U, V = (torch.rand(count, n, n, generator=generator, dtype=torch.float64) for _ in range(4))
        return cls(X, Y, U, V, torch.linalg.inv(X), leaky_relu(negative_slope))

    def loss_and_gradients(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(L (tasks,), ∇_U = R σ(Z)ᵀ, ∇_V = (σ'(Z) ⊙ UᵀR) Xᵀ) with Z = V X and R = U σ(Z) − Y, differentiable in U and V."""
        Z = V @ self.X
        H = self.activation.function(Z)
        R = U @ H - self.Y
        return 0.5 * R.square().sum((-2, -1)), R @ H.mT, (self.activation.derivative(Z) * (U.mT @ R)) @ self.X.mT

    def act(self, U: Tensor, V: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
        """U g⁻¹ and V + (σ⁻¹(g σ(Z)) − Z) X⁻¹ with g = I + T, MLPAction's U-exact form, differentiable in U, V and T; ‖T‖ < 1.

        Equal to MLPAction.apply (tests/data_dependent/test_learned.py). exp T and its derivative would cost more than the rest.
        """
        Z = V @ self.X
        moved = self.activation.inverse(torch.baddbmm(H := self.activation.function(Z), T, H))
        g = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device) + T
        return torch.linalg.solve(g, U, left=False), V + (moved - Z) @ self.X_inverse


class TwoLayerLSTM(nn.Module):
    """Two LSTM cells and linear heads: features (tasks, inputs) to one output (tasks, size) a head.

    >>> outputs, state = TwoLayerLSTM(5, 8, [3, 1])(torch.ones(2, 5), None)
    >>> [tuple(output.shape) for output in outputs]
    [(2, 3), (2, 1)]
    """

    def __init__(self, inputs: int, hidden: int, heads: list[int]) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(inputs, hidden), nn.LSTMCell(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in heads)
        # A learned rate then starts as gradient descent and an update as none: from random heads most first runs diverge.
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, state: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """(outputs by head, the state after): state None at the start."""
        h0, c0 = self.first(x, None if state is None else (state[0], state[1]))
        h1, c1 = self.second(h0, None if state is None else (state[2], state[3]))
        return [head(h1) for head in self.heads], [h0, c0, h1, c1]


@dataclass
class State:
    """Where a run of all tasks stands: weights, the LSTMs' states, the learning rate for the next step."""

    U: Tensor
    V: Tensor
    memory: dict[str, list[Tensor] | None]
    rate: Tensor

    def detached(self) -> State:
        """The same, cut off from its past: the truncation of back-propagation."""
        memory = {name: None if past is None else [part.detach() for part in past] for name, past in self.memory.items()}
        return State(self.U.detach(), self.V.detach(), memory, self.rate.detach())


class MetaOptimizer(nn.Module):
    """One of KINDS for tasks of size n: `start(tasks)` gives a State, `step(tasks, state)` the loss there and the State after.

    As published: a local step with the gradient (times the learned rate) or the learned update, then, by the element that an
    LSTM gives for the same gradients, a teleport. "rate" is the control without an element. Different from the published code:
    the action is exact (g = I + T, ‖T‖_F < radius, and its inverse; published I − T for that, ‖T‖_F = 0.01), the gradient enters as g/‖g‖
    and log‖g‖ (published: as it is), a rate is lr exp(2 tanh ·) (published: clamped, without gradient outside),
    heads start at 0. hidden: default 20 with a learned rate, 300 with a learned update, as published.

    >>> optimizer, tasks = MetaOptimizer(4, "rate+element", lr=1e-3), Tasks.draw(2, 4)
    >>> loss, state = optimizer.step(tasks, optimizer.start(tasks))
    >>> tuple(loss.shape), tuple(state.U.shape)
    ((2,), (2, 4, 4))
    """

    def __init__(self, n: int, kind: str = "rate+element", lr: float = 1e-4, radius: float = 0.01, hidden: int | None = None) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be positive and finite, got {lr}; pass gradient descent's")
        if not 0 < radius < 1:
            raise ValueError(f"radius must be between 0 and 1, got {radius}; it bounds ‖T‖ of I + T, published is 0.01")
        if n < 1 or (hidden is not None and hidden < 1):
            raise ValueError(f"n and hidden must be at least 1, got {n} and {hidden}")
        self.n, self.kind, self.lr, self.radius = n, kind, lr, radius
        self.learns_element, self.learns_update = kind.endswith("element"), kind.startswith("update")
        hidden = (300 if self.learns_update else 20) if hidden is None else hidden
        inputs = 2 * n * n + 2
        heads = [n * n] * self.learns_element + [1] * (not self.learns_update)
        self.lstms = nn.ModuleDict()
        if heads:
            self.lstms["element"] = TwoLayerLSTM(inputs, hidden, heads)
        if self.learns_update:
            self.lstms["local"] = TwoLayerLSTM(inputs, hidden, [2 * n * n])

    def start(self, tasks: Tasks) -> State:
        """The tasks' first weights, empty memories, gradient descent's rate; ValueError for tasks of another size."""
        if tasks.U.shape[-1] != self.n:
            raise ValueError(f"tasks must be of size {self.n} like the optimizer, got {tasks.U.shape[-1]}")
        rate = torch.full((len(tasks.U), 1, 1), self.lr, dtype=torch.float64)
        return State(tasks.U, tasks.V, dict.fromkeys(self.lstms), rate)

    def step(self, tasks: Tasks, state: State) -> tuple[Tensor, State]:
        """(L (tasks,) at the state's weights, the state after the local step and the teleport)."""
        loss, G_U, G_V = tasks.loss_and_gradients(state.U, state.V)
        norm = (G_U.square().sum((-2, -1)) + G_V.square().sum((-2, -1))).sqrt().clamp_min(1e-300)
        features = self._features(loss, G_U, G_V, norm)
        memory, rate = dict(state.memory), state.rate
        if self.learns_update:
            (update,), memory["local"] = self.lstms["local"](features, state.memory["local"])
            dU, dV = update.to(rate).reshape(-1, 2, self.n, self.n).unbind(1)
            U, V = state.U - dU, state.V - dV
        else:
            U, V = state.U - rate * G_U, state.V - rate * G_V
        if "element" in self.lstms:
            outputs, memory["element"] = self.lstms["element"](features, state.memory["element"])
            if not self.learns_update:
                rate = self.lr * torch.exp(2 * torch.tanh(outputs[-1].to(rate))).unsqueeze(-1)
            if self.learns_element:
                T = outputs[0].to(U).reshape(-1, self.n, self.n)
                T = T * (self.radius / (1 + T.square().sum((-2, -1), keepdim=True)).sqrt())
                U, V = tasks.act(U, V, T)
        return loss, State(U, V, memory, rate)

    def _features(self, loss: Tensor, G_U: Tensor, G_V: Tensor, norm: Tensor) -> Tensor:
        """(tasks, 2 n² + 2) in the LSTMs' dtype: g/‖g‖, log‖g‖ and log L, entries about 1; constants, as published."""
        with torch.no_grad():
            flat = torch.cat([G_U.flatten(1), G_V.flatten(1)], 1) * (math.sqrt(2) * self.n / norm).unsqueeze(1)
            logs = torch.stack([norm.log(), loss.clamp_min(1e-300).log()], 1) / 10
            return torch.cat([flat, logs], 1).to(next(self.parameters()))


def train(
    optimizer: MetaOptimizer,
    iterations: int,
    tasks: int = 8,
    horizon: int = 100,
    unroll: int = 10,
    meta_lr: float = 1e-3,
    generator: torch.Generator | None = None,
    negative_slope: float = 0.1,
) -> Iterator[float]:
    """Truncated back-propagation through time; yields the mean log loss over the horizon of each of `iterations` fresh batches.

    Adam on the mean of log L after every `unroll` steps, the gradient clipped at 1. The derivative runs through the gradients of
    the task too; held constant, as published, they leave half: d L(g·w − ηG)/dg is −½η d‖∇L‖²/dg to first order, not −η d‖∇L‖²/dg.
    ValueError for counts under 1 or a meta_lr that is not positive.
    """
    for name, value in (("iterations", iterations), ("tasks", tasks), ("horizon", horizon), ("unroll", unroll)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not meta_lr > 0:
        raise ValueError(f"meta_lr must be positive, got {meta_lr}; the default is 1e-3")
    adam = torch.optim.Adam(optimizer.parameters(), meta_lr)
    for _ in range(iterations):
        batch = Tasks.draw(tasks, optimizer.n, generator, negative_slope)
        state, total, pending = optimizer.start(batch), 0.0, torch.zeros(())
        for step in range(horizon + 1):
            loss, after = optimizer.step(batch, state)
            logs = loss.clamp_min(1e-300).log().mean()
            pending, total = pending + logs, total + float(logs.detach())
            if not math.isfinite(total):
                break
            if step and step % unroll == 0:
                adam.zero_grad()
                (pending / unroll).backward()
                norm = nn.utils.clip_grad_norm_(optimizer.parameters(), 1.0)
                if math.isfinite(norm):
                    adam.step()
                # The state after this step was made by the weights before Adam's, which its graph still holds.
                after, pending = after.detached(), torch.zeros(())
            state = after
        yield total / (horizon + 1)


@torch.no_grad()
def run(optimizer: MetaOptimizer, tasks: Tasks, horizon: int = 100) -> Tensor:
    """L (horizon + 1, tasks) before each step and at the end."""
    state, losses = optimizer.start(tasks), []
    for _ in range(horizon + 1):
        loss, state = optimizer.step(tasks, state)
        losses.append(loss)
    return torch.stack(losses)


@torch.no_grad()
def descend(tasks: Tasks, horizon: int, lr: float, momentum: float = 0.0) -> Tensor:
    """L (horizon + 1, tasks) of gradient descent, heavy-ball with momentum.

    >>> losses = descend(Tasks.draw(1, 3, torch.Generator().manual_seed(0)), 5, 1e-3)
    >>> bool((losses[1:] < losses[:-1]).all())
    True
    """
    U, V, losses = tasks.U, tasks.V, []
    past_U, past_V = torch.zeros_like(U), torch.zeros_like(V)
    for _ in range(horizon + 1):
        loss, G_U, G_V = tasks.loss_and_gradients(U, V)
        losses.append(loss)
        past_U, past_V = momentum * past_U + G_U, momentum * past_V + G_V
        U, V = U - lr * past_U, V - lr * past_V
    return torch.stack(losses)
