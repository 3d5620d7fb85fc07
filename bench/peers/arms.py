"""What a step may be: ours, the optimizers that others tune, and teleports that ask for no symmetry or for the papers' loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.convergence.additions import Context, begin, parse
from bench.convergence.optimizers import base_named
from bench.peers.models import Workload
from teleport_fast.data_dependent import CrossEntropy, MLPAction, leaky_relu, reference
from teleport_fast.peers import level_set_teleport, null_space_teleport

TELEPORT_STEPS = 10
# The published loop's first step: ‖T‖ of it, as in bench/papers/data_dependent_speed.py.
FIRST_STEP = 1e-3


@dataclass(frozen=True)
class Arm:
    """`steps` steps in a call of what `make(workload)` returns; `once`: a teleport, whose cost is that of the call."""

    name: str
    make: Callable[[Workload], Callable[[], object]]
    steps: int = 1
    once: bool = False


def trained(arm: str, period: int, length: int = 100) -> Callable[[Workload], Callable[[], object]]:
    """An arm of bench/convergence at rate 0, so that all see the same weights; `length`: the run's, of which a rare teleport has a tenth."""

    def make(work: Workload) -> Callable[[], object]:
        base = base_named(parse(arm)[0])
        optimizer: Any = base.make(list(work.model.named_parameters()), base.rate, work.symmetries, **base.choices[0])
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        options = {"radius": 0.05} if "grad-norm" in arm else {}
        begin(arm, Context(work.model, optimizer, work.symmetries, length, 0, work.loss), options)

        def call() -> None:
            for _ in range(period):
                optimizer.step(work.backward) if base.steps_by == "closure" else optimizer.step()

        return call

    return make


def level_set(work: Workload) -> Callable[[], object]:
    """Its Hessian-vector products need an attention whose backward has a derivative: torch's plain one."""

    def loss() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return work.loss()

    return lambda: level_set_teleport(loss, work.parameters, TELEPORT_STEPS)


def null_space(work: Workload) -> Callable[[], object]:
    return lambda: null_space_teleport(work.loss, work.model, TELEPORT_STEPS)


def _problem(work: Workload) -> tuple[list[torch.Tensor], torch.Tensor, CrossEntropy, float]:
    assert work.labels is not None
    weights = [p.detach() for p in work.parameters]
    X, loss = work.inputs[0].mT.contiguous(), CrossEntropy(work.labels)
    first = MLPAction(weights, X, form="v_exact").lie_gradient(loss)
    return weights, X, loss, FIRST_STEP / max(float(gradient.norm()) for gradient in first)


def published(work: Workload) -> Callable[[], object]:
    """The ICLR 2024 loop by double backward, from the authors' released steps."""
    weights, X, loss, lr = _problem(work)
    return lambda: reference.published_teleport(
        weights, X, loss, "iclr24", leaky_relu(0.1), TELEPORT_STEPS, lr, math.inf, True, lambda *record: None
    )


def fused(work: Workload) -> Callable[[], object]:
    """The same loop by our closed form: it ends at the same weights (bench/papers/data_dependent_speed.py)."""
    weights, X, loss, lr = _problem(work)
    return lambda: MLPAction(weights, X, form="v_exact").teleport(loss, TELEPORT_STEPS, lr, parity=True)


COMMON = (
    Arm("AdamW", trained("adamw", 1)),
    Arm("AdamW + grad_norm teleport, every step", trained("adamw+grad-norm", 1, 10)),
    Arm("AdamW + grad_norm teleport, every 10th", trained("adamw+grad-norm", 10, 100), 10),
    Arm("Rotated", trained("rotated", 3), 3),
    Arm("Muon", trained("muon", 1)),
    Arm("SOAP", trained("soap", 10), 10),
    Arm("Shampoo", trained("shampoo", 10), 10),
    Arm("SAM", trained("sam", 1)),
    Arm("level-set teleport of ten steps", level_set, once=True),
)
GPT_ARMS = (
    *COMMON[:3],
    Arm("AdamW + exact rotations, every 3rd", trained("adamw+rotations", 3), 3),
    COMMON[3],
    Arm("Rotated, hidden side too", trained("rotated-hidden", 3), 3),
    *COMMON[4:],
)
MLP_ARMS = (
    *COMMON,
    Arm("null-space teleport of ten steps", null_space, once=True),
    Arm("the published teleport of ten steps", published, once=True),
    Arm("the same by our op", fused, once=True),
)
