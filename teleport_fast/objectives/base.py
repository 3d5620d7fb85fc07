"""What every objective offers the engine: which joints it can use, what it observes, and the element it wants."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from teleport_fast.objectives.sums import SUMS
from teleport_fast.schedule import Every, Schedule
from teleport_fast.symmetry.bucket import Bucket, Element, Split
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries

Key = TypeVar("Key", bound=Hashable)


def kept_where(void: Tensor, before: Mapping[Key, Tensor], after: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """`before` where void holds (zeros for what was not there), else `after`; nothing is read back."""
    return {
        key: torch.where(void.to(new.device, non_blocking=True), before.get(key, torch.zeros_like(new)), new)
        for key, new in after.items()
    }


@dataclass(frozen=True)
class Move:
    """The situation before a move: tensors by parameter name, how far, which way, the source of random numbers, and the largest
    condition number that a dense element may have."""

    parameters: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    radius: float
    descend: bool
    generator: torch.Generator
    max_condition: float = math.inf


class Objective(ABC):
    """Chooses a group element for each bucket of joints.

    `directions` lists what it accepts, the default first; `closed_form` those whose optimum is known, where the radius
    may be infinite; `holds` says that in the return frame its last element stays in force between refreshes (a basis)
    instead of lasting one step; `frames` are those it has a meaning in; `measures` is what `value` reads, "gradients"
    or "parameters"; `stretches` is False where every element is a rotation; `adds` says that `value` is a sum over
    their entries, `reads_tensors` whether `element` reads values of what moves. An objective that overrides `reads` and `decide`
    works where tensors lie on many ranks too; one that overrides `element` sees whole tensors, and is refused there.

    A move that fails before it has written anything leaves the objective's memory as it was: `element` and `decide` replace the
    tensors that they remember, and never write into them.
    """

    name = "objective"
    directions: tuple[str, ...] = ("ascend", "descend")
    holds = False
    closed_form: tuple[str, ...] = ()
    frames: tuple[str, ...] = ("stay", "return")
    measures = "gradients"
    reads_tensors = True
    stretches = True
    adds = True

    def default_radius(self, direction: str) -> float:
        """Searches without an optimum are bounded by 0.5: a condition number of g of at most e."""
        return 0.5

    def default_schedule(self) -> Schedule:
        return Every(100)

    def check(self, symmetries: Symmetries) -> None:
        """Raise ValueError for what does not fit these symmetries, before anything is planned."""
        return None

    @abstractmethod
    def unusable(self, joint: Joint) -> str | None:
        """Why this joint cannot serve, or None."""

    def needs_whole(self, joint: Joint) -> str | None:
        """Why this joint cannot serve where its tensors lie on many ranks, or None."""
        if type(self).decide is Objective.decide:
            return f"{type(self).__name__} decides from whole tensors; override reads and decide instead of element"
        return None

    def observe(self, index: int, bucket: Bucket, gradients: Mapping[str, Tensor]) -> None:
        """Called at every optimizer step with the gradients of bucket number `index`."""
        return None

    def reads(self, bucket: Bucket, descend: bool) -> tuple[tuple[str, str], ...]:
        """What `decide` needs of this bucket: (a name in SUMS, "gradients" or "parameters") each."""
        return ()

    def decide(
        self, index: int, bucket: Bucket, sums: Sequence[Tensor], move: Move
    ) -> tuple[Element | Split, Tensor] | None:
        """The element for bucket `index`, from the sums that it reads, and the largest factor length it uses (0-d).

        None: this bucket stays. Of `move`'s tensors only names, dtypes and devices may be looked at: the sums stand for them.
        """
        raise NotImplementedError(f"{type(self).__name__} must override decide (and reads), or element")

    def element(self, index: int, bucket: Bucket, move: Move) -> tuple[Element | Split, Tensor] | None:
        """`decide` on the sums of whole tensors."""
        sums: list[Tensor] = []
        for name, source in self.reads(bucket, move.descend):
            tensors = move.gradients if source == "gradients" else move.parameters
            sums += SUMS[name][2](bucket.plus(tensors), bucket.minus(tensors), len(bucket.joints))
        return self.decide(index, bucket, sums, move)

    @abstractmethod
    def value(self, move: Move) -> Tensor:
        """What is being raised or lowered, a 0-d tensor, for the record."""

    def unless(self, void: Tensor, work: Callable[[], None]) -> None:
        """Do the work, and leave the objective's memory as it was where `void` (0-d bool) holds."""
        before = self.state_dict()
        work()
        after = self.state_dict()
        if after:
            self.load_state_dict(kept_where(void, before, after))

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(
                f"objective {self.name!r} has no state, got {sorted(state)}; load it into the objective that saved it"
            )
