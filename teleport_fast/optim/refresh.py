"""When and how `Rotated`'s bases turn: covariances at every step, one orthogonal iteration every few, moments along."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from teleport_fast.distributed.blocks import Spread
from teleport_fast.flag import Flag
from teleport_fast.ops.checks import accumulation_dtype
from teleport_fast.ops.covariance import NORMALISE, covariance_
from teleport_fast.ops.group_action import group_action_
from teleport_fast.ops.orthogonal_iteration import orthogonal_iteration_
from teleport_fast.optim.assigned import Owner
from teleport_fast.optim.bases import next_basis
from teleport_fast.optim.dealt import deal, handed_out, made_here
from teleport_fast.optim.moments import MOMENTS, Groups, Members, State, Turn, turn_moments_, views_of
from teleport_fast.optim.sides import Side
from teleport_fast.optim.summed import Due, Held, buckets_of, normalised_grams
from teleport_fast.optim.views import part_of, view_of
from teleport_fast.state import SECOND_MOMENTS
from teleport_fast.writes import Write, Writes, signals_held

AXES = ("rows", "columns")
# Devices where Householder's QR is no slower than the Cholesky factor's.
HOUSEHOLDER = ("cpu",)


class Refresh:
    """Every side's covariance takes up a part of each gradient; every `every` of them its basis turns, moments with it."""

    def __init__(
        self,
        every: int,
        hidden_every: int,
        covariance_parts: int,
        decay: float,
        basis_dtype: torch.dtype | None,
        normalise: str = "tensor",
        second_moments: str = "keep",
    ) -> None:
        counts = (("every", every, 3), ("hidden_every", hidden_every, 3), ("covariance_parts", covariance_parts, 1))
        for name, value, usual in counts:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}; {usual} is the default")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}; 0.95 is the default")
        if basis_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"basis_dtype must be None, torch.float32 or torch.bfloat16, got {basis_dtype}; pass one of these"
            )
        choices = (("normalise", normalise, NORMALISE), ("second_moments", second_moments, SECOND_MOMENTS))
        for name, chosen, allowed in choices:
            if chosen not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {chosen!r}; {allowed[0]!r} is the default"
                )
        self.every, self.hidden_every, self.covariance_parts = every, hidden_every, covariance_parts
        self.decay, self.basis_dtype = decay, basis_dtype
        self.normalise, self.second_moments = normalise, second_moments
        # only off the CPU
        self._pending: dict[Owner, Flag] = {}

    def dtype_for(self, parameter: Tensor) -> torch.dtype:
        """What bases and covariances of this parameter are kept in."""
        return self.basis_dtype or accumulation_dtype(parameter.dtype)

    def basis(self, groups: Groups, state: State, owner: Owner | None) -> Tensor | None:
        """(heads, h, h), rows are the basis vectors; None for a side that is not turned."""
        if owner is None:
            return None
        g, i, axis = owner
        basis: Tensor = state[groups[g]["params"][i]][f"{AXES[axis]}_basis"]
        return basis

    def forget(self) -> None:
        """Drop what belongs to a state that is gone."""
        self._pending = {}

    def step_(self, groups: Groups, state: State, members: Members, everyone: Members, held: Held) -> None:
        """Take up the gradients of `members` (sides by owner), and turn the bases that are due.

        `everyone` are all sides of each basis: first moments of parameters without a gradient in this step turn along.
        """
        due: dict[tuple[Any, ...], list[Owner]] = {}
        dealt: dict[tuple[Any, ...], list[tuple[Owner, bool]]] = {}
        moments: dict[Owner, list[Tensor]] = {}
        squares: dict[Owner, list[Tensor]] = {}
        turns: dict[Owner, Turn] = {}
        projects = self.second_moments == "project"
        for owner, sides in members.items():
            holder, axis = groups[owner[0]]["params"][owner[1]], AXES[owner[2]]
            if f"{axis}_basis" not in state[holder]:
                _begin(state[holder], axis, sides[0][1], holder.device, self.dtype_for(holder))
        count_up_([state[groups[g]["params"][i]][f"{AXES[axis]}_age"] for g, i, axis in members])
        taken_up = self._take_up_sharded_(groups, state, members, held)
        for owner, sides in members.items():
            holder, axis = groups[owner[0]]["params"][owner[1]], AXES[owner[2]]
            entry = state[holder]
            age = int(entry[f"{axis}_age"])
            if owner not in taken_up:
                views = [view_of(held.home[g, i], a, side.heads) for (g, i, a), side in sides]
                views = [part_of(view, self.covariance_parts, age - 1) for view in views]
                dtype = accumulation_dtype(holder.dtype)
                _observe_(entry[f"{axis}_covariance"], views, self.decay, dtype, self.normalise)
            period = self.hidden_every if sides[0][1].kind == "hidden" else self.every
            if age % period == 0:
                basis = entry[f"{axis}_basis"]
                # a first basis is cold, and its images are far from orthogonal
                cold = age == period or basis.device.type in HOUSEHOLDER or self._was_ill(owner, entry, axis)
                spread = _spread_of(sides, held)
                if spread is not None:
                    whom = (spread.group, spread.over, accumulation_dtype(holder.dtype), basis.device)
                    dealt.setdefault(whom, []).append((owner, cold))
                    continue
                whole = [entry for entry in everyone[owner] if held.placings.get(entry[0][:2]) is None]
                moments[owner] = views_of("exp_avg", groups, state, whole)
                # by default second moments stay, and nobody needs their views
                squares[owner] = views_of("exp_avg_sq", groups, state, whole) if projects else []
                key = (basis.shape, holder.dtype, basis.device, cold, len(moments[owner]), len(squares[owner]))
                due.setdefault(key, []).append(owner)
        for (shape, dtype, _, by_householder, _, _), owners in due.items():
            turning = [view for owner in owners for view in moments[owner]]
            turn = self._turn_(groups, state, owners, turning, shape[0], accumulation_dtype(dtype), by_householder)
            turns.update((owner, (own,)) for owner, own in zip(owners, turn.split(shape[0]), strict=True))
            projected = [view for owner in owners for view in squares[owner]]
            if projected:
                group_action_(projected, [], turn.square(), joints=len(owners))
        turn_moments_(groups, state, everyone, held, turns, projects, sharded=True)
        for entries in dealt.values():
            self._turn_dealt_(groups, state, entries, members, everyone, held)
        refreshed = [*turns, *(owner for entries in dealt.values() for owner, _ in entries)]
        if self.second_moments == "reset":
            for owner in refreshed:
                for g, i, _ in (place for place, _ in everyone[owner]):
                    for value in (state.get(groups[g]["params"][i], {}).get(key) for key in MOMENTS):
                        if value is not None:
                            value.zero_()

    def _turn_(
        self,
        groups: Groups,
        state: State,
        owners: list[Owner],
        moments: list[Tensor],
        heads: int,
        dtype: torch.dtype,
        by_householder: bool,
    ) -> Tensor:
        """Turn the owners' bases and these moments; the turn, (owners·heads, h, h)."""
        # a turn and the moments that follow it are one: a signal waits, and what raises is called again
        found: list[Tensor] = []
        entries = [(state[groups[g]["params"][i]], AXES[axis]) for g, i, axis in owners]
        bases = [entry[f"{axis}_basis"] for entry, axis in entries]
        covariances = [entry[f"{axis}_covariance"].to(dtype) for entry, axis in entries]
        if bases[0].device.type in HOUSEHOLDER:
            wide = [basis.to(dtype) for basis in bases]
            writes: list[Write] = [lambda: found.append(orthogonal_iteration_(wide, covariances))]
            writes += [partial(basis.copy_, to) for basis, to in zip(bases, wide, strict=True) if to is not basis]
        else:
            before = torch.cat(bases).to(dtype)
            after, ill = next_basis(torch.cat(covariances), before, by_householder)
            for index, (owner, (entry, axis)) in enumerate(zip(owners, entries, strict=True)):
                rows = slice(index * heads, (index + 1) * heads)
                self._send(owner, entry, axis, ill[rows].any())
            found.append(after @ before.mT)
            pairs = zip(bases, after.split(heads), strict=True)
            writes = [partial(basis.copy_, to) for basis, to in pairs]
        if moments:
            writes.append(lambda: group_action_(moments, [], found[0], joints=len(owners)))
        with signals_held():
            Writes(writes).finish()
        return found[0]

    def _turn_dealt_(
        self,
        groups: Groups,
        state: State,
        entries: list[tuple[Owner, bool]],
        members: Members,
        everyone: Members,
        held: Held,
    ) -> None:
        """Turn bases with a matrix that is sharded: each is made on one rank of the group, and sent to the others."""
        owners = [owner for owner, _ in entries]
        holders = {owner: state[groups[owner[0]]["params"][owner[1]]] for owner in owners}
        bases = {owner: holders[owner][f"{AXES[owner[2]]}_basis"] for owner in owners}
        spread, projects = _spread_of(members[owners[0]], held), self.second_moments == "project"
        assert spread is not None
        first = groups[owners[0][0]]["params"][owners[0][1]]
        dtype, flagged = accumulation_dtype(first.dtype), bases[owners[0]].device.type not in HOUSEHOLDER
        dealing = deal([float(basis.numel() * basis.shape[-1]) for basis in bases.values()], len(spread.blocks))
        sources = dict(zip(owners, dealing, strict=True))
        own = [
            (owner, bases[owner], holders[owner][f"{AXES[owner[2]]}_covariance"], cold)
            for owner, cold in entries
            if sources[owner] == spread.me
        ]
        made = made_here(own, dtype, flagged)
        sizes = {owner: basis.numel() + flagged for owner, basis in bases.items()}
        for arrived in handed_out(made, sizes, sources, spread, dtype, bases[owners[0]].device):
            turns: dict[Owner, Turn] = {}
            for owner, flat_basis in arrived.items():
                basis = bases[owner]
                after = flat_basis[: basis.numel()].view(basis.shape)
                before = basis.to(dtype).mT.contiguous()
                # for a rank's part two turns are less than their product, which squares would need
                turns[owner] = (after @ before,) if projects else (before, after)
                basis.copy_(after)
                if flagged:
                    self._send(owner, holders[owner], AXES[owner[2]], flat_basis[-1] > 0)
            turn_moments_(groups, state, everyone, held, turns, projects, sharded=False)
            turn_moments_(groups, state, everyone, held, turns, projects, sharded=True)

    def _take_up_sharded_(self, groups: Groups, state: State, members: Members, held: Held) -> set[Owner]:
        """Update the covariances of bases with a matrix that is sharded, some at a time, and say which these are."""
        due: dict[Owner, Due] = {}
        for owner, sides in members.items():
            if any(held.placings.get(place[:2]) for place, _ in sides):
                holder, axis = groups[owner[0]]["params"][owner[1]], AXES[owner[2]]
                covariance, age = (state[holder][f"{axis}_{key}"] for key in ("covariance", "age"))
                kept = covariance.dtype in (torch.float32, torch.float64)
                dtype = covariance.dtype if kept else accumulation_dtype(holder.dtype)
                due[owner] = Due(sides, dtype, int(age) - 1)
        for bucket in buckets_of(due):
            grams = normalised_grams(bucket, held, self.covariance_parts, self.normalise)
            for (g, i, side), gram in grams.items():
                covariance = state[groups[g]["params"][i]][f"{AXES[side]}_covariance"]
                wide = covariance.to(gram.dtype).mul_(self.decay).add_(gram, alpha=1 - self.decay)
                if wide is not covariance:
                    covariance.copy_(wide)
        return set(due)

    def _send(self, owner: Owner, entry: dict[str, Any], axis: str, ill: Tensor) -> None:
        """Keep the flag, and let it travel: the next refresh finds it on the host without waiting."""
        entry[f"{axis}_ill"] = ill
        self._pending[owner] = Flag(ill)

    def _was_ill(self, owner: Owner, entry: dict[str, Any], axis: str) -> bool:
        sent = self._pending.pop(owner, None)
        return bool(entry.get(f"{axis}_ill")) if sent is None else sent.is_set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": {}}


