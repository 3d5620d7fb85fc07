"""LoRA from one domain of text to another: a byte GPT trained on Python sources, its adapters on English."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

import teleport_fast as tf
from bench.convergence.costs import step_seconds
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

    base_steps: int = 400
    base_batch: int = 8
    steps: int = 100
    batch: int = 2
    windows: int = 32
    rank: int = 8
    alpha: int = 16
    d_model: int = 64
    layers: int = 3

    def config(self) -> GPTConfig:
        return GPTConfig(d_model=self.d_model, layers=self.layers, heads=4)


@dataclass(frozen=True)
class Adapters:
    """One network's factors by name, with its peak rate."""

    named: list[tuple[str, nn.Parameter]]
    rate: float

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(A, B) of every adapter, (rank, in) and (out, rank)."""
        by_name = dict(self.named)
        return [(p, by_name[name.replace("lora_A", "lora_B")]) for name, p in self.named if "lora_A" in name]


Stack = Sequence[Adapters]


@dataclass(frozen=True)
class Arm:
    """`begin(stack, symmetries, **options)`: one optimizer of many networks, and what is attached to it; two `choices` for every arm."""

    begin: Callable[..., Optimizer]
    rate: float
    choices: tuple[Options, ...]


def adamw(stack: Stack, _: Any, beta2: float = 0.99) -> torch.optim.AdamW:
    groups = [{"params": one.named, "lr": one.rate} for one in stack]
    return torch.optim.AdamW(groups, betas=(0.9, beta2), weight_decay=0.0)


def lora_plus(stack: Stack, _: Any, ratio: float, beta2: float = 0.99) -> Optimizer:
    """B's rate is `ratio` times A's, `rate` their geometric mean [arXiv 2402.12354]."""
    groups = []
    for one in stack:
        for letter, rate in (("A", one.rate / math.sqrt(ratio)), ("B", one.rate * math.sqrt(ratio))):
            groups.append({"params": [(name, p) for name, p in one.named if f"lora_{letter}" in name], "lr": rate})
    return torch.optim.AdamW(groups, betas=(0.9, beta2), weight_decay=0.0)


def scaled_adam(stack: Stack, _: Any, damping: float, beta2: float = 0.99) -> Optimizer:
    """AdamW on preconditioned gradients, G_A → (BᵀB + δI)⁻¹ G_A, G_B → G_B (A Aᵀ + δI)⁻¹ [arXiv 2402.02347, algorithm 2]."""
    optimizer = adamw(stack, None, beta2)
    alike: dict[Any, list[tuple[nn.Parameter, nn.Parameter]]] = {}
    for one in stack:
        for a, b in one.pairs():
            alike.setdefault((a.shape, b.shape), []).append((a, b))

    @torch.no_grad()
    def precondition(*_: object) -> None:
        for pairs in alike.values():
            a, b = (torch.stack([pair[side] for pair in pairs]) for side in (0, 1))
            grad_a, grad_b = (torch.stack([pair[side].grad for pair in pairs]) for side in (0, 1))  # type: ignore[misc]
            eye = damping * torch.eye(a.shape[1])
            new_a, new_b = torch.linalg.solve(b.mT @ b + eye, grad_a), torch.linalg.solve(a @ a.mT + eye, grad_b.mT).mT
            for place, pair in enumerate(pairs):
                pair[0].grad, pair[1].grad = new_a[place], new_b[place].contiguous()

    optimizer.register_step_pre_hook(precondition)
    return optimizer


def attached(*teleports: tuple[Callable[..., Any], Any, str]) -> Callable[..., Optimizer]:
    """AdamW with teleporters (objective, schedule, frame), the first the outermost; options that are not AdamW's go to it."""

    def begin(stack: Stack, symmetries: Symmetries, beta2: float = 0.99, **own: Any) -> Optimizer:
        optimizer = adamw(stack, None, beta2)
        for place, (objective, schedule, frame) in enumerate(teleports):
            tf.attach(optimizer, symmetries, objective(**own) if place == 0 else objective(), schedule, frame=frame)
        return optimizer

    return begin


BETAS: tuple[Options, ...] = ({"beta2": 0.99}, {"beta2": 0.95})
RATIOS: tuple[Options, ...] = ({"ratio": 16.0}, {"ratio": 4.0})
DAMPINGS: tuple[Options, ...] = ({"damping": 1e-6}, {"damping": 1e-2})
# B is zero at first and a zero side cannot be balanced: the first balance is after WARM steps
WARM = 10
RATIO, SCALED = (objectives.Ratio, None, "return"), (objectives.Scaled, None, "return")
TURNS, RANDOM = (objectives.Eigenbasis, tf.Every(3), "stay"), (objectives.RandomRotation, tf.Every(10), "stay")
ONCE, AGAIN = (objectives.Balance, tf.Once(WARM), "stay"), (objectives.Balance, tf.Every(WARM), "stay")
ARMS: dict[str, Arm] = {
    "adamw": Arm(adamw, 0.008, BETAS),
    "loraplus": Arm(lora_plus, 0.004, RATIOS),
    "scaledadam": Arm(scaled_adam, 0.004, DAMPINGS),
    "invariant": Arm(attached(SCALED), 0.004, BETAS),
    "ratio-rotations": Arm(attached(RATIO, TURNS), 0.004, RATIOS),
    "rotations": Arm(attached(TURNS), 0.008, BETAS),
    "balance-every": Arm(attached(AGAIN), 0.008, BETAS),
    "balance-once": Arm(attached(ONCE), 0.008, BETAS),
    "balance-rotations": Arm(attached(AGAIN, TURNS), 0.008, BETAS),
    "random": Arm(attached(RANDOM), 0.008, BETAS),
    "ratio": Arm(attached(RATIO), 0.004, RATIOS),
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
        steps = max(1, round(trial.share * self.steps))
        yield from Run(self, trial.arm, trial.options, [(trial.rate, seed) for seed in seeds], steps).results(CURVE_POINTS)

    def tune(self, trials: Sequence[Trial], seeds: Sequence[int]) -> Iterator[tuple[Trial, Result]]:
        """All rates of a choice at once."""
        for options in {repr(trial.options): trial.options for trial in trials}.values():
            pairs = [(trial, seed) for trial in trials if trial.options == options for seed in seeds]
            run = Run(self, pairs[0][0].arm, options, [(trial.rate, seed) for trial, seed in pairs], self.steps)
            yield from ((trial, result) for (trial, _), result in zip(pairs, run.results(1), strict=True))

    def cost(self, trials: Mapping[str, Trial]) -> dict[str, float]:
        """Seconds of a step of each arm, one network: `step_seconds`."""
        return step_seconds({arm: Run(self, arm, trial.options, [(trial.rate, 0)], self.steps) for arm, trial in trials.items()})

    def model(self, seed: int) -> nn.Module:
        """The base with fresh adapters, A drawn from the seed, B zero."""
        peft = _peft()
        base = GPT(self.work.config())
        base.load_state_dict(pretrained(self.work, self.folder))
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=self.work.rank, lora_alpha=self.work.alpha, target_modules=TARGETS, lora_dropout=0.0)
        adapted: nn.Module = peft.inject_adapter_in_model(config, base)
        return adapted


