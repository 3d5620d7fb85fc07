"""Learning rates tuned per arm on a logarithmic grid that grows at its edges; every run is a row of a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from teleport_fast.experiments.arms import BASES, Arm
from teleport_fast.experiments.compare import Silent, Watcher
from teleport_fast.experiments.report import finite, run_json, text_json, versions, write_json
from teleport_fast.experiments.summary import mean_sd
from teleport_fast.experiments.text import Text
from teleport_fast.experiments.train import Setting, train

RECORDED = Path(__file__).parent / "recorded"
# Six values per decade, neighbours 1.47 apart (the E6 series).
DECADE = (1.0, 1.5, 2.2, 3.3, 4.7, 6.8)
POINTS = 6
MOST_POINTS = 18
# A row keeps what the choice needs; the curves of recorded comparisons are elsewhere.
KEPT = ("arm", "rate", "seed", "steps", "validation", "step_ms", "optimizer_ms", "diverged")


def grid(arm: Arm) -> list[float]:
    """The six rates around the base optimizer's usual one that a sweep of this arm begins with.

    >>> grid(Arm("adamw", "adamw"))
    [0.001, 0.0015, 0.0022, 0.0033, 0.0047, 0.0068]
    """
    middle = round(len(DECADE) * math.log10(BASES[arm.base].rate))
    places = (divmod(middle - POINTS // 2 + i, len(DECADE)) for i in range(POINTS))
    return [float(f"{DECADE[digit] * 10.0**power:.2g}") for power, digit in places]


def beyond(rates: Sequence[float], best: float) -> float | None:
    """The rate to try next where the best one is at an edge of the grid, as far from it as its neighbour is; else None.

    >>> beyond([0.001, 0.002, 0.004], 0.004), beyond([0.001, 0.002, 0.004], 0.001), beyond([0.1, 0.2, 0.4], 0.2)
    (0.008, 0.0005, None)
    """
    ordered = sorted(rates)
    if len(ordered) == 1:
        return float(f"{1.5 * best:.2g}")
    for edge, neighbour in ((ordered[0], ordered[1]), (ordered[-1], ordered[-2])):
        if best == edge:
            return float(f"{edge * edge / neighbour:.2g}")
    return None


def means(rows: Sequence[dict[str, Any]], label: str, seeds: Sequence[int]) -> dict[float, float]:
    """Mean final validation loss per rate of one arm, of the rates that all `seeds` have run; diverged is infinite."""
    losses: dict[float, dict[int, float]] = {}
    for row in rows:
        if row["arm"] == label and row["seed"] in seeds:
            final = math.inf if row["diverged"] or not row["validation"] else row["validation"][-1][1]
            losses.setdefault(row["rate"], {})[row["seed"]] = final
    return {rate: mean_sd(of.values())[0] for rate, of in sorted(losses.items()) if len(of) == len(set(seeds))}


def chosen(rows: Sequence[dict[str, Any]], label: str, seeds: Sequence[int]) -> dict[str, Any] | None:
    """The best rate of an arm with its loss, the losses of all rates, and whether it still lies at the grid's edge."""
    losses = means(rows, label, seeds)
    if not losses:
        return None
    best = min(losses, key=lambda rate: losses[rate])
    by_rate = [[rate, loss] for rate, loss in losses.items()]
    return {"rate": best, "loss": losses[best], "at_edge": beyond(list(losses), best) is not None, "losses": by_rate}


def sweep(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    setting: Setting,
    text: Text,
    folder: Path,
    command: str,
    rates: Sequence[float] | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Tunes every arm; `folder/sweep.jsonl` gets a row per run and is taken up again where it ended.

    A row counts as done when arm, rate, seed, setting and text are the same. `folder/sweep.json` holds the rows that
    count and, under "rates", the best of each arm; the same value is returned, with "interrupted" after Ctrl-C. The
    grid grows until its best rate is inside, up to 18 rates. Raises ValueError for a rate that is not positive.
    """
    if any(not rate > 0 for rate in rates or ()):
        raise ValueError(f"rates must be positive, got {min(rates or ())}; pass learning rates such as 0.001,0.002")
    if not arms or not seeds:
        raise ValueError(
            f"arms and seeds must not be empty, got {list(arms)} and {list(seeds)}; name at least one each"
        )
    path, shown = folder / "sweep.jsonl", watcher or Silent()
    same = finite({"setting": asdict(setting), "text": text_json(text)["digest"]})
    rows = [row for row in _read(path) if all(row[key] == value for key, value in same.items())]
    asked = [_given(asdict(arm)) for arm in arms]
    rows = [row for row in rows if _given(row["options"]) in asked and row["seed"] in seeds]
    interrupted = False
    try:
        for arm in arms:
            label, wanted = arm.label, sorted(set(rates or grid(arm)))
            while wanted and not interrupted:
                for rate, seed in ((rate, seed) for rate in wanted for seed in seeds):
                    if any((row["arm"], row["rate"], row["seed"]) == (label, rate, seed) for row in rows):
                        continue
                    shown.started(f"{label}, lr {rate:g}", seed)
                    run = train(arm, rate, seed, setting, text, shown.step)
                    shown.finished(run)
                    if run.interrupted:
                        raise KeyboardInterrupt
                    slim_run = {key: value for key, value in run_json(run).items() if key in KEPT}
                    rows.append(finite({**slim_run, "options": asdict(arm), **same, "command": command}))
                    with path.open("a") as file:
                        file.write(json.dumps(rows[-1], allow_nan=False) + "\n")
                losses = means(rows, label, seeds)
                found = chosen(rows, label, seeds)
                further = beyond(list(losses), found["rate"]) if found else None
                wanted = [further] if further is not None and len(losses) < MOST_POINTS else []
    except KeyboardInterrupt:
        interrupted = True
    choice = {arm.label: chosen(rows, arm.label, seeds) for arm in arms}
    slim = [{key: value for key, value in row.items() if key in KEPT} for row in rows]
    whole = {
        "command": command,
        "versions": versions(),
        "setting": same["setting"],
        "text": text_json(text),
        "seeds": list(seeds),
        "options": {arm.label: asdict(arm) for arm in arms},
        "rates": {label: found for label, found in choice.items() if found},
        "interrupted": interrupted,
        "rows": slim,
    }
    result: dict[str, Any] = finite(whole)
    write_json(result, folder / "sweep.json")
    return result


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """An arm's fields that are set, as JSON has them: rows of before a field existed are rows of arms without it."""
    given: dict[str, Any] = json.loads(json.dumps({key: value for key, value in options.items() if value}))
    return given


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    try:
        return [json.loads(line) for line in lines if line]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must hold one JSON object per line, got {error}; move it away or repair it") from None


@cache
def recorded(path: Path = RECORDED / "sweep.json") -> dict[str, Any]:
    """The checked-in sweep; empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def rate_for(arm: Arm) -> tuple[float, str]:
    """The arm's learning rate and where it comes from: its recorded sweep, its base optimizer's, or a default."""
    rates = recorded().get("rates", {})
    for label in (arm.label, arm.usual.label, arm.base):
        if label in rates:
            return float(rates[label]["rate"]), "recorded sweep" + (f" of {label}" if label != arm.label else "")
    return BASES[arm.base].rate, f"default; tune it with: python -m teleport_fast train --sweep --arms {arm.name}"
