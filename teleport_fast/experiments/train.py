"""One run: a GPT, an arm and a seed in; loss curves, timings and the checks of every teleport out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast.experiments.arms import Arm, attach, make_optimizer
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.experiments.joints import joint_rows
from teleport_fast.experiments.text import Text, sample
from teleport_fast.record import TeleportRecord

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Relative deviation of the logits across a move that still counts as rounding.
TOLERANCE = {"float32": 1e-4, "float64": 1e-12}
FLOOR = 0.02
UNTIMED = 5


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share: the model, the amount of work and how it is measured."""

    model: GPTConfig = field(default_factory=GPTConfig)
    steps: int = 360
    batch: int = 8
    dtype: str = "float32"
    table_rate: float | None = None
    validate_every: int = 30
    validation_windows: int = 64
    probe_windows: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validate_every", "validation_windows", "probe_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; pass a positive integer")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}; pass one of these names")
        if self.table_rate is not None and not 0 < self.table_rate < math.inf:
            raise ValueError(f"table_rate must be positive, got {self.table_rate}; pass a learning rate such as 0.01")


@dataclass
class Run:
    """What one run measured; lists hold one entry per step, `validation` pairs (steps done, loss).

    `history` is the teleporter's (objective before and after, radius, seconds), `joints` the rows of `joint_rows`.
    """

    arm: str
    rate: float
    seed: int
    steps: int
    validation: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    teleports: list[int] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)
    history: list[TeleportRecord] = field(default_factory=list)
    joints: list[dict[str, Any]] = field(default_factory=list)
    step_ms: float = math.nan
    optimizer_ms: float = math.nan
    tokens_per_second: float = math.nan
    seconds: float = 0.0
    interrupted: bool = False
    diverged: bool = False

    @property
    def complete(self) -> bool:
        """Whether every step was taken."""
        return len(self.losses) == self.steps and not self.interrupted

    @property
    def final(self) -> float:
        """The last validation loss: infinite after divergence, not a number where none was measured."""
        if self.diverged:
            return math.inf
        return self.validation[-1][1] if self.validation else math.nan

    @property
    def max_deviation(self) -> float:
        """The largest relative deviation of the probe's logits at any teleport; 0 where there was none."""
        return max(self.deviations, default=0.0)


class FunctionCheck:
    """Compares the model's logits on a fixed batch before and after every move, on a clock of its own.

    The deviation is ‖after − before‖ / ‖before‖; `seconds` is what the checks took, to be left out of timings.
    """

    def __init__(self, model: nn.Module, probe: Tensor) -> None:
        self.model, self.probe, self.seconds = model, probe, 0.0
        self.deviations: list[float] = []
        self._before: Tensor | None = None

    def watch(self, teleporter: Any) -> None:
        """Is called by `teleporter` around every move from now on."""
        teleporter.before_move.append(self.before)
        teleporter.after_move.append(self.after)

    def _logits(self) -> Tensor:
        begun = time.perf_counter()
        with torch.no_grad():
            logits: Tensor = self.model(self.probe)
        self.seconds += time.perf_counter() - begun
        return logits

    def before(self, _: Any) -> None:
        """Remembers the logits."""
        self._before = self._logits()

    def after(self, _: Any) -> None:
        """Records how far the logits moved."""
        if self._before is None:
            return
        norm = self._before.norm().item()
        moved = (self._logits() - self._before).norm().item()
        # A head that is still zero gives zero logits: they may not move at all.
        self.deviations.append(moved / norm if norm else moved)
        self._before = None


