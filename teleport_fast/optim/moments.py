"""How moments turn with the bases that they are held in, where they are whole and where they are sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from teleport_fast.distributed.layout import local_part
from teleport_fast.ops.group_action import group_action_
from teleport_fast.optim.assigned import Owner
from teleport_fast.optim.sharded import turn_
from teleport_fast.optim.sides import Side
from teleport_fast.optim.summed import Held
from teleport_fast.optim.views import view_of

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
State = Mapping[Tensor, dict[str, Any]]
Members = dict[Owner, list[tuple[Owner, Side]]]
Groups = list[dict[str, Any]]
# What turns a basis, (heads, h, h), as one element or as several in turn: the way out of the old basis and that into the new one.
Turn = tuple[Tensor, ...]


def views_of(key: str, groups: Groups, state: State, sides: list[tuple[Owner, Side]]) -> list[Tensor]:
    """Views of this state of all the sides' parameters that have it."""
    return [
        view_of(state[parameter][key], a, side.heads)
        for (g, i, a), side in sides
        if key in state.get(parameter := groups[g]["params"][i], {})
    ]


def turn_moments_(
    groups: Groups,
    state: State,
    everyone: Members,
    held: Held,
    turns: dict[Owner, Turn],
    projects: bool,
    sharded: bool,
) -> None:
    """Turn the first moments of these bases' matrices, either of those that are sharded or of the others; project second ones."""
    for key in ("exp_avg", "exp_avg_sq") if projects else ("exp_avg",):
        acting = turns if key == "exp_avg" else {owner: tuple(g.square() for g in turn) for owner, turn in turns.items()}
        chosen = {
            owner: [entry for entry in everyone[owner] if (held.placings.get(entry[0][:2]) is not None) == sharded]
            for owner in turns
        }
        if sharded:
            _turn_sharded_(key, groups, state, chosen, held, acting)
            continue
        for owner, turn in acting.items():
            views = views_of(key, groups, state, chosen[owner])
            for g in turn if views else ():
                group_action_(views, [], g)


def _turn_sharded_(
    key: str, groups: Groups, state: State, sharded: Members, held: Held, turns: dict[Owner, Turn]
) -> None:
    """Turn this state of sharded parameters along every side whose basis turned; rows before columns, as they share entries."""
    for axis in (0, 1):
        entries = []
        for owner, sides in sharded.items():
            for (g, i, a), side in sides:
                value, placing = state.get(groups[g]["params"][i], {}).get(key), held.placings[g, i]
                if a == axis and value is not None and placing is not None:
                    entries.append((local_part(value), placing, axis, side, turns[owner]))
        turn_(entries)
