"""One answer on all ranks to what each can see only of its own part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from teleport_fast.distributed.layout import Over, layout_of
from teleport_fast.distributed.reduce import all_reduce_

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def meshes_of(parameters: Iterable[Tensor]) -> list[DeviceMesh]:
    """The meshes on which they lie, in order; none where all are plain tensors."""
    found = (layout_of(parameter).mesh for parameter in parameters)
    return [*dict.fromkeys(mesh for mesh in found if mesh is not None)]


def anywhere(flag: Tensor, meshes: Iterable[DeviceMesh]) -> bool:
    """Whether a 0-d flag is set on a rank of these meshes; one number is reduced over each, and read back.

    >>> import torch
    >>> anywhere(torch.tensor(True), [])
    True
    """
    found = flag.float()
    for mesh in meshes:
        all_reduce_([(found, Over(mesh, tuple(range(mesh.ndim))))], "max")
    return bool(found)
