"""Seconds of a method's average step beside a training step's, on so many GPUs, and what they are spent on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from bench.scale.costs import Method, Work, at_refresh, every_step, parameter_bytes, state_of_a_rank
from bench.scale.machines import Machine, Reached, all_reduce, exchange
from bench.scale.shapes import Shape

PARTS = ("products", "factorisations", "memory", "network")
GPUS = (8, 64, 512, 4096)
PERCENT = 0.01


@dataclass(frozen=True)
class Setting:
    """tf32: products of the optimizer in TF32 (`torch.set_float32_matmul_precision("high")`) instead of torch's default, float32."""

    machine: Machine
    reached: Reached = field(default_factory=Reached)
    tf32: bool = False
    tokens: int | None = None


@dataclass(frozen=True)
class Share:
    """Seconds of a method per step, by part, against a step's; bytes that a rank keeps of covariances and bases, and of all."""

    seconds: dict[str, float]
    step: float
    state: float
    held: float

    @property
    def share(self) -> float:
        return sum(self.seconds.values()) / self.step

    @property
    def dominant(self) -> str:
        return max(self.seconds, key=lambda part: self.seconds[part])


def training_step(shape: Shape, ranks: int, setting: Setting) -> float:
    """Seconds of forward, backward and their communication: the step's flops at the share of the peak that is said to be reached."""
    tokens = setting.tokens or shape.tokens
    return shape.flops_per_token * tokens / (ranks * setting.machine.bfloat16 * setting.reached.training)


def seconds(work: Work, ranks: int, setting: Setting) -> dict[str, float]:
    """By part, one after the other with nothing hidden behind anything."""
    machine, reached = setting.machine, setting.reached
    rate = (machine.tf32 if setting.tf32 else machine.float32) * reached.products
    slow = machine.float32 * reached.factorisations
    # whole matrices cannot be cut: no rank finishes before the one with the largest
    products = max(work.products / ranks, work.alone_products) + work.own_products
    factorisations = max(work.factorisations / ranks, work.alone_factorisations) + work.own_factorisations
    network = all_reduce(machine, reached, work.reduced, ranks) + exchange(machine, reached, work.exchanged, ranks)
    return {
        "products": products / rate,
        "factorisations": factorisations / slow,
        "memory": work.streamed / ranks / (machine.memory * reached.memory),
        "network": network,
    }


def simulate(shape: Shape, method: Method, ranks: int, setting: Setting) -> Share:
    """A method's average step. Errors: ValueError for fewer ranks than one."""
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}; 8 is a node")
    own = state_of_a_rank(shape, method, ranks)
    step, refresh = (seconds(work(shape, method, ranks), ranks, setting) for work in (every_step, at_refresh))
    mean = {part: step[part] + refresh[part] / method.every for part in PARTS}
    return Share(mean, training_step(shape, ranks, setting), own, own + parameter_bytes(shape) / ranks)


def least_every(shape: Shape, method: Method, ranks: int, setting: Setting, share: float = PERCENT, most: int = 4096) -> int | None:
    """The fewest steps between refreshes at which the method is below `share` of a step; None where no number up to `most` is."""

    def below(every: int) -> bool:
        return simulate(shape, replace(method, every=every), ranks, setting).share < share

    if not below(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if below(middle) else (middle, high)
    return high


def least_tokens(shape: Shape, method: Method, ranks: int, setting: Setting, share: float = PERCENT) -> int:
    """Tokens of a step, all ranks together, above which the method is below `share` of it: its seconds know nothing of them."""
    one = training_step(shape, ranks, replace(setting, tokens=1))
    found = simulate(shape, method, ranks, setting)
    return int(sum(found.seconds.values()) / (share * one)) + 1
