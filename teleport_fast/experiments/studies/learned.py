"""[ICLR24], learning to teleport: LSTM meta-optimizers with and without a group element, against tuned gradient descent."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor

from teleport_fast.data_dependent.learned import KINDS, MetaOptimizer, Tasks, descend, train
from teleport_fast.data_dependent.learned import run as learned_run
from teleport_fast.experiments.studies.study import Cell, Claim, Curve, Options, Outcome, Panel, Sample, Table, number

SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
SLOPES = {"LeakyReLU 0.1, as published": 0.1, "linear": 1.0}
RATES = tuple(1e-5 * 10 ** (k / 5) for k in range(11))
MOMENTA = {"gradient descent, tuned": 0.0, "heavy ball 0.9, tuned": 0.9}
# At radius 0.1 a hundred steps may multiply scales by e^10 and training diverges; published is 0.01.
META_RATE, RADIUS, UNROLL, PER_ITERATION = 1e-3, 0.01, 10, 4
# Published 300, at which an iteration of "update+element" takes 3 s of processor time, six times that of 64.
UPDATE_HIDDEN = 64


class Job(NamedTuple):
    """One training and its test: picklable, so that trainings may run side by side."""

    kind: str
    slope: float
    seed: int
    lr: float
    n: int
    iterations: int
    horizon: int
    fresh: int


def trained(job: Job) -> tuple[Tensor, float]:
    """(log L (steps, fresh tasks) on fresh tasks up to twice the horizon of training, ms of a step for a task)."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    optimizer = MetaOptimizer(job.n, job.kind, job.lr, RADIUS, UPDATE_HIDDEN if job.kind.startswith("update") else None)
    generator = torch.Generator().manual_seed(1000 + job.seed)
    for _ in train(optimizer, job.iterations, PER_ITERATION, job.horizon, UNROLL, META_RATE, generator, job.slope):
        pass
    tasks, start = fresh_tasks(job), time.thread_time()
    losses = learned_run(optimizer, tasks, 2 * job.horizon)
    return losses.log(), 1e3 * (time.thread_time() - start) / (2 * job.horizon + 1) / job.fresh


def fresh_tasks(job: Job) -> Tasks:
    """The test tasks of a seed: the same for every method, never trained or tuned on."""
    return Tasks.draw(job.fresh, job.n, torch.Generator().manual_seed(5000 + job.seed), job.slope)


def tuned(n: int, slope: float, horizon: int, momentum: float) -> float:
    """The rate of RATES with the lowest mean log loss at the horizon, on 32 tasks of their own."""
    tasks = Tasks.draw(32, n, torch.Generator().manual_seed(9), slope)
    ends = {lr: float(descend(tasks, horizon, lr, momentum)[-1].log().mean()) for lr in RATES}
    return min(ends, key=lambda lr: ends[lr] if math.isfinite(ends[lr]) else math.inf)


