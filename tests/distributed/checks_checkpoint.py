"""Distributed checkpoints: saved on 4, 2 and 1 ranks, loaded on as many bit for bit and on others, by torch's own engine."""

from __future__ import annotations

import copy
import io
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on
from rotated_cases import HEADS, gpt, mesh, replicated_state, same_on_all_ranks, train, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import teleport_fast as tf
from teleport_fast.optim import Rotated

Make = Callable[[nn.Module], Any]
OPTIONS: dict[str, Any] = {"lr": 0.01, "every": 2, "weight_decay": 0.1, "hidden": 8, "sides": HEADS, "table_lr": 0.02}


def rotated(model: nn.Module) -> Any:
    return Rotated(model.named_parameters(), **OPTIONS)


def shared_path() -> str:
    """A folder that rank 0 makes and every rank knows."""
    found: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return str(found[0])


def sharded(over: DeviceMesh) -> Any:
    model = gpt()
    for block in model.blocks:
        fully_shard(block, mesh=over)
    return fully_shard(model, mesh=over)


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def restore(path: str, model: Any, optimizer: Any, group: Any = None) -> None:
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=path, process_group=group)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def everything(model: Any, optimizer: Any) -> dict[str, Tensor]:
    """Weights and state, whole, by name: a collective over the model's mesh."""
    found = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{name} {k}": whole(v).clone() for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor)}
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@on(4)
def a_resumed_rotated_run_is_the_uninterrupted_one_and_reshards() -> None:
    resumes_and_reshards(rotated)


def resumes_and_reshards(make: Make) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    path = shared_path()
    model = sharded(mesh(world))
    optimizer = make(model)
    train(model, optimizer, range(3), rank, world)
    at_save = everything(model, optimizer)
    # its thread talks while this one trains and saves: over the same group the two would mix
    apart = dist.new_group()
    saving = dcp.async_save(state_of(model, optimizer), checkpoint_id=f"{path}/async", process_group=apart)
    dcp.save(state_of(model, optimizer), checkpoint_id=f"{path}/plain")
    saving.result()
    train(model, optimizer, range(3, 6), rank, world)
    at_end = everything(model, optimizer)
    for name in ("plain", "async"):
        resumed = sharded(mesh(world))
        second = make(resumed)
        restore(f"{path}/{name}", resumed, second)
        assert equal(everything(resumed, second), at_save), name
        train(resumed, second, range(3, 6), rank, world)
        assert equal(everything(resumed, second), at_end), name
        assert all(map(same_on_all_ranks, replicated_state(second)))
    # half of the ranks, with the same numbers whole, and on with them
    half = DeviceMesh("cpu", list(range(world // 2)))
    if rank < world // 2:
        fewer = sharded(half)
        third = make(fewer)
        restore(f"{path}/plain", fewer, third, half.get_group())
        assert equal(everything(fewer, third), at_save)
        train(fewer, third, range(3, 6), rank, world // 2)
        found = everything(fewer, third)
        assert all(torch.allclose(found[key], at_end[key], rtol=1e-6, atol=1e-6) for key in found if "basis" not in key)
    # one process, without torch.distributed
    if rank == 0:
        alone = gpt()
        fourth = make(alone)
        state = state_of(alone, fourth)
        dcp.load(state, checkpoint_id=f"{path}/plain", no_dist=True)
        alone.load_state_dict(state["model"])
        set_optimizer_state_dict(alone, fourth, state["optimizer"])
        assert equal(everything(alone, fourth), at_save)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(path)


@on(2)
def a_whole_state_goes_through_a_file_with_weights_only_and_comes_back_in_shards() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = sharded(mesh(world))
    optimizer = rotated(model)
    train(model, optimizer, range(3), rank, world)
    at_save = everything(model, optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = [get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)]
    if rank == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        alone = gpt()
        second = rotated(alone)
        alone.load_state_dict(state[0])
        set_optimizer_state_dict(alone, second, copy.deepcopy(state[1]))
        assert equal(everything(alone, second), at_save)
    else:
        state = [{}, {}]
    resumed = sharded(mesh(world))
    third = rotated(resumed)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(resumed, state[0], options=options)
    set_optimizer_state_dict(resumed, third, state[1], options=options)
    assert equal(everything(resumed, third), at_save)
    # the optimizer's own state_dict, of one process, is cut where it is loaded
    whole_state = rotated(single := gpt())
    train(single, whole_state, range(3))
    third.load_state_dict(copy.deepcopy(whole_state.state_dict()))
    wanted = everything(single, whole_state)
    found = everything(resumed, third)
    assert all(torch.equal(found[key], wanted[key]) for key in found if " " in key)
    # an older state knows neither nesterov nor shards' layouts: steps without, as it was made
    older = third.state_dict()
    for group in older["param_groups"]:
        del group["nesterov"]
    third.load_state_dict(older)
    assert [group["nesterov"] for group in third.param_groups] == [False] * len(third.param_groups)
    # a state of other bases is refused, on every rank alike
    other = Rotated(resumed.named_parameters(), **{**OPTIONS, "sides": {}})
    try:
        other.load_state_dict(third.state_dict())
    except ValueError as error:
        assert "same stream, heads" in str(error)
    else:
        raise AssertionError("a state of other bases was taken")


def under_attach(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    tf.attach(optimizer, joints(model), schedule=tf.Every(2), radius=0.1)
    return optimizer


def fused(model: nn.Module) -> Any:
    return tf.optim.AdamW(model.named_parameters(), lr=0.01, symmetries=joints(model), schedule=tf.Every(2), radius=0.1)


def joints(model: nn.Module) -> tf.Symmetries:
    """Made by hand: a checkpoint does not ask whether the function stays."""

    def joint(name: str, group: tf.symmetry.Group, plus: str, minus: str, heads: int, width: int) -> tf.Joint:
        first, second = tf.View(f"blocks.0.{plus}.weight", 0, heads, width), tf.View(f"blocks.0.{minus}.weight", 1, heads, width)
        return tf.Joint(name, name, group, heads, width, (first,), (second,))

    found = (
        joint("neurons", tf.symmetry.Diagonal(16), "mlp.up", "mlp.down", 1, 16),
        joint("value-output", tf.symmetry.GeneralLinear(2), "attention.v", "attention.o", 4, 2),
    )
    return tf.Symmetries(found, model=model)


@on(4)
def a_resumed_attached_run_is_the_uninterrupted_one_and_reshards() -> None:
    resumes_and_reshards(under_attach)


@on(4)
def a_resumed_fused_run_is_the_uninterrupted_one_and_reshards() -> None:
    resumes_and_reshards(fused)
