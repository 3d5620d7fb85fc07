"""The closed-form curvature of the papers' action against forward differentiation twice, interleaved, results compared.

    python bench/papers/curvature_speed.py [--rounds 9] [--json]

float64, one thread, one M, both forms. "first" includes building the action and factoring its inputs; "closed form" is a later
call on the same action. Times are medians of thread time in ms, `ratio` the median of the per-round ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import warnings

import torch

import teleport_fast as tf
from teleport_fast.data_dependent import MLPAction, RankWarning
from teleport_fast.experiments.timing import seconds
from teleport_fast.minima import curvature_at, lie_curve, random_generators

CASES = {(784, 16, 10, 10): 200, (3072, 128, 32, 10): 200}


def measure(widths: tuple[int, ...], batch: int, form: str, rounds: int) -> dict[str, float]:
    """Medians in ms, the ratio, and the relative difference of the two curvatures."""
    torch.manual_seed(0)
    weights = [torch.randn(b, a, dtype=torch.float64) / a**0.5 for a, b in itertools.pairwise(widths)]
    X = torch.randn(widths[0], batch, dtype=torch.float64)
    action = MLPAction(weights, X, form=form)
    Ms = [M[0] for M in random_generators(action, 1)]
    curve, zero = lie_curve(action, Ms), torch.zeros((), dtype=torch.float64)
    difference = abs(float(curvature_at(curve, zero)) / tf.curvature(action, Ms) - 1)
    runs: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        first = 1e3 * seconds(lambda: tf.curvature(MLPAction(weights, X, form=form), Ms))
        closed = 1e3 * seconds(lambda: tf.curvature(action, Ms))
        runs.append((first, closed, 1e3 * seconds(lambda: curvature_at(curve, zero))))
    firsts, closeds, differentiated = (statistics.median(column) for column in zip(*runs, strict=True))
    return {
        "first": firsts,
        "closed form": closeds,
        "differentiation": differentiated,
        "ratio": statistics.median(run[2] / run[1] for run in runs),
        "difference": difference,
    }


def main() -> None:
    """Prints one row per network and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds per row (default 9)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore", RankWarning)
    torch.set_num_threads(1)
    rows = {
        f"{'-'.join(map(str, widths))}, {batch}, {form}": measure(widths, batch, form, options.rounds)
        for widths, batch in CASES.items() for form in ("u_exact", "v_exact")
    }
    if options.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(name, *(f"{key} {value:.3g}" for key, value in row.items()), sep="; ")


if __name__ == "__main__":
    main()
