"""Losses of the network's outputs with what a Hessian-vector product asks of them, in closed form or by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

LossFunction = Callable[[Tensor], Tensor]


class OutputLoss(Protocol):
    """A loss of outputs Y (out, batch): value and gradient, then products with its Hessian at the last Y."""

    def value_and_gradient(self, Y: Tensor) -> tuple[Tensor, Tensor]: ...

    def hessian_product(self, R: Tensor) -> Tensor: ...


class CrossEntropy:
    """Mean cross entropy of logits Y (classes, batch) on labels (batch,) int64, with its closed-form derivatives.

    >>> CrossEntropy(torch.tensor([0, 1]))(torch.zeros(2, 2, dtype=torch.float64))
    tensor(0.6931, dtype=torch.float64)
    """

    def __init__(self, labels: Tensor) -> None:
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(f"labels must be (batch,) of integers, got {tuple(labels.shape)} of {labels.dtype}; pass class indices")
        self.labels = labels
        self._target: Tensor | None = None

    def _check(self, Y: Tensor) -> None:
        if Y.shape[1] != len(self.labels):
            raise ValueError(f"labels must hold one class per column of Y, got {len(self.labels)} for Y {tuple(Y.shape)}")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= Y.shape[0]:
            raise ValueError(f"labels must lie in 0..{Y.shape[0] - 1}, got {low}..{high}; check the last layer's width")

    def __call__(self, Y: Tensor) -> Tensor:
        self._check(Y)
        return torch.nn.functional.cross_entropy(Y.mT, self.labels)

    def value_and_gradient(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, dL/dY): softmax minus one-hot, over the batch."""
        if self._target is None or self._target.shape != Y.shape or self._target.dtype != Y.dtype:
            self._check(Y)
            self._target = torch.zeros_like(Y).scatter_(0, self.labels.unsqueeze(0), -1 / Y.shape[1])
            self._flat_target = self._target.view(-1)
        log_p = torch.log_softmax(Y, 0)
        self._p = log_p.exp()
        return torch.dot(self._flat_target, log_p.flatten()), torch.add(self._target, self._p, alpha=1 / Y.shape[1])

    def hessian_product(self, R: Tensor) -> Tensor:
        """(diag p − p pᵀ) R per sample, over the batch."""
        weighted = torch.mul(self._p, R).mul_(1 / R.shape[1])
        return torch.addcmul(weighted, self._p, weighted.sum(0, keepdim=True), value=-1)


class SquaredError:
    """½‖Y − targets‖² summed over outputs (out, batch), with its closed-form derivatives.

    >>> SquaredError(torch.zeros(2, 1))(torch.tensor([[3.0], [4.0]]))
    tensor(12.5000)
    """

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def __call__(self, Y: Tensor) -> Tensor:
        if Y.shape != self.targets.shape:
            raise ValueError(f"targets must be of Y's shape, got {tuple(self.targets.shape)} for Y {tuple(Y.shape)}")
        return 0.5 * (Y - self.targets).square().sum()

    def value_and_gradient(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, Y − targets)."""
        return self(Y), Y - self.targets

    def hessian_product(self, R: Tensor) -> Tensor:
        """R: the Hessian is the identity."""
        return R


class AutogradLoss:
    """Any differentiable scalar function of the outputs, its derivatives by autograd on the outputs alone."""

    def __init__(self, loss_fn: LossFunction) -> None:
        self.loss_fn = loss_fn

    def value_and_gradient(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, dL/dY); ValueError where the loss is no scalar."""
        with torch.enable_grad():
            self._Y = Y.detach().requires_grad_()
            loss = self.loss_fn(self._Y)
            if loss.dim():
                raise ValueError(f"loss_fn must give a scalar of the outputs, got shape {tuple(loss.shape)}; reduce it")
            (self._gradient,) = torch.autograd.grad(loss, self._Y, create_graph=True)
        return loss.detach(), self._gradient.detach()

    def hessian_product(self, R: Tensor) -> Tensor:
        """The loss's Hessian in the outputs, times R."""
        if not self._gradient.requires_grad:
            return torch.zeros_like(R)
        (product,) = torch.autograd.grad(self._gradient, self._Y, R, retain_graph=True, allow_unused=True)
        return torch.zeros_like(R) if product is None else product


def output_loss(loss_fn: LossFunction | OutputLoss) -> OutputLoss:
    """loss_fn itself where it knows its derivatives, else wrapped for autograd.

    >>> type(output_loss(lambda Y: Y.square().sum())).__name__
    'AutogradLoss'
    """
    if isinstance(loss_fn, (CrossEntropy, SquaredError, AutogradLoss)):
        return loss_fn
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of the outputs, got {type(loss_fn).__name__}")
    return AutogradLoss(loss_fn)
