"""Small LeakyReLU networks trained by SGD as in [ICLR24]: up to a teleport once a seed, then on from there by every arm."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.data_dependent import CrossEntropy, MLPAction, leaky_relu
from teleport_fast.data_dependent.reference import forward
from teleport_fast.experiments.datasets import found, load
from teleport_fast.experiments.studies.study import Options

WIDTHS = (16, 10)  # hidden, as published for MNIST and Fashion-MNIST
BATCH, RATE = 20, 1e-2
SIGMA = leaky_relu(0.1)
Weights = list[Tensor]
Teleport = Callable[[Weights], Weights]


@dataclass(frozen=True)
class Data:
    """Inputs as columns, float64, standardised, and labels, of both splits; `train` and `test` give the mean cross entropy of weights."""

    name: str
    X: Tensor
    labels: Tensor
    X_test: Tensor
    labels_test: Tensor
    classes: int

    def train(self, weights: Sequence[Tensor]) -> float:
        """Loss on the training split."""
        return float(CrossEntropy(self.labels)(forward(weights, self.X, SIGMA)[-1]))

    def test(self, weights: Sequence[Tensor]) -> float:
        """Loss on the test split."""
        return float(CrossEntropy(self.labels_test)(forward(weights, self.X_test, SIGMA)[-1]))

    def accuracy(self, weights: Sequence[Tensor]) -> float:
        """Share of the test split that is told right."""
        return float((forward(weights, self.X_test, SIGMA)[-1].argmax(0) == self.labels_test).double().mean())

    def batch(self, size: int, seed: int, form: str) -> Callable[[Sequence[Tensor]], tuple[MLPAction, CrossEntropy]]:
        """weights -> (the action on `size` training images drawn by `seed`, their loss)."""
        index = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))[:size]
        return lambda weights: (MLPAction(list(weights), self.X[:, index], form=form), CrossEntropy(self.labels[index]))


def data_of(options: Options) -> Data:
    """Digits, or the first data set found in options.data, less the training pixels' mean and over their spread."""
    name = "digits" if options.data is None else found(options.data)[0]
    images = load(name, options.data)
    X, X_test = (images.inputs(split, dtype=torch.float64).mT.contiguous() for split in (images.train, images.test))
    # The published code leaves pixels in [0, 1], which at its lr of .01 leaves digits, with 70 steps an epoch, hardly trained.
    mean, spread = X.mean(), X.std(correction=0)
    return Data(name, (X - mean) / spread, images.train.labels, (X_test - mean) / spread, images.test.labels, images.classes)


def start(data: Data, seed: int, hidden: Sequence[int] = WIDTHS) -> Weights:
    """Uniform in ±1/√n, n the width before, as torch.nn.Linear and the published code; no biases."""
    generator = torch.Generator().manual_seed(seed)
    widths = [len(data.X), *hidden, data.classes]
    return [
        (2 * torch.rand(after, before, generator=generator, dtype=torch.float64) - 1) / math.sqrt(before)
        for before, after in itertools.pairwise(widths)
    ]


def train(
    data: Data, weights: Weights, epochs: int, seed: int, rate: float = RATE, batch: int = BATCH, each: Callable[[Weights], None] | None = None
) -> Weights:
    """SGD for `epochs`, images shuffled anew each epoch by `seed`; each(weights) after every epoch."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [W.clone().requires_grad_() for W in weights]
    for _ in range(epochs):
        for index in torch.randperm(len(data.labels), generator=generator).split(batch):
            h = data.X[:, index]
            for W in leaves[:-1]:
                h = torch.nn.functional.leaky_relu(W @ h, 0.1)
            loss = torch.nn.functional.cross_entropy((leaves[-1] @ h).mT, data.labels[index])
            with torch.no_grad():
                for W, G in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                    W.sub_(G, alpha=rate)
        if each is not None:
            each([W.detach() for W in leaves])
    return [W.detach().clone() for W in leaves]


def train_many(
    data: Data, networks: Sequence[Weights], epochs: int, seeds: Sequence[int], rates: Sequence[float], batch: int
) -> list[Weights]:
    """`train` of networks of equal shapes side by side, each with its seed and rate: a step of all costs little more than one's."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    leaves = [torch.stack(layer).requires_grad_() for layer in zip(*networks, strict=True)]
    rate = torch.tensor(list(rates), dtype=torch.float64)[:, None, None]
    rows = data.X.mT.contiguous()
    for _ in range(epochs):
        orders = torch.stack([torch.randperm(len(data.labels), generator=generator) for generator in generators])
        for index in orders.split(batch, 1):
            h = rows[index].mT
            for W in leaves[:-1]:
                h = torch.nn.functional.leaky_relu(W @ h, 0.1)
            losses = torch.nn.functional.cross_entropy(leaves[-1] @ h, data.labels[index], reduction="none")
            total = losses.mean(1).sum()
            with torch.no_grad():
                for W, G in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
                    W.sub_(rate * G)
    return [[W[k].detach().clone() for W in leaves] for k in range(len(networks))]


@dataclass(frozen=True)
class Arm:
    """One way on from the teleport: training and test loss at it and after each epoch, and what the teleport did."""

    train: tuple[float, ...]
    test: tuple[float, ...]
    accuracy: float
    jump: float
    measure: float
    seconds: float


def go_on(
    data: Data, weights: Weights, epochs: int, seed: int, teleport: Teleport | None, measure: Callable[[Weights], float]
) -> Arm:
    """`epochs` of SGD after the teleport; `jump`: the training loss right after it over the one before, less 1."""
    begun = time.thread_time()
    there = weights if teleport is None else teleport(weights)
    seconds = time.thread_time() - begun
    trains, tests = [data.train(there)], [data.test(there)]

    def each(now: Weights) -> None:
        trains.append(data.train(now))
        tests.append(data.test(now))

    end = train(data, there, epochs, seed, each=each)
    return Arm(
        tuple(trains), tuple(tests), data.accuracy(end), trains[0] / data.train(weights) - 1, measure(there), seconds
    )
