"""Teleports of a fully sharded or replicated model are those of one process."""

from __future__ import annotations

from typing import Any

import stand
import torch
import torch.distributed as dist
from ranks import on
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import teleport_fast as tf
from teleport_fast.objectives import Eigenbasis, Fixed, GradNorm

prepare = stand.prepare
KINDS = {2: ("gpt", "uneven"), 4: ("uneven",)}


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
    for kind in KINDS[dist.get_world_size()]:
        for direction in ("ascend", "descend"):
            stand.compared(kind, sharded, objective="grad_norm", direction=direction, schedule=tf.At(1, 3), radius=0.3)


@on(2, 4)
def fully_sharded_balance_and_eigenbases_are_those_of_one_process() -> None:
    for kind in KINDS[dist.get_world_size()]:
        stand.compared(kind, sharded, objective="balance", schedule=tf.At(1))
        stand.compared(kind, sharded, objective="eigenbasis", schedule=tf.Every(2), steps=5)


@on(2)
def every_objective_and_frame_is_that_of_one_process() -> None:
    stand.compared("wide", sharded, objective="eigenbasis", schedule=tf.Every(3), steps=7)  # a quarter of the columns a step
    for arguments in (
        {"normalise": "joint", "parts": 1},
        {"normalise": "none", "iterations": 2, "parts": 1},
        {"takes": "turns", "parts": 1},
    ):
        stand.compared("gpt", sharded, objective=lambda a=arguments: Eigenbasis(**a), schedule=tf.At(1, 2))
    stand.compared("gpt", sharded, objective="eigenbasis", schedule=tf.At(1), frame="return")
    stand.compared("gpt", sharded, objective="grad_norm", schedule=tf.At(1, 2), frame="return")
    stand.compared("uneven", sharded, objective="grad_l1", schedule=tf.At(1, 2), keep=lambda j: j.group.form == "diagonal")
    stand.compared("gpt", sharded, objective=lambda: GradNorm(steps=3), schedule=tf.At(1))
    stand.compared("gpt", sharded, objective="ratio", schedule=tf.Once(1))
    stand.compared("gpt", sharded, objective="random", schedule=tf.At(1))
    stand.compared("gpt", sharded, objective="scaled", frame="return", base=lambda p: torch.optim.SGD(p, lr=1e-2))
    for policy in ("reset", "project"):
        stand.compared("uneven", sharded, objective="grad_norm", schedule=tf.At(2), second_moments=policy)
    stand.compared("gpt", sharded, schedule=tf.At(2), max_norm=0.05, base=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))


@on(2)
def permutations_of_sharded_units_are_those_of_one_process() -> None:
    joints = [joint for joint in stand.joints_of("gelu") if joint.group.form == "permutation"]
    assert joints
    elements = stand.Symmetries(tuple(joints)).random()
    stand.compared("gelu", sharded, objective=lambda: Fixed(elements), schedule=tf.At(1, 2), keep=lambda j: j in joints)
    stand.compared("gelu", sharded, objective="grad_norm", schedule=tf.At(1))
    stand.compared("gelu", sharded, objective="balance", schedule=tf.At(1))


@on(2)
def wrappers_options_change_nothing() -> None:
    for options in (
        {"reshard_after_forward": False},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"shard_placement_fn": lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % 2 == 0 else None},
    ):
        stand.compared("gpt", lambda model, o=options: sharded(model, **o), objective="grad_norm", schedule=tf.At(1, 2))
        stand.compared("gpt", lambda model, o=options: sharded(model, **o), objective="eigenbasis", schedule=tf.At(1, 2))


@on(2)
def tied_tensors_accumulated_and_clipped_gradients_are_those_of_one_process() -> None:
    for objective in ("grad_norm", "eigenbasis"):
        stand.compared("tied", sharded, objective=objective, schedule=tf.At(1, 2))
    results = []
    for wrap in (False, True):
        model = stand.built("tied")
        if wrap:
            sharded(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        tf.attach(optimizer, stand.symmetries_of("tied", model), schedule=tf.At(0, 1))
        for _ in range(2):
            for number, (tokens, targets) in enumerate(stand.batches("tied", 2, 2)):
                if wrap:
                    model.set_requires_gradient_sync(number == 1)
                stand.loss_of(model, tokens, targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        results.append(stand.weights(model))
    assert stand.far(*results) < 1e-9 and stand.far(results[0], stand.weights(stand.built("tied"))) > 1e-3


@on(2)
def apply_moves_a_sharded_model_as_a_whole_one() -> None:
    for kind in ("gpt", "gelu"):
        model, parts = stand.built(kind), stand.built(kind)
        sharded(parts)
        symmetries = stand.symmetries_of(kind)
        elements = symmetries.random(radius=0.3)
        symmetries.apply_(model, elements)
        symmetries.apply_(parts, elements)
        assert stand.far(stand.weights(model), stand.weights(parts)) < 1e-12
        assert stand.far(stand.weights(model), stand.weights(stand.built(kind))) > 1e-2
        tokens, targets = next(stand.batches(kind, 1, 2))
        before, after = (float(stand.loss_of(m, tokens, targets).detach()) for m in (stand.built(kind), parts))
        assert abs(before - after) < 1e-9


@on(4)
def hybrid_shards_are_counted_once() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for objective in ("grad_norm", "eigenbasis"):
        stand.compared("gpt", lambda model: sharded(model, mesh=mesh), objective=objective, schedule=tf.At(1, 3))


@on(2)
def mixed_precision_teleports_keep_the_function() -> None:
    """bfloat16 in forward and backward, weights in float32: the same gradients give the same weights as in one process."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = stand.built("gpt").float()
    sharded(model, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    teleporter = tf.attach(optimizer, stand.symmetries_of("gpt", model), schedule=tf.At(0), radius=0.3)
    tokens, targets = next(stand.batches("gpt", 1, 2))
    before = stand.weights(model)
    loss = stand.loss_of(model, tokens, targets)
    loss.backward()
    gradients = {name: stand.full(p.grad) for name, p in model.named_parameters()}
    optimizer.step()
    single = stand.built("gpt").float()
    for name, parameter in single.named_parameters():
        parameter.data.copy_(before[name])
        parameter.grad = gradients[name].clone()
    alone = torch.optim.SGD(single.parameters(), lr=1e-9)
    tf.attach(alone, stand.symmetries_of("gpt", single), schedule=tf.At(0), radius=0.3)
    alone.step()
    assert teleporter.history
    assert stand.far(stand.weights(model), before) > 1e-3, stand.far(stand.weights(model), before)
    assert stand.far(stand.weights(model), stand.weights(single)) < 1e-6
    with torch.no_grad():
        moved = stand.loss_of(single, tokens, targets)
        there = stand.built("gpt").float()
        there.load_state_dict(before, strict=False)
    assert abs(float(moved) - float(stand.loss_of(there, tokens, targets))) < 1e-5
