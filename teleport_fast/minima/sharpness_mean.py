"""Sharpness as the papers measure it: the mean loss on spheres around the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from teleport_fast.minima.point import Closure, Point, checked_loss

# Entries of a unit vector in float32 round its norm by 1e-7 or so; a direction that was not normalised is further off.
UNIT = 1e-4


def sharpness(
    loss_fn: Closure, params: Iterable[Tensor], radii: Sequence[float] | Tensor, directions: Tensor | Iterable[Tensor]
) -> float:
    """φ(w, T, D): the mean of L(w + t d) over radii t and unit directions d [ICLR24]; the mean of `losses_around`.

    params are bit-identical afterwards, also when loss_fn raises.

    >>> w = torch.zeros(3, dtype=torch.float64)
    >>> round(tf.sharpness(lambda: w.square().sum(), [w], [1.0, 2.0], tf.minima.sphere_directions([w], 4)), 6)
    2.5
    """
    return float(losses_around(loss_fn, params, radii, directions).mean())


@torch.no_grad()
def losses_around(
    loss_fn: Closure, params: Iterable[Tensor], radii: Sequence[float] | Tensor, directions: Tensor | Iterable[Tensor]
) -> Tensor:
    """L(w + t d), (radii, directions) float64; loss_fn takes no argument and reads params, which are moved in place.

    directions: (n, P) or an iterable of (P,) for every radius, or (radii, n, P), each radius its own; P entries of all params
    in order. ValueError for a radius that is not positive, a direction of another size or not of unit norm.

    >>> w = torch.zeros(2)
    >>> losses_around(lambda: w[0] + 2 * w[1], [w], [0.5, 1.0], torch.eye(2))
    tensor([[0.5000, 1.0000],
            [1.0000, 2.0000]], dtype=torch.float64)
    """
    lengths = [float(t) for t in radii]
    if not lengths or not all(0 < t < float("inf") for t in lengths):
        raise ValueError(f"radii must be positive and finite, got {lengths}; pass for example [0.1, 0.2]")
    rows: list[list[float]] = [[] for _ in lengths]
    with Point(params) as point:
        size = sum(point.sizes)
        if isinstance(directions, Tensor) and directions.dim() == 3:
            if len(directions) != len(lengths):
                raise ValueError(f"directions must be ({len(lengths)}, n, {size}), one stack for each of the radii, got "
                                 f"{tuple(directions.shape)}; pass (n, {size}) to use the same at every radius")
            pairs = [(d, [index]) for index, stack in enumerate(directions) for d in stack]
        else:
            pairs = ((d, range(len(lengths))) for d in directions)  # type: ignore[assignment]
        for d, indices in pairs:
            check_direction(d, size)
            for index in indices:
                point.move(d, lengths[index])
                rows[index].append(float(checked_loss(loss_fn())))
    if not rows[0]:
        raise ValueError("directions must hold at least one direction, got none; an iterator can be used once only")
    return torch.tensor(rows, dtype=torch.float64)


def check_direction(direction: Tensor, size: int) -> None:
    """ValueError unless direction is (size,) of unit norm."""
    if direction.shape != (size,):
        raise ValueError(f"directions must have {size} entries, one per entry of params, got shape {tuple(direction.shape)}; "
                         "see teleport_fast.minima.sphere_directions")
    norm = float(torch.linalg.vector_norm(direction))
    if not abs(norm - 1) <= UNIT:
        raise ValueError(f"directions must have unit norm, got {norm:.6g}; divide by it, and give lengths as radii")