class Run:
    """Networks (rate, seed) that train side by side on one base: their factors are stacked for the model's pass alone.

    To the optimizer and its teleporters every factor is a parameter of its own, so that each network goes the way that it goes alone.
    """

    def __init__(self, task: Lora, arm: str, options: Options, networks: Sequence[tuple[float, int]], steps: int) -> None:
        models = [task.model(seed) for _, seed in networks]
        self.work, self.model, self.networks, self.steps, self.step = task.work, models[0], networks, steps, 0
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.stack = [
            Adapters([(f"{place}.{name}", model.get_parameter(name)) for name in self.names], rate)
            for place, (model, (rate, _)) in enumerate(zip(models, networks, strict=True))
        ]
        self.begun = [[p.detach().clone() for _, p in one.named] for one in self.stack]
        found = joints(task.work, task.folder)
        symmetries = Symmetries(tuple(_of(joint, place) for place in range(len(networks)) for joint in found))
        self.optimizer = ARMS[arm].begin(self.stack, symmetries, **options)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.streams = {seed: torch.Generator().manual_seed(1000 + seed) for _, seed in networks}
        self.dead = [False] * len(networks)

    def losses(self, stacked: Mapping[str, Tensor], ids: Tensor, targets: Tensor, alike: bool = False) -> Tensor:
        """Every network's loss, (networks,), on its own windows or on the same ones."""

        def one(factors: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.model, factors, (ids,)).flatten(0, 1), targets.flatten())

        which = None if alike else 0
        found: Tensor = torch.vmap(one, in_dims=(0, which, which))(dict(stacked), ids, targets)
        return found

    def stacked(self) -> dict[str, Tensor]:
        return {name: torch.stack([one.named[i][1] for one in self.stack]) for i, name in enumerate(self.names)}

    def advance(self) -> None:
        """One step of all; one whose loss is not finite has diverged, and goes back to its start for good."""
        context = self.work.config().context
        batches = {seed: sample(english().train, stream, self.work.batch, context) for seed, stream in self.streams.items()}
        ids, targets = (torch.stack([batches[seed][part] for _, seed in self.networks]) for part in (0, 1))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate_scale(self.step, self.steps)
        self.optimizer.zero_grad()
        losses = self.losses(self.stacked(), ids, targets)
        losses.sum().backward()
        for place, loss in enumerate(losses.tolist()):
            self.dead[place] = self.dead[place] or not math.isfinite(loss)
            if self.dead[place]:
                for (_, p), start in zip(self.stack[place].named, self.begun[place], strict=True):
                    p.data.copy_(start)
                    p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.step += 1

    @torch.no_grad()
    def held_out(self, text: Text) -> list[float]:
        """Losses on windows of held-out text, the same for every call."""
        generator = torch.Generator().manual_seed(0)
        ids, targets = sample(text.validation, generator, self.work.windows, self.work.config().context)
        losses = torch.stack([self.losses(self.stacked(), *part, alike=True) for part in zip(ids.split(8), targets.split(8), strict=True)])
        return [math.inf if dead or not math.isfinite(loss) else loss for dead, loss in zip(self.dead, losses.mean(0).tolist(), strict=True)]

    def results(self, points: int) -> list[Result]:
        """Trains to the end; one result a network, with a curve of `points` points."""
        curves = []
        while self.step < self.steps:
            self.advance()
            if self.step * points // self.steps > (self.step - 1) * points // self.steps:
                curves.append((self.step, self.held_out(english())))
        kept = self.held_out(python()) if points > 1 else []
        return [
            Result(
                seed, curves[-1][1][place], [(step, losses[place]) for step, losses in curves],
                {"loss on Python": kept[place]} if kept else {},
            )
            for place, (_, seed) in enumerate(self.networks)
        ]


def _of(joint: Joint, place: int) -> Joint:
    """The joint of network number `place`."""
    sides = ([replace(view, parameter=f"{place}.{view.parameter}") for view in side] for side in (joint.plus, joint.minus))
    plus, minus = map(tuple, sides)
    return replace(joint, name=f"{place}.{joint.name}", plus=plus, minus=minus)


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
