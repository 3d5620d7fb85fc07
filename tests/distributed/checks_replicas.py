"""Replicas of a model on many ranks: they move by the first one's elements, at the first one's word."""

from __future__ import annotations

import warnings

import stand
import torch
import torch.distributed as dist
from ranks import on
from torch.nn.parallel import DistributedDataParallel

import teleport_fast as tf

prepare = stand.prepare


@on(2)
def replicas_of_a_group_go_by_the_first_ranks_word() -> None:
    for group in (dist.group.WORLD, None):
        model = DistributedDataParallel(stand.built("gpt"))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        rank = dist.get_rank()
        schedule = tf.When(lambda info, rank=rank: info.step == 1 + rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            teleporter = tf.attach(optimizer, stand.symmetries_of("gpt", model.module), schedule=schedule, group=group)
        assert any("group=" in str(warning.message) for warning in caught) is (group is None)
        stand.trained(model, optimizer, "gpt", steps=3, share=True)
        # without a group each rank goes by its own word, and the replicas part
        assert [record.step for record in teleporter.history] == ([1] if group is not None else [1 + rank])
        assert stand.same_everywhere(list(stand.weights(model).values())) is (group is not None)


@on(2)
def replicas_that_decide_by_different_bits_move_by_the_first_ones() -> None:
    for objective, group in (("grad_norm", dist.group.WORLD), ("eigenbasis", dist.group.WORLD), ("eigenbasis", None)):
        model = stand.built("gpt")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        teleporter = tf.attach(
            optimizer, stand.symmetries_of("gpt", model), objective=objective, schedule=tf.At(0), group=group
        )
        seen = stand.moved_by(teleporter)
        tokens, targets = next(stand.batches("gpt", 1, 2))
        stand.loss_of(model, tokens, targets).backward()
        with torch.no_grad():
            for parameter in model.parameters():  # another kernel's rounding on one rank
                parameter.grad.mul_(1 + 1e-12 * dist.get_rank())
        optimizer.step()
        assert stand.same_everywhere(seen) is (group is not None)
