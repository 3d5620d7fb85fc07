"""What `Rotated` says about itself before it steps: which side of which parameter is turned, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from teleport_fast.ops.checks import accumulation_dtype
from teleport_fast.optim.sides import Assignment, Side

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes of an optimizer's state once every parameter has had a gradient."""

    parameters: int
    moments: int
    bases: int
    covariances: int

    @property
    def total(self) -> int:
        """The state's bytes, the parameters' own left out."""
        return self.moments + self.bases + self.covariances


@dataclass(frozen=True)
class Line:
    """A parameter as the table shows it; `owned`: entries of the bases whose state is this parameter's.

    part, held: entries of the parameter and of a moment on this rank; note: how a matrix is stepped that is sharded.
    """

    assignment: Assignment
    dtype: torch.dtype
    basis_dtype: torch.dtype
    moments: int
    owned: int
    part: int
    held: int
    note: str = ""

    @property
    def bytes(self) -> Memory:
        own = self.dtype.itemsize
        held = accumulation_dtype(self.dtype).itemsize if self.assignment.turned else own
        side = self.owned * self.basis_dtype.itemsize
        return Memory(self.part * own, self.held * held * self.moments, side, side)


def memory_of(lines: Sequence[Line]) -> Memory:
    """The sum over parameters."""
    parts = [line.bytes for line in lines]
    return Memory(*(sum(getattr(part, name) for part in parts) for name in Memory.__dataclass_fields__))


def render(lines: Sequence[Line]) -> str:
    """A row per parameter, parameters that differ only by a number of their names together, and the memory under them."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        assignment = line.assignment
        if assignment.sides is None:
            cells = ("adamw", "", assignment.why)
        else:
            notes = [f"{axis}: {s.why}" for axis, s in zip(("rows", "columns"), assignment.sides, strict=True) if s.why]
            notes += [line.note] if line.note else []
            cells = (_side(assignment.sides[0]), _side(assignment.sides[1]), "; ".join(notes))
        key = (_without_numbers(assignment.name), " x ".join(map(str, assignment.shape)), *cells)
        rows.setdefault(key, []).append(assignment.name)
    shown: list[tuple[str, ...]] = [("parameter", "shape", "rows", "columns", "why not")]
    shown += [(name if len(names) > 1 else names[0], *rest) for (name, *rest), names in rows.items()]
    widths = [max(len(row[i]) for row in shown) for i in range(4)]
    text = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in shown]
    text.insert(1, "-" * min(120, max(map(len, text))))
    memory = memory_of(lines)
    parts = [f"{name} {getattr(memory, name) / MIB:.1f}" for name in ("moments", "bases", "covariances")]
    text.append(
        f"state: {memory.total / MIB:.1f} MiB ({', '.join(parts)}) for {memory.parameters / MIB:.1f} of parameters"
    )
    return "\n".join(text)


def _side(side: Side) -> str:
    if side.basis is None:
        return "-"
    if side.kind == "heads" or side.heads > 1:
        return f"{side.kind} {side.heads} x {side.width}"
    return f"{'all heads' if side.kind == 'whole' else side.kind} {side.width}"


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
