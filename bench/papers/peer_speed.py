"""Ours (the data-dependent symmetry), null-space and level-set teleportation on the same nets: gain in ‖∇L‖, seconds, SGD steps.

    python bench/papers/peer_speed.py [--rounds 7] [--steps 10] [--case N] [--json]

float64, one thread. Every round draws a new network and batch, times an SGD step, and gives each method `steps` steps of its own
line search whose first step predicts half a log of ‖∇L‖. Our time includes the action, its report and writing the weights back;
theirs the projectors. "best step" is the loss after one SGD step at the best of 41 learning rates, over the same without a
teleport: under 1, the teleport was worth having, whatever its gain. Cells are medians over rounds with quartiles; "ln gain a
second" is ln(‖∇L‖ after / before) per second of thread time, "ln gain an SGD step" the same per SGD step's time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from teleport_fast.data_dependent import CrossEntropy, MLPAction, RankWarning
from teleport_fast.experiments.timing import seconds
from teleport_fast.minima.point import Closure
from teleport_fast.peers import level_set_teleport, null_space_teleport

CASES = {(784, 16, 10, 10): 200, (784, 256, 256, 10): 200, (64, 64, 64, 10): 32}
METHODS = ("ours, U-exact", "ours, V-exact", "null space", "level set")
COLUMNS = ("gain", "SGD steps", "ln gain a second", "ln gain a step", "best step")
Row = dict[str, float]


def network(widths: tuple[int, ...], seed: int, batch: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """(model with biases, inputs (batch, n), labels)."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after), nn.LeakyReLU(0.1)]
    model = nn.Sequential(*parts[:-1]).double()
    return model, torch.randn(batch, widths[0], dtype=torch.float64), torch.randint(widths[-1], (batch,))


def ours(model: nn.Sequential, inputs: Tensor, labels: Tensor, form: str, steps: int) -> None:
    """Our search from the lr that predicts half a log, the weights written back."""
    action, loss = MLPAction.from_sequential(model, inputs, form), CrossEntropy(labels)
    length = sum(float(D.square().sum()) for D in action.lie_gradient(loss))
    squared = sum(float(G.square().sum()) for G in action.moved_gradients([torch.eye(k) for k in action.widths], loss))
    action.write_(model, action.teleport(loss, steps, squared / length).weights)


def state_of(model: nn.Sequential, loss_fn: Closure) -> tuple[float, float]:
    """(loss, ‖∇L‖)."""
    loss = loss_fn()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), math.sqrt(sum(float(G.square().sum()) for G in gradients))


def best_step(model: nn.Sequential, loss_fn: Closure, norm: float) -> float:
    """The lowest loss after one SGD step from here over learning rates of five decades a side of L/‖∇L‖²."""
    params, loss = list(model.parameters()), loss_fn()
    gradients, start = torch.autograd.grad(loss, params), [p.detach().clone() for p in params]
    found = [float(loss.detach())]
    with torch.no_grad():
        for exponent in range(-20, 21):
            lr = float(loss) / norm**2 * 10 ** (exponent / 4)
            for p, old, G in zip(params, start, gradients, strict=True):
                p.copy_(old - lr * G)
            found.append(float(loss_fn()))
        for p, old in zip(params, start, strict=True):
            p.copy_(old)
    return min(found)


def measure(widths: tuple[int, ...], batch: int, seed: int, steps: int) -> dict[str, Row]:
    """One round: every method from the same start."""
    model, inputs, labels = network(widths, seed, batch)
    start = [p.detach().clone() for p in model.parameters()]

    def loss_fn() -> Tensor:
        return nn.functional.cross_entropy(model(inputs), labels)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def sgd() -> None:
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()

    sgd_seconds = statistics.median([seconds(sgd) for _ in range(12)][3:])
    before = state_of(model, loss_fn)
    plain = best_step(model, loss_fn, before[1])
    runs: dict[str, Callable[[], object]] = {
        "ours, U-exact": lambda: ours(model, inputs, labels, "u_exact", steps),
        "ours, V-exact": lambda: ours(model, inputs, labels, "v_exact", steps),
        "null space": lambda: null_space_teleport(loss_fn, model, steps),
        "level set": lambda: level_set_teleport(loss_fn, model.parameters(), steps),
    }
    rows = {}
    for name in METHODS[seed % 4 :] + METHODS[: seed % 4]:  # nobody always runs first
        spent = seconds(runs[name])
        loss, norm = state_of(model, loss_fn)
        log_gain = math.log(norm / before[1])
        rows[name] = {
            "gain": norm / before[1], "ms": 1e3 * spent, "SGD steps": spent / sgd_seconds, "ln gain a second": log_gain / spent,
            "ln gain a step": log_gain / spent * sgd_seconds, "loss change": abs(loss - before[0]) / before[0],
            "best step": best_step(model, loss_fn, norm) / plain,
        }
        with torch.no_grad():
            for p, old in zip(model.parameters(), start, strict=True):
                p.copy_(old)
    return rows


def main() -> None:
    """Prints a row a network and method, or JSON with every round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="only this one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Where the batch exceeds the widths our move is not exact: what it costs is in the last column.
    warnings.simplefilter("ignore", RankWarning)
    everything: dict[str, dict[str, list[Row]]] = {}
    for index, (widths, batch) in enumerate(CASES.items()):
        if options.case not in (None, index):
            continue
        measure(widths, batch, 0, 1)
        rounds = [measure(widths, batch, seed, options.steps) for seed in range(1, options.rounds + 1)]
        case = f"{'-'.join(map(str, widths))}, batch {batch}"
        everything[case] = {name: [found[name] for found in rounds] for name in METHODS}
        if not options.json:
            print(f"| {case} | gain in ‖∇L‖ | SGD steps | ln gain a second | ln gain an SGD step | best step | loss moved by |")
            print("|" + " --- |" * 7)
            for name, rows in everything[case].items():
                cells = [spread([row[key] for row in rows]) for key in COLUMNS]
                print(f"| {name} | {' | '.join(cells)} | {max(row['loss change'] for row in rows):.0e} |", flush=True)
            print()
    if options.json:
        print(json.dumps(everything, indent=2))


def spread(values: list[float]) -> str:
    """Median with quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


if __name__ == "__main__":
    main()
