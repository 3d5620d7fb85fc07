"""Whether a model that was moved still computes the same: its outputs before and after, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from teleport_fast.discovery.inputs import guess_inputs
from teleport_fast.symmetry.verify import Prover, relative_deviation

EPS_OF_STORAGE = 64.0


def compare(model: nn.Module, inputs: Any = None) -> Callable[[nn.Module], dict[str, Any]]:
    """Remember the outputs of a float64 copy of the model; returns a function that measures how far they moved since.

    That function takes the moved model and returns {deviation, tolerance, ok}: deviation is relative, over all floating
    outputs. Weights were rounded to their own dtype once, so the tolerance is 64 times its eps (1e-10 for float64).
    Errors: ValueError where inputs cannot be guessed.
    """
    given = guess_inputs(model) if inputs is None else inputs
    before = _outputs(model, given)

    def after(moved: nn.Module) -> dict[str, Any]:
        coarsest = max(torch.finfo(p.dtype).eps for p in moved.parameters() if p.is_floating_point())
        tolerance = max(1e-10, EPS_OF_STORAGE * coarsest) if coarsest > 1e-10 else 1e-10
        deviation = relative_deviation(_outputs(moved, given), before)
        return {"deviation": deviation, "tolerance": tolerance, "ok": deviation <= tolerance}

    return after


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """As a joint's proof takes them: quantized layers opened, casts to float32 widened."""
    return Prover(model, inputs, perturb=False).before
