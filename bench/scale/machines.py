"""Public figures of the machines, and what share of each figure is taken to be reached."""

from __future__ import annotations

import math
from dataclasses import dataclass

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """Peaks of one GPU: bfloat16 dense, float32 outside tensor cores, TF32 dense (flops/s); bytes/s of its memory, of its link
    inside a node and of its network adapter, each in one direction; bytes of memory."""

    name: str
    source: str
    bfloat16: float
    float32: float
    tf32: float
    memory: float
    inside: float
    between: float
    holds: float
    node: int = 8


H100 = Machine(
    "H100", "NVIDIA H100 datasheet, SXM5: 1,979 bfloat16 and 989 TF32 with sparsity, half of it dense; NVLink 900 GB/s both ways; "
    "one 400 Gb/s InfiniBand port a GPU (DGX H100 datasheet)",
    bfloat16=989.5 * TERA, float32=67 * TERA, tf32=494.7 * TERA, memory=3350 * GIGA, inside=450 * GIGA, between=50 * GIGA, holds=80 * GIGA,
)  # fmt: skip
A100 = Machine(
    "A100", "NVIDIA A100 datasheet, SXM 80 GB: 312 bfloat16, 19.5 float32, 156 TF32 dense; NVLink 600 GB/s both ways; "
    "one 200 Gb/s InfiniBand port a GPU (DGX A100 datasheet)",
    bfloat16=312 * TERA, float32=19.5 * TERA, tf32=156 * TERA, memory=2039 * GIGA, inside=300 * GIGA, between=25 * GIGA, holds=80 * GIGA,
)  # fmt: skip
MACHINES = {machine.name: machine for machine in (H100, A100)}


@dataclass(frozen=True)
class Reached:
    """Assumptions, not measurements: shares of the peaks, and seconds per message.

    training: of bfloat16, by forward and backward with their own communication (model flops); products, factorisations: of float32
    (or TF32 for products), by large products and by QR; memory, network: of bytes a second. latency: of a collective's stage.
    """

    training: float = 0.4
    products: float = 0.7
    factorisations: float = 0.1
    memory: float = 0.8
    network: float = 0.7
    latency: float = 20e-6
    message: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("training", "products", "factorisations", "memory", "network"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}; it is a share of a peak")


def all_reduce(machine: Machine, reached: Reached, payload: float, ranks: int) -> float:
    """Seconds: 2 (n − 1)/n of the payload through each GPU; across nodes all of a node's adapters carry it together."""
    if ranks == 1 or not payload:
        return 0.0
    rate = machine.inside if ranks <= machine.node else min(machine.inside, machine.node * machine.between)
    return 2 * payload * (ranks - 1) / ranks / (rate * reached.network) + 2 * math.log2(ranks) * reached.latency


def exchange(machine: Machine, reached: Reached, everyone: float, ranks: int) -> float:
    """Seconds of an all-to-all of `everyone`'s bytes: a rank sends its share, less what it keeps, through its own adapter."""
    if ranks == 1 or not everyone:
        return 0.0
    rate = machine.inside if ranks <= machine.node else machine.between
    return sent(everyone, ranks) / (rate * reached.network) + reached.latency + (ranks - 1) * reached.message


def sent(everyone: float, ranks: int) -> float:
    """Bytes that one of `ranks` sends where all of them together lay out so many anew."""
    return everyone / ranks * (ranks - 1) / ranks
