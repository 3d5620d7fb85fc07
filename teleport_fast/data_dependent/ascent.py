"""Steps along the Lie-algebra gradient: a line search that never loses ground, and a cap that holds after the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.data_dependent.losses import OutputLoss
from teleport_fast.data_dependent.moves import Frame, Moved, exponentials, joint_factors, lie_gradient, move_if_finite
from teleport_fast.data_dependent.network import Backward, Network, backward, hessian_product
from teleport_fast.data_dependent.pseudo_inverse import PseudoInverse
from teleport_fast.data_dependent.report import StepRecord

HALVINGS = 30
# Closer to the cap than this an ascent has nothing left to gain, and 30 halvings would each cost a move to find that out.
NEAR_CAP = 0.99
# What one exact step may move the loss by: a hundredth of the digits that a well-conditioned element leaves.
LOSS_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}


@dataclass(frozen=True)
class Arrival:
    """The end of a path: V₀ on the batch, the weights after the first, Y, J, and how the σ(Z) (V-exact) or h (U-exact) were factored."""

    Z0: Tensor
    tail: list[Tensor]
    outputs: Tensor
    objective: float
    ranks: tuple[int, ...]
    factorisations: tuple[str, ...]
    lead: Tensor | None
    steps: list[StepRecord]
    stopped: str
    full_rank: bool = True


@dataclass
class Path:
    """Where the steps ended: the network, its gradients, the product of V-exact's factors of the first weight, and the records."""

    net: Network
    back: Backward
    factors: list[PseudoInverse]
    lead: Tensor | None
    steps: list[StepRecord]
    stopped: str
    full_rank: bool = True

    def arrival(self) -> Arrival:
        """What a teleport asks of it at the end."""
        ranks = tuple(inverse.rank for inverse in self.factors)
        kinds = tuple(inverse.kind for inverse in self.factors)
        net = self.net
        return Arrival(net.Z0, net.tail, net.outputs, self.back.J, ranks, kinds, self.lead, self.steps, self.stopped, self.full_rank)

    def append(self, moved: Moved, back: Backward, record: StepRecord) -> None:
        self.net, self.back, self.factors = moved.net, back, moved.factors
        if moved.lead is not None:
            self.lead = moved.lead if self.lead is None else moved.lead @ self.lead
        self.steps.append(record)


def ascend_with_search(
    net: Network, frame: Frame, loss: OutputLoss, steps: int, lr: float, cap: float, sign: int, group: str, radius: float
) -> Path:
    """At most `steps` accepted steps T = ±t lr dJ/dT, ‖T‖_F ≤ radius, t halved until J does not fall (rise) and keeps the cap."""
    path = Path(net, backward(net, loss), joint_factors(net, frame), None, [], "all steps done")
    if not math.isfinite(path.back.J):
        raise ValueError(f"the squared gradient norm is {path.back.J} before the teleport; check the weights and the loss")
    for _ in range(steps):
        exact = all(inverse.full_columns for inverse in path.factors)
        before = path.back
        if sign > 0 and NEAR_CAP * cap <= before.J:
            path.stopped = f"squared gradient norm {before.J:.3g} at the cap {cap:.3g}"
            break
        gradients = lie_gradient(path.net, before, hessian_product(path.net, before, loss), frame, path.factors)
        scale = 1.0 / max(1.0, lr * max(float(gradient.norm()) for gradient in gradients) / radius)
        for _ in range(HALVINGS):
            Ts = [gradient * (sign * lr * scale) for gradient in gradients]
            moved = _try(path.net, Ts, frame, group)
            if moved is not None:
                back = backward(moved.net, loss)
                if _improves(back, before, sign, cap) and _keeps_loss(moved, back, before, exact):
                    path.append(moved, back, StepRecord(before.loss, before.J, Ts, scale))
                    break
            scale /= 2
        else:
            path.stopped = f"no step of {HALVINGS} halvings improves the objective within the cap and keeps the loss"
            break
    return path


def _improves(back: Backward, before: Backward, sign: int, cap: float) -> bool:
    """J did not go the wrong way, and no step takes it over the cap."""
    return math.isfinite(back.J) and sign * (back.J - before.J) >= 0 and (cap >= back.J or back.J <= before.J)


def _keeps_loss(moved: Moved, back: Backward, before: Backward, exact: bool) -> bool:
    """A step that the ranks make exact must be exact: beyond this the element is too large for the dtype. Others are reported."""
    if not exact:
        return math.isfinite(back.loss)
    if not all(inverse.full_columns for inverse in moved.factors):
        return False
    tolerance = LOSS_TOLERANCE[moved.net.Z0.dtype]
    return abs(back.loss - before.loss) <= tolerance * abs(before.loss) + torch.finfo(moved.net.Z0.dtype).eps


def _try(net: Network, Ts: list[Tensor], frame: Frame, group: str) -> Moved | None:
    """The move by exp(T) or I + T; None where it leaves the finite numbers or the activation's range."""
    if group == "exp":
        gs, inverses = exponentials(Ts, frame.form)
    else:
        gs = [identity_plus(T) for T in Ts]
        inverses = [torch.linalg.inv_ex(g)[0] for g in gs] if frame.form == "u_exact" else None
    moved = move_if_finite(net, gs, inverses, frame)
    return moved if moved is not None and bool(torch.isfinite(moved.net.outputs).all()) else None


def identity_plus(T: Tensor) -> Tensor:
    """I + T."""
    g = T.clone()
    g.diagonal().add_(1)
    return g
