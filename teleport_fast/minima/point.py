"""The parameters as one point: moved by a vector of all their entries, and put back bit for bit whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor

Closure = Callable[[], Tensor]


def checked_parameters(params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list; ValueError where there is none, one comes twice, or dtypes or devices differ."""
    tensors = [params] if isinstance(params, Tensor) else list(params)
    if not tensors:
        raise ValueError("params must hold at least one tensor, got none; pass for example model.parameters()")
    kinds = {(p.dtype, p.device) for p in tensors}
    if len(kinds) > 1 or not tensors[0].is_floating_point():
        found = sorted(f"{dtype} on {device}" for dtype, device in kinds)
        raise ValueError(f"params must share one floating dtype and device, got {found}; convert the model")
    if len({id(p) for p in tensors}) < len(tensors):
        raise ValueError(f"params must be distinct, got {len(tensors)} with a repeat; pass tied parameters once")
    return tensors


def checked_loss(loss: Tensor) -> Tensor:
    """The loss, if it is a scalar tensor."""
    if not isinstance(loss, Tensor) or loss.dim():
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must take no argument and return a scalar tensor, got {found}; reduce it with .mean()")
    return loss


class Point:
    """`with Point(params) as w`: `w.move(d, t)` puts the parameters to w + t d in place; leaving restores every bit of w.

    >>> p = torch.tensor([0.1, 0.2])
    >>> with Point([p]) as w:
    ...     w.move(torch.ones(2), 0.5)
    ...     print(p)
    tensor([0.6000, 0.7000])
    >>> p
    tensor([0.1000, 0.2000])
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = checked_parameters(params)
        self.sizes = [p.numel() for p in self.params]
        self._start: list[Tensor] = []

    def __enter__(self) -> Point:
        self._start = [p.detach().clone() for p in self.params]
        return self

    @torch.no_grad()
    def move(self, direction: Tensor, t: float) -> None:
        """w + t d, d (P,) of all entries in order."""
        for p, start, part in zip(self.params, self._start, direction.split(self.sizes), strict=True):
            p.copy_(torch.add(start, part.reshape(p.shape).to(p), alpha=t))

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A copy, not the subtraction of what was added: that would leave rounding behind.
        for p, start in zip(self.params, self._start, strict=True):
            p.copy_(start)

    def gradient(self, loss_fn: Closure) -> tuple[float, Tensor]:
        """(loss, its gradient (P,)) at the present point; ValueError where no parameter takes part."""
        with torch.enable_grad():
            loss = checked_loss(loss_fn())
            check_graph(loss, self.params)
            gradients = torch.autograd.grad(loss, self.params, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, gradients, strict=True)]
        return float(loss.detach()), torch.cat([part.detach().flatten() for part in parts])


def check_graph(loss: Tensor, params: list[Tensor]) -> None:
    """ValueError unless every parameter and the loss can be differentiated."""
    frozen = [index for index, p in enumerate(params) if not p.requires_grad]
    if frozen:
        raise ValueError(f"params must require gradients, got requires_grad=False at {frozen[:8]}; leave these out or unfreeze them")
    if not loss.requires_grad:
        raise ValueError("loss_fn must depend on params, got a loss without a graph; compute it from the parameters themselves")
