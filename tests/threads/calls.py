"""A call of every C++ op that is large enough to be cut into several chunks, on fresh tensors: for threads and for failing memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teleport_fast import ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass
class Call:
    """`run` calls the op; `written` is what it writes, `read` what it reads only. `results` are what it returns."""

    run: Callable[[], Any]
    written: Sequence[Tensor] = ()
    read: Sequence[Tensor] = ()

    def tensors(self) -> list[Tensor]:
        return [*self.written, *self.read]

    def results(self) -> list[Tensor]:
        """What the call returns and what it has written, copied."""
        found = self.run()
        returned = [found] if isinstance(found, Tensor) else [*found] if found else []
        return [tensor.clone() for tensor in (*returned, *self.written)]


class Maker:
    """Random tensors in one dtype; with `columns` the rows of a view are neighbours in memory, as where a layer reads a joint."""

    def __init__(self, dtype: torch.dtype, columns: bool, seed: int) -> None:
        self.dtype, self.columns = dtype, columns
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.wide)

    def view(self, heads: int, h: int, n: int) -> Tensor:
        if self.columns:
            return self.matrix(n, heads, h).to(self.dtype).permute(1, 2, 0)
        return self.matrix(heads, h, n).to(self.dtype)

    def orthogonal(self, heads: int, h: int) -> Tensor:
        return torch.linalg.qr(self.matrix(heads, h, h))[0].contiguous()

    def invertible(self, heads: int, h: int) -> Tensor:
        return torch.eye(h, dtype=self.wide) + 0.1 / h**0.5 * self.matrix(heads, h, h)


def _group_action(make: Maker) -> Call:
    plus, minus = [make.view(2, 16, n) for n in (1100, 600)], [make.view(2, 16, n) for n in (600, 1100)]
    g = make.invertible(4, 16)
    inverse = torch.linalg.inv(g).mT.contiguous()
    return Call(lambda: ops.group_action_(plus, minus, g, inverse, joints=2), [*plus, *minus], [g, inverse])


def _group_action_of_one_memory(make: Maker) -> Call:
    """Views that share memory move one after the other: several parallel runs in one call."""
    x, other = make.view(2, 16, 1100), make.view(2, 16, 1100)
    g = make.invertible(2, 16)
    return Call(lambda: ops.group_action_([x[..., :700], other], [x[..., 500:]], g, g), [x, other], [g])


def _diagonal_action(make: Maker) -> Call:
    tensors, s = [make.view(2, 16, n) for n in (2500, 600, 600, 600)], make.matrix(4, 16).exp()
    return Call(lambda: ops.diagonal_action_(tensors, s, (1.0, -1.0), joints=2), tensors, [s])


def _diagonal_action_of_one_memory(make: Maker) -> Call:
    x, other, s = make.view(2, 16, 2500), make.view(2, 16, 1200), make.matrix(2, 16).exp()
    return Call(lambda: ops.diagonal_action_([x[..., :1300], other, x[..., 1200:]], s, (1.0, -1.0, 2.0)), [x, other], [s])


def _permutation_action(make: Maker) -> Call:
    tensors = [make.view(2, 16, n) for n in (5000, 600)]
    index = torch.stack([torch.randperm(16, generator=make.generator) for _ in range(2)])
    return Call(lambda: ops.permutation_action_(tensors, index), tensors, [index])


def _permutation_action_of_one_memory(make: Maker) -> Call:
    x, other = make.view(2, 16, 2600), make.view(2, 16, 1200)
    index = torch.stack([torch.randperm(16, generator=make.generator) for _ in range(2)])
    return Call(lambda: ops.permutation_action_([x[..., :1400], other, x[..., 1200:]], index), [x, other], [index])


def _gram_difference(make: Maker) -> Call:
    plus, minus = [make.view(4, 24, 300) for _ in range(2)], [make.view(4, 24, 200) for _ in range(2)]
    return Call(lambda: ops.gram_difference(plus, minus, joints=2), (), [*plus, *minus])


def _gram_difference_in_parts(make: Maker) -> Call:
    """Few heads and many columns: threads share the columns, and add up after."""
    plus, minus = make.view(1, 64, 1700), make.view(1, 64, 500)
    return Call(lambda: ops.gram_difference(plus, minus), (), [plus, minus])


def _covariance(make: Maker) -> Call:
    tensors, root = [make.view(2, 48, n) for n in (700, 3200)], make.matrix(2, 48, 48)
    covariance = root @ root.mT
    return Call(lambda: ops.covariance_(covariance, tensors, 0.9), [covariance], tensors)


def _matrix_exp(make: Maker) -> Call:
    M = make.matrix(24, 16, 16) * 0.3
    return Call(lambda: ops.matrix_exp(M), (), [M])


def _matrix_exp_pair(make: Maker) -> Call:
    M = make.matrix(24, 16, 16) * 0.3
    return Call(lambda: ops.matrix_exp_pair(M), (), [M])


def _grad_norm_objective(make: Maker) -> Call:
    plus, minus, g = make.view(2, 24, 300), make.view(2, 24, 200), torch.stack([make.invertible(2, 24) for _ in range(6)])
    return Call(lambda: ops.grad_norm_objective(plus, minus, g), (), [plus, minus, g])


def _square_sums(make: Maker) -> Call:
    tensors = [make.view(2, 300, n) for n in (150, 50)]
    return Call(lambda: ops.square_sums(tensors), (), tensors)


def _activation_action(make: Maker) -> Call:
    Z, g = make.view(2, 24, 500).to(make.wide), make.invertible(2, 24)
    return Call(lambda: ops.activation_action(Z, g, 0.2), (), [Z, g])


def _activation_action_tangent(make: Maker) -> Call:
    Z, M = make.view(2, 24, 500).to(make.wide), make.matrix(2, 24, 24)
    return Call(lambda: ops.activation_action_tangent(Z, M, 0.2), (), [Z, M])


def _adamw(make: Maker) -> Call:
    lists = [[make.view(2, 16, n) for n in (1500, 600)] for _ in range(4)]
    for second in lists[3]:
        second.abs_()
    s, gradients = make.matrix(2, 16).exp(), lists.pop(1)
    run = lambda: ops.teleport_adamw_(lists[0], gradients, lists[1], lists[2], s, (1.0, -1.0), step=3)  # noqa: E731
    return Call(run, [tensor for one in lists for tensor in one], [*gradients, s])


def _rotate(make: Maker, base: str = "adam") -> Call:
    lists = [[make.view(2, 24, 100) for _ in range(2)] for _ in range(4)]
    for second in lists[3]:
        second.abs_()
    left, right = [make.orthogonal(2, 24) for _ in range(2)], [make.orthogonal(1, 100)[0] for _ in range(2)]
    gradients = lists.pop(1)
    run = lambda: ops.rotate_step_(lists[0], gradients, lists[1], lists[2], left, right, base=base, step=3, lr=0.01)  # noqa: E731
    return Call(run, [tensor for one in lists for tensor in one], [*gradients, *left, *right])


def _orthogonal_iteration(make: Maker) -> Call:
    bases, roots = [make.orthogonal(4, 24) for _ in range(2)], [make.matrix(4, 24, 24) for _ in range(2)]
    covariances = [root @ root.mT for root in roots]
    return Call(lambda: ops.orthogonal_iteration_(bases, covariances), bases, covariances)


def _data_dependent_steps(make: Maker) -> Call:
    """Of what is written, Ts and trace are only results: their memory need not be what it was."""
    Z0, tail, gram = make.matrix(6, 9), [make.matrix(5, 6), make.matrix(3, 5)], make.matrix(9, 9)
    gram, target = gram @ gram.mT, torch.randint(3, (9,), generator=make.generator)
    lead, outputs, trace = make.matrix(6, 6), make.matrix(3, 9), torch.zeros(3, 2, dtype=torch.float64)
    Ts = [torch.zeros(2, k, k, dtype=make.wide) for k in (6, 5)]
    numbers = {"slope": 0.1, "scale": 1e-4, "cap": 1e9, "gram_limit": 1e9, "square_limit": 1e9}
    run = lambda: (ops.data_dependent_steps_(Z0, tail, gram, target, lead, Ts, outputs, trace, **numbers), *Ts, trace)[1:]  # noqa: E731
    return Call(run, [Z0, *tail, lead, outputs], [gram, target])


CALLS: dict[str, Callable[[Maker], Call]] = {
    "group_action_": _group_action,
    "group_action_, one memory": _group_action_of_one_memory,
    "diagonal_action_": _diagonal_action,
    "diagonal_action_, one memory": _diagonal_action_of_one_memory,
    "permutation_action_": _permutation_action,
    "permutation_action_, one memory": _permutation_action_of_one_memory,
    "gram_difference": _gram_difference,
    "gram_difference, in parts": _gram_difference_in_parts,
    "covariance_": _covariance,
    "matrix_exp": _matrix_exp,
    "matrix_exp_pair": _matrix_exp_pair,
    "grad_norm_objective": _grad_norm_objective,
    "square_sums": _square_sums,
    "activation_action": _activation_action,
    "activation_action_tangent": _activation_action_tangent,
    "teleport_adamw_": _adamw,
    "rotate_step_": _rotate,
    "orthogonal_iteration_": _orthogonal_iteration,
    "data_dependent_steps_": _data_dependent_steps,
}
ON_ONE_THREAD = ("data_dependent_steps_",)


def call(name: str, dtype: torch.dtype = torch.float32, columns: bool = False, seed: int = 0) -> Call:
    return CALLS[name](Maker(dtype, columns, seed))
