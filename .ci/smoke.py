"""Tries an installed teleport_fast: python .ci/smoke.py [--inside FOLDER] [--require cpp] [--holds FILE]; says what is wrong.

It imports nothing but torch, the standard library and the package, so that it runs wherever a wheel is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.resources
import sys
from pathlib import Path

import torch

import teleport_fast as tf
from teleport_fast import doctor
from teleport_fast.experiments.gpt import GPT, GPTConfig


def installed(inside: Path | None, holds: list[str]) -> None:
    """The package that was imported is the one asked for, typed, and says one version of itself."""
    found = Path(tf.__file__).resolve()
    if inside is not None and inside.resolve() not in found.parents:
        raise SystemExit(f"smoke: imported {found}, which is not inside {inside}; is another installation on the path?")
    assert importlib.metadata.version("teleport-fast") == tf.__version__
    assert importlib.resources.files("teleport_fast").joinpath("py.typed").is_file()
    assert importlib.resources.files("teleport_fast.kernels").joinpath("gram.py").is_file()
    for name in holds:
        if not found.with_name(name).is_file():
            raise SystemExit(f"smoke: {found.parent} holds no {name}")


def computes() -> None:
    """An op of each kind by every backend that is there, against float64."""
    G = torch.randn(2, 8, 40, dtype=torch.float64)
    for name, available in tf.backends().items():
        if available is not True or name == "triton":
            continue
        with tf.set_backend(name):
            difference, _ = tf.ops.gram_difference(G, 2 * G)
            moved = G.clone()
            tf.ops.diagonal_action_(moved, torch.full((2, 8), 2.0, dtype=torch.float64))
        torch.testing.assert_close(difference, 3 * G @ G.mT)
        torch.testing.assert_close(moved, 2 * G)


def teleports() -> None:
    """One step with a move leaves the outputs where a move alone must."""
    model = GPT(GPTConfig(d_model=16, layers=1, heads=2, context=8)).double()
    torch.nn.init.normal_(model.head.weight)  # it starts at zero, and so would every other gradient
    ids = torch.randint(256, (2, 9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    teleporter = tf.attach(optimizer, tf.find_symmetries(model), objective="grad_norm", schedule=tf.Every(1))
    before = model(ids[:, :-1])
    torch.nn.functional.cross_entropy(before.flatten(0, 1), ids[:, 1:].flatten()).backward()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        optimizer.step()
    assert len(teleporter.history) >= 1, "no teleport"
    assert any(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True)), "nothing moved"
    torch.testing.assert_close(model(ids[:, :-1]), before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", type=Path)
    parser.add_argument("--require", action="append", default=[], metavar="BACKEND")
    parser.add_argument("--holds", action="append", default=[], metavar="FILE", help="beside the package's Python files")
    options = parser.parse_args()
    torch.manual_seed(0)
    installed(options.inside, options.holds)
    computes()
    teleports()
    return doctor.main(["--summary", *(part for name in options.require for part in ("--require", name))])


if __name__ == "__main__":
    sys.exit(main())
