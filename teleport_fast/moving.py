"""One move of everything that belongs to a parameter: itself, its gradient, its optimizer state, and buffers that go along."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.plan import Plan
from teleport_fast.state import NORMALISED, forget_, state_sources
from teleport_fast.symmetry.bucket import COVECTOR, PARAMETER, SQUARE, Bucket, Element, Split
from teleport_fast.writes import Write


def writes_of(
    optimizer: Optimizer,
    plan: Plan,
    parameters: dict[str, Tensor],
    gradients: dict[str, Tensor],
    moves: Sequence[tuple[int, Bucket, Element | Split]],
    second_moments: str,
) -> list[Write]:
    """Parameters, gradients, first moments in one pass per bucket; second moments as `second_moments` says.

    Nothing is written before the first of the calls. What a reset forgets the next bucket does not move: there the state is
    looked up call by call.
    """
    states, place = state_sources(optimizer, parameters) if moves else [], plan.place

    def of(bucket: Bucket, element: Element | Split, states: list[tuple[str, dict[str, Tensor]]] | None = None) -> list[Write]:
        states = state_sources(optimizer, parameters) if states is None else states
        moving = [source for source in states if source[0] != NORMALISED]
        carried = [(PARAMETER, buffers)] if (buffers := plan.buffers(bucket)) else []
        found = place.writes(bucket, element, [(PARAMETER, parameters), (COVECTOR, gradients), *moving, *carried])
        normalised = [(COVECTOR, tensors) for kind, tensors in states if kind == NORMALISED]
        if normalised:
            found += place.writes(bucket, element.signs(), normalised)
        if element.form in ("diagonal", "permutation") or second_moments == "keep":
            return found
        if second_moments == "project" and isinstance(element, Element):
            squares = [(COVECTOR, tensors) for kind, tensors in states if kind == SQUARE]
            return found + place.writes(bucket, element.squared(), squares)
        return [*found, partial(forget_, optimizer, [parameters[name] for name in bucket.parameters()])]

    if second_moments == "reset":
        return [partial(of, bucket, element) for _, bucket, element in moves]
    return [write for _, bucket, element in moves for write in of(bucket, element, states)]
