"""[ICLR24] figure "integrating teleportation with various optimizers": each optimizer plain, reset only, teleported and reset or carried."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from teleport_fast.data_dependent import CrossEntropy
from teleport_fast.experiments.datasets import Images, Split, found, load
from teleport_fast.experiments.optimizer_arms import Arm, Move, Setting, Trained, teleport, train
from teleport_fast.experiments.studies.study import Cell, Claim, Curve, Options, Outcome, Panel, Sample, Table, number

SEEDS, QUICK_SEEDS = (0, 1, 2, 3, 4), (0, 1)
# Released: learning rate, epoch whose first eight mini-batches are teleported at, learning rate of the ten teleport steps.
RELEASED = {
    "SGD": (1e-2, 2, 1e-4),
    "momentum": (1e-3, 0, 5e-2),
    "AdaGrad": (1e-2, 2, 1e-4),
    "RMSProp": (1e-4, 0, 5e-2),
    "Adam": (1e-4, 0, 5e-2),
}
WIDTHS = {"digits": (64, 64), "mnist": (16, 10), "fashion-mnist": (16, 10), "cifar10": (128, 32)}
# Arms that do not teleport cost little and get one rate more.
LARGER, LARGER_STILL = (10.0,), (10.0, 30.0)
TUNED = ("momentum", "AdaGrad", "Adam")
BAR = 0.2448
QUICK_IMAGES, QUICK_EPOCHS, QUICK_OPTIMIZERS = 1400, 3, ("momentum", "AdaGrad")
PLAIN, RESET, PUBLISHED, TELEPORT, CARRIED = "plain", "reset only", "published loop + reset", "teleport + reset", "teleport + carried"


@dataclass(frozen=True)
class Run:
    """One cell's training: who, at which multiple of the released learning rate, and what came out."""

    optimizer: str
    arm: str
    factor: float
    trained: Trained


