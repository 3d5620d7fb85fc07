"""LoRA from one domain of text to another: a byte GPT trained on Python sources, its adapters on English."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from bench.convergence.english import english
from bench.convergence.interface import Result, Space, Task, Trial
from teleport_fast import objectives
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.experiments.text import Text, read_text, sample
from teleport_fast.experiments.train import loss_of, rate_scale
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries

BASE_RATE, BASE_SEED = 0.003, 0
CURVE_POINTS = 5
TARGETS = ["q", "k", "v", "o", "up", "down", "head"]
FOLDER = Path("runs/lora")
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """The base's steps on Python and the adapters' on English, of so many windows; the adapters' rank and scaling."""

    base_steps: int = 600
    base_batch: int = 8
    steps: int = 150
    batch: int = 4
    windows: int = 64
    rank: int = 8
    alpha: int = 16
    d_model: int = 72
    layers: int = 3

    def config(self) -> GPTConfig:
        return GPTConfig(d_model=self.d_model, layers=self.layers, heads=4)


@dataclass(frozen=True)
class Arm:
    """An optimizer of the adapters' factors and what is attached to it; `choices` beside the rate, two for every arm."""

    begin: Callable[..., Optimizer]
    rate: float
    choices: tuple[Options, ...]


def factors(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) of every adapter, (rank, in) and (out, rank)."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [(p, named[name.replace("lora_A", "lora_B")]) for name, p in named.items() if "lora_A" in name]


def adamw(model: nn.Module, rate: float, beta2: float = 0.99, beta1: float = 0.9) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, betas=(beta1, beta2), weight_decay=0.0)


def lora_plus(model: nn.Module, symmetries: Symmetries, rate: float, ratio: float, beta2: float = 0.99) -> Optimizer:
    """B's rate is `ratio` times A's, `rate` their geometric mean [arXiv 2402.12354]."""
    pairs, s = factors(model), math.sqrt(ratio)
    groups = [{"params": [a for a, _ in pairs], "lr": rate / s}, {"params": [b for _, b in pairs], "lr": rate * s}]
    return torch.optim.AdamW(groups, betas=(0.9, beta2), weight_decay=0.0)


def scaled_adam(model: nn.Module, symmetries: Symmetries, rate: float, damping: float, beta2: float = 0.99) -> Optimizer:
    """AdamW on preconditioned gradients, G_A → (BᵀB + δI)⁻¹ G_A, G_B → G_B (A Aᵀ + δI)⁻¹ [arXiv 2402.02347, algorithm 2]."""
    optimizer, pairs = adamw(model, rate, beta2), factors(model)

    @torch.no_grad()
    def precondition(*_: object) -> None:
        for a, b in pairs:
            assert a.grad is not None and b.grad is not None
            eye = damping * torch.eye(len(a))
            a.grad.copy_(torch.linalg.solve(b.mT @ b + eye, a.grad))
            b.grad.copy_(torch.linalg.solve(a @ a.mT + eye, b.grad.mT).mT)

    optimizer.register_step_pre_hook(precondition)
    return optimizer


def attached(objective: Callable[..., Any], schedule: Any, frame: str = "stay") -> Callable[..., Optimizer]:
    """AdamW with a teleporter; options that are not AdamW's go to the objective."""

    def begin(model: nn.Module, symmetries: Symmetries, rate: float, beta2: float = 0.99, beta1: float = 0.9, **own: Any) -> Optimizer:
        optimizer = adamw(model, rate, beta2, beta1)
        tf.attach(optimizer, symmetries, objective(**own), schedule, frame=frame)
        return optimizer

    return begin


def ratio_and_turns(model: nn.Module, symmetries: Symmetries, rate: float, ratio: float, beta2: float = 0.99) -> Optimizer:
    optimizer = adamw(model, rate, beta2)
    tf.attach(optimizer, symmetries, objectives.Ratio(ratio), frame="return")
    tf.attach(optimizer, symmetries, "eigenbasis", tf.Every(3))
    return optimizer


def balance_and_turns(model: nn.Module, symmetries: Symmetries, rate: float, beta2: float = 0.99) -> Optimizer:
    optimizer = adamw(model, rate, beta2)
    tf.attach(optimizer, symmetries, "balance", tf.When(lambda info: info.step % 10 == 5))
    tf.attach(optimizer, symmetries, "eigenbasis", tf.Every(3))
    return optimizer


BETAS: tuple[Options, ...] = ({"beta2": 0.99}, {"beta2": 0.95})
RATIOS: tuple[Options, ...] = ({"ratio": 16.0}, {"ratio": 4.0})
# B is zero at first and a zero side cannot be balanced: the first balance is after WARM steps
WARM = 10
ARMS: dict[str, Arm] = {
    "adamw": Arm(lambda model, _, rate, **o: adamw(model, rate, **o), 0.008, BETAS),
    "loraplus": Arm(lora_plus, 0.004, RATIOS),
    "scaledadam": Arm(scaled_adam, 0.004, ({"damping": 1e-6}, {"damping": 1e-2})),
    "invariant": Arm(attached(objectives.Scaled, None, "return"), 0.004, BETAS),
    "ratio-rotations": Arm(ratio_and_turns, 0.004, RATIOS),
    "rotations": Arm(attached(objectives.Eigenbasis, tf.Every(3)), 0.008, BETAS),
    "balance-every": Arm(attached(objectives.Balance, tf.Every(WARM)), 0.008, BETAS),
    "balance-once": Arm(attached(objectives.Balance, tf.Once(WARM)), 0.008, BETAS),
    "balance-rotations": Arm(balance_and_turns, 0.008, BETAS),
    "random": Arm(attached(objectives.RandomRotation, tf.Every(10)), 0.008, BETAS),
    "ratio": Arm(attached(objectives.Ratio, None, "return"), 0.004, RATIOS),
}


