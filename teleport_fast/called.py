"""How an optimizer's step was called: inside another of its own, with a closure, with a scaler's scale and verdict on it."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.distributed.layout import local_part
from teleport_fast.symmetry.bucket import Element, Split

E = TypeVar("E", bound=Element | Split)


def is_nested(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer runs inside another: where an override calls super().step(), hooks run twice."""
    wrapper, frame, found = type(optimizer).step.__code__, sys._getframe(), 0
    while frame is not None and found < 2:
        found += frame.f_code is wrapper and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return found == 2


def run_closure_once(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-step hooks run before the closure: evaluate it here and hand its loss on, so that it runs once."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    if len(args) > 1:
        return (args[0], lambda: loss, *args[2:]), kwargs
    return args, {**kwargs, "closure": lambda: loss}


def has_no_rate(optimizer: Optimizer) -> bool:
    """Whether every group's lr is 0, as where a checkpoint makes an optimizer's state: it puts a 0 on the host there.

    A rate that lies on another device is taken for positive: reading it would wait for the device at every step.
    """
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if lr is None or (isinstance(lr, Tensor) and lr.device.type != "cpu") or float(lr) != 0:
            return False
    return True


def unscale_(optimizer: Optimizer) -> None:
    """Divide all gradients by the scale that a GradScaler left on a fused optimizer, which finds them unscaled then."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    on_device: dict[torch.device, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                on_device.setdefault(parameter.grad.device, []).append(local_part(parameter.grad))
    for device, gradients in on_device.items():
        torch._foreach_mul_(gradients, scale.to(device, torch.float64, non_blocking=True).reciprocal().float())
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def found_inf(optimizer: Optimizer) -> Tensor | None:
    """The scaler's verdict on a fused optimizer's gradients, a tensor above 0 where the step is void; else None."""
    found = getattr(optimizer, "found_inf", None)
    return local_part(found) if isinstance(found, Tensor) else None


def unless(void: Tensor, element: E, max_condition: float = math.inf) -> E:
    """The element, or the identity where `void` (0-d bool) holds, an entry is not finite or a condition number is too large;
    nothing is read back."""
    finite = element.finite()
    void = void.to(finite.device, non_blocking=True) | ~finite
    if isinstance(element, Element) and element.form == "dense" and not element.turns and not math.isinf(max_condition):
        # an SVD of what is not finite raises
        void = void | (_or_identity(void, element).conditions() > max_condition).any()
    if isinstance(element, Split):
        return cast(E, Split(_or_identity(void, element.plus), _or_identity(void, element.minus)))
    return cast(E, _or_identity(void, element))


def _or_identity(void: Tensor, element: Element) -> Element:
    g = element.g
    if element.form == "dense":
        identity = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    elif element.form == "diagonal":
        identity = torch.ones((), dtype=g.dtype, device=g.device)
    else:
        identity = torch.arange(g.shape[-1], dtype=g.dtype, device=g.device)
    inverse = element.g_inverse_t
    return Element(
        element.form,
        torch.where(void, identity, g),
        None if inverse is None else torch.where(void, identity.to(inverse.dtype), inverse),
    )


@contextlib.contextmanager
def full_precision(devices: Iterable[str]) -> Iterator[None]:
    """Autocast is off inside: a step taken under it would round group elements, and the function would move."""
    with contextlib.ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
