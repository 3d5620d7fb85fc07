"""The joints of a model as rows: what moves, in which group, and what share of all parameters is symmetric."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries, named_tensors

COLUMNS = ("joint", "kind", "group", "width", "heads", "tensors", "touched", "dim", "share", "deviation")


@dataclass(frozen=True)
class JointRow:
    """One joint: `touched` counts the numbers in the tensors that move, `share` is dim over all the model's parameters."""

    name: str
    kind: str
    group: str
    width: int
    heads: int
    parameters: tuple[str, ...]
    touched: int
    dim: int
    share: float
    deviation: float | None

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `COLUMNS`."""
        return (
            self.name,
            self.kind,
            self.group,
            str(self.width),
            str(self.heads),
            str(len(self.parameters)),
            f"{self.touched:,}",
            f"{self.dim:,}",
            f"{self.share:.3%}",
            "unproven" if self.deviation is None else f"{self.deviation:.0e}",
        )


@dataclass(frozen=True)
class Inspection:
    """A model's joints and what was rejected or skipped; `dim` and `share` are of all joints together."""

    joints: tuple[JointRow, ...]
    findings: tuple[dict[str, Any], ...]
    parameters: int
    dim: int
    share: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def inspection(model: nn.Module, symmetries: Symmetries) -> Inspection:
    """The table of a model's symmetries; a tied parameter counts once.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> table = inspection(model, tf.find_symmetries(model))
    >>> table.parameters, table.dim, round(table.share, 3)
    (26, 4, 0.154)
    """
    tensors = named_tensors(model)
    total = sum(tensor.numel() for tensor in tensors.values())
    deviations = {finding.name: finding.deviation for finding in symmetries.findings if finding.status == "found"}

    def row(joint: Joint) -> JointRow:
        names = joint.parameters()
        return JointRow(
            name=joint.name,
            kind=joint.kind,
            group=str(joint.group),
            width=joint.width,
            heads=joint.heads,
            parameters=names,
            touched=sum(tensors[name].numel() for name in names),
            dim=joint.dim,
            share=joint.dim / total,
            deviation=deviations.get(joint.name),
        )

    findings = tuple(vars(finding) for finding in symmetries.findings)
    return Inspection(tuple(map(row, symmetries)), findings, total, symmetries.dim, symmetries.dim / total)
