"""One problem per op: tensors of a size and dtype on a device, the call under test, and what torch alone would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast import ops

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """`call` runs the op on tensors it is given and answers what it computed; `bytes` is the least it can move."""

    op: str
    label: str
    inputs: tuple[Tensor, ...]
    call: Callable[..., Outputs]
    bytes: int


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def problems(dtype: torch.dtype, device: torch.device, heads: int, h: int, n: int) -> Iterator[Problem]:
    """Every op at one width; in-place ops answer with the tensors that they changed."""
    label = f"{heads} x {h} x {n}"

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def wide(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    plus, minus = normal(heads, h, n), normal(n, heads, h).permute(1, 2, 0)
    g = torch.linalg.qr(wide(heads, h, h))[0].contiguous()
    moved = size_of(plus, minus)
    square = heads * h * h * g.element_size()

    yield Problem("gram_difference", label, (plus, minus), lambda p, m: ops.gram_difference(p, m), moved + square)
    yield Problem(
        "grad_norm_objective", label, (plus, minus, g), lambda p, m, g: (ops.grad_norm_objective(p, m, g),), moved + square
    )
    symmetric = (g + g.mT) / (4 * h)
    yield Problem("matrix_exp", label, (symmetric,), lambda M: (ops.matrix_exp(M),), 2 * square)

    def act(p: Tensor, m: Tensor, g: Tensor) -> Outputs:
        ops.group_action_([p], [m], g, g)
        return p, m

    yield Problem("group_action_", label, (plus, minus, g), act, 2 * moved + square)

    def covary(C: Tensor, p: Tensor, m: Tensor) -> Outputs:
        ops.covariance_(C, [p, m], 0.9)
        return (C,)

    yield Problem("covariance_", label, (symmetric, plus, minus), covary, moved + 2 * square)
    yield Problem("square_sums", label, (plus, minus), lambda p, m: ops.square_sums([p, m]), moved)
    s = torch.rand(heads, h, device=device, dtype=g.dtype) + 0.5

    def scale(p: Tensor, m: Tensor, s: Tensor) -> Outputs:
        ops.diagonal_action_([p, m], s, [1.0, -1.0])
        return p, m

    yield Problem("diagonal_action_", label, (plus, minus, s), scale, 2 * moved)
    index = torch.stack([torch.randperm(h, device=device) for _ in range(heads)])

    def permute(p: Tensor, m: Tensor, index: Tensor) -> Outputs:
        ops.permutation_action_([p, m], index)
        return p, m

    yield Problem("permutation_action_", label, (plus, minus, index), permute, 2 * moved)
    state = [normal(heads, h, n).abs() for _ in range(3)]

    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Tensor) -> Outputs:
        ops.teleport_adamw_([p], [g], [m], [v], s, [1.0], step=2, lr=1e-3)
        return p, m, v

    yield Problem("teleport_adamw_", label, (plus, *state, s), step, 7 * size_of(plus))

    def turn(p: Tensor, g: Tensor, m: Tensor, v: Tensor, left: Tensor) -> Outputs:
        ops.rotate_step_([p], [g], [m], [v], [left], step=2, lr=1e-3)
        return p, m, v

    moments = [wide(heads, h, n).abs() for _ in range(2)]
    once = 3 * size_of(plus) + 2 * size_of(*moments) + square
    yield Problem("rotate_step_", label, (plus, state[0], *moments, g), turn, once)
    right = torch.linalg.qr(wide(n, n))[0].contiguous()

    def turn_both(p: Tensor, g: Tensor, m: Tensor, v: Tensor, left: Tensor, right: Tensor) -> Outputs:
        ops.rotate_step_([p], [g], [m], [v], [left], [right], step=2, lr=1e-3)
        return p, m, v

    # Wide on the right, so that the CUDA and Triton backends leave that turn to the BLAS.
    inputs = (plus, state[0], *moments, g, right)
    yield Problem("rotate_step_ both sides", label, inputs, turn_both, once + size_of(right))
    Z, mixing = normal(h, n), wide(h, h).to(dtype) / h**0.5

    def mix(Z: Tensor, g: Tensor) -> Outputs:
        return (ops.activation_action(Z, g, 0.1),)

    yield Problem("activation_action", label, (Z, mixing), mix, 2 * size_of(Z) + size_of(mixing))
