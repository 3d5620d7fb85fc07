"""Tasks that train a network on labelled images: batches of a seed, a decayed rate, CPU time without what is only measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teleport_fast as tf
from bench.convergence.additions import Context, arm_space, base_options, begin, parse
from bench.convergence.costs import step_seconds
from bench.convergence.interface import Result, Space, Task, Trial
from bench.convergence.optimizers import base_named
from bench.convergence.stacked import stackable, train_stacked
from teleport_fast.experiments.datasets import load
from teleport_fast.experiments.train import rate_scale
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries

CURVE_POINTS = 20


@dataclass(frozen=True)
class Work:
    """How much a run of digits is: steps of `batch` images, drawn without return until all `images` were seen."""

    steps: int
    batch: int
    images: int


class Digits(Task):
    """A classifier of the digits; `build()` makes it with a layer `head`, `shape` is one image's, `start(model, seed, arm)` moves it first."""

    loss = "training loss"
    compared_by = "ratio"

    def __init__(
        self, name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], work: Work, arms: Sequence[str],
        start: Callable[[nn.Module, int, str], None] | None = None, note: str = "",
    ) -> None:
        self.name, self.build, self.shape, self.work, self.arms = name, build, shape, work, tuple(arms)
        self.steps, self.start, self.note = work.steps, start, note

    def setting(self) -> dict[str, Any]:
        return {"model": repr(self.build()), "start": self.note, "schedule": "train.rate_scale", **asdict(self.work)}

    def space(self, arm: str) -> Space:
        return arm_space(arm)

    def train(self, trial: Trial, seeds: Sequence[int]) -> Iterator[Result]:
        if stackable(trial.arm, _joints(self.build, self.shape)):
            yield from (result for _, result in self._stacked([trial], seeds, CURVE_POINTS))
        else:
            yield from (self.train_one(trial, seed) for seed in seeds)

    def tune(self, trials: Sequence[Trial], seeds: Sequence[int]) -> Iterator[tuple[Trial, Result]]:
        """Arms that act entry by entry train all rates and seeds of a choice as one stack, which takes an eighth of the time."""
        for options in {repr(trial.options): trial.options for trial in trials}.values():
            alike = [trial for trial in trials if trial.options == options]
            if stackable(alike[0].arm, _joints(self.build, self.shape)):
                yield from self._stacked(alike, seeds, 1)
            else:
                yield from super().tune(alike, seeds)

    def _stacked(self, trials: Sequence[Trial], seeds: Sequence[int], points: int) -> Iterator[tuple[Trial, Result]]:
        first, pairs = trials[0], [(trial, seed) for trial in trials for seed in seeds]
        results = train_stacked(
            first.arm, first.options, [(trial.rate, seed) for trial, seed in pairs], [self.model(seed, first.arm) for _, seed in pairs],
            _joints(self.build, self.shape), digits(self.work.images, self.shape),
            lambda seed: batches(seed, self.work.batch, self.work.images), self._steps(first), points,
        )
        yield from ((trial, result) for (trial, _), result in zip(pairs, results, strict=True))

    def _steps(self, trial: Trial) -> int:
        return max(1, round(trial.share * self.steps))

    def model(self, seed: int, arm: str) -> nn.Module:
        """The seed's network where it starts."""
        torch.manual_seed(seed)
        model = self.build()
        if self.start is not None:
            self.start(model, seed, arm)
        return model

    def train_one(self, trial: Trial, seed: int) -> Result:
        """One run; a loss that is not finite ends it as diverged."""
        run, steps, result = Run(self, trial, seed), self._steps(trial), Result(seed, math.inf)
        for step in range(steps):
            if not run.advance():
                return result
            if (step + 1) * CURVE_POINTS // steps > step * CURVE_POINTS // steps:
                result.curve.append((step + 1, run.training_loss()))
        result.measures = run.measures()
        last = result.curve[-1][1]
        result.final = last if math.isfinite(last) else math.inf
        return result

    def cost(self, trials: Mapping[str, Trial]) -> dict[str, float]:
        """Seconds of a step of each arm, alone: `step_seconds`."""
        return step_seconds({arm: Run(self, trial, 0) for arm, trial in trials.items()})


class Run:
    """One network in training: `advance` takes a step."""

    def __init__(self, task: Digits, trial: Trial, seed: int) -> None:
        self.task, self.base, self.steps, self.step = task, base_named(parse(trial.arm)[0]), task._steps(trial), 0
        (self.X, self.labels), self.test = digits(task.work.images, task.shape)
        self.model = task.model(seed, trial.arm)
        symmetries = Symmetries(_joints(task.build, task.shape), model=self.model)
        options = base_options(trial.arm, trial.options)
        self.optimizer: Any = self.base.make(list(self.model.named_parameters()), trial.rate, symmetries, **options)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        # SAM's own step needs a closure that really runs twice; a teleport belongs where its weights are back and it steps
        stepped = getattr(self.optimizer, "base_optimizer", self.optimizer)
        context = Context(self.model, stepped, symmetries, self.steps, seed, lambda: F.cross_entropy(self.model(self.X), self.labels))
        self.before, self.again = begin(trial.arm, context, trial.options)
        self.rows = batches(seed, task.work.batch, len(self.X))

    def advance(self) -> bool:
        """One step on the next mini-batch; whether the loss was finite."""
        modes, step, rows = self.base.steps_by == "modes", self.step, next(self.rows)
        scale = min(1.0, (step + 1) / max(1, self.steps // 20)) if modes else rate_scale(step, self.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        inputs, targets = self.X[rows], self.labels[rows]

        def backward() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(inputs), targets)
            loss.backward()
            return loss.detach()

        if modes:
            self.optimizer.train()
        if not math.isfinite(float(backward())):
            return False
        for action in self.before:
            action(step)
        if self.again:
            backward()
        self.optimizer.step(backward) if self.base.steps_by == "closure" else self.optimizer.step()
        if modes:
            self.optimizer.eval()
        self.step += 1
        return True

    @torch.no_grad()
    def training_loss(self) -> float:
        """The loss on all training images."""
        return float(F.cross_entropy(self.model(self.X), self.labels))

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """Loss and accuracy on the test images."""
        Y, answers = self.test
        outputs = self.model(Y)
        return {
            "test loss": float(F.cross_entropy(outputs, answers)),
            "test accuracy": float((outputs.argmax(1) == answers).double().mean()),
        }


def batches(seed: int, batch: int, images: int) -> Iterator[Tensor]:
    """A seed's row numbers, the same for every arm."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        yield from torch.randperm(images, generator=generator).split(batch)[: images // batch]


@cache
def digits(images: int, shape: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(training images and labels, test ones); pixels from 0 to 1."""
    found = load("digits")
    X, Y = found.inputs(found.train), found.inputs(found.test)
    return (X.view(-1, *shape)[:images], found.train.labels[:images]), (Y.view(-1, *shape), found.test.labels)


@cache
def _joints(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[Joint, ...]:
    return tf.find_symmetries(build(), (digits(4, shape)[0][0],)).joints