def count_up_(counters: list[Tensor]) -> None:
    """One more, of all in one call."""
    if counters:
        torch._foreach_add_(counters, 1.0)


def _begin(entry: dict[str, Any], axis: str, side: Side, device: torch.device, dtype: torch.dtype) -> None:
    eye = torch.eye(side.width, dtype=dtype, device=device)
    entry[f"{axis}_basis"] = eye.expand(side.heads, *eye.shape).clone()
    entry[f"{axis}_covariance"] = torch.zeros_like(entry[f"{axis}_basis"])
    entry[f"{axis}_age"] = torch.zeros((), dtype=torch.float32)


def _spread_of(sides: list[tuple[Owner, Side]], held: Held) -> Spread | None:
    """The ranks that make a basis of these sides together: those of its first matrix that is cut, None where none is."""
    placings = (held.placings.get(place[:2]) for place, _ in sides)
    return next((placing.home for placing in placings if placing is not None and placing.home.group is not None), None)


def _observe_(covariance: Tensor, views: list[Tensor], decay: float, dtype: torch.dtype, normalise: str) -> None:
    wide = covariance if covariance.dtype in (torch.float32, torch.float64) else covariance.to(dtype)
    if wide.dtype == torch.float32:
        views = [view.float() if view.dtype == torch.float64 else view for view in views]
    covariance_(wide, views, decay, normalise=normalise)
    if wide is not covariance:
        covariance.copy_(wide)
