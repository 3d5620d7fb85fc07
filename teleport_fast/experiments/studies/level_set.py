"""arXiv 2403.03362, gradient descent with level-set teleportation, beside null-space (2502.11362) and our symmetry's: by step and by time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from teleport_fast.data_dependent import MLPAction, SquaredError
from teleport_fast.experiments.studies.study import Claim, Curve, Options, Outcome, Panel, Sample, Table, number
from teleport_fast.peers import level_set_teleport, null_space_teleport

SEEDS, QUICK_SEEDS = (0, 1, 2, 3, 4), (0,)
TUNING_SEED = 1000
ASCENT_STEPS, FIRST, EVERY = 5, 5, 20
GAINS, SCHEDULES = (1.5, 3.0, 10.0), {"once": 1, f"every {EVERY}": 10**9}
WIDTHS, BATCH = (40, 40, 40, 3), 30


@dataclass
class Problem:
    """A model and its full batch; targets are classes (batch,) or real (batch, out)."""

    model: nn.Sequential
    inputs: Tensor
    targets: Tensor

    def loss(self) -> Tensor:
        """Mean cross entropy of classes, ½‖Y − targets‖² of real targets."""
        outputs: Tensor = self.model(self.inputs)
        if self.targets.is_floating_point():
            return 0.5 * (outputs - self.targets).square().sum()
        return nn.functional.cross_entropy(outputs, self.targets)


@dataclass
class Trace:
    """Loss before every step and at the end, thread seconds spent by then, the teleports' worst |ΔL|/L."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    moved: float = 0.0


def logistic(seed: int) -> Problem:
    """Three classes by noisy linear rule, 200 samples of 20 features whose scales fall from 1 to 0.03: convex, ill-conditioned."""
    torch.manual_seed(seed)
    inputs = torch.randn(200, 20, dtype=torch.float64) * torch.logspace(0, -1.5, 20, dtype=torch.float64)
    logits = inputs @ torch.randn(20, 3, dtype=torch.float64) * 3 + torch.randn(200, 3, dtype=torch.float64)
    return Problem(nn.Sequential(nn.Linear(20, 3)).double(), inputs, logits.argmax(1))


def mlp(seed: int) -> Problem:
    """Least squares on random targets, a batch of 30 under every width: all three teleports are exact there."""
    torch.manual_seed(seed)
    parts = [part for a, b in itertools.pairwise(WIDTHS) for part in (nn.Linear(a, b), nn.LeakyReLU(0.1))]
    inputs = torch.randn(BATCH, WIDTHS[0], dtype=torch.float64) * torch.logspace(0, -1, WIDTHS[0], dtype=torch.float64)
    return Problem(nn.Sequential(*parts[:-1]).double(), inputs, torch.randn(BATCH, WIDTHS[-1], dtype=torch.float64))


def by_symmetry(problem: Problem, cap: float) -> None:
    """Our U-exact action from the lr that predicts half a log of ‖∇L‖, like the peers."""
    action, loss = MLPAction.from_sequential(problem.model, problem.inputs), SquaredError(problem.targets.mT)
    length = sum(float(D.square().sum()) for D in action.lie_gradient(loss))
    squared = sum(float(G.square().sum()) for G in action.moved_gradients([torch.eye(k) for k in action.widths], loss))
    action.write_(problem.model, action.teleport(loss, ASCENT_STEPS, squared / length, cap).weights)


def by_level_set(problem: Problem, cap: float) -> None:
    """Mishkin, Bietti and Gower's."""
    level_set_teleport(problem.loss, problem.model.parameters(), ASCENT_STEPS, cap=cap)


def by_null_space(problem: Problem, cap: float) -> None:
    """Wu, Dong, Aloui and Tarokh's."""
    null_space_teleport(problem.loss, problem.model, ASCENT_STEPS, cap=cap)


Teleport = Callable[[Problem, float], None]
WAYS: dict[str, Teleport | None] = {"plain": None, "level set": by_level_set, "null space": by_null_space, "our symmetry": by_symmetry}


def descend(problem: Problem, steps: int, teleport: Teleport | None, gain: float = 1.0, most: int = 10**9) -> Trace:
    """Gradient descent by Armijo's rule (half of what the slope promises, lr doubled, then halved); at most `most` teleports.

    gain: what a teleport may multiply ‖∇L‖ by.
    """
    params, lr, trace = list(problem.model.parameters()), 1.0, Trace()
    begun = time.thread_time()
    for step in range(steps + 1):
        loss = problem.loss()
        gradients = torch.autograd.grad(loss, params)
        if teleport is not None and 0 <= step - FIRST < most * EVERY and (step - FIRST) % EVERY == 0 and step < steps:
            squared = sum(float(G.square().sum()) for G in gradients)
            teleport(problem, gain**2 * squared)
            before, loss = float(loss.detach()), problem.loss()
            trace.moved = max(trace.moved, abs(float(loss.detach()) - before) / max(before, 1e-300))
            gradients = torch.autograd.grad(loss, params)
        value = float(loss.detach())
        trace.losses.append(value)
        trace.seconds.append(time.thread_time() - begun)
        lr = _armijo(problem, params, gradients, value, lr)
    return trace


@torch.no_grad()
def _armijo(problem: Problem, params: Sequence[Tensor], gradients: Sequence[Tensor], value: float, lr: float) -> float:
    squared, lr, start = sum(float(G.square().sum()) for G in gradients), 2 * lr, [p.clone() for p in params]
    for _ in range(60):
        for p, old, G in zip(params, start, gradients, strict=True):
            p.copy_(old - lr * G)
        if float(problem.loss()) <= value - 0.5 * lr * squared:
            return lr
        lr /= 2
    for p, old in zip(params, start, strict=True):
        p.copy_(old)
    return lr


