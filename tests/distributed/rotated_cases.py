"""What the checks of `Rotated` on many ranks share: a tiny GPT, its training, and a single process that gets the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch._dynamo  # fully_shard loads it, a second that the ranks are spared when it is there before they fork
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.optim import Rotated

NAMES = {1: ("dp",), 2: ("dp", "tp")}
HEADS = {"*.attention.[qkv].weight": ("heads:4", "stream"), "*.attention.o.weight": ("stream", "heads:4")}


@lru_cache
def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=NAMES[len(shape)])


def gpt(dtype: torch.dtype = torch.float64, width: int = 8, hidden: int = 16) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(vocab=13, context=6, d_model=width, layers=1, heads=4 if width == 8 else 5, hidden=hidden)
    return GPT(config).to(dtype)


def loss_of(model: nn.Module, step: int, rank: int = 0, world: int = 1) -> Tensor:
    """The rank's share of a batch that depends on the step alone."""
    ids = torch.randint(13, (4, 6), generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, optimizer: Any, steps: range, rank: int = 0, world: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, rank, world).backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """A collective: every rank must ask."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def state_of(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    return {key: whole(value) for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}


def distance(one: Any, other: Any) -> float:
    """The largest difference of two optimizers' parameters and states, relative to each tensor's largest entry."""
    worst = 0.0
    for p, q in zip(parameters_of(one), parameters_of(other), strict=True):
        pairs = [(whole(p), whole(q))]
        mine, theirs = state_of(one, p), state_of(other, q)
        assert mine.keys() == theirs.keys(), (mine.keys(), theirs.keys())
        pairs += [(mine[key], theirs[key]) for key in mine]
        for a, b in pairs:
            assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
            if a.numel():
                a, b = (each.double() for each in (a, b))
                assert a.isfinite().all() and b.isfinite().all()
                worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst


def parameters_of(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def same_on_all_ranks(tensor: Tensor) -> bool:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return all(torch.equal(each, found[0]) for each in found)


def replicated_state(optimizer: Any) -> list[Tensor]:
    """Counters, bases and covariances: what every rank keeps in full."""
    states = [optimizer.state[parameter] for parameter in parameters_of(optimizer)]
    return [v for state in states for v in state.values() if isinstance(v, Tensor) and not isinstance(v, DTensor)]


class Twins:
    """Matrices as DTensors and whole ones in one process, stepped by `Rotated` with the same random gradients."""

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], on: DeviceMesh, placements: list[Placement], dtype: torch.dtype, **options: Any
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.whole = {n: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in shapes.items()}
        copies = [Replicate()] * on.ndim
        self.sharded = {
            n: nn.Parameter(distribute_tensor(p.detach(), on, placements if p.dim() == 2 else copies))
            for n, p in self.whole.items()
        }
        self.one, self.many = (Rotated([*p.items()], **options) for p in (self.whole, self.sharded))
        self.generator = generator

    def step(self, count: int) -> Twins:
        for _ in range(count):
            for name, parameter in self.whole.items():
                parameter.grad = torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64).to(parameter.dtype)
                many: Any = self.sharded[name]
                many.grad = distribute_tensor(parameter.grad, many.device_mesh, many.placements)
            self.one.step()
            self.many.step()
        return self

    def distance(self) -> float:
        return distance(self.one, self.many)


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def follow(model: nn.Module, optimizer: Any, reference: Any, steps: range, rank: int, world: int) -> None:
    """Train the sharded model, and let the reference in each process step with the gradients that it had."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, rank, world).backward()
        for p, q in zip(parameters_of(reference), parameters_of(optimizer), strict=True):
            p.grad = None if q.grad is None else whole(q.grad).clone()
        reference.step()
        optimizer.step()


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
