"""What one rank reads and writes in a step of `Rotated`: matrices, gradients and bases as it holds them, updates brought home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.distributed.blocks import exchange
from teleport_fast.distributed.layout import local_part, written
from teleport_fast.ops.checks import accumulation_dtype
from teleport_fast.ops.group_action import group_action_
from teleport_fast.optim.assigned import Place
from teleport_fast.optim.sharded import Placing, rows_of
from teleport_fast.optim.sides import Side
from teleport_fast.optim.summed import Held
from teleport_fast.optim.views import view_of

Bases = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Task:
    """A matrix to be stepped: where it stands, its placing (None where it is whole), its sides and their bases."""

    place: Place
    parameter: Tensor
    placing: Placing | None
    sides: tuple[Side, Side]
    bases: Bases


@dataclass(frozen=True)
class Work:
    """What the step of a task is given: `parameter` is the matrix' own part, or zeros that take the update up."""

    parameter: Tensor
    gradient: Tensor
    heads: tuple[int, int]
    bases: Bases


def works_of(tasks: Sequence[Task], held: Held) -> list[Work]:
    """One per task; gradients that are turned at home go to work in one exchange."""
    away = [task for task in tasks if task.placing is not None and task.placing.turns_at_home]
    turned = [_turned(held.home[task.place], task) for task in away]
    moved = exchange(turned, [(task.placing.home, task.placing.work) for task in away if task.placing is not None])
    arrived = {task.place: gradient for task, gradient in zip(away, moved, strict=True)}
    return [_work(task, held, arrived) for task in tasks]


def _work(task: Task, held: Held, arrived: dict[Place, Tensor]) -> Work:
    placing = task.placing
    if placing is None:
        return Work(task.parameter, held.home[task.place], (task.sides[0].heads, task.sides[1].heads), task.bases)
    heads, bases = [1, 1], list[Tensor | None]([None, None])
    for axis in (0, 1):
        basis = task.bases[axis]
        if basis is not None and placing.at[axis] is placing.work:
            own = rows_of(task.sides[axis], placing.work, axis)
            heads[axis], bases[axis] = max(1, own.stop - own.start), basis[own]
    if placing.stays:
        parameter, gradient = local_part(task.parameter), held.home[task.place]
    else:
        gradient = arrived[task.place] if task.place in arrived else held.at(task.place, placing.work)
        gradient = gradient.to(accumulation_dtype(task.parameter.dtype))
        parameter = torch.zeros_like(gradient)
    return Work(parameter, gradient, (heads[0], heads[1]), (bases[0], bases[1]))


def bring_home_(tasks: Sequence[Task], works: Sequence[Work], numbers: Sequence[tuple[float, float]]) -> None:
    """Add the updates that lie at work to their matrices, which decay first; numbers: (lr, weight_decay) per task.

    Whether they lay there or not, autograd hears that all tasks' matrices were written.
    """
    away = [index for index, task in enumerate(tasks) if task.placing is not None and not task.placing.stays]
    moves = [(placing.work, placing.home) for index in away if (placing := tasks[index].placing) is not None]
    updates = exchange([works[index].parameter for index in away], moves)
    for index, update in zip(away, updates, strict=True):
        lr, weight_decay = numbers[index]
        own = local_part(tasks[index].parameter)
        wide = own.to(update.dtype).mul_(1 - lr * weight_decay).add_(_turned(update, tasks[index], back=True))
        if wide.data_ptr() != own.data_ptr():
            own.copy_(wide)
    written(task.parameter for task in tasks)


def _turned(tensor: Tensor, task: Task, back: bool = False) -> Tensor:
    """A copy of this rank's part at home, turned along the axes that are turned there."""
    placing = task.placing
    assert placing is not None
    if not placing.turns_at_home:
        return tensor
    dtype = accumulation_dtype(task.parameter.dtype)
    found = tensor.to(dtype, copy=True)
    for axis in placing.turns_at_home:
        basis, own = task.bases[axis], rows_of(task.sides[axis], placing.home, axis)
        assert basis is not None
        if found.numel():
            g = basis[own].to(dtype)
            group_action_([view_of(found, axis, len(g))], [], (g.mT if back else g).contiguous())
    return found
