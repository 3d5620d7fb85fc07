"""What `Layout` says a rank holds is what torch gave it; sums over ranks are those of the whole, and what is sent is counted."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import on
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from teleport_fast.distributed import Layout, all_reduce_, counted, layout_of, local_part, widest_mesh


def part_by_runs(whole: torch.Tensor, layout: Layout) -> torch.Tensor:
    for dim, runs in enumerate(layout.runs):
        pieces = [whole.narrow(dim, run.start, run.stop - run.start) for run in runs]
        whole = torch.cat(pieces, dim) if pieces else whole.narrow(dim, 0, 0)
    return whole


def holds_its_part(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    layout, part = layout_of(tensor), local_part(tensor)
    expected = part_by_runs(whole, layout)
    assert part.numel() == expected.numel(), (part.shape, expected.shape, layout.placements)
    assert torch.equal(part.reshape(expected.shape), expected), layout.placements
    # every entry counts once: the parts of the ranks that count add up to the whole
    total = (part.square().sum() if layout.counts() else torch.zeros(())).double().reshape(1)
    all_reduce_([(total, layout_of(tensor).__class__(layout.shape, layout.mesh, layout.placements).everywhere)])
    assert layout.everywhere.size == 1 or torch.allclose(total, whole.square().sum().double()) or not layout.counts()


@on(4)
def parts_of_a_tensor_are_the_runs_that_its_layout_says() -> None:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for shape in ((8, 6), (7, 5), (3, 4), (1, 3), (9, 2, 5)):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
        for placements in ([Shard(0)], [Shard(1)], [Replicate()]):
            holds_its_part(distribute_tensor(whole, line, placements), whole)
        for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(0)]):
            holds_its_part(distribute_tensor(whole, square, placements), whole)


@on(4)
def fully_shard_after_tensor_parallel_cuts_the_rows_of_one_rank() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
    whole = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    assert any("Strided" in type(p.placements[0]).__name__ for p in model.parameters())
    widest = widest_mesh(layout_of(p) for p in model.parameters())
    assert widest is not None and widest.size() == 4
    for name, parameter in model.named_parameters():
        holds_its_part(parameter.detach(), whole[name])
        layout = layout_of(parameter)
        held = local_part(parameter.detach()).double().square().sum() if layout.counts(widest) else torch.zeros(()).double()
        total = held.reshape(1).clone()
        dist.all_reduce(total)
        assert torch.allclose(total, whole[name].double().square().sum()), name


@on(2)
def sums_over_ranks_are_those_of_the_whole_and_are_counted() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows, columns = (distribute_tensor(whole, mesh, [Shard(dim)]) for dim in (0, 1))
    over_rows, over_columns = layout_of(rows).over(0), layout_of(columns).over(1)
    assert layout_of(rows).over(1).size == 1
    gram = local_part(rows).mT @ local_part(rows)
    left = local_part(columns) @ local_part(columns).mT
    small = torch.full((3,), float(dist.get_rank() + 1))
    with counted() as traffic:
        all_reduce_([(gram, over_rows), (left, over_columns), (small, over_rows)])
    assert torch.allclose(gram, whole.mT @ whole, atol=1e-14) and torch.allclose(left, whole @ whole.mT, atol=1e-14)
    assert gram.dtype == torch.float64 and small.tolist() == [3.0, 3.0, 3.0]
    # float64 in one collective, float32 in another
    assert (traffic.reductions, traffic.reduced) == (2, 8 * (16 + 25) + 4 * 3)
    # without the sum the ranks disagree
    assert not torch.allclose(local_part(rows).mT @ local_part(rows), whole.mT @ whole)