class Lora(Task):
    """Validation loss on English, in nats a byte; the arms are this task's own, since only adapters have these joints."""

    name, loss = "lora", "validation loss"
    arms = tuple(ARMS)

    def __init__(self, work: Work, folder: Path = FOLDER) -> None:
        self.work, self.steps, self.folder = work, work.steps, folder

    def setting(self) -> dict[str, Any]:
        return {**asdict(self.work), "python": python().digest, "english": english().digest, "targets": TARGETS, "schedule": "train.rate_scale"}

    def space(self, arm: str) -> Space:
        if arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}; pass one of these names")
        return Space.around(ARMS[arm].rate, ARMS[arm].choices)

    def references(self, arm: str) -> tuple[str, ...]:
        return tuple(other for other in ("adamw", "loraplus", "scaledadam") if other != arm)

    def train(self, trial: Trial, seeds: Sequence[int]) -> Iterator[Result]:
        for seed in seeds:
            yield self.train_one(trial, seed)

    def model(self, seed: int) -> nn.Module:
        """The base with fresh adapters, A drawn from the seed, B zero."""
        peft = _peft()
        base = GPT(self.work.config())
        base.load_state_dict(pretrained(self.work, self.folder))
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=self.work.rank, lora_alpha=self.work.alpha, target_modules=TARGETS, lora_dropout=0.0)
        adapted: nn.Module = peft.inject_adapter_in_model(config, base)
        return adapted

    def train_one(self, trial: Trial, seed: int) -> Result:
        """One run; a loss that is not finite ends it as diverged."""
        work, text = self.work, english()
        model, steps = self.model(seed), max(1, round(trial.share * self.steps))
        optimizer = ARMS[trial.arm].begin(model, Symmetries(joints(work, self.folder), model=model), trial.rate, **trial.options)
        peaks = [group["lr"] for group in optimizer.param_groups]
        generator = torch.Generator().manual_seed(1000 + seed)
        result = Result(seed, math.inf)
        for step in range(steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate_scale(step, steps)
            ids, targets = sample(text.train, generator, work.batch, model.config.context)  # type: ignore[union-attr]
            begun = time.thread_time()
            loss = loss_of(model, ids, targets)
            optimizer.zero_grad()
            loss.backward()
            between = time.thread_time()
            optimizer.step()
            ended = time.thread_time()
            result.seconds += ended - begun
            result.optimizer_seconds += ended - between
            if not math.isfinite(loss.item()):
                return result
            if (step + 1) * CURVE_POINTS // steps > step * CURVE_POINTS // steps:
                result.curve.append((step + 1, held_out(model, text, work.windows)))
        result.measures = {"loss on Python": held_out(model, python(), work.windows)}
        result.final = result.curve[-1][1] if math.isfinite(result.curve[-1][1]) else math.inf
        return result


@torch.no_grad()
def held_out(model: nn.Module, text: Text, windows: int) -> float:
    """Loss on windows of held-out text, the same for every call."""
    ids, targets = sample(text.validation, torch.Generator().manual_seed(0), windows, model.config.context)  # type: ignore[union-attr]
    return loss_of(model, ids, targets).item()


@cache
def python() -> Text:
    return read_text()


@cache
def pretrained(work: Work, folder: Path) -> dict[str, Tensor]:
    """The base's weights: trained once by AdamW on Python sources, kept in `folder` under the digest of text and sizes."""
    config, text = work.config(), python()
    path = folder / f"base-{text.digest}-{work.d_model}x{work.layers}-{work.base_steps}.pt"
    if not path.exists():
        torch.manual_seed(BASE_SEED)
        model = GPT(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(BASE_SEED)
        for step in range(work.base_steps):
            for group in optimizer.param_groups:
                group["lr"] = BASE_RATE * rate_scale(step, work.base_steps)
            ids, targets = sample(text.train, generator, work.base_batch, config.context)
            optimizer.zero_grad()
            loss_of(model, ids, targets).backward()
            optimizer.step()
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


@cache
def joints(work: Work, folder: Path) -> tuple[Joint, ...]:
    """The adapters' joints, found and proven once."""
    model = Lora(work, folder).model(0)
    # tokens of one kind would hide queries and keys
    ids = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    return tuple(tf.find_symmetries(model, (ids,)).select(lambda joint: "lora_B" in joint.name).joints)


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the task lora adapts by PEFT; pip install peft==0.21.2", name="peft") from error
    return peft


def variants(quick: bool) -> tuple[Task, ...]:
    """One task."""
    return (Lora(Work(base_steps=20, base_batch=2, steps=8, batch=2, windows=4, d_model=32, layers=1) if quick else Work()),)
