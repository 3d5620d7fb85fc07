"""What each joint of a run did: how often it moved and how far, the spectrum of P = gᵀg, how diagonal its basis is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from teleport_fast.inspection.table import inspection
from teleport_fast.objectives.eigenbasis import Eigenbasis
from teleport_fast.optim import Rotated
from teleport_fast.optim.refresh import AXES
from teleport_fast.symmetry.bucket import Bucket, Element, Split
from teleport_fast.teleporter import Teleporter

# Numbers of a spectrum that are written, evenly spaced by rank; wider spaces are left out, where a spectrum takes seconds.
POINTS = 33
WIDEST = 1024


class Watched(Teleporter):
    """A Teleporter that remembers how often each bucket moved and its first and last elements; it computes nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.first: dict[int, Element | Split] = {}
        self.last: dict[int, Element | Split] = {}
        self.moves: dict[int, int] = {}
        super().__init__(*arguments, **options)

    def _hold(self, index: int, element: Element | Split) -> None:
        super()._hold(index, element)
        self.first.setdefault(index, element)
        self.last[index] = element
        self.moves[index] = self.moves.get(index, 0) + 1


@torch.no_grad()
def joint_rows(model: nn.Module, optimizer: Optimizer, teleporter: Teleporter | None) -> list[dict[str, Any]]:
    """A row for every joint of a teleporter, or for every basis of `Rotated`; none for another optimizer alone.

    Keys: those of `inspect`, then `why_not` (left out by the objective), `moves`, `distance` (‖g − I‖_F of the first and of
    the last move, the largest head's), `log_p` (the last move's eigenvalues of log gᵀg) and `covariance` (of the gradients:
    eigenvalues, the diagonal in the present basis, both divided by the trace, and the diagonal's `share` of ‖C‖²_F).
    Spectra are pooled over heads, largest first, at most 33 numbers of each; None for spaces wider than 1,024.
    """
    if teleporter is None:
        return basis_rows(optimizer) if isinstance(optimizer, Rotated) else []
    of_joint = {joint.name: place for place in enumerate(teleporter.plan.buckets) for joint in place[1].joints}
    rows = []
    for row in inspection(model, teleporter.symmetries).joints:
        plain: dict[str, Any] = {key: value for key, value in vars(row).items() if key != "parameters"}
        plain["tensors"], plain["why_not"] = len(row.parameters), teleporter.plan.left_out.get(row.name)
        if row.name in of_joint:
            plain |= _moved(teleporter, row.name, *of_joint[row.name])
        rows.append(plain)
    return rows


def basis_rows(optimizer: Rotated) -> list[dict[str, Any]]:
    """A row for every basis that `Rotated` keeps, named by the matrix that holds it and its side."""
    rows = []
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            state = optimizer.state.get(parameter, {})
            for axis, side in enumerate(AXES):
                covariance, owned = state.get(f"{side}_covariance"), optimizer._assigned.owned_side(g, i, axis)
                if covariance is None or owned is None:
                    continue
                basis = state[f"{side}_basis"].double()
                rows.append(
                    {
                        "name": f"{optimizer._assigned.of(g, i).name}, {side}",
                        "kind": owned.kind,
                        "group": f"O({owned.width})",
                        "width": owned.width,
                        "heads": owned.heads,
                        "covariance": _covariance(covariance.double(), basis),
                    }
                )
    return rows


def _moved(teleporter: Teleporter, name: str, index: int, bucket: Bucket) -> dict[str, Any]:
    at = next(i for i, joint in enumerate(bucket.joints) if joint.name == name) * bucket.heads
    heads = slice(at, at + bucket.heads)
    found: dict[str, Any] = {"moves": 0}
    if isinstance(teleporter, Watched) and index in teleporter.last:
        ends = [_matrix(element)[heads] for element in (teleporter.first[index], teleporter.last[index])]
        found = {"moves": teleporter.moves[index], "distance": [_distance(g) for g in ends], "log_p": _log_p(ends[1])}
    covariances = teleporter.objective.covariances if isinstance(teleporter.objective, Eigenbasis) else {}
    if index in covariances:
        found["covariance"] = _covariance(covariances[index][heads].double(), None)
    return found


def _matrix(element: Element | Split) -> Tensor:
    """g of the writers' side."""
    return (element.plus if isinstance(element, Split) else element).g


def _distance(g: Tensor) -> float | None:
    if not g.is_floating_point():
        return None
    g = g.double()
    if g.ndim == 2:
        return float((g - 1).norm(dim=-1).amax())
    return float(torch.linalg.matrix_norm(g - torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)).amax())


def _log_p(g: Tensor) -> list[float] | None:
    if not g.is_floating_point() or g.shape[-1] > WIDEST or not bool(g.isfinite().all()):
        return None
    values = g.double().abs() if g.ndim == 2 else torch.linalg.svdvals(g.double())
    return _spaced(2 * values.log())


def _covariance(covariance: Tensor, basis: Tensor | None) -> dict[str, Any] | None:
    """basis: (heads, h, h) whose rows are the basis vectors; None where C is already taken in the present basis."""
    if covariance.shape[-1] > WIDEST or not bool(covariance.isfinite().all()):
        return None
    seen = covariance if basis is None else basis @ covariance @ basis.mT
    diagonal = seen.diagonal(dim1=-2, dim2=-1)
    trace = float(diagonal.sum())
    if trace <= 0:
        return None
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    share = float(diagonal.square().sum() / seen.square().sum())
    return {"eigenvalues": _spaced(eigenvalues / trace), "diagonal": _spaced(diagonal / trace), "share": share}


def _spaced(values: Tensor) -> list[float]:
    ordered = values.flatten().sort(descending=True).values
    ranks = torch.linspace(0, len(ordered) - 1, min(POINTS, len(ordered))).round().long()
    return [float(f"{value:.5g}") for value in ordered[ranks].tolist()]
