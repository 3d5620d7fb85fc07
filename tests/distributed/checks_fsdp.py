"""Teleports of a fully sharded or replicated model are those of one process."""

from __future__ import annotations

from typing import Any

import stand
import torch
from ranks import on
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import teleport_fast as tf

prepare = stand.prepare


def sharded(model: nn.Module, **arguments: Any) -> None:
    """Every block by itself, then the rest, as training scripts do."""
    for block in model.blocks:
        fully_shard(block, **arguments)
    fully_shard(model, **arguments)


@on(2)
def data_parallel_teleports_are_those_of_one_process() -> None:
    for objective in ("grad_norm", "balance", "eigenbasis"):
        stand.compared("gpt", DistributedDataParallel, objective=objective, schedule=tf.At(1, 3))


@on(2, 4)
def fully_sharded_gradient_norms_are_those_of_one_process() -> None:
    for kind in ("gpt", "uneven"):
        for direction in ("ascend", "descend"):
            stand.compared(kind, sharded, objective="grad_norm", direction=direction, schedule=tf.At(1, 3), radius=0.3)


@on(2, 4)
def fully_sharded_balance_and_eigenbases_are_those_of_one_process() -> None:
    for kind in ("gpt", "uneven"):
        stand.compared(kind, sharded, objective="balance", schedule=tf.At(1))
        stand.compared(kind, sharded, objective="eigenbasis", schedule=tf.Every(2), steps=5)
