"""A long run on a small model: resident memory may not grow, and the function may not drift.

    python bench/step/soak.py [--steps 20000] [--moves 1000] [--out FILE.json]

Trains two networks with a teleport every third step, `balance` in the stay frame and `eigenbasis` in the return
frame, and reads the process' resident memory every 1000 steps; more than 2 MB of growth after a tenth of the steps
fails. Then `--moves` teleports and ways back, and as many random turns that stay, of a byte GPT in float32 without
training: logits that move by more than 1e-4 of their norm fail.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.symmetry import Diagonal, GeneralLinear

GROWTH, DRIFT = 2 * 2**20, 1e-4


def resident() -> int:
    """Bytes of this process in memory; Linux only."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def network(width: int = 16) -> tuple[nn.Sequential, tf.Symmetries]:
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
    groups = GeneralLinear(width), Diagonal(width)
    joints = tuple(
        tf.Joint(f"{i}", f"{i}", group, 1, width, (tf.View(f"{i}.weight", 0, 1, width),), (tf.View(f"{i + 1}.weight", 1, 1, width),))
        for i, group in zip((0, 2), groups, strict=True)
    )
    return model, tf.Symmetries(joints, model=model)


def memory(steps: int) -> dict[str, Any]:
    """Resident bytes along a run of `steps` steps of two optimizers side by side."""
    torch.manual_seed(0)
    runs = []
    # no ascent: after thousands of them in one direction the network itself is out of range
    for objective, frame in (("balance", "stay"), ("eigenbasis", "return")):
        model, symmetries = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        teleporter = tf.attach(optimizer, symmetries, objective, tf.Every(3), frame=frame)
        runs.append((model, optimizer, teleporter))
    generator, read, every = torch.Generator().manual_seed(1), list[tuple[int, int]](), max(1, steps // 20)
    for step in range(steps):
        x = torch.randn(8, 16, generator=generator)
        for model, optimizer, _ in runs:
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        if (step + 1) % every == 0:
            read.append((step + 1, resident()))
    warm = next(bytes for step, bytes in read if step >= steps // 10)
    finite = all(bool(parameter.isfinite().all()) for model, *_ in runs for parameter in model.parameters())
    return {
        "steps": steps, "teleports": [len(teleporter.history) for *_, teleporter in runs], "resident": read,
        "growth": read[-1][1] - warm, "finite": finite,
    }  # fmt: skip


def drift(moves: int, objective: str, frame: str) -> float:
    """How far `moves` teleports move the logits of a GPT in float32, of their norm; the optimizer's own steps move nothing."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=64, d_model=32, layers=2, heads=2, context=8))
    tokens = torch.randint(64, (4, 8))
    with torch.no_grad():  # a fresh GPT's last projections are zero
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(tokens)
        return found.double()

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    teleporter = tf.attach(optimizer, tf.find_symmetries(model), objective, tf.Every(1), frame=frame)
    before = logits()
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    for _ in range(moves + 1):  # Every does not fire before the first
        optimizer.step()
    assert len(teleporter.history) == moves
    return float((logits() - before).norm() / before.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--moves", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="Write the figures as JSON here, too.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = memory(options.steps)
    grown = ", ".join(f"{bytes / 2**20:.1f}" for _, bytes in report["resident"])
    print(f"{options.steps} steps of two runs, {report['teleports']} teleports; resident MB every {max(1, options.steps // 20)} steps: {grown}")
    print(f"growth after a tenth of the steps: {report['growth'] / 2**20:.2f} MB (at most {GROWTH / 2**20:.0f})")
    ways = {"grad_norm, there and back": ("grad_norm", "return"), "random turns that stay": ("random", "stay")}
    report["drift"] = {name: drift(options.moves, *way) for name, way in ways.items()}
    for name, moved in report["drift"].items():
        print(f"{options.moves} teleports, {name}: logits moved by {moved:.1e} (at most {DRIFT:.0e})")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    failed = report["growth"] > GROWTH or not report["finite"] or max(report["drift"].values()) > DRIFT
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
