"""Numeric proof of joints: outputs before and after a random move in float64, a wrong move as control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from teleport_fast.symmetry.bucket import PARAMETER, Bucket, Element
from teleport_fast.symmetry.diagonal_groups import Diagonal, Signs
from teleport_fast.symmetry.eager import eagerly
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.plain_copy import plain_copy
from teleport_fast.symmetry.widen import WideCasts


@dataclass(frozen=True)
class JointProof:
    """Relative deviation of the outputs after a right move, and after a wrong one (the negative control).

    `training` is the deviation in training mode where that mode computes something else (batch statistics) and the joint
    moves running statistics, which it leaves only up to the norm's eps; None elsewhere.
    """

    name: str
    deviation: float
    control: float
    ok: bool
    training: float | None = None


@dataclass(frozen=True)
class VerifyReport:
    """What `Symmetries.verify` measured; iterates over the joints' proofs."""

    joints: tuple[JointProof, ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        return all(proof.ok for proof in self.joints)

    @property
    def max_deviation(self) -> float:
        return max((proof.deviation for proof in self.joints), default=0.0)

    def __iter__(self) -> Iterator[JointProof]:
        return iter(self.joints)

    def __bool__(self) -> bool:
        return self.ok


CONTROL_FLOOR = 1e-3


class Prover:
    """A perturbed float64 deep copy of a model on which joints are moved and put back, bit for bit.

    Casts to float32 within the model's forward are widened to float64; `casts` counts them per call.
    """

    def __init__(self, model: nn.Module, inputs: Any, own: bool = False, perturb: bool = True) -> None:
        """With `own` the model is the prover's to change, and is not copied; `perturb` is for one that is not random."""
        self.model = model.double().eval() if own else plain_copy(model)
        self.tensors: dict[str, Tensor] = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        for module in self.model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "_experts_implementation", None) is not None:
                config._experts_implementation = "eager"  # transformers' grouped products have no float64
        self.casts = 0
        self._forward = _caller(self.model, inputs)
        if perturb:
            self._perturb()
        self.start()

    def start(self) -> None:
        """Take the outputs that every move is held to."""
        self.before = self.call()
        self.batch_statistics, self.drops_units, self.no_training = False, False, ""
        try:
            self.before_training = self._call_training(1)
            self.drops_units = relative_deviation(self._call_training(2), self.before_training) > 0
        except ValueError as error:  # BatchNorm refuses a batch of one value per channel
            self.no_training = str(error)

    def call(self) -> list[Tensor]:
        with WideCasts() as mode:
            outputs = self._forward()
        self.casts = mode.casts
        return outputs

    def _call_training(self, seed: int) -> list[Tensor]:
        """Outputs in training mode with dropout masks of one seed; running statistics stay as they were.

        A call that changes them says that the model has batch statistics.
        """
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        self.model.train()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self.call()
        finally:
            self.model.eval()
            for name, value in self.model.named_buffers():
                self.batch_statistics |= value.is_floating_point() and not torch.equal(value, buffers[name])
                value.copy_(buffers[name])

    def _perturb(self) -> None:
        """Leave the initialisation: at it, zero tensors and equal entries hide what a move does wrong."""
        generator = torch.Generator().manual_seed(20240229)
        with torch.no_grad():
            for tensor in self.model.parameters():
                if tensor.requires_grad and tensor.numel():
                    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                    tensor.add_(noise.to(tensor.device) * (0.05 + 0.1 * tensor.square().mean().sqrt()))

    def prove(self, joint: Joint, tolerance: float, seed: int = 0) -> JointProof:
        """Move by a random element far from the identity, then by the same element on the first view alone.

        A joint of a single view is controlled by the element's negative. What fails the first needs no control: its
        `control` is infinite.

        A model with dropout is also held to its outputs in training mode, same masks: a dense g mixes what a mask cuts.
        A permutation moves the mask with the units, which is the same in distribution, so it is proven in eval mode.
        A model with batch statistics is held to its outputs in both modes. There a scale that moves running statistics
        is exact in eval mode and up to eps in training mode, so its bar there is the control's floor.
        """
        generator = torch.Generator().manual_seed(seed)
        radius = 0.4 * joint.width**0.5 if joint.group.form == "dense" else 0.5
        g = joint.group.random(joint.heads, radius, generator, torch.float64)
        if isinstance(joint.group, Diagonal) and joint.group.signs:
            g[:, 0] = torch.where((g > 0).all(1), -g[:, 0], g[:, 0])  # a draw without a sign would prove no sign
        element = Element.of(joint.group, g)
        deviation, training = self._deviations(joint, element)
        if deviation > tolerance:
            return JointProof(joint.name, deviation, float("inf"), False)
        lone = (joint.plus or joint.minus)[0]
        half = Joint(joint.name, joint.kind, joint.group, joint.heads, joint.width, (lone,), ())
        if len([*joint.views(), *joint.carried]) == 1 and element.form == "diagonal":
            element = Element(element.form, -element.g)  # nothing to leave out: a sign is what is wrong
        control = max(self._deviations(half, element))
        if self.batch_statistics and joint.carried and joint.group.form == "diagonal":
            holds = training <= CONTROL_FLOOR < control
            return JointProof(joint.name, deviation, control, holds, training)
        deviation = max(deviation, training)
        return JointProof(joint.name, deviation, control, deviation <= tolerance and control > CONTROL_FLOOR)

    @torch.no_grad()
    def _deviations(self, joint: Joint, element: Element) -> tuple[float, float]:
        """In eval mode, and in training mode where that is another function; 0 where it is not looked at."""
        undo = Element(element.form, joint.group.inverse(element.g)) if _undone_exactly(joint) else None
        moved = () if undo else (*joint.parameters(), *joint.buffers())
        saved = {name: self.tensors[name].clone() for name in moved}
        bucket = Bucket((joint,))
        try:
            bucket.move_(element, [(PARAMETER, self.tensors)])
            deviation, training = relative_deviation(self.call(), self.before), 0.0
            masked = self.drops_units and joint.group.form == "permutation"
            if (self.batch_statistics or self.drops_units) and not masked and not self.no_training:
                training = relative_deviation(self._call_training(1), self.before_training)
            return deviation, training
        finally:
            if undo is not None:
                bucket.move_(undo, [(PARAMETER, self.tensors)])
            for name, value in saved.items():
                self.tensors[name].copy_(value)