def run(options: Options) -> Outcome:
    """The cap on the gain and the schedule are tuned for every way on a seed of its own, then held for all seeds."""
    steps = 40 if options.quick else 100
    tables, panels, claims = [], [], []
    chosen: dict[str, tuple[float, str]] = {}
    cases = (("logistic regression", logistic, ("plain", "level set")), ("MLP", mlp, tuple(WAYS)))
    for name, make, ways in cases:
        traces: dict[str, list[Trace]] = {}
        for way in options.track(ways, name):
            teleport = WAYS[way]
            if teleport is None:
                descend(make(TUNING_SEED), steps, None)  # the others are warm from their tuning
                traces[way] = [descend(make(seed), steps, None) for seed in options.seeds]
                continue
            ends = {
                (gain, schedule): descend(make(TUNING_SEED), steps, teleport, gain, most).losses[-1]
                for gain in GAINS for schedule, most in SCHEDULES.items()
            }
            gain, schedule = chosen[f"{name}, {way}"] = min(ends, key=ends.__getitem__)
            traces[way] = [descend(make(seed), steps, teleport, gain, SCHEDULES[schedule]) for seed in options.seeds]
        tables.append(_table(name, traces, chosen, steps))
        panels += [_by_step(name, traces), _by_time(name, traces)]
        claims += _claims(name, traces)
    return Outcome(
        name="level_set",
        title="Level-set teleportation and its peers",
        source="arXiv 2403.03362 (gradient descent with teleportation), arXiv 2502.11362, and our action of arXiv 2205.10637",
        settings={
            "steps": steps, "teleports": f"before step {FIRST + 1}, once or every {EVERY} steps", "ascent steps": ASCENT_STEPS,
            "descent": "full batch, Armijo 1/2, lr doubled then halved",
            "MLP": f"{'-'.join(map(str, WIDTHS))}, batch {BATCH}, LeakyReLU 0.1, least squares",
            "caps on the gain tried": GAINS, "chosen": chosen, "seeds": options.seeds,
        },
        tables=tuple(tables), panels=tuple(panels), claims=tuple(claims),
    )


def equal_time(trace: Trace, seconds: float) -> float:
    """The loss that was reached by then.

    >>> equal_time(Trace([3.0, 2.0, 1.0], [0.1, 0.2, 0.3]), 0.25)
    2.0
    """
    reached = [loss for loss, spent in zip(trace.losses, trace.seconds, strict=True) if spent <= seconds]
    return reached[-1] if reached else trace.losses[0]


def _table(name: str, traces: dict[str, list[Trace]], chosen: dict[str, tuple[float, str]], steps: int) -> Table:
    budget = [trace.seconds[-1] for trace in traces["plain"]]
    rows = []
    for way, found in traces.items():
        costs = Sample(tuple(trace.seconds[-1] / plain for trace, plain in zip(found, budget, strict=True)))
        same = Sample(tuple(equal_time(trace, plain) for trace, plain in zip(found, budget, strict=True)))
        tuned = chosen.get(f"{name}, {way}")
        moved = max(trace.moved for trace in found)
        ends = Sample(tuple(trace.losses[-1] for trace in found))
        rows.append((way, f"×{tuned[0]:g}, {tuned[1]}" if tuned else "", ends, costs, same, f"{moved:.0e}" if tuned else ""))
    head = ("", "cap of ‖∇L‖, when", f"loss after {steps} steps", "time, in plain's", "loss in plain's time", "largest |ΔL|/L of a teleport")
    return Table(name, head, tuple(rows))


def _by_step(name: str, traces: dict[str, list[Trace]]) -> Panel:
    curves = tuple(Curve(way, tuple(range(len(found[0].losses))), tuple(tuple(t.losses) for t in found)) for way, found in traces.items())
    return Panel(f"{name}, by step", "step", "loss", curves, log_y=True)


def _by_time(name: str, traces: dict[str, list[Trace]]) -> Panel:
    """Over the time that plain descent takes, seed by seed, on a common grid."""
    grid = [k / 40 for k in range(1, 41)]
    curves = tuple(
        Curve(way, tuple(grid), tuple(
            tuple(equal_time(trace, share * plain.seconds[-1]) for share in grid) for trace, plain in zip(found, traces["plain"], strict=True)
        )) for way, found in traces.items()
    )
    return Panel(f"{name}, by time", "thread time, in plain descent's", "loss", curves, log_y=True)


def _claims(name: str, traces: dict[str, list[Trace]]) -> list[Claim]:
    """The paper's claim by step, the same by time, and where both symmetry and level set run, which is lower."""
    plain = traces["plain"]
    claims = []
    for way, found in traces.items():
        if way == "plain":
            continue
        pairs = list(zip(found, plain, strict=True))
        by_step = sum(a.losses[-1] < b.losses[-1] for a, b in pairs)
        by_time = sum(equal_time(a, b.seconds[-1]) < b.losses[-1] for a, b in pairs)
        claims += [
            Claim(f"{name}: {way} ends lower than plain after the same {same}", f"{count} of {len(pairs)} seeds", "all", count == len(pairs))
            for same, count in (("steps", by_step), ("time", by_time))
        ]
    if "our symmetry" in traces:
        pairs = list(zip(traces["our symmetry"], traces["level set"], strict=True))
        ahead = sum(a.losses[-1] < b.losses[-1] for a, b in pairs)
        medians = [Sample(tuple(math.log10(t.losses[-1]) for t in traces[way])).median for way in ("our symmetry", "level set")]
        claims.append(Claim(
            f"{name}: our symmetry ends lower than the level set after the same steps",
            f"{ahead} of {len(pairs)} seeds, median log10 loss {number(medians[0])} and {number(medians[1])}", "all", ahead == len(pairs),
        ))
    return claims
