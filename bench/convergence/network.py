"""Tasks that train a network on labelled images: batches of a seed, a decayed rate, CPU time without what is only measured."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teleport_fast as tf
from bench.convergence.additions import Context, arm_space, base_options, begin, parse
from bench.convergence.interface import Result, Space, Task, Trial
from bench.convergence.optimizers import base_named
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
        for seed in seeds:
            yield self.train_one(trial, seed)

    def model(self, seed: int, arm: str) -> nn.Module:
        """The seed's network where it starts."""
        torch.manual_seed(seed)
        model = self.build()
        if self.start is not None:
            self.start(model, seed, arm)
        return model

    def symmetries(self, model: nn.Module) -> Symmetries:
        """The joints, found and proven once for all networks of this kind."""
        return Symmetries(_joints(self.build, self.shape), model=model)

    def train_one(self, trial: Trial, seed: int) -> Result:
        """One run; a loss that is not finite ends it as diverged."""
        (X, labels), (Y, answers) = digits(self.work.images, self.shape)
        base, steps = base_named(parse(trial.arm)[0]), max(1, round(trial.share * self.steps))
        model = self.model(seed, trial.arm)
        options = base_options(trial.arm, trial.options)
        optimizer: Any = base.make(list(model.named_parameters()), trial.rate, self.symmetries(model), **options)
        peaks = [group["lr"] for group in optimizer.param_groups]
        full_loss = lambda: F.cross_entropy(model(X), labels)  # noqa: E731
        context = Context(model, optimizer, self.symmetries(model), steps, seed, full_loss)
        before, again = begin(trial.arm, context, trial.options)
        result = Result(seed, math.inf)
        for step, rows in enumerate(itertools.islice(batches(seed, self.work.batch, len(X)), steps)):
            scale = min(1.0, (step + 1) / max(1, steps // 20)) if base.steps_by == "modes" else rate_scale(step, steps)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            inputs, targets = X[rows], labels[rows]

            def backward(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), targets)
                loss.backward()
                return loss.detach()

            begun = time.thread_time()
            if base.steps_by == "modes":
                optimizer.train()
            value = float(backward())
            if not math.isfinite(value):
                return result
            between = time.thread_time()
            for action in before:
                action(step)
            if again:
                backward()
            optimizer.step(backward) if base.steps_by == "closure" else optimizer.step()
            ended = time.thread_time()
            result.seconds += ended - begun
            result.optimizer_seconds += ended - between
            if (step + 1) * CURVE_POINTS // steps > step * CURVE_POINTS // steps:
                if base.steps_by == "modes":
                    optimizer.eval()
                with torch.no_grad():
                    result.curve.append((step + 1, float(full_loss())))
        with torch.no_grad():
            outputs = model(Y)
            result.measures = {
                "test loss": float(F.cross_entropy(outputs, answers)),
                "test accuracy": float((outputs.argmax(1) == answers).double().mean()),
            }
        last = result.curve[-1][1]
        result.final = last if math.isfinite(last) else math.inf
        return result


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