def run(options: Options) -> Outcome:
    """Trains every kind a seed, tests all on fresh tasks. Worker processes: torch's number of threads (--threads)."""
    n, iterations, horizon, fresh = (8, 6, 40, 16) if options.quick else (20, 30, 100, 32)
    names = list(SLOPES)[:1] if options.quick else list(SLOPES)
    rates = {(name, momentum): tuned(n, SLOPES[name], horizon, momentum) for name in names for momentum in MOMENTA.values()}
    jobs = [
        Job(kind, SLOPES[name], seed, rates[name, 0.0] / 2, n, iterations, horizon, fresh)
        for name in names for kind in KINDS for seed in options.seeds
    ]
    found = {}
    for job, result in zip(jobs, options.track(_all(jobs), f"{len(jobs)} trainings"), strict=True):
        found[job] = result
        options.say(f"{job.kind}, slope {job.slope:g}, seed {job.seed}: log loss {float(result[0][horizon].mean()):.3f} at step {horizon}")
    tables, panels, claims = [], [], []
    for name in names:
        logs: dict[str, list[Tensor]] = {}
        times: dict[str, Sample] = {}
        for label, momentum in MOMENTA.items():
            ends = [_descended(job, rates[name, momentum], momentum) for job in jobs if (job.slope, job.kind) == (SLOPES[name], "rate")]
            logs[f"{label} ({number(rates[name, momentum])})"] = [end for end, _ in ends]
            times[f"{label} ({number(rates[name, momentum])})"] = Sample(tuple(spent for _, spent in ends))
        baselines = list(logs)
        for kind in KINDS:
            mine = [found[job] for job in jobs if (job.slope, job.kind) == (SLOPES[name], kind)]
            logs[kind] = [losses for losses, _ in mine]
            times[kind] = Sample(tuple(spent for _, spent in mine))
        tables.append(_table(name, logs, times, times[baselines[0]].median, horizon))
        panels.append(Panel(name, "step", "loss, geometric mean", tuple(_curve(label, runs) for label, runs in logs.items()), log_y=True))
        claims += _claims(name, {label: _at(runs, horizon) for label, runs in logs.items()}, baselines, horizon)
    return Outcome(
        name="learned",
        title="Learned teleportation on fresh tasks",
        source="arXiv 2305.13404, section on learning to teleport",
        settings={
            "task": f"min ½‖Y − U σ(V X)‖², {n} × {n}, entries uniform on [0, 1)", "fresh tasks a seed": fresh, "seeds": options.seeds,
            "training tasks": iterations * PER_ITERATION, "horizon": horizon, "unroll": UNROLL, "lr of Adam": META_RATE, "radius": RADIUS,
            "hidden": f"20 with a learned rate, {UPDATE_HIDDEN} with a learned update",
            "lr": {f"{name}, momentum {momentum:g}": lr for (name, momentum), lr in rates.items()},
        },
        tables=tuple(tables), panels=tuple(panels), claims=tuple(claims),
    )


def _all(jobs: list[Job]) -> Iterable[tuple[Tensor, float]]:
    workers = torch.get_num_threads()
    return _side_by_side(jobs, workers) if workers > 1 else map(trained, jobs)


def _side_by_side(jobs: list[Job], workers: int) -> Iterator[tuple[Tensor, float]]:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(trained, jobs)


def _descended(job: Job, lr: float, momentum: float) -> tuple[Tensor, float]:
    start = time.thread_time()
    losses = descend(fresh_tasks(job), 2 * job.horizon, lr, momentum)
    return losses.log(), 1e3 * (time.thread_time() - start) / (2 * job.horizon + 1) / job.fresh


def _at(runs: list[Tensor], step: int) -> Sample:
    """The geometric mean of the loss over tasks after `step` steps, a value a seed."""
    return Sample(tuple(float(logs[step].mean().exp()) for logs in runs))


def _curve(label: str, runs: list[Tensor]) -> Curve:
    return Curve(label, tuple(range(len(runs[0]))), tuple(tuple(logs.mean(1).exp().tolist()) for logs in runs))


def _table(name: str, logs: dict[str, list[Tensor]], times: dict[str, Sample], unit: float, horizon: int) -> Table:
    steps = (horizon // 10, horizon // 2, horizon, 2 * horizon)
    rows: list[tuple[Cell, ...]] = [
        (label, *(_at(runs, step) for step in steps), f"{times[label].median / unit:.1f}") for label, runs in logs.items()
    ]
    head = (*(f"{step} steps" for step in steps[:-1]), f"{steps[-1]}, beyond training", "time of a step, in descent's")
    return Table(f"{name}: loss on fresh tasks, geometric mean", ("", *head), tuple(rows))


def _claims(name: str, ends: dict[str, Sample], baselines: list[str], horizon: int) -> list[Claim]:
    """What the paper's figure shows: an element helps the learned rate and the learned update, and both beat descent."""
    pairs = [
        ("learned rate and element end lower than tuned descent", "rate+element", baselines[0]),
        ("an element helps the learned rate", "rate+element", "rate"),
        ("an element helps the learned update", "update+element", "update"),
        ("learned update and element end lower than tuned descent", "update+element", baselines[0]),
        ("learned rate and element end lower than the tuned heavy ball", "rate+element", baselines[1]),
    ]
    return [
        Claim(f"{name}: {text}", f"{ends[better]} and {ends[worse]} after {horizon} steps", "lower for every seed",
              all(a < b for a, b in zip(ends[better].values, ends[worse].values, strict=True)))
        for text, better, worse in pairs
    ]
