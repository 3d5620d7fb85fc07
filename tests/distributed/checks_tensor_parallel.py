"""Teleports under tensor parallelism, and under tensor parallelism and full sharding at once, are those of one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import stand
import torch
from ranks import on
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import teleport_fast as tf
from teleport_fast.distributed import Layout, counted
from teleport_fast.distributed.refuse import impossible, is_ragged
from teleport_fast.objectives import GradNorm

prepare = stand.prepare
PLAN: dict[str, Any] = {
    "attention.q": ColwiseParallel(),
    "attention.k": ColwiseParallel(),
    "attention.v": ColwiseParallel(),
    "attention.o": RowwiseParallel(),
    "mlp.up": ColwiseParallel(),
    "mlp.gate": ColwiseParallel(),
    "mlp.down": RowwiseParallel(),
}


def cut(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        parallelize_module(block, mesh, PLAN)


def cut_and_sharded(model: nn.Module, mesh: DeviceMesh) -> None:
    cut(model, mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])


@on(2, 4)
def joints_that_tensor_parallelism_leaves_to_one_rank_move_no_tensor() -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))

    def inner(joint: Any) -> bool:
        return joint.kind in ("value-output", "query-key", "up-down")

    for objective in ("grad_norm", "balance", "eigenbasis"):
        with counted() as traffic:
            stand.compared("even", lambda m: cut(m, mesh), objective=objective, schedule=tf.At(0, 2), share=False, keep=inner)
        assert traffic.turns == 0 and traffic.reduced > 0


@on(2)
def a_stream_that_tensor_parallelism_cuts_is_turned_by_a_collective() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    assert any(joint.name == "residual" for joint in stand.joints_of("even"))
    for objective in ("eigenbasis", "grad_norm"):
        stand.compared("even", lambda m: cut(m, mesh), objective=objective, schedule=tf.At(0, 2), share=False)


@on(4)
def both_at_once_are_one_process() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for objective in ("grad_norm", "balance", "eigenbasis"):
        for kind in ("odd",) if objective == "balance" else ("even", "odd"):
            stand.compared(kind, lambda m: cut_and_sharded(m, mesh), objective=objective, schedule=tf.At(0, 2), share=False)


@on(4)
def cuts_that_placements_tell_wrongly_are_refused() -> None:
    """Three ranks that share what another cut of two has left: 7 = 4 + 3 = (2, 2, 0) + (1, 1, 1)."""
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 7, bias=False), nn.Linear(7, 4, bias=False)).double()
    (joint,) = (j for j in tf.find_symmetries(model) if j.group.form == "dense")
    told = SimpleNamespace(size=lambda m=None: 6 if m is None else (3, 2)[m], shape=(3, 2), mesh=mesh.mesh, ndim=2)
    for size, wrong in ((7, True), (8, False), (10, False), (12, False)):
        layout = Layout((size, 4), told, (_StridedShard(0, split_factor=2), Shard(0)))
        assert is_ragged(layout) is wrong, size
    for parameter in list(model):
        parameter.weight = nn.Parameter(distribute_tensor(parameter.weight.detach(), mesh, [Shard(0), Shard(1)]))
    assert impossible(GradNorm(), joint, dict(model.named_parameters()), mesh) is None
    other = SimpleNamespace(mesh=torch.tensor([7, 8]), size=lambda m=None: 2, ndim=1)
    reason = impossible(GradNorm(), joint, dict(model.named_parameters()), other)
    assert reason is not None and "one mesh" in reason and "'0.weight'" in reason


class Experts(nn.Module):
    """Experts of a mixture as 3-D weights, every token through all of them: up (E, f, d), down (E, d, f)."""

    def __init__(self, experts: int = 4, width: int = 6, hidden: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.up = nn.Parameter(torch.randn(experts, hidden, width, generator=generator, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(experts, width, hidden, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("efd,nd->enf", self.up, x)
        return torch.einsum("edf,enf->nd", self.down, hidden)


@on(4)
def experts_that_lie_on_different_ranks_keep_their_own_elements() -> None:
    """Shard(0) of (E, f, d) tensors: every expert's hidden space is on one rank, and GL(f) of it moves nothing between them."""
    from teleport_fast.symmetry.groups import GeneralLinear
    from teleport_fast.symmetry.joint import Joint
    from teleport_fast.symmetry.symmetries import Symmetries
    from teleport_fast.symmetry.view import View

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    up = View("up", axis=1, heads=4, width=5, head_axis=0)
    down = View("down", axis=2, heads=4, width=5, head_axis=0)
    joint = Joint("experts", "experts", GeneralLinear(5), 4, 5, (up,), (down,))
    results = []
    for shard in (False, True):
        model = Experts()
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        model(x).square().sum().backward()
        before = model(x).detach()
        if shard:
            gradients = {name: p.grad for name, p in model.named_parameters()}
            for name, parameter in list(model.named_parameters()):
                cut_up = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
                cut_up.grad = distribute_tensor(gradients[name], mesh, [Shard(0)])
                setattr(model, name, cut_up)
        optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-12)
        with counted() as traffic:
            tf.attach(optimizer, Symmetries((joint,), model=model), schedule=tf.At(0))
            optimizer.step()
        assert traffic.turns == 0
        results.append(stand.weights(model))
    assert stand.far(*results) < 1e-12 and stand.far(results[0], stand.weights(Experts())) > 1e-2
    whole = Experts()
    whole.load_state_dict(results[1])
    assert torch.allclose(whole(x), before, rtol=1e-8)


@on(2)
def gradients_that_are_partial_sums_are_summed_before_they_are_read() -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    gradients = [torch.randn_like(p) for p in plain.parameters()]
    symmetries = tf.find_symmetries(plain)
    results = []
    for partial in (False, True):
        model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
        model.load_state_dict(plain.state_dict())
        for layer, gradient in zip(model, gradients, strict=True):
            layer.weight.grad = gradient.clone()
            if partial:
                share = 0.25 if torch.distributed.get_rank() == 0 else 0.75
                layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
                layer.weight.grad = DTensor.from_local(gradient * share, mesh, [Partial()])
        optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2)
        tf.attach(optimizer, symmetries, schedule=tf.At(0))
        optimizer.step()
        results.append(stand.weights(model))
    assert stand.far(*results) < 1e-12 and stand.far(results[0], stand.weights(plain)) > 1e-2
