"""A bucket: joints of equal shape that move together, in one call for parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain

import torch
from torch import Tensor

from teleport_fast.ops import diagonal_action_, group_action_, permutation_action_
from teleport_fast.symmetry.condition import condition_numbers, diagonal_condition_number
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
        """Whether every entry of g and of its inverse is finite, a 0-d bool where the element lies."""
        if self.form == "diagonal":
            return torch.isfinite(self.g.sum() + self.g.reciprocal().sum())
        inverse = self.g_inverse_t
        return torch.isfinite(self.g.sum() if inverse is None else self.g.sum() + inverse.sum())

    def conditions(self) -> Tensor:
        """The condition number of each head's g, (heads,); 1 where g is diagonal (its entries are factors of their own), a
        permutation, or given as its own inverse transpose (a rotation). For finite elements."""
        if self.form != "dense" or self.turns or not self.g.numel():
            return torch.ones(len(self.g), dtype=torch.float32, device=self.g.device)
        return condition_numbers(self.g)

    @property
    def turns(self) -> bool:
        """Whether a dense g was given as its own inverse transpose: a rotation."""
        g, inverse = self.g, self.g_inverse_t
        return inverse is not None and g.data_ptr() == inverse.data_ptr() and g.stride() == inverse.stride()

    def to(self, device: torch.device) -> Element:
        """The element on another device, where the tensors lie that it moves."""
        inverse = self.g_inverse_t
        return self if self.g.device == device else Element(self.form, self.g.to(device), None if inverse is None else inverse.to(device))

    def condition(self) -> Tensor:
        """The condition number of the worst head, 0-d where the element lies."""
        if self.form == "diagonal":
            return diagonal_condition_number(self.g)
        return condition_numbers(self.g).amax() if self.form == "dense" else torch.ones((), device=self.g.device)

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

    def conditions(self) -> Tensor:
        """1: each side's frame has the bound of the objective that made it (`Scaled.ridge`)."""
        return torch.ones(len(self.plus.g), dtype=torch.float32, device=self.plus.g.device)

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
        for write in self.writes(element, sources):
            write()

    def writes(self, element: Element | Split, sources: Sequence[tuple[str, Mapping[str, Tensor]]]) -> list[Callable[[], object]]:
        """The calls, one op each, that `move_` makes: every view is taken and checked for its size before the first of them."""
        if isinstance(element, Split):
            plus, minus = self.sides
            return [*plus.writes(element.plus, sources), *minus.writes(element.minus, sources)]
        if element.form == "dense":
            return self._dense(element, sources)
        return self._diagonal(element.g, sources) if element.form == "diagonal" else self._permutation(element.g, sources)

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

    def _dense(self, element: Element, sources: Sequence[tuple[str, Mapping[str, Tensor]]]) -> list[Callable[[], object]]:
        forward: list[list[Tensor]] = [[] for _ in self.joints]
        backward: list[list[Tensor]] = [[] for _ in self.joints]
        for index, kind, _, side, alias in self._present(sources):
            if kind != SQUARE:
                (forward if side * _EXPONENT[kind] > 0 else backward)[index].append(alias)
        if len({len(run) for run in forward}) == 1 and len({len(run) for run in backward}) == 1:
            every_forward, every_backward = list(chain(*forward)), list(chain(*backward))
            if not every_forward and not every_backward:
                return []
            return [partial(group_action_, every_forward, every_backward, element.g, element.g_inverse_t, len(self.joints))]
        found: list[Callable[[], object]] = []
        for index in range(len(self.joints)):
            rows = slice(index * self.heads, (index + 1) * self.heads)
            assert element.g_inverse_t is not None
            if forward[index] or backward[index]:
                g, inverse = element.g[rows], element.g_inverse_t[rows]
                found.append(partial(group_action_, forward[index], backward[index], g, inverse))
        return found

    def _diagonal(self, g: Tensor, sources: Sequence[tuple[str, Mapping[str, Tensor]]]) -> list[Callable[[], object]]:
        present = list(self._present(sources))
        exponents = [side * view.power * _EXPONENT[kind] for _, kind, view, side, _ in present]
        shifts = [view.shift if kind == PARAMETER else 0.0 for _, kind, view, _, _ in present]
        found: list[Callable[[], object]] = []
        for rows, joints, run in self._runs([index for index, *_ in present]):
            tensors, powers = [present[i][4] for i in run], [exponents[i] for i in run]
            found.append(partial(diagonal_action_, tensors, g[rows], powers, [shifts[i] for i in run], joints))
        return found

    def _permutation(self, g: Tensor, sources: Sequence[tuple[str, Mapping[str, Tensor]]]) -> list[Callable[[], object]]:
        present = list(self._present(sources))
        runs = self._runs([index for index, *_ in present])
        return [partial(permutation_action_, [present[i][4] for i in run], g[rows], joints) for rows, joints, run in runs]

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


def meet(one: Bucket, other: Bucket) -> bool:
    """Whether two buckets have an entry of a parameter or buffer in common, or may have one."""
    theirs: dict[str, list[View]] = {}
    for joint in other.joints:
        for view in (*joint.views(), *joint.carried):
            theirs.setdefault(view.parameter, []).append(view)
    mine = (view for joint in one.joints for view in (*joint.views(), *joint.carried))
    return any(view.meets(their) for view in mine for their in theirs.get(view.parameter, ()))


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
