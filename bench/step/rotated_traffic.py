"""What a step of `Rotated` under fully_shard sends and keeps per rank, against what fully_shard sends itself.

`python bench/step/rotated_traffic.py`: no weights and no processes, the layouts and sides are those that the optimizer would take.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from teleport_fast.distributed.layout import layout_of
from teleport_fast.optim import Rotated
from teleport_fast.optim.sharded import Placing

GB = 1e9
# width, layers, inner, heads, vocabulary
MODELS = {"0.12B": (768, 12, 2048, 12, 50304), "1.1B": (2048, 22, 5632, 32, 32000), "6.7B": (4096, 32, 11008, 32, 32000)}
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "hidden=32": {"hidden": 32},
    'stream="layer", hidden=32': {"stream": "layer", "hidden": 32},
}


def llama(width: int, layers: int, inner: int, vocab: int, mesh: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Named parameters, sharded as fully_shard does, on meta."""

    def weight(rows: int, columns: int) -> torch.nn.Parameter:
        part = torch.empty(len(torch.arange(rows).chunk(mesh.size())[0]), columns, device="meta")
        shape, stride = torch.Size((rows, columns)), (columns, 1)
        return torch.nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride))

    named = [("embed_tokens.weight", weight(vocab, width)), ("lm_head.weight", weight(vocab, width))]
    for i in range(layers):
        named += [(f"layers.{i}.self_attn.{name}_proj.weight", weight(width, width)) for name in "qkvo"]
        named += [(f"layers.{i}.mlp.{name}_proj.weight", weight(inner, width)) for name in ("gate", "up")]
        named.append((f"layers.{i}.mlp.down_proj.weight", weight(width, inner)))
    return named


def exchanged(placing: Placing, every: int) -> float:
    """Entries that leave this rank per step: gradient there, turned gradient there, update back, moments at a refresh."""
    if placing.stays:
        return 0.0
    ranks, at_home = len(placing.home.blocks), len(placing.turns_at_home)
    times = placing.works_elsewhere + bool(at_home) + 1 + 2 * at_home / every
    return times * math.prod(placing.home.shape) * (ranks - 1) / ranks**2


def row(name: str, ranks: int, options: dict[str, Any]) -> str:
    width, layers, inner, heads, vocab = MODELS[name]
    mesh = DeviceMesh("cpu", list(range(ranks)))
    named = llama(width, layers, inner, vocab, mesh)
    sides = {"*.[qkv]_proj.weight": (f"heads:{heads}", "stream"), "*.o_proj.weight": ("stream", f"heads:{heads}")}
    optimizer = Rotated(named, sides=sides, **options)
    reduced = moved = handed = 0.0
    for owned in (optimizer._assigned.owned(0, i) for i in range(len(named))):
        reduced += sum(side.heads * side.width * (side.width + 1) / 2 for side in owned)
        handed += sum(side.entries for side in owned) / 3
    for i, (_, parameter) in enumerate(named):
        assert layout_of(parameter).mesh is not None
        placing = optimizer._placings.of(optimizer._assigned.of(0, i), parameter, "adam", None)
        moved += exchanged(placing, 3) if placing is not None else 0.0
    # a ring sends each entry of a sum twice; fully_shard gathers weights twice (bfloat16) and scatters gradients (float32)
    share = (ranks - 1) / ranks
    own = sum(p.numel() for _, p in named) * (2 + 2 + 4) * share
    memory = optimizer.memory()
    cells = [2 * reduced * 4 * share, handed * 4 * share, moved * 4, own, memory.moments, memory.bases + memory.covariances]
    return " | ".join(f"{cell / GB:.3g}" for cell in cells)


def main() -> None:
    dist.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    heads = ("sums of covariances", "bases", "all-to-all", "fully_shard's own", "moments", "bases and covariances")
    print("| model | ranks | options | " + " | ".join(heads) + " |\n" + "| --- " * 9 + "|")
    for name in MODELS:
        for ranks in (8, 64):
            for choice, options in CHOICES.items():
                print(f"| {name} | {ranks} | {choice} | {row(name, ranks, options)} |")


if __name__ == "__main__":
    main()
