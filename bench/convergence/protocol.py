"""The protocol: every arm tuned with the same number of trials on the same grid, then trained on seeds that tuned nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.convergence.interface import RATES, TRIALS, Result, Task, Trial
from bench.convergence.paired import Paired, paired
from bench.convergence.store import Store
from teleport_fast.experiments.summary import steps_to_reach
from teleport_fast.experiments.sweep import beyond

# How many rates growth may add before the edge is admitted.
GROWTH = 12
Say = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """An arm's best trial on the tuning seeds; `by_rate` the best score at each rate, `at_edge` whether growth ran out."""

    trial: Trial
    score: float
    trials: int
    at_edge: bool
    by_rate: Mapping[float, float]


@dataclass(frozen=True)
class Comparison:
    """An arm against a reference at the end of training, seed by seed.

    `steps`: the share of the reference's steps at which the arm's curve is at the reference's final loss, mean over the
    `reached` of n seeds that get there, linear between a curve's points; `time`: the same in CPU time of its steps.
    """

    arm: str
    reference: str
    loss: Paired
    steps: float
    time: float
    reached: int


@dataclass
class Outcome:
    """What a task's run found: per arm what was tuned and the paired seeds' results, then the comparisons."""

    task: Task
    tuned: dict[str, Tuned] = field(default_factory=dict)
    results: dict[str, list[Result]] = field(default_factory=dict)
    # (arm, share of the steps) and (arm, reference whose trial it runs at)
    shorter: dict[tuple[str, float], list[Result]] = field(default_factory=dict)
    untuned: dict[tuple[str, str], list[Result]] = field(default_factory=dict)
    # CPU seconds of a step
    cost: dict[str, float] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)


def train(task: Task, trial: Trial, seeds: Sequence[int], store: Store) -> list[Result]:
    """The results of a trial's seeds; those that the store has are not trained again."""
    if missing := store.missing(trial, seeds):
        for result in task.train(trial, missing):
            store.add(trial, result)
    return [_found(store, trial, seed) for seed in seeds]


def _found(store: Store, trial: Trial, seed: int) -> Result:
    found = store.get(trial, seed)
    if found is None:
        raise RuntimeError(f"task {store.task} gave no result for seed {seed} of {trial}; its train and tune must yield one for each seed")
    return found


def tune(task: Task, arm: str, store: Store, seeds: Sequence[int], trials: int = TRIALS) -> Tuned:
    """Tries every rate with every choice; while the best rate is an edge, the next one beyond it, with every choice too."""
    space = task.space(arm)
    choices = space.choices[: max(1, trials // RATES)]
    rates = sorted(space.grid(trials))
    first, scores = len(rates), dict[tuple[float, int], float]()
    wanted = list(rates)
    while True:
        asked = {(rate, place): Trial(arm, rate, choice) for rate in wanted for place, choice in enumerate(choices)}
        if missing := [trial for trial in asked.values() if store.missing(trial, seeds)]:
            for trial, result in task.tune(missing, seeds):
                store.add(trial, result, curve=False)
        for key, trial in asked.items():
            scores[key] = task.score([_found(store, trial, seed) for seed in seeds])
        rate, place = min(scores, key=lambda key: scores[key])
        further = beyond(rates, rate)
        if further is None or len(rates) >= first + GROWTH or (math.isinf(scores[rate, place]) and further > rate):
            break
        rates = sorted([*rates, further])
        wanted = [further]
    by_rate = {rate: min(scores[rate, place] for place in range(len(choices))) for rate in rates}
    return Tuned(Trial(arm, rate, choices[place]), scores[rate, place], len(scores), further is not None, by_rate)


def compare(
    arm: str, reference: str, mine: Sequence[Result], theirs: Sequence[Result], by: str, cost: Mapping[str, float]
) -> Comparison:
    """Pairs two arms' results by seed; `cost`: seconds of a step of each. ValueError where they ran other seeds."""
    if [result.seed for result in mine] != [result.seed for result in theirs]:
        raise ValueError(f"{arm} and {reference} must run the same seeds, got {[r.seed for r in mine]} and {[r.seed for r in theirs]}")
    steps, curves = [], all(result.curve for result in (*mine, *theirs))
    for result, base in zip(mine, theirs, strict=True):
        reached = steps_to_reach(result.curve, base.final)
        if result.diverged or base.diverged or math.isnan(reached):
            continue
        steps.append(reached / base.curve[-1][0])
    loss = paired([result.final for result in mine], [base.final for base in theirs], by)
    if not curves:
        return Comparison(arm, reference, loss, math.nan, math.nan, loss.n)
    dearer = cost[arm] / cost[reference] if cost.get(arm) and cost.get(reference) else math.nan
    return Comparison(arm, reference, loss, _mean(steps), dearer * _mean(steps), len(steps))


def run(
    task: Task,
    arms: Sequence[str],
    store: Store,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    trials: int = TRIALS,
    shares: Sequence[float] = (),
    say: Say = lambda _: None,
) -> Outcome:
    """Tunes and trains every arm and pairs it with its references among them.

    shares: every arm is trained for these shares of the steps too, at its best trial; so "reached in 1/1.6 of the steps" can
    be read off the end of a whole decayed schedule. An arm with a reference is run once more at that one's best trial: what
    the addition does without tuning of its own. ValueError where tuning and paired seeds overlap, or the budget is too small.
    """
    if both := sorted(set(seeds) & set(tuning_seeds)):
        raise ValueError(f"seeds must not be tuned on, got {both} in both lists; pass other tuning seeds")
    outcome = Outcome(task)
    for arm in arms:
        tuned = outcome.tuned[arm] = tune(task, arm, store, tuning_seeds, trials)
        results = outcome.results[arm] = train(task, tuned.trial, seeds, store)
        at = ", ".join([f"lr {tuned.trial.rate:g}", *(f"{key} {value}" for key, value in tuned.trial.options.items())])
        say(f"{task.name}: {arm} at {at}: {task.loss} {_mean([result.final for result in results]):.6g}")
        for share in shares:
            outcome.shorter[arm, share] = train(task, Trial(arm, tuned.trial.rate, tuned.trial.options, share), seeds, store)
    outcome.cost = task.cost({arm: tuned.trial for arm, tuned in outcome.tuned.items()}) or {
        arm: _mean([result.seconds for result in results]) / task.steps for arm, results in outcome.results.items()
    }
    for arm in arms:
        for reference in task.references(arm):
            if reference not in outcome.results:
                continue
            theirs = outcome.results[reference]
            outcome.comparisons.append(compare(arm, reference, outcome.results[arm], theirs, task.compared_by, outcome.cost))
            if arm.startswith(f"{reference}+"):
                own, given = task.space(arm).choices[0], outcome.tuned[reference].trial
                trial = Trial(arm, given.rate, {**own, **given.options})
                outcome.untuned[arm, reference] = train(task, trial, seeds, store)
    return outcome


def _mean(values: Sequence[float] | list[Any]) -> float:
    return sum(values) / len(values) if values else math.nan
