"""The sides of an optimizer's parameters by place: positions and plain data, never tensors, so that copies keep them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from teleport_fast.optim.names import is_table, plain
from teleport_fast.optim.sides import Assignment, Known, Rules, Side, assign, stream_width
from teleport_fast.symmetry.symmetries import Symmetries

Place = tuple[int, int]
Owner = tuple[int, int, int]
Key = tuple[str, torch.device, torch.dtype]


class Assigned:
    """An Assignment per place (group, index), and for every turned side the side whose state holds its basis."""

    def __init__(self, rules: Rules, known: Known, symmetries: Symmetries | None) -> None:
        self.rules, self.known, self.symmetries = rules, known, symmetries
        self.width: int | None = known.width
        self._groups: list[list[Assignment]] = []
        self._owners: dict[Owner, Owner] = {}
        self._by_key: dict[Key, Owner] = {}
        self._ids: list[list[int]] | None = []

    def extend(self, groups: list[dict[str, Any]]) -> bool:
        """Decide the sides of groups that were added since the last time; whether others were removed or reordered.

        Errors: ValueError where a parameter left whose state holds a basis that others share.
        """
        ids = [[id(parameter) for parameter in group["params"]] for group in groups]
        if ids == self._ids:
            return False
        before = ids[: len(self._groups)] if self._ids is None else self._ids  # a copy's places are the original's
        known = {number: (g, i) for g, row in enumerate(before) for i, number in enumerate(row)}
        moved = {known[n]: (g, i) for g, row in enumerate(ids) for i, n in enumerate(row) if n in known}
        rearranged = ids[: len(before)] != before
        if rearranged:
            self._check_owners(moved)
        names = self._names()
        fresh = [
            [self._entry(group, g, i, p, names) for i, p in enumerate(group["params"])]
            for g, group in enumerate(groups)
            if any(number not in known for number in ids[g])
        ]
        if self.width is None:
            self.width = stream_width(
                [
                    shape
                    for entries in fresh
                    for name, shape, named, wanted in entries
                    if wanted and not (plain(name) in self.known.tables or (named and is_table(name)))
                ]
            )
        decided = iter([assign(entries, self.known, self.rules, self.width) for entries in fresh])
        made = [[] if all(number in known for number in row) else next(decided) for row in ids]
        self._groups = [
            [self._at(known[n]) if n in known else made[g][i] for i, n in enumerate(row)] for g, row in enumerate(ids)
        ]
        if rearranged:
            self._owners = {
                (*moved[g, i], axis): (*moved[owner[:2]], owner[2])
                for (g, i, axis), owner in self._owners.items()
                if (g, i) in moved
            }
            held = {key: owner for key, owner in self._by_key.items() if owner[:2] in moved}
            self._by_key = {key: (*moved[owner[:2]], owner[2]) for key, owner in held.items()}
        self._ids = ids
        self._own(groups)
        return rearranged

    def _at(self, place: Place) -> Assignment:
        return self._groups[place[0]][place[1]]

    def _check_owners(self, moved: dict[Place, Place]) -> None:
        for (g, i, _), (holder, at, _) in self._owners.items():
            if (g, i) in moved and (holder, at) not in moved:
                name, gone = self._groups[g][i].name, self._groups[holder][at].name
                raise ValueError(
                    f"{gone!r} left the optimizer, and its state holds a basis that {name!r} turns in; keep its group, "
                    f"with lr=0, or make a new Rotated"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ids": None}

    def _names(self) -> dict[int, str]:
        """Names by identity, for plain parameters of the model on which symmetries were found."""
        if self.symmetries is None:
            return {}
        names = {name for joint in self.symmetries for name in joint.parameters()}
        found = ((name, self.symmetries.parameter(name)) for name in sorted(names))
        return {id(parameter): name for name, parameter in found if parameter is not None}

    def _entry(
        self, group: dict[str, Any], g: int, i: int, parameter: Tensor, names: dict[int, str]
    ) -> tuple[str, tuple[int, ...], bool, bool]:
        name = group["param_names"][i] if "param_names" in group else names.get(id(parameter))
        if getattr(parameter, "_fsdp_flattened", False) or hasattr(parameter, "_fqns"):
            raise TypeError(
                f"{name or 'a parameter'!r} is flattened by FullyShardedDataParallel, and no matrix is left to turn; "
                f"shard the model with torch.distributed.fsdp.fully_shard"
            )
        wanted = bool(group["rotate"]) and parameter.is_floating_point()
        return name or f"group {g}, parameter {i}", tuple(parameter.shape), name is not None, wanted

    def _own(self, groups: list[dict[str, Any]]) -> None:
        for g, assignments in enumerate(self._groups):
            for i, assignment in enumerate(assignments):
                parameter = groups[g]["params"][i]
                for axis, side in enumerate(assignment.sides or ()):
                    if side.basis is not None and (g, i, axis) not in self._owners:
                        key = (side.basis, parameter.device, parameter.dtype)
                        self._owners[g, i, axis] = self._by_key.setdefault(key, (g, i, axis))

    def split(self, groups: list[dict[str, Any]], table_lr: float) -> list[dict[str, Any]]:
        """Every group in two: what is turned, and what AdamW steps, at `table_lr`."""
        made: list[dict[str, Any]] = []
        assigned: list[list[Assignment]] = []
        for group, assignments in zip(groups, self._groups, strict=True):
            for turned in (True, False):
                chosen = [i for i, assignment in enumerate(assignments) if assignment.turned == turned]
                if not chosen:
                    continue
                part = {**group, "lr": group["lr"] if turned else table_lr}
                for key in ("params", "param_names"):
                    if key in group:
                        part[key] = [group[key][i] for i in chosen]
                made.append(part)
                assigned.append([assignments[i] for i in chosen])
        self._groups, self._owners, self._by_key = assigned, {}, {}
        self._ids = [[id(parameter) for parameter in group["params"]] for group in made]
        self._own(made)
        return made

    def of(self, g: int, i: int) -> Assignment:
        return self._groups[g][i]

    def owner(self, g: int, i: int, axis: int) -> Owner | None:
        """Where the basis of this side is kept; None where it is not turned."""
        return self._owners.get((g, i, axis))

    def owned_side(self, g: int, i: int, axis: int) -> Side | None:
        """The side if its basis is kept here."""
        sides = self._groups[g][i].sides
        return sides[axis] if sides is not None and self._owners.get((g, i, axis)) == (g, i, axis) else None

    def owned(self, g: int, i: int) -> list[Side]:
        found = (self.owned_side(g, i, axis) for axis in (0, 1))
        return [side for side in found if side is not None]

    def everyone(self) -> dict[Owner, list[tuple[Owner, Side]]]:
        """The turned sides of all parameters by owner, those without a gradient too."""
        return self.members((g, i) for g, group in enumerate(self._groups) for i in range(len(group)))

    def members(self, places: Iterable[Place]) -> dict[Owner, list[tuple[Owner, Side]]]:
        """The turned sides of these places by owner, in order."""
        found: dict[Owner, list[tuple[Owner, Side]]] = {}
        for g, i in places:
            for axis, side in enumerate(self._groups[g][i].sides or ()):
                owner = self._owners.get((g, i, axis))
                if owner is not None:
                    found.setdefault(owner, []).append(((g, i, axis), side))
        return found
