"""inverse: matrices⁻¹ without making the host wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse(matrices: Tensor) -> Tensor:
    """matrices⁻¹ of (..., h, h), float32 or float64; differentiable.

    A singular matrix is an error on the CPU. Elsewhere the host would have to wait for the device to hear of it, which a CUDA
    graph cannot hold either: there its inverse is NaN. Errors: torch.linalg.LinAlgError, on the CPU.

    >>> inverse(torch.tensor([[2.0]]))
    tensor([[0.5000]])
    """
    return torch.linalg.inv(matrices) if matrices.device.type == "cpu" else inverse_or_nan(matrices)


def inverse_or_nan(matrices: Tensor) -> Tensor:
    """As `inverse` answers on other devices than the CPU.

    >>> inverse_or_nan(torch.tensor([[0.0]]))
    tensor([[nan]])
    """
    found, failed = torch.linalg.inv_ex(matrices)
    return torch.where((failed == 0)[..., None, None], found, torch.nan)
