"""A flag on its way from a device to the host; nobody waits for it before somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor


class Flag:
    """A copy of a one-entry tensor that sets out when this is made and is read, and waited for, in `is_set`.

    >>> Flag(torch.tensor(True)).is_set(), Flag(torch.tensor(0.0)).is_set()
    (True, False)
    """

    def __init__(self, found: Tensor) -> None:
        self._host = found.to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if found.is_cuda else None
        if self._event is not None:
            self._event.record()

    def is_set(self) -> bool:
        """Whether the entry is not 0."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)
