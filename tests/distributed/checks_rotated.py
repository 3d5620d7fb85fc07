"""`Rotated` on many ranks is `Rotated` in one process: under DDP, fully_shard, tensor parallelism and 2-D meshes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from ranks import on
from rotated_cases import (
    HEADS,
    Twins,
    distance,
    follow,
    gpt,
    mesh,
    parameters_of,
    replaced,
    replicated_state,
    same_on_all_ranks,
    train,
    whole,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import teleport_fast as tf
from teleport_fast.distributed import Layout, Over, counted, layout_of, local_part
from teleport_fast.distributed.blocks import exchange, spread_of
from teleport_fast.optim import Rotated, dealt, refresh, summed
from teleport_fast.optim.bases import next_basis
from teleport_fast.optim.sharded import placing_of
from teleport_fast.optim.sides import Assignment, Side

OPTIONS: dict[str, Any] = {"lr": 0.01, "every": 2, "weight_decay": 0.1, "hidden": 8, "sides": HEADS, "table_lr": 0.02}
SHAPES = {"h.0.q.weight": (8, 8), "h.0.up.weight": (16, 8), "h.0.down.weight": (8, 16), "h.0.norm.weight": (8,)}
PLAIN: dict[str, Any] = {"lr": 0.01, "every": 2, "weight_decay": 0.1, "hidden": 8, "sides": {"*.q.weight": ("heads:4", "stream")}}


def sharded(model: Any, **options: Any) -> Any:
    for block in model.blocks:
        fully_shard(block, mesh=mesh(dist.get_world_size()), **options)
    return fully_shard(model, mesh=mesh(dist.get_world_size()), **options)


@on(2, 4)
def under_ddp_every_rank_has_the_single_process_bits_and_nothing_is_sent() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    single, model = gpt(), gpt()
    one = Rotated(single.named_parameters(), **OPTIONS)
    ddp = nn.parallel.DistributedDataParallel(model)
    many = Rotated(ddp.named_parameters(), **OPTIONS)
    assert many.table() == one.table().replace("blocks.", "module.blocks.") or "module." in many.table()
    with counted() as traffic:
        train(ddp, many, range(5), rank, world)
    assert (traffic.reductions, traffic.turns) == (0, 0)
    train(single, one, range(5))
    assert distance(one, many) < 1e-9
    assert all(map(same_on_all_ranks, [*model.parameters(), *replicated_state(many)]))
    # without the average of DDP the ranks would part
    train(model, many, range(5, 6), rank, world)
    assert not same_on_all_ranks(model.blocks[0].mlp.up.weight.detach())


@on(2, 4)
def under_fully_shard_a_run_is_the_single_process_one() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    single = gpt()
    model = sharded(copy.deepcopy(single))
    one, many = (Rotated(m.named_parameters(), **OPTIONS) for m in (single, model))
    train(single, one, range(5))
    with counted() as traffic:
        train(model, many, range(5), rank, world)
    assert distance(one, many) < 1e-7
    assert all(map(same_on_all_ranks, replicated_state(many)))
    # per step: Σ h(h + 1)/2 over all bases (6 stream sides of 8, 4 of 4 heads of 2, 2 of 2 blocks of 8), in one bucket, and
    # the verdict on finiteness
    entries = 6 * 36 + 4 * 4 * 3 + 2 * 2 * 36
    assert traffic.reduced == 5 * (8 * entries + 4), (traffic, entries)
    assert traffic.reductions == 5 * 2
    # at each of two refreshes the bases are sent, each from the rank that made it
    assert traffic.broadcast == 2 * 8 * (6 * 64 + 4 * 4 * 4 + 2 * 2 * 64) and traffic.broadcasts == 2 * world, traffic
    # o and down write the stream by their rows, which are cut: gradients go to columns and updates come back, a rank's part
    # of each but what stays. On 4 ranks a block of 8 neurons is cut as well: up goes too, and up and down go once more with
    # the other side turned, whose two turns take their moments home and back.
    cut = int(world == 4)
    part = 8 * (world - 1) / world**2
    assert traffic.turned == part * (5 * (2 * 64 + (2 + 4 * cut) * 128) + 2 * cut * 2 * 2 * 128), traffic


@on(2)
def without_the_sum_over_ranks_they_part_and_a_wrong_basis_is_another_run() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    single = gpt()
    one = Rotated(single.named_parameters(), **OPTIONS)
    train(single, one, range(3))
    model = sharded(gpt())
    many = Rotated(model.named_parameters(), **OPTIONS)
    with replaced(summed, "all_reduce_", lambda requests: [*requests]):
        train(model, many, range(3), rank, world)
    assert distance(one, many) > 1e-3 and not all(map(same_on_all_ranks, replicated_state(many)))

    pair = Twins(SHAPES, mesh(world), [Shard(0)], torch.float64, **PLAIN).step(3)
    assert pair.distance() < 1e-9
    basis = pair.many.state[pair.sharded["h.0.up.weight"]]["columns_basis"]
    basis.copy_(basis.roll(1, 1))
    assert pair.step(1).distance() > 1e-3


@on(2, 4)
def uneven_shards_policies_and_offloading_step_as_one_process_with_their_gradients() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    cases: list[tuple[torch.dtype, dict[str, Any]]] = [
        (torch.float64, {"reshard_after_forward": False}),
        (torch.float32, {"mp_policy": half}),
        (torch.float64, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    ]
    sides = {"*.attention.[qkv].weight": ("heads:5", "stream"), "*.attention.o.weight": ("stream", "heads:5")}
    for dtype, options in cases:
        # 10 rows and 15 over 4 ranks: 3, 3, 3, 1 and 4, 4, 4, 3
        single = gpt(dtype, width=10, hidden=15)
        model = sharded(copy.deepcopy(single), **options)
        one, many = (Rotated(m.named_parameters(), **{**OPTIONS, "hidden": 5, "sides": sides}) for m in (single, model))
        follow(model, many, one, range(5), rank, world)
        # float32: an eigenbasis is as exact as rounding over the gap of its eigenvalues, 100 to 1000 eps here
        assert distance(one, many) < (1e-9 if dtype == torch.float64 else 2e-3), (dtype, options, distance(one, many))
        assert all(map(same_on_all_ranks, replicated_state(many)))


@on(4)
def tensor_parallel_and_two_dimensional_meshes_step_as_one_process_with_their_gradients() -> None:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.down(self.up(self.norm(x)).relu())
            return found

    for shape in ((4,), (2, 2)):
        torch.manual_seed(0)
        single = Block().double()
        model: Any = copy.deepcopy(single)
        parallelize_module(model, mesh(*shape)["tp"] if len(shape) == 2 else mesh(*shape), plan)
        if len(shape) == 2:
            fully_shard(model, mesh=mesh(*shape)["dp"])
        one, many = (Rotated(m.named_parameters(), **{**OPTIONS, "hidden": 4}) for m in (single, model))
        for step in range(5):
            data = dist.get_rank() // 2 if len(shape) == 2 else 0
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(10 * step + data), dtype=torch.float64)
            many.zero_grad()
            (model(x) - x.roll(1, 1)).square().mean().backward()
            for p, q in zip(parameters_of(one), parameters_of(many), strict=True):
                p.grad = whole(q.grad).clone()
            one.step()
            many.step()
        assert distance(one, many) < 1e-9, (shape, distance(one, many))
        assert all(map(same_on_all_ranks, replicated_state(many)))
    parallelize_module(single, mesh(4), plan)
    for optimizer in (Rotated(single.named_parameters(), hidden=4), tf.optim.AdamW(single.named_parameters())):
        single.zero_grad()
        single(x).square().mean().backward()
        late = single(x).square().mean()
        optimizer.step()
        try:
            late.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            raise AssertionError("a step between forward and backward went by unseen")


@on(4)
def every_option_and_placement_steps_as_one_process() -> None:
    square, line = mesh(2, 2), mesh(4)
    layouts = [(line, [Shard(0)]), (line, [Shard(1)]), (square, [Replicate(), Shard(0)]), (square, [Shard(0), Shard(1)])]
    layouts += [(square, [Shard(0), Shard(0)]), (line, [Replicate()])]
    options: list[dict[str, Any]] = [
        {},
        {"base": "sign", "stream": "model", "hidden": True},
        {"base": "row_norm"},
        {"base": "sinkhorn", "normalise": "joint", "stream": "layer"},
        {"match_rms": 0.2, "normalise": "none"},
        {"second_moments": "project", "stream": "layer", "hidden": 4},
        {"second_moments": "reset", "basis_dtype": torch.bfloat16},
    ]
    for index, (on_mesh, placements) in enumerate(layouts):
        for number, changes in enumerate(options):
            if index == 0 or (index + number) % 3 == 0:
                pair = Twins(SHAPES, on_mesh, placements, torch.float64, **{**PLAIN, **changes}).step(3)
                limit = 1e-9 if "basis_dtype" not in changes else 1e-2
                assert pair.distance() < limit, (placements, changes, pair.distance())
                assert "rank" in pair.many.table() or placements == [Replicate()]
                assert all(map(same_on_all_ranks, replicated_state(pair.many)))


@on(4)
def an_exchange_is_torchs_redistribution_with_empty_ranks_too() -> None:
    for shape in ((3, 8), (6, 10), (1, 1), (16, 4)):
        line = mesh(4)
        torch.manual_seed(sum(shape))
        tensor = torch.randn(shape)
        for before, after in ((Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(1))):
            one, two = (distribute_tensor(tensor, line, [p]) for p in (before, after))
            over = Over(line, (0,))
            move = spread_of(layout_of(one), over), spread_of(layout_of(two), over)
            found = exchange([local_part(one), local_part(one).double()], [move, move])
            assert torch.equal(found[0], local_part(two)) and torch.equal(found[1], local_part(two).double())
    # matrices of which some ranks hold nothing are stepped as in one process
    thin = {"h.0.up.weight": (6, 3), "h.0.down.weight": (3, 6), "h.1.up.weight": (2, 3)}
    pair = Twins(thin, mesh(4), [Shard(0)], torch.float64, **{**PLAIN, "hidden": True}).step(5)
    assert pair.distance() < 1e-7, pair.distance()


@on(2)
def what_fully_sharded_data_parallel_flattens_is_refused() -> None:
    flat = FullyShardedDataParallel(gpt(), device_id=torch.device("cpu"), use_orig_params=True)
    try:
        Rotated(flat.named_parameters())
    except TypeError as error:
        assert "fully_shard" in str(error)
    else:
        raise AssertionError("a flattened parameter was taken")


@on(4)
def rows_that_are_cut_twice_unevenly_are_refused() -> None:
    told: Any = SimpleNamespace(size=lambda m=None: 6 if m is None else (3, 2)[m], shape=(3, 2), mesh=mesh(2, 2).mesh, ndim=2)
    side = Side("stream", 1, 4, "basis")
    layout = Layout((7, 4), told, (_StridedShard(0, split_factor=2), Shard(0)))
    try:
        placing_of(Assignment("up.weight", (7, 4), (side, side)), layout, True)
    except ValueError as error:
        assert "'up.weight'" in str(error) and "shard_placement_fn" in str(error)
    else:
        raise AssertionError("7 rows on 3 x 2 ranks were taken")


@on(2)
def off_the_cpu_a_basis_comes_with_its_flag() -> None:
    """As on a GPU: Cholesky's QR, and whether it went wrong, from the rank that made the basis; an ill one stays on all."""
    for fails in (False, True):
        with replaced(refresh, "HOUSEHOLDER", ()):
            pair = Twins(SHAPES, mesh(2), [Shard(0)], torch.float64, **{**PLAIN, "every": 1}).step(1)

            def ill(covariance: Tensor, basis: Tensor, by_householder: bool) -> tuple[Tensor, Tensor]:
                found, wrong = next_basis(covariance, basis, by_householder)
                return (found, wrong) if by_householder else (basis.clone(), torch.ones_like(wrong))

            with replaced(refresh, "next_basis", ill if fails else next_basis), replaced(dealt, "next_basis", refresh.next_basis):
                pair.step(1)
            assert pair.distance() < 1e-9
            flags = [state[key] for state in pair.many.state.values() for key in state if key.endswith("_ill")]
            assert len(flags) == 6 and all(bool(flag) == fails for flag in flags)
            assert pair.step(1).distance() < 1e-9


@on(4)
def a_base_may_change_and_moments_go_where_it_is_stepped() -> None:
    pair = Twins(SHAPES, mesh(4), [Shard(0)], torch.float64, **{**PLAIN, "base": "sign"}).step(2)
    for optimizer in (pair.one, pair.many):
        optimizer.param_groups[0]["base"] = "sinkhorn"
    assert pair.step(2).distance() < 1e-9


@on(4)
def a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    pair = Twins(SHAPES, mesh(4), [Shard(0)], torch.float64, **PLAIN).step(1)
    before = [whole(p).clone() for p in pair.sharded.values()]
    up: Any = pair.sharded["h.0.up.weight"]
    if dist.get_rank() == 2:
        up.grad._local_tensor[0, 0] = torch.inf
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair.many.step()
    text = str(caught[0].message)
    assert ("'h.0.up.weight'" if dist.get_rank() == 2 else "another rank") in text, text
    assert all(torch.equal(whole(p), q) for p, q in zip(pair.sharded.values(), before, strict=True))
    assert pair.many.memory().moments < pair.one.memory().moments / 3
