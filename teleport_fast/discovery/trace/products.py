"""Reading and writing units: products with parameters, of values with each other, and parameters met entry by entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teleport_fast.discovery.trace.tape import Alias, Tape
from teleport_fast.discovery.trace.units import BENT, LINKED, MIXED


def read(
    tape: Tape, x: Any, weight: Alias, read_dim: int, write_dim: int, channel: int = -1, groups: int = 1
) -> Tensor | None:
    """x meets the weight along `channel`: its units are read, the weight's other dimension writes new ones.

    Returns the new units (outputs,). A convolution in groups reads the units of a group with the group's rows alone.
    """
    known = tape.known(x)
    label = tape.data(known) if isinstance(known, Alias) else known
    fresh = tape.units.new(weight.view.shape[write_dim])
    tape.use(weight, write_dim, fresh, 1.0)
    if label is not None:
        units = tape.column(label, channel)
        _read_units(tape, units, weight, read_dim, write_dim, groups)
        if groups == len(units) > 1:
            tape.units.together(fresh, units.repeat_interleave(len(fresh) // groups))
            tape.units.mark(fresh, BENT)
    if groups > 1 and (label is None or groups < len(units)):  # a row keeps to the inputs of its group
        tape.units.refine(fresh, torch.arange(groups).repeat_interleave(len(fresh) // groups))
    return fresh


def _read_units(tape: Tape, units: Tensor, weight: Alias, read_dim: int, write_dim: int, groups: int) -> None:
    rows = weight.view.shape[write_dim] // groups
    if groups == 1:
        tape.use(weight, read_dim, units, -1.0)
        return
    inside = len(units) // groups
    if inside == 1:  # depthwise: a unit is read by the rows of its own group
        tape.use(weight, write_dim, units.repeat_interleave(rows), -1.0)
        return
    if bool((units.reshape(groups, inside) < 0).all(1).any()):  # its rows would count as rows that nobody uses
        tape.units.pin(units, f"a group of {weight.name!r} reads plain data alone")
        return
    group = torch.arange(groups).repeat_interleave(inside)
    tape.units.refine(units, group)
    place = tape.axes(weight)[write_dim]
    one_group = Alias(weight.name, weight.view.narrow(write_dim, 0, rows))
    axes = tape.axes(one_group)[read_dim]
    if place is None or axes is None:
        tape.units.pin(units, f"{weight.name!r} is reshaped across its axes")
        return
    tape.note(weight.name, axes[0], axes[1].repeat(groups), units, -1.0, (place[0], group * rows, rows))


def contract(tape: Tape, a: Any, b: Any, out: Tensor) -> Any:  # NotImplemented has no useful type
    """a (…, m, k) times b (…, k, n): units along k meet each other (queries, keys), others pass on (values).

    Returns the units of the result, None, or NotImplemented.
    """
    known = [tape.known(a), tape.known(b)]
    if isinstance(known[0], Alias) or (isinstance(known[1], Alias) and known[0] is not None):
        known = [tape.data(k) if isinstance(k, Alias) else k for k in known]
    if any(isinstance(side, Alias) for side in known):
        return NotImplemented
    x, y = (side.reshape(-1, *side.shape[-2:]) if isinstance(side, Tensor) else None for side in known)
    batch = torch.arange(out.shape[0] if out.ndim == 3 else 1).reshape(-1, 1, 1)
    units = tape.units
    x, y = _level(tape, x, 2, 1), _level(tape, y, 1, 2)
    if x is not None and y is not None and _flat(x, 1) and _flat(y, 2):
        units.tie(x[:, 0, :], y[:, :, 0], -1.0)
        for side in (x, y):
            units.refine(side, batch.expand(side.shape))
            units.mark(side, LINKED)
        return None
    x, y = _level(tape, x, 1, 2), _level(tape, y, 2, 1)
    left = x is not None and _flat(x, 2)
    right = y is not None and _flat(y, 1)
    if x is not None and right and not left:
        units.pin(x, "it meets a weight that is computed")
        x = None
    elif y is not None and left and not right:
        units.pin(y, "it meets a weight that is computed")
    elif (x is not None and not left) or (y is not None and not right):
        return NotImplemented
    if left and right and x is not None:
        units.pin(x, "two values that both hold units are multiplied")
        left = False
    passing = x if left else y
    if passing is None:
        return NotImplemented
    units.refine(passing, batch.expand(passing.shape))
    units.mark(passing, MIXED)
    kept = passing[:, :, :1] if left else passing[:, :1, :]
    shape = (kept.shape[0], out.shape[-2], out.shape[-1])
    return kept.expand(shape).reshape(out.shape)


def _level(tape: Tape, label: Tensor | None, along: int, across: int) -> Tensor | None:
    """Where units differ along one dimension and only now and then across the other, those that meet are tied."""
    if label is None or _flat(label, across) or not _distinct(label, along) or _distinct(label, across):
        return label
    first = label.narrow(across, 0, 1)
    tape.units.tie(first, label)
    return first.expand(label.shape)


def _flat(label: Tensor, dim: int) -> bool:
    return bool((label.narrow(dim, 0, 1) == label).all())


def elementwise_parameter(tape: Tape, label: Tensor, alias: Alias, terms: tuple[tuple[float, Tensor], ...]) -> bool:
    """A parameter meets a value entry by entry: its entries scale as the product of units ** exponent over `terms`.

    False where no single axis of it runs along the units.
    """
    view, ndim = alias.view, label.ndim
    dims = [d + ndim - view.ndim for d, size in enumerate(view.shape) if size > 1]
    along = [d for d in dims if _distinct(label, d)] if len(dims) > 1 else dims
    if not dims and view.ndim and label.shape[-1] == 1:
        along = [ndim - 1]  # a lone unit
    if len(along) != 1:
        return False
    dim = along[0]
    for exponent, units in terms:
        tape.use(alias, dim - ndim + view.ndim, tape.column(units, dim), exponent)
    return True


def _distinct(label: Tensor, dim: int) -> bool:
    """Whether every place along a dimension is a unit of its own."""
    line = label.movedim(dim, 0).reshape(label.shape[dim], -1)[:, 0]
    return len(torch.unique(line)) == len(line)
