"""One tensor laid out anew by torch's own collective, and put back where it lay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teleport_fast.distributed.layout import as_dtensor
from teleport_fast.distributed.reduce import note_turn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


@torch.no_grad()
def laid_out(tensor: Tensor, placements: tuple[Placement, ...]) -> DTensor:
    """A copy of a DTensor under other placements, on the mesh's own device; every rank of the mesh must call this."""
    dtensor = as_dtensor(tensor)
    assert dtensor is not None
    local, mesh = dtensor._local_tensor, dtensor.device_mesh
    note_turn(local.numel() * local.element_size())
    if local.device.type != mesh.device_type:  # offloaded to a CPU
        from torch.distributed.tensor import DTensor

        dtensor = DTensor.from_local(
            local.to(mesh.device_type), mesh, dtensor.placements, run_check=False, shape=dtensor.shape, stride=dtensor.stride()
        )
    return dtensor.redistribute(placements=placements)


@torch.no_grad()
def put_back_(tensor: Tensor, turned: DTensor) -> None:
    """Write a copy that `laid_out` made, and that has moved, into the tensor."""
    dtensor = as_dtensor(tensor)
    assert dtensor is not None
    back = turned.redistribute(placements=dtensor.placements)
    note_turn(back._local_tensor.numel() * back._local_tensor.element_size())
    dtensor._local_tensor.copy_(back._local_tensor)
