"""A bucket: joints of equal shape that move together, in one call for parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from teleport_fast.ops import diagonal_action_, group_action_, permutation_action_
from teleport_fast.symmetry.condition import condition_number, diagonal_condition_number
from teleport_fast.symmetry.groups import Group
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View

PARAMETER, COVECTOR, SQUARE = "parameter", "covector", "square"
_EXPONENT = {PARAMETER: 1.0, COVECTOR: -1.0, SQUARE: -2.0}


@dataclass(frozen=True)
class Element:
    """One group element for all heads of a bucket; dense ones carry g⁻ᵀ so that nobody inverts twice.

    A dense group may be given an element of form "diagonal", (heads, h): it moves second moments exactly.
    """

    form: str
    g: Tensor
    g_inverse_t: Tensor | None = None

    @classmethod
    def of(cls, group: Group, g: Tensor) -> Element:
        return cls(group.form, g, group.inverse(g).mT if group.form == "dense" else None)

    def inverse(self, group: Group) -> Element:
        if self.form == "diagonal":
            return Element(self.form, self.g.reciprocal())
        if self.g_inverse_t is None:
            return Element(self.form, group.inverse(self.g))
        return Element(self.form, self.g_inverse_t.mT, self.g.mT)

    def after(self, first: Element) -> Element:
        """The element that acts as `first` and then this one; both of one form, which is not a permutation."""
        if self.form == "diagonal":
            return Element(self.form, self.g * first.g)
        assert self.g_inverse_t is not None and first.g_inverse_t is not None
        return Element(self.form, self.g @ first.g, self.g_inverse_t @ first.g_inverse_t)

    def signs(self) -> Element:
        """What moves an average of normalised gradients: of a diagonal the signs alone."""
        return Element(self.form, self.g.sign()) if self.form == "diagonal" else self

    def finite(self) -> Tensor:
        """Whether every entry is finite, a 0-d bool where the element lies."""
        return torch.isfinite(self.g.sum())

    def to(self, device: torch.device) -> Element:
        """The element on another device, where the tensors lie that it moves."""
        inverse = self.g_inverse_t
        return self if self.g.device == device else Element(self.form, self.g.to(device), None if inverse is None else inverse.to(device))

    def condition(self) -> Tensor:
        """The condition number of the worst head, 0-d where the element lies."""
        if self.form == "diagonal":
            return diagonal_condition_number(self.g)
        return condition_number(self.g) if self.form == "dense" else torch.ones((), device=self.g.device)

    def squared(self) -> Element:
        """The element whose matrices have squared entries: it carries second moments of uncorrelated entries."""
        assert self.g_inverse_t is not None
        return replace(self, g=self.g.square(), g_inverse_t=self.g_inverse_t.square())


@dataclass(frozen=True)
class Split:
    """An element for each side of a joint: what goes to `plus` for the writers' step, to `minus` for the readers'.

    Each is a move along the orbit, but the network is at neither point as a whole: only the return frame may use it.
    """

    plus: Element
    minus: Element

    form = "split"

    def inverse(self, group: Group) -> Split:
        return Split(self.plus.inverse(group), self.minus.inverse(group))

    def signs(self) -> Split:
        return Split(self.plus.signs(), self.minus.signs())

    def finite(self) -> Tensor:
        return self.plus.finite() & self.minus.finite()

    def condition(self) -> Tensor:
        return torch.maximum(self.plus.condition(), self.minus.condition())

    def to(self, device: torch.device) -> Split:
        return Split(self.plus.to(device), self.minus.to(device))


@dataclass(frozen=True)
class Bucket:
    """Joints with the same group, heads, width and number of views, whose parameters are disjoint."""

    joints: tuple[Joint, ...]

    @property
    def group(self) -> Group:
        return self.joints[0].group

    @property
    def heads(self) -> int:
        return self.joints[0].heads

    @property
    def width(self) -> int:
        return self.joints[0].width

    def plus(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The plus views of all joints, joint after joint: strided aliases (heads, h, outer, inner)."""
        return [view.of(tensors[view.parameter]) for joint in self.joints for view in joint.plus]

    def minus(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [view.of(tensors[view.parameter]) for joint in self.joints for view in joint.minus]

    def parameters(self) -> list[str]:
        return [name for joint in self.joints for name in joint.parameters()]

    def buffers(self) -> list[str]:
        return [name for joint in self.joints for name in joint.buffers()]

    @torch.no_grad()
    def move_(self, element: Element | Split, sources: Sequence[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Move every tensor of `sources` in place; a source is (kind, {parameter name: tensor}).

        Parameters: A₊ → g A₊, A₋ → g⁻ᵀ A₋. Covectors (gradients, first moments): G₊ → g⁻ᵀ G₊, G₋ → g G₋. Squares
        (second moments) take the square of a diagonal's factor; under a dense g they are not moved here. Buffers that a
        joint carries move with the parameters. Names missing from a source are left out. A `Split` moves each side by
        its own element.
        Source: own derivation, checked by tests/symmetry/test_bucket.py.
        """
        if isinstance(element, Split):
            plus, minus = self.sides
            plus.move_(element.plus, sources)
            minus.move_(element.minus, sources)
        elif element.form == "dense":
            self._move_dense(element, sources)
        elif element.form == "diagonal":
            self._move_diagonal(element.g, sources)
        else:
            self._permute(element.g, sources)

    @cached_property
    def sides(self) -> tuple[Bucket, Bucket]:
        """The same joints with their writers only, and with their readers only."""
        plus = tuple(replace(joint, minus=()) for joint in self.joints)
        return Bucket(plus), Bucket(tuple(replace(joint, plus=(), carried=()) for joint in self.joints))

    def _present(
        self, sources: Sequence[tuple[str, Mapping[str, Tensor]]]
    ) -> Iterable[tuple[int, str, View, float, Tensor]]:
        for index, joint in enumerate(self.joints):
            for side, views in ((1.0, joint.plus), (-1.0, joint.minus), (1.0, joint.carried)):
                for kind, tensors in sources:
                    for view in views:
                        tensor = tensors.get(view.parameter)
                        if tensor is not None:
                            yield index, kind, view, side, view.of(tensor)

    def _move_dense(self, element: Element, sources: Sequence[tuple[str, Mapping[str, Tensor]]]) -> None:
        forward: list[list[Tensor]] = [[] for _ in self.joints]
        backward: list[list[Tensor]] = [[] for _ in self.joints]
        for index, kind, _, side, alias in self._present(sources):
            if kind != SQUARE:
                (forward if side * _EXPONENT[kind] > 0 else backward)[index].append(alias)
        if len({len(run) for run in forward}) == 1 and len({len(run) for run in backward}) == 1:
            every_forward, every_backward = list(chain(*forward)), list(chain(*backward))
            if every_forward or every_backward:
                group_action_(every_forward, every_backward, element.g, element.g_inverse_t, joints=len(self.joints))
            return
        for index in range(len(self.joints)):
            rows = slice(index * self.heads, (index + 1) * self.heads)
            assert element.g_inverse_t is not None
            if forward[index] or backward[index]:
                group_action_(forward[index], backward[index], element.g[rows], element.g_inverse_t[rows])

    def _move_diagonal(self, g: Tensor, sources: Sequence[tuple[str, Mapping[str, Tensor]]]) -> None:
        present = list(self._present(sources))
        exponents = [side * view.power * _EXPONENT[kind] for _, kind, view, side, _ in present]
        shifts = [view.shift if kind == PARAMETER else 0.0 for _, kind, view, _, _ in present]
        for rows, joints, run in self._runs([index for index, *_ in present]):
            tensors = [present[i][4] for i in run]
            diagonal_action_(tensors, g[rows], [exponents[i] for i in run], [shifts[i] for i in run], joints)

    def _permute(self, g: Tensor, sources: Sequence[tuple[str, Mapping[str, Tensor]]]) -> None:
        present = list(self._present(sources))
        for rows, joints, run in self._runs([index for index, *_ in present]):
            permutation_action_([present[i][4] for i in run], g[rows], joints=joints)

    def _runs(self, owners: Sequence[int]) -> Iterable[tuple[slice, int, list[int]]]:
        """(rows of g, joints, positions) of each call: one for all joints that own as many tensors, else one per joint."""
        count, places = len(self.joints), list(range(len(owners)))
        if owners and [owners.count(index) for index in range(count)] == [len(owners) // count] * count:
            yield slice(None), count, places
            return
        for index in range(count):
            run = [i for i in places if owners[i] == index]
            if run:
                yield slice(index * self.heads, (index + 1) * self.heads), 1, run


def buckets(joints: Iterable[Joint]) -> list[Bucket]:
    """Joints of equal shape and disjoint parameters, in the order in which they were found."""
    found: dict[tuple[object, ...], list[list[Joint]]] = {}
    for joint in joints:
        key = (
            joint.kind,
            joint.group,
            joint.heads,
            tuple(view.power for view in joint.plus),
            tuple(view.power for view in joint.minus),
            tuple(view.power for view in joint.carried),
        )
        names = {*joint.parameters(), *joint.buffers()}
        for run in found.setdefault(key, []):
            if all(names.isdisjoint({*other.parameters(), *other.buffers()}) for other in run):
                run.append(joint)
                break
        else:
            found[key].append([joint])
    return [Bucket(tuple(run)) for runs in found.values() for run in runs]
