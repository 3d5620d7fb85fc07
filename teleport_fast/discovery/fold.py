"""Folding norm gains into the layers that read them: explicit, function-exact and reversible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teleport_fast.discovery.find import find_symmetries
from teleport_fast.discovery.gains import gain_shift, is_norm
from teleport_fast.discovery.roles import Attention, roles
from teleport_fast.symmetry.bucket import PARAMETER, Bucket, Element
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import named_tensors


@dataclass
class FoldedGains:
    """What `fold_norm_gains_` did: the folded norms' joints, their gains, and those only frozen; `unfold_()` undoes it."""

    model: nn.Module
    gains: dict[str, Tensor]
    joints: tuple[Joint, ...]
    frozen: tuple[str, ...] = ()

    @torch.no_grad()
    def unfold_(self) -> None:
        """Give every norm its gain back and let it train again; the function does not change.

        Also after training, and after turns of the stream: gains are then those of the present basis' units.
        """
        tensors = named_tensors(self.model)
        for joint in self.joints:
            view = joint.plus[0]
            _move(joint, self.gains[view.parameter] + view.shift, tensors)
            tensors[view.parameter].copy_(self.gains[view.parameter])
        for name in (*self.gains, *self.frozen):
            tensors[name].requires_grad_(True)


@torch.no_grad()
def fold_norm_gains_(model: nn.Module, example_inputs: Any = None, freeze_ones: bool = False) -> FoldedGains:
    """Set every norm's gain γ to one and multiply the linear layers that read it by γ; the gains are then frozen.

    Gains stored as 1 + w become w = 0. Norms of queries and keys inside attention stay as they are: they are not on the
    stream. W → W diag γ for the readers, β → β/γ for a LayerNorm's bias: the norm's own diagonal symmetry with s = 1/γ, so the
    function is unchanged. Afterwards the residual stream of the model has its orthogonal joint. Call it before the
    optimizer is built. freeze_ones: a gain that no set of linear layers alone reads (in front of a tied head, or written onto
    the stream) is frozen where all of it is one, as in a fresh model; it then no longer trains.
    Returns a FoldedGains whose `unfold_()` restores the gains and lets all train again.
    Errors: ValueError when a gain has a zero, or when a norm's gain feeds something else than linear layers and is not
    frozen; nothing is changed then. Source: own derivation, checked by tests/discovery/test_fold.py.
    """
    tensors = named_tensors(model)
    joints = tuple(j for j in find_symmetries(model, example_inputs) if j.kind == "norm-readers")
    foldable = {joint.plus[0].parameter: joint for joint in joints}
    inside = {name for role in roles(model) if isinstance(role, Attention) for name, _ in role.norms}
    frozen: list[str] = []
    for module_name, module in model.named_modules():
        gain = getattr(module, "weight", None)
        if not is_norm(module) or not isinstance(gain, nn.Parameter) or not gain.requires_grad or module_name in inside:
            continue
        name = f"{module_name}.weight"
        if name not in foldable:
            ones = bool((gain + gain_shift(module) == 1).all())
            if ones and freeze_ones:
                frozen.append(name)
                continue
            remedy = "untie the head, or build the model without this gain"
            if ones:
                remedy = f"all of it is one: pass freeze_ones=True to freeze it so, or {remedy}"
            raise ValueError(
                f"gain {name!r} cannot be folded: no set of linear layers alone reads it (a tied head does not count); {remedy}"
            )
        if bool((gain + foldable[name].plus[0].shift == 0).any()):
            raise ValueError(f"gain {name!r} has a zero entry, folding could not be undone; set it to a small number")
    gains = {name: tensors[name].detach().clone() for name in foldable}
    for name, joint in foldable.items():
        shift = joint.plus[0].shift
        _move(joint, (gains[name] + shift).reciprocal(), tensors)
        tensors[name].fill_(1.0 - shift)
    for name in (*foldable, *frozen):
        tensors[name].requires_grad_(False)
    return FoldedGains(model, gains, joints, tuple(frozen))


def _move(joint: Joint, scale: Tensor, tensors: dict[str, Tensor]) -> None:
    Bucket((joint,)).move_(Element(joint.group.form, scale[None]), [(PARAMETER, tensors)])
