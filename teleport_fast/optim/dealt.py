"""Bases of sharded matrices are made by one rank each, dealt out by cost, and sent from there to the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from teleport_fast.distributed.blocks import Spread, device_type
from teleport_fast.distributed.reduce import broadcast_
from teleport_fast.ops.orthogonal_iteration import orthogonal_iteration_
from teleport_fast.optim.assigned import Owner
from teleport_fast.optim.bases import next_basis

# Entries that are sent at once: 128 MB in float32.
SENT_AT_ONCE = 2**25


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """Which of the ranks does each: the dearest first, each to the rank that has least so far.

    >>> deal([1.0, 8.0, 4.0, 4.0], 2)
    [0, 0, 1, 1]
    """
    loads, found = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[index] = min(range(ranks), key=lambda rank: loads[rank])
        loads[found[index]] += costs[index]
    return found


def made_here(
    own: Sequence[tuple[Owner, Tensor, Tensor, bool]], dtype: torch.dtype, flagged: bool
) -> dict[Owner, Tensor]:
    """Flat next bases of (owner, basis, covariance, whether it is cold); off the CPU a flag is added: it was ill-conditioned."""
    alike: dict[tuple[torch.Size, bool], list[tuple[Owner, Tensor, Tensor]]] = {}
    for owner, basis, covariance, cold in own:
        alike.setdefault((basis.shape, cold), []).append((owner, basis.to(dtype, copy=True), covariance.to(dtype)))
    made: dict[Owner, Tensor] = {}
    for (_, by_householder), run in alike.items():
        copies, covariances = [basis for _, basis, _ in run], [covariance for *_, covariance in run]
        if not flagged:
            orthogonal_iteration_(copies, covariances)
            made.update((owner, basis.view(-1)) for owner, basis, _ in run)
            continue
        found, ill = next_basis(torch.cat(covariances), torch.cat(copies), by_householder)
        flags = ill.view(len(run), -1).any(1, keepdim=True).to(dtype)
        for (owner, *_), basis, flag in zip(run, found.view(len(run), -1), flags, strict=True):
            made[owner] = torch.cat((basis, flag))
    return made


def handed_out(
    made: Mapping[Owner, Tensor],
    sizes: Mapping[Owner, int],
    sources: Mapping[Owner, int],
    spread: Spread,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[dict[Owner, Tensor]]:
    """The flat tensors of all owners, some at a time: those in `made` are this rank's own, the others come from theirs.

    sizes: entries of each; sources: the place in the group of the rank that has it. Every rank of the group must ask with the
    same sizes and sources, in the same order.
    """
    for source in sorted(set(sources.values())):
        run: list[Owner] = []
        for owner in (owner for owner, at in sources.items() if at == source):
            if run and sum(sizes[each] for each in run) + sizes[owner] > SENT_AT_ONCE:
                yield _sent(run, made, sizes, source, spread, dtype, device)
                run = []
            run.append(owner)
        yield _sent(run, made, sizes, source, spread, dtype, device)


def _sent(
    run: list[Owner],
    made: Mapping[Owner, Tensor],
    sizes: Mapping[Owner, int],
    source: int,
    spread: Spread,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[Owner, Tensor]:
    counts = [sizes[owner] for owner in run]
    own = source == spread.me
    flat = torch.cat([made[owner] for owner in run]) if own else torch.empty(sum(counts), dtype=dtype, device=device)
    flat = broadcast_(flat, source, spread.group, device_type(spread))
    return dict(zip(run, flat.split(counts), strict=True))