def rate_scale(step: int, steps: int) -> float:
    """Factor of the learning rate: a twentieth of the steps up, level, the last three fifths down to 0.02.

    >>> [round(rate_scale(step, 100), 2) for step in (0, 4, 40, 70, 99)]
    [0.2, 1.0, 1.0, 0.5, 0.02]
    """
    return min(1.0, (step + 1) / max(1, steps // 20)) * max(FLOOR, min(1.0, (steps - step) / (0.6 * steps)))


def loss_of(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats per byte of (batch, time) inputs and next bytes."""
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def validation_loss(model: nn.Module, text: Text, setting: Setting) -> float:
    """Loss on the same held-out windows at every call, in every arm and for every seed."""
    generator = torch.Generator().manual_seed(7)
    ids, targets = sample(text.validation, generator, setting.validation_windows, setting.model.context)
    model.eval()
    with torch.no_grad():
        parts = [loss_of(model, i, t) * len(i) for i, t in zip(ids.split(32), targets.split(32), strict=True)]
    model.train()
    return torch.stack(parts).sum().item() / len(ids)


def batches(seed: int) -> torch.Generator:
    """The generator of a seed's training batches: every arm starts it afresh, so all see the same ones."""
    return torch.Generator().manual_seed(1000 + seed)


def train(
    arm: Arm,
    rate: float,
    seed: int,
    setting: Setting,
    text: Text,
    on_step: Callable[[Run], None] | None = None,
) -> Run:
    """Trains the setting's model with `arm` at the peak learning rate `rate`; what was measured.

    The seed decides the initial weights and the batches, the same for every arm. `on_step` is called with the
    growing Run after every step. Validation and function checks are outside every timing. A loss that is not finite
    ends the run with `diverged`; Ctrl-C ends it with `interrupted` and what there is so far.
    """
    run = Run(arm.label, rate, seed, setting.steps)
    begun = time.perf_counter()
    try:
        torch.manual_seed(seed)
        model = GPT(setting.model).to(DTYPES[setting.dtype])
        windows = torch.Generator().manual_seed(11)
        probe, _ = sample(text.validation, windows, setting.probe_windows, setting.model.context)
        if setting.model.gains:
            # Frozen in every arm, the baseline too: otherwise the arms would train different models.
            tf.fold_norm_gains_(model, (probe,), freeze_ones=True)
        optimizer = make_optimizer(arm, model, rate, setting.table_rate)
        teleporter, check = attach(arm, optimizer, model, probe, seed), FunctionCheck(model, probe)
        if teleporter is not None:
            check.watch(teleporter)
        run.deviations = check.deviations
        try:
            _steps(run, model, optimizer, check, setting, text, on_step)
        finally:
            run.history = [] if teleporter is None else teleporter.history
            run.joints = joint_rows(model, optimizer, teleporter)
    except KeyboardInterrupt:
        run.interrupted = True
    run.seconds = time.perf_counter() - begun
    return run


def _steps(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    check: FunctionCheck,
    setting: Setting,
    text: Text,
    on_step: Callable[[Run], None] | None,
) -> None:
    generator, peak = batches(run.seed), [group["lr"] for group in optimizer.param_groups]
    parameters = list(model.parameters())
    tokens = setting.batch * setting.model.context
    spent, optimizing, timed = 0.0, 0.0, 0
    for step in range(setting.steps):
        for group, rate in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = rate * rate_scale(step, setting.steps)
        ids, targets = sample(text.train, generator, setting.batch, setting.model.context)
        begun = time.perf_counter()
        loss = loss_of(model, ids, targets)
        optimizer.zero_grad()
        loss.backward()
        computed = time.perf_counter() - begun
        value = loss.item()
        if not math.isfinite(value):
            run.diverged = True
            return
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        moves, checked, begun = len(check.deviations), check.seconds, time.perf_counter()
        optimizer.step()
        stepped = time.perf_counter() - begun - (check.seconds - checked)
        run.losses.append(value)
        run.gradient_norms.append(norm)
        run.teleports.extend([step] * (len(check.deviations) - moves))
        # The first steps fill caches and allocate the optimizer's state.
        if step >= min(UNTIMED, setting.steps - 1):
            spent, optimizing, timed = spent + computed + stepped, optimizing + stepped, timed + 1
            run.step_ms, run.optimizer_ms = 1e3 * spent / timed, 1e3 * optimizing / timed
            run.tokens_per_second = tokens * timed / spent
        if (step + 1) % setting.validate_every == 0 or step + 1 == setting.steps:
            run.validation.append((step + 1, validation_loss(model, text, setting)))
        if on_step:
            on_step(run)