def _undone_exactly(joint: Joint) -> bool:
    """Whether the inverse restores every bit, so that no copy is kept: orders and signs, one view per axis."""
    views = list(joint.views())
    axes = {(view.parameter, view.axis) for view in views}
    plain = joint.group.form == "permutation" or isinstance(joint.group, Signs)
    return plain and len(axes) == len(views) and not any(view.shift for view in views)


def verify(joints: Iterable[Joint], model: nn.Module, inputs: Any = None, tolerance: float = 1e-10) -> VerifyReport:
    """Prove each joint on a float64 deep copy of the model, its trainable parameters perturbed.

    inputs: a tensor, a tuple of positional arguments or a dict of keywords; None guesses them from the first module.
    Joints whose tensors do not fit the model raise ValueError.
    """
    if inputs is None:
        from teleport_fast.discovery.inputs import guess_inputs

        inputs = guess_inputs(model)
    proofs = []
    with eagerly(model):
        prover = Prover(model, inputs)
        for joint in joints:
            joint.check_shapes(prover.tensors)
            proofs.append(prover.prove(joint, tolerance))
    return VerifyReport(tuple(proofs), tolerance)


def relative_deviation(after: list[Tensor], before: list[Tensor]) -> float:
    """‖after − before‖ / ‖before‖ over all floating outputs; infinite when something is not finite or changed shape."""
    if [a.shape for a in after] != [b.shape for b in before]:
        return float("inf")
    change = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    size = sum(float(b.square().sum()) for b in before)
    ratio = (change / size) ** 0.5 if size > 0 else float("inf")
    return ratio if ratio == ratio else float("inf")


def _seen(output: Any) -> Any:
    """What of a model's output must stay: its logits where it names some, else all but caches, which follow a basis."""
    if not isinstance(output, Mapping):
        return output.to_tuple() if hasattr(output, "to_tuple") else output
    named = {key: value for key, value in output.items() if "logits" in str(key) and value is not None}
    if named:
        return list(named.values())
    return [value for key, value in output.items() if "past_key_values" not in str(key) and value is not None]


def _caller(model: nn.Module, inputs: Any) -> Callable[[], list[Tensor]]:
    def cast(value: Any) -> Any:
        return value.to(torch.float64) if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(inputs, Mapping):
        keywords: dict[str, Any] = {key: cast(value) for key, value in inputs.items()}
        positional: tuple[Any, ...] = ()
    else:
        keywords = {}
        positional = tuple(cast(v) for v in inputs) if isinstance(inputs, (tuple, list)) else (cast(inputs),)

    @torch.no_grad()
    def call() -> list[Tensor]:
        output = _seen(model(*positional, **keywords))
        leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
        if not leaves:
            raise ValueError("the model returns no floating tensor for example_inputs; pass inputs that give logits")
        return [x.clone() for x in leaves]

    return call
