"""What a run leaves: a table in Markdown, all that the table is made of in JSON, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.convergence.interface import Task
from bench.convergence.paired import Paired, holm
from bench.convergence.picture import draw
from bench.convergence.protocol import Comparison, Outcome
from bench.convergence.store import digest, short
from teleport_fast.experiments.report import finite, versions, write_json


def write(outcome: Outcome, folder: Path, command: str, seeds: Sequence[int], tuning_seeds: Sequence[int]) -> str:
    """Writes TASK.md, TASK.json and TASK.png beside the rows; the table."""
    folder.mkdir(parents=True, exist_ok=True)
    task = outcome.task
    text = "\n".join([*header(task, command, seeds, tuning_seeds), "", *table(outcome), ""])
    (folder / f"{task.name}.md").write_text(text)
    write_json(finite(summary(outcome, command, seeds, tuning_seeds)), folder / f"{task.name}.json")
    draw(outcome, folder / f"{task.name}.png")
    return text


def header(task: Task, command: str, seeds: Sequence[int], tuning_seeds: Sequence[int]) -> list[str]:
    return [
        f"### {task.name}",
        "",
        f"{task.steps} steps; {task.loss} at the end, mean over {len(seeds)} paired seeds ({_list(seeds)}) at each arm's best trial on "
        f"seeds {_list(tuning_seeds)}. `{command}`",
    ]


def table(outcome: Outcome) -> list[str]:
    """An arm per row, with its pairing with the baseline and, in a line of its own, with its own optimizer."""
    task = outcome.task
    extra = list(dict.fromkeys(name for results in outcome.results.values() for result in results for name in result.measures))
    against = "quotient" if task.compared_by == "ratio" else "difference"
    columns = [
        "arm", "best trial (trials)", task.loss, *extra, f"against: {against} (95%), p", "steps to its loss", "time to its loss",
        "ms a step", "shorter", "untuned",
    ]
    rows = []
    corrected = dict(zip(map(id, outcome.comparisons), holm([one.loss.p for one in outcome.comparisons]), strict=True))
    for arm, results in outcome.results.items():
        tuned = outcome.tuned[arm]
        trial = ", ".join([f"lr {tuned.trial.rate:g}", *(f"{key} {value}" for key, value in tuned.trial.options.items())])
        edge = ", at the edge" if tuned.at_edge else ""
        own = [one for one in outcome.comparisons if one.arm == arm]
        shown = [
            arm, f"{trial} ({tuned.trials}{edge})", spread([result.final for result in results], task),
            *(spread([result.measures.get(name, math.nan) for result in results]) for name in extra),
            "<br>".join(f"{one.reference}: {pairing(one.loss, corrected[id(one)], task.failed)}" for one in own) or "–",
            "<br>".join(reach(one, one.steps) for one in own) or "–",
            "<br>".join(reach(one, one.time) for one in own) or "–",
            f"{1e3 * outcome.cost.get(arm, math.nan):.2g}" if outcome.cost.get(arm) else "–",
            "<br>".join(f"{share:g}: {spread([r.final for r in rs], task)}" for (a, share), rs in outcome.shorter.items() if a == arm) or "–",
            "<br>".join(f"{spread([r.final for r in rs], task)}" for (a, _), rs in outcome.untuned.items() if a == arm) or "–",
        ]
        rows.append(shown)
    told = [place for place in range(len(columns)) if any(set(row[place].split("<br>")) != {"–"} for row in rows)]
    lines = [[columns[place] for place in told], ["---"] * len(told), *([row[place] for place in told] for row in rows)]
    return [*(f"| {' | '.join(line)} |" for line in lines), "", _legend()]


def _legend() -> str:
    return (
        "p: paired t test, two-sided, after Holm's correction over this table. Steps and time (CPU) to the reference's final loss, as shares "
        "of what the reference took; seeds that got there in brackets where not all did. untuned: the arm at its optimizer's best trial."
    )


def pairing(loss: Paired, p: float, failed: str = "diverged") -> str:
    """One pairing's cell: the mean, its interval and the corrected p; whose run failed, where one did."""
    if math.isnan(loss.mean) or (math.isnan(loss.low) and loss.n > 1):
        return failed if math.isinf(loss.mean) else f"the other {failed}"
    if math.isnan(loss.low):
        return f"{loss.mean:.3g}"
    return f"{loss.mean:.3g} ({loss.low:.3g} to {loss.high:.3g}), {probability(p)}"


