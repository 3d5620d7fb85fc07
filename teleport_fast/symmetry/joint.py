"""A joint: a hidden space that some tensors write and others read, with the group that acts between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from teleport_fast.symmetry.groups import Group
from teleport_fast.symmetry.view import View


@dataclass(frozen=True, repr=False)
class Joint:
    """`heads` equal hidden spaces of `width` units that `plus` views write and `minus` views read.

    Action: A₊ → g A₊, A₋ → g⁻ᵀ A₋. `carried` views are of buffers (running statistics), which move as A₊ does and have
    no gradient. Errors: ValueError if a view's heads or width are not the joint's, the group has another width, or a view
    has a power or a shift that a dense group cannot apply.
    """

    name: str
    kind: str
    group: Group
    heads: int
    width: int
    plus: tuple[View, ...]
    minus: tuple[View, ...]
    carried: tuple[View, ...] = ()

    def __post_init__(self) -> None:
        for view in (*self.views(), *self.carried):
            if (view.heads, view.width) != (self.heads, self.width):
                raise ValueError(
                    f"joint {self.name!r} has {self.heads} heads of width {self.width}, but the view of "
                    f"{view.parameter!r} has {view.heads} of width {view.width}; all tensors of a joint share one space"
                )
            if self.group.form == "dense" and (view.power != 1 or view.shift):
                raise ValueError(
                    f"joint {self.name!r}: the view of {view.parameter!r} has power {view.power} and shift "
                    f"{view.shift}, which mean nothing under {self.group}; use a diagonal group"
                )
        if self.group.width != self.width:
            raise ValueError(f"joint {self.name!r} has width {self.width}, but its group is {self.group}")
        if not self.plus and not self.minus:
            raise ValueError(f"joint {self.name!r} has no views; name at least one parameter")

    def __repr__(self) -> str:
        sides = f"plus={_shown(self.plus)}, minus={_shown(self.minus)}"
        return f"Joint({self.name!r}, kind={self.kind!r}, group={self.group}, heads={self.heads}, {sides})"

    @property
    def dim(self) -> int:
        """Continuous symmetric dimensions, all heads."""
        return self.heads * self.group.dim

    def views(self) -> Iterator[View]:
        yield from self.plus
        yield from self.minus

    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that move, each once."""
        return tuple(dict.fromkeys(view.parameter for view in self.views()))

    def buffers(self) -> tuple[str, ...]:
        """Names of the buffers that move along, each once."""
        return tuple(dict.fromkeys(view.parameter for view in self.carried))

    def check_shapes(self, tensors: dict[str, Tensor]) -> None:
        """Raise ValueError if a parameter (or a buffer) is missing or too small for its view."""
        for view in (*self.views(), *self.carried):
            if view.parameter not in tensors:
                raise ValueError(
                    f"joint {self.name!r} names the parameter {view.parameter!r}, which the model does not have; "
                    f"run find_symmetries on this model again"
                )
            try:
                view.of(tensors[view.parameter])
            except ValueError as error:
                raise ValueError(f"joint {self.name!r}: {error}") from None


def _shown(side: tuple[View, ...]) -> str:
    """A side in one line: four parameters, and how many more there are."""
    names = list(dict.fromkeys(view.parameter for view in side))
    more = [f"{len(names) - 4} more"] if len(names) > 4 else []
    return f"[{', '.join([*names[:4], *more])}]"
