"""A byte-level GPT on the standard library's sources, trained by the package's own `train`: sizes, gated MLP, rotary positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from bench.convergence.interface import Result, Space, Task, Trial
from teleport_fast.experiments import arms as known
from teleport_fast.experiments.arms import Arm, arm_named
from teleport_fast.experiments.gpt import GPTConfig
from teleport_fast.experiments.report import text_json
from teleport_fast.experiments.text import Text, read_text
from teleport_fast.experiments.train import Setting, train

# name: model, steps of 1,024 bytes (360 as in the demo)
SIZES = {
    "gpt-0.2M": (GPTConfig(d_model=64), 360),
    "gpt-0.9M": (GPTConfig(), 360),
    "gpt-4M": (GPTConfig(d_model=256, layers=5), 360),
    "gpt-gated-rotary-0.2M": (GPTConfig(d_model=64, mlp="swiglu", positions="rotary", gains=True), 360),
    "gpt-gated-rotary-0.9M": (GPTConfig(mlp="swiglu", positions="rotary", gains=True), 360),
}
# The third of six rates. Muon's is for a whole matrix, not for an entry.
MIDDLE = {"muon": 0.015, "adamw": 0.0015}
ARMS = ("adamw", "adamw+rotations", "adamw+random", "rotated", "rotated-hidden", "muon")
MOMENTA = ({"momentum": 0.8}, {"momentum": 0.9})


class Bytes(Task):
    """Validation loss of a GPT after its last step; a seed decides start and batches, the same for every arm."""

    loss = "validation loss (nats per byte)"
    arms = ARMS

    def __init__(self, name: str, model: GPTConfig, steps: int, windows: int) -> None:
        self.name, self.steps = name, steps
        self.work = Setting(model=model, steps=steps, validate_every=max(1, steps // 24), validation_windows=windows)

    def setting(self) -> dict[str, Any]:
        fixed = {name: repr(sorted(base.options.items())) for name, base in known.BASES.items() if name in ARMS}
        return {**asdict(self.work), "text": text_json(text())["digest"], "schedule": "train.rate_scale", "optimizers": fixed}

    def space(self, arm: str) -> Space:
        arm_of(arm, {})
        return Space.around(MIDDLE.get(arm.partition(":")[0], 0.0033), MOMENTA, factor=1.47)

    def references(self, arm: str) -> tuple[str, ...]:
        """Rotated is held to Muon as well, the strongest of the peers here."""
        return (*super().references(arm), *(["muon"] if arm.startswith("rotated") and "muon" in self.arms else []))

    def train(self, trial: Trial, seeds: Sequence[int]) -> Iterator[Result]:
        work = replace(self.work, steps=max(1, round(trial.share * self.steps)))
        for seed in seeds:
            run = train(arm_of(trial.arm, trial.options), trial.rate, seed, work, text())
            if run.interrupted:
                raise KeyboardInterrupt
            measures = {"largest move of the logits": run.max_deviation} if run.deviations else {}
            seconds, optimizing = (1e-3 * ms * work.steps for ms in (run.step_ms, run.optimizer_ms))
            yield Result(seed, run.final, [*run.validation], measures, seconds, optimizing)


def arm_of(name: str, options: Mapping[str, Any]) -> Arm:
    """The arm that `train` knows: an optimizer, or what is added to AdamW."""
    base, _, added = name.partition("+")
    return arm_named(added or base, base=base if added else "adamw", momentum=options.get("momentum"))


@cache
def text() -> Text:
    return read_text()


def variants(quick: bool) -> tuple[Bytes, ...]:
    """All sizes; quick: one tiny model for a few steps."""
    if quick:
        return (Bytes("gpt-quick", GPTConfig(d_model=16, layers=1, heads=2, context=16), 8, 4),)
    return tuple(Bytes(name, model, steps, 64) for name, (model, steps) in SIZES.items())