def probability(p: float) -> str:
    """A p value as tables have it.

    >>> probability(0.0004), probability(0.0312)
    ('p < .001', 'p .031')
    """
    return "p –" if math.isnan(p) else "p < .001" if p < 0.001 else f"p {p:.3f}".replace("0.", ".", 1)


def reach(one: Comparison, value: float) -> str:
    if one.reached == 0:
        return "not reached"
    return ("–" if math.isnan(value) else f"{value:.2f}") + (f" ({one.reached} of {one.loss.n})" if one.reached < one.loss.n else "")


def spread(values: Sequence[float], task: Task | None = None) -> str:
    """Mean ± sd over seeds; of quotients where the task compares by ratio: geometric mean ×/÷ factor.

    >>> spread([1.0, 3.0])
    '2 ± 1.4'
    """
    if not values or not all(map(math.isfinite, values)):
        gone = sum(map(math.isinf, values))
        return f"{task.failed if task else 'diverged'} ({gone} of {len(values)})" if gone else "–"
    ratio = task is not None and task.compared_by == "ratio"
    numbers = [math.log(max(value, 1e-38)) for value in values] if ratio else list(values)
    mean = _mean(numbers)
    deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)) if len(numbers) > 1 else math.nan
    if ratio:
        return f"{math.exp(mean):.4g}" + ("" if math.isnan(deviation) else f" ×÷ {math.exp(deviation):.2f}")
    return f"{mean:.4g}" + ("" if math.isnan(deviation) else f" ± {deviation:.2g}")


def summary(outcome: Outcome, command: str, seeds: Sequence[int], tuning_seeds: Sequence[int]) -> dict[str, Any]:
    """All of it in plain numbers; curves included, of the paired seeds."""
    task = outcome.task
    return {
        "task": task.name, "command": command, "versions": versions(), "setting": task.setting(), "digest": digest(task.setting()),
        "loss": task.loss, "compared_by": task.compared_by, "seeds": list(seeds), "tuning_seeds": list(tuning_seeds),
        "arms": {
            arm: {
                "rate": tuned.trial.rate, "options": dict(tuned.trial.options), "trials": tuned.trials, "at_edge": tuned.at_edge,
                "score_by_rate": [[rate, short(value)] for rate, value in tuned.by_rate.items()],
                "finals": [short(result.final) for result in outcome.results[arm]],
                "step_seconds": short(outcome.cost.get(arm, math.nan)),
                "curves": [[[step, short(loss)] for step, loss in result.curve] for result in outcome.results[arm]],
            }
            for arm, tuned in outcome.tuned.items()
        },
        "comparisons": [
            {
                "arm": one.arm, "reference": one.reference, "mean": one.loss.mean, "low": one.loss.low, "high": one.loss.high,
                "p": one.loss.p, "steps": one.steps, "time": one.time, "reached": one.reached, "n": one.loss.n,
            }
            for one in outcome.comparisons
        ],
        "shorter": [[arm, share, [short(r.final) for r in results]] for (arm, share), results in outcome.shorter.items()],
        "untuned": [[arm, reference, [short(r.final) for r in results]] for (arm, reference), results in outcome.untuned.items()],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _list(numbers: Sequence[int]) -> str:
    consecutive = list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 2
    return f"{numbers[0]} to {numbers[-1]}" if consecutive else ", ".join(map(str, numbers))
