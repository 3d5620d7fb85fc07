"""One move of everything that belongs to a parameter: itself, its gradient, its optimizer state, and buffers that go along."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.plan import Plan
from teleport_fast.state import NORMALISED, forget_, state_sources
from teleport_fast.symmetry.bucket import COVECTOR, PARAMETER, SQUARE, Bucket, Element, Split


def move_all_(
    optimizer: Optimizer,
    plan: Plan,
    parameters: dict[str, Tensor],
    gradients: dict[str, Tensor],
    moves: Sequence[tuple[int, Bucket, Element | Split]],
    second_moments: str,
) -> None:
    """Parameters, gradients, first moments in one pass per bucket; second moments as `second_moments` says."""
    if not moves:
        return
    states, place = state_sources(optimizer, parameters), plan.place
    for _, bucket, element in moves:
        moving = [source for source in states if source[0] != NORMALISED]
        carried = [(PARAMETER, buffers)] if (buffers := plan.buffers(bucket)) else []
        place.move_(bucket, element, [(PARAMETER, parameters), (COVECTOR, gradients), *moving, *carried])
        normalised = [(COVECTOR, tensors) for kind, tensors in states if kind == NORMALISED]
        if normalised:
            place.move_(bucket, element.signs(), normalised)
        if element.form in ("diagonal", "permutation") or second_moments == "keep":
            continue
        if second_moments == "project" and isinstance(element, Element):
            place.move_(bucket, element.squared(), [(COVECTOR, tensors) for kind, tensors in states if kind == SQUARE])
        else:
            forget_(optimizer, [parameters[name] for name in bucket.parameters()])
            states = state_sources(optimizer, parameters)
