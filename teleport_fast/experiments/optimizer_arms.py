"""Training a stack of networks on images with one optimizer in the arms of a fair comparison: plain, reset, teleported."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teleport_fast.data_dependent import CrossEntropy, RankWarning, RoundOffWarning, TeleportReport
from teleport_fast.experiments.datasets import Images
from teleport_fast.experiments.stack import OPTIMIZERS, Stack


@dataclass(frozen=True)
class Move:
    """How an arm teleports: MLPAction's form and teleport options on a mini-batch of `batch` samples."""

    form: str
    batch: int
    steps: int
    lr: float
    cap: float = 100.0
    parity: bool = False
    check: bool = False
    second_moments: str = "keep"


@dataclass(frozen=True)
class Arm:
    """`state`: what becomes of the optimizer's state at each teleport, "keep", "reset" or "carry"; no move: nothing else happens."""

    name: str
    move: Move | None
    state: str


@dataclass(frozen=True)
class Setting:
    """Network, optimizer, learning rate, and the epoch whose first `teleports` mini-batches are preceded by a teleport each."""

    widths: tuple[int, ...]
    optimizer: str
    lr: float
    epochs: int
    teleport_epoch: int
    batch: int = 20
    teleports: int = 8


@dataclass
class Trained:
    """By seed: each epoch's mean mini-batch loss, the end's losses and accuracy on whole splits; the teleports' reports."""

    epochs: list[Tensor]
    train_loss: Tensor
    test_loss: Tensor
    test_accuracy: Tensor
    reports: list[TeleportReport]
    stack: Stack


def train(images: Images, setting: Setting, arm: Arm, seeds: Sequence[int]) -> Trained:
    """Trains the seeds' networks on the same mini-batches in the same order, as published; teleports draw theirs from the seed."""
    X, labels = images.inputs(images.train).mT.contiguous(), images.train.labels
    stack = Stack.uniform(setting.widths, seeds)
    optimizer = OPTIMIZERS[setting.optimizer](stack.weights, setting.lr)
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    batches = torch.arange(len(labels)).split(setting.batch)
    epochs, reports = [], []
    for epoch in range(setting.epochs):
        total = torch.zeros(len(seeds))
        for index, batch in enumerate(batches):
            if epoch == setting.teleport_epoch and index < setting.teleports:
                if arm.move is not None:
                    for seed, stream in enumerate(streams):
                        reports += teleport(stack, seed, X, labels, arm, stream, optimizer)
                if arm.state == "reset":
                    optimizer = OPTIMIZERS[setting.optimizer](stack.weights, setting.lr)
            optimizer.zero_grad()
            losses = stack.cross_entropy(X[:, batch], labels[batch])
            losses.sum().backward()
            optimizer.step()
            total += losses.detach() * len(batch)
        epochs.append(total / len(labels))
    Y, answers = images.inputs(images.test).mT, images.test.labels
    with torch.no_grad():
        ends = stack.cross_entropy(X, labels), stack.cross_entropy(Y, answers), stack.accuracy(Y, answers)
    return Trained(epochs, *ends, reports, stack)


def teleport(
    stack: Stack, seed: int, X: Tensor, labels: Tensor, arm: Arm, stream: torch.Generator, optimizer: torch.optim.Optimizer | None = None
) -> list[TeleportReport]:
    """One teleport of the network at place `seed` on a mini-batch drawn from `stream`.

    None, and the network as it was, where it has diverged or a published loop leaves the finite numbers within its steps.
    """
    move = arm.move
    assert move is not None
    few = torch.randperm(len(labels), generator=stream)[: move.batch]
    if not stack.finite(seed):
        return []
    if move.form == "u_exact":
        # Some of the digits' pixels are 0 in most images, so that 51 of them can have a rank of 50.
        while (rank := int(torch.linalg.matrix_rank(X[:, few].double()))) < len(few):
            few = few[:rank]
    every = CrossEntropy(labels)
    options: dict[str, object] = {"recheck": lambda weights: every(stack.like(weights, X))} if move.check else {}
    with warnings.catch_warnings():
        # Counted and shown in the study's table instead of said at each of hundreds of teleports.
        warnings.simplefilter("ignore", RankWarning)
        warnings.simplefilter("ignore", RoundOffWarning)
        try:
            report = stack.teleport_(
                seed, X[:, few], CrossEntropy(labels[few]), optimizer if arm.state == "carry" else None, move.form,
                second_moments=move.second_moments, steps=move.steps, lr=move.lr, cap=move.cap, parity=move.parity, **options,
            )
        except torch.linalg.LinAlgError:
            return []
    # Without the steps' matrices, which nobody reads here and a process would have to hand over.
    return [replace(report, steps=[])]