def arms(lr: float, widths: tuple[int, ...]) -> tuple[Arm, ...]:
    """The arms; ours teleport on as few samples as the layers' inputs have ranks for, and ask the full data."""
    published = Move("v_exact", 200, 10, lr, parity=True)
    ours = Move("u_exact", min(widths[:-2]) * 25 // 32, 10, lr, check=True)
    return (
        Arm(PLAIN, None, "keep"), Arm(RESET, None, "reset"), Arm(PUBLISHED, published, "reset"), Arm(TELEPORT, ours, "reset"),
        Arm(CARRIED, ours, "carry"),
    )


def run(options: Options) -> Outcome:
    """Released learning rates in all arms, then each arm at its own best: of 1 and 10 times the released one, plain and reset of 30 too."""
    names = ["digits"] if options.data is None else found(options.data)
    tables: list[Table] = []
    panels: list[Panel] = []
    claims: list[Claim] = []
    settings: dict[str, object] = {
        "released lr, epoch, teleport lr": RELEASED, "teleports": "the epoch's first 8 mini-batches, 10 steps, cap 100", "mini-batch": 20,
        "second moments": "kept where carried", "dtype": "float32", "seeds": options.seeds,
    }
    for name in names:
        images = _small(load(name, options.data)) if options.quick else load(name, options.data)
        widths = (images.width, *WIDTHS[name], images.classes)
        settings[f"{name} widths"] = widths
        runs = _runs(options, images, widths)
        released = [run for run in runs if run.factor == 1]
        best = [_best(run, runs) for run in released]
        tables.append(_table(f"{name}, {'-'.join(map(str, widths))}, released learning rates", released))
        panels += _panels(name, released)
        claims += _claims(name, "quick" if options.quick else "released", released)
        if not options.quick:
            tuned = [run for run in best if run.arm != PUBLISHED and run.optimizer in TUNED]
            tables.append(_table(f"{name}, each arm's best of 1 and 10 (without teleports also 30) times the released rate", tuned))
            claims += _claims(name, "tuned", tuned)
        guard, shown = _guard(images, next(run for run in released if (run.optimizer, run.arm) == ("AdaGrad", PLAIN)), options)
        tables.append(guard)
        claims += shown
    return Outcome(
        "convergence", "Optimizers with and without teleportation", "arXiv 2305.13404, teleportation with various optimizers", settings,
        tuple(tables), tuple(panels), tuple(claims),
    )


def _runs(options: Options, images: Images, widths: tuple[int, ...]) -> list[Run]:
    planned = []
    for optimizer in QUICK_OPTIMIZERS if options.quick else RELEASED:
        lr, epoch, teleport_lr = RELEASED[optimizer]
        setting = Setting(widths, optimizer, lr, 40, epoch)
        if options.quick:
            setting = replace(setting, epochs=QUICK_EPOCHS, teleport_epoch=min(epoch, 1), teleports=2)
        for arm in arms(teleport_lr, widths):
            larger = LARGER if arm.move else LARGER_STILL
            released_only = options.quick or arm.name == PUBLISHED or optimizer not in TUNED
            for factor in (1.0,) if released_only else (1.0, *larger):
                planned.append((replace(setting, lr=lr * factor), arm, factor))
    planned.sort(key=lambda plan: plan[2])
    made = []
    with ExitStack() as stack:
        trained: Iterable[Trained] = (train(images, setting, arm, options.seeds) for setting, arm, _ in planned)
        if not options.quick:
            workers = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
            stack.enter_context(workers)
            tasks = [workers.submit(train, images, setting, arm, options.seeds) for setting, arm, _ in planned]
            trained = (task.result() for task in tasks)
        said = options.track(planned, f"{images.name}: {len(planned)} trainings of {len(options.seeds)} networks")
        for (setting, arm, factor), result in zip(said, trained, strict=False):
            made.append(Run(setting.optimizer, arm.name, factor, result))
            if options.bar is None:
                options.say(f"{setting.optimizer} at lr {setting.lr:g}, {arm.name}: training loss {_loss(made[-1])}")
    return made


def _best(released: Run, runs: list[Run]) -> Run:
    """The rate with the lowest mean of the training loss: chosen on the seeds that are shown, alike for every arm."""
    own = [run for run in runs if (run.optimizer, run.arm) == (released.optimizer, released.arm)]
    return min(own, key=lambda run: _loss(run).mean)


def _sample(values: torch.Tensor) -> Sample:
    return Sample(tuple(values.double().tolist()))


def _loss(run: Run) -> Sample:
    """The last epoch's mean mini-batch loss, which is what the paper plots."""
    return _sample(run.trained.epochs[-1])


def _table(title: str, runs: list[Run]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        reports = run.trained.reports
        still, undone = sum(report.at_round_off for report in reports), sum(report.undone for report in reports)
        rows.append((
            f"{run.optimizer}, {run.arm}", f"{RELEASED[run.optimizer][0] * run.factor:g}", _loss(run), _sample(run.trained.test_loss),
            _sample(100 * run.trained.test_accuracy), f"{still}/{undone} of {len(reports)}" if reports else "–",
        ))
    columns = ("", "lr", "train loss, last epoch", "test loss", "test accuracy, %", "teleports at round-off/undone")
    return Table(f"{title}; mean ± sd over seeds", columns, tuple(rows))


def _panels(name: str, runs: list[Run]) -> list[Panel]:
    panels = []
    for optimizer in dict.fromkeys(run.optimizer for run in runs):
        curves = []
        for run in runs:
            if run.optimizer == optimizer:
                losses = torch.stack(run.trained.epochs).T.double().tolist()
                curves.append(Curve(run.arm, tuple(range(1, len(losses[0]) + 1)), tuple(map(tuple, losses))))
        panels.append(Panel(f"{name}, {optimizer}", "epoch", "training loss", tuple(curves), log_y=True))
    return panels


def _claims(name: str, rates: str, runs: list[Run]) -> list[Claim]:
    """Does a teleport gain more than the reset that comes with it? Paired over the seeds."""
    claims = []
    by = {(run.optimizer, run.arm): run for run in runs}
    for optimizer in dict.fromkeys(run.optimizer for run in runs):
        plain, reset = by[optimizer, PLAIN], by[optimizer, RESET]
        for arm, against in ((PUBLISHED, reset), (TELEPORT, reset), (CARRIED, plain)):
            if (optimizer, arm) not in by:
                continue
            gain = _sample(against.trained.epochs[-1] - by[optimizer, arm].trained.epochs[-1])
            low, high = gain.interval
            text = f"{name}, {rates} rates, {optimizer}: {arm} ends with a lower training loss than {against.arm}"
            measured = f"by {gain}, 95% interval {number(low)} to {number(high)}; {plain.arm} {_loss(plain)}, {reset.arm} {_loss(reset)}"
            claims.append(Claim(text, measured, "interval above 0", low > 0))
        if (optimizer, rates, name) == ("momentum", "released", "digits"):
            for arm in (PUBLISHED, TELEPORT, CARRIED):
                loss = _loss(by[optimizer, arm])
                claims.append(Claim(f"momentum, {arm}: training loss", str(loss), f"mean at most {BAR}", loss.mean <= BAR))
    small = [report for run in runs for report in run.trained.reports if run.arm == PUBLISHED and RELEASED[run.optimizer][2] == 1e-4]
    if small:
        still = sum(report.at_round_off for report in small)
        text = f"{name}: published loop at its lr 1e-4 is at float32's round-off, and it is said"
        claims.append(Claim(text, f"{still} of {len(small)} teleports", "all", still == len(small)))
    return claims


def _guard(images: Images, run: Run, options: Options) -> tuple[Table, list[Claim]]:
    """A late teleport on eight samples by the published loop at lr 5e-2, without and with the full data's say."""
    X, labels, stack = images.inputs(images.train).mT, images.train.labels, run.trained.stack
    every = CrossEntropy(labels)
    rows: list[tuple[Cell, ...]] = []
    after: dict[bool, list[float]] = {False: [], True: []}
    for check in after:
        arm, undone = Arm(PUBLISHED, Move("v_exact", 8, 10, 5e-2, parity=True, check=check), "reset"), 0
        for place, seed in enumerate(options.seeds):
            before = [weight.clone() for weight in stack.of(place)]
            undone += sum(report.undone for report in teleport(stack, place, X, labels, arm, torch.Generator().manual_seed(seed)))
            after[check].append(float(every(stack.like(stack.of(place), X))))
            stack.write_(place, before)
        title = "with the full data's check" if check else "without"
        rows.append((title, _sample(run.trained.train_loss), Sample(tuple(after[check])), undone))
    holds = all(loss <= 2 * before for loss, before in zip(after[True], run.trained.train_loss.tolist(), strict=True))
    claim = Claim(
        f"{images.name}: a late published teleport on 8 samples is undone where it more than doubles the full loss",
        f"at most {number(max(after[True]))} with the check, {number(max(after[False]))} without", "at most doubled", holds,
    )
    title = f"{images.name}: full training loss around one published teleport (lr 5e-2, batch 8) at the end of AdaGrad's plain training"
    return Table(title, ("", "before", "after", "undone"), tuple(rows)), [claim]


def _small(images: Images) -> Images:
    """The first images only."""
    few = [Split(split.pixels[:QUICK_IMAGES], split.labels[:QUICK_IMAGES]) for split in (images.train, images.test)]
    return replace(images, train=few[0], test=few[1])
