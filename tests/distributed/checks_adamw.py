"""`tf.optim.AdamW` on many ranks is `tf.optim.AdamW` in one process."""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist
from checks_checkpoint import fused, under_attach
from ranks import on
from rotated_cases import distance, gpt, mesh, parameters_of, same_on_all_ranks, train
from torch import nn
from torch.distributed.fsdp import fully_shard

from teleport_fast.distributed import counted


@on(2, 4)
def fused_adamw_under_ddp_and_fully_shard_is_the_single_process_one_and_attachs() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    single = gpt()
    ddp, shards, attached = (copy.deepcopy(single) for _ in range(3))
    one = fused(single)
    train(single, one, range(5))
    wrapped = nn.parallel.DistributedDataParallel(ddp)
    many = fused(ddp)
    with counted() as traffic:
        train(wrapped, many, range(5), rank, world)
    assert traffic.reduced == traffic.turned == 0
    assert distance(one, many) < 1e-9 and all(same_on_all_ranks(p.detach()) for p in parameters_of(many))
    assert len(many.teleporter.history) == 2
    results: list[Any] = []
    for model, make in ((shards, fused), (attached, under_attach)):
        for block in model.blocks:
            fully_shard(block, mesh=mesh(world))
        fully_shard(model, mesh=mesh(world))
        results.append(make(model))
        train(model, results[-1], range(5), rank, world)
        assert distance(one, results[-1]) < 1e-9
    assert distance(results[0], results[1]) < 1e-12
    # a run that teleports never is another one
    plain = gpt()
    never = fused(plain)
    never.teleporter.detach()
    train(plain, never, range(5))
    assert distance(one, never) > 1e-3
