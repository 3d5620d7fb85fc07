"""The tape: one call of a model, recorded operator by operator, with the hidden unit of every entry of every value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teleport_fast.discovery.trace.units import Units


@dataclass(frozen=True)
class Alias:
    """A value that is a strided view of one parameter or buffer (plus `shift`)."""

    name: str
    view: Tensor
    shift: float = 0.0


@dataclass(frozen=True)
class Use:
    """Entries `index` of a tensor's axis scale with s_unit ** exponent; `region` is (axis, starts, size) of its part.

    `event` numbers the operator call, `carried` marks buffers.
    """

    parameter: str
    axis: int
    index: Tensor
    unit: Tensor
    exponent: float
    shift: float
    event: int
    carried: bool
    region: tuple[int, Tensor, int] | None = None


Rule = Callable[["Tape", Any, Any, Mapping[str, Any]], bool]


class Tape(TorchDispatchMode):
    """Runs under `record`; afterwards `uses` says which axis of which parameter follows which units."""

    def __init__(self, tensors: Mapping[str, Tensor], buffers: Iterable[str], rules: Mapping[str, Rule]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rules = rules
        self.units = Units()
        self.uses: list[Use] = []
        self.opaque: dict[str, str] = {}
        self.tensors = dict(tensors)
        self._buffers = set(buffers)
        self._event = 0
        self.current: Any = None
        self.current_name = ""
        self._values: dict[int, tuple[Tensor, Tensor | Alias]] = {}
        self._owners: dict[int, str] = {}
        self.buffers = {id(self.tensors[name]): name for name in self._buffers}
        for name, tensor in self.tensors.items():
            key = tensor.untyped_storage()._cdata
            if name in self._buffers:
                continue  # a buffer is plain data, but for the statistics that a BatchNorm rule takes up
            if key in self._owners:
                reason = "it shares its memory with another parameter"
                self.opaque[name] = self.opaque[self._owners[key]] = reason
            self._owners.setdefault(key, name)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the tape is never compiled, and skipping would import dynamo: 3 s

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        out = func(*args, **keywords)
        if not any(self.known(leaf) is not None for leaf in tree_leaves((args, keywords)) if isinstance(leaf, Tensor)):
            return out
        self.current, name = func.overloadpacket, func.overloadpacket.__name__
        in_place = name.endswith("_") and not name.startswith("__")
        self.current_name = name.rstrip("_") if in_place else name
        self._event += 1
        rule = self._rules.get(self.current_name)
        if in_place and isinstance(args[0], Tensor) and args[0]._is_view():
            rule = None  # what shares its memory changes too
        if rule is None or not self._applies(rule, out, args, keywords):
            self._stop(name, out, args, keywords)
        return out

    def _stop(self, name: str, out: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """An operator without a rule: nothing that goes in may move."""
        reason = f"operator {name} has no rule"
        for leaf in tree_leaves((args, dict(kwargs))):
            known = self.known(leaf)
            if isinstance(known, Tensor):
                self.units.pin(known, reason)
            elif isinstance(known, Alias):
                self.hide(known, f"it goes through operator {name}, which has no rule")
        if name.endswith("_"):
            for label in self.shared(args[0]):
                self.units.pin(label, reason)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.set(leaf, None)

    def _applies(self, rule: Rule, out: Any, args: Any, keywords: Mapping[str, Any]) -> bool:
        try:
            return rule(self, out, args, keywords)
        except (RuntimeError, IndexError, TypeError, ValueError, AssertionError, NotImplementedError):
            return False  # an overload that the rule does not foresee: as good as none

    def known(self, value: Any) -> Tensor | Alias | None:
        """The units of a value's entries, the parameter that it is a view of, or None for plain data."""
        if not isinstance(value, Tensor):
            return None
        held = self._values.get(id(value))
        if held is not None:
            return held[1]
        name = self._owners.get(value.untyped_storage()._cdata) if value.layout == torch.strided else None
        return Alias(name, value) if name is not None and value.is_floating_point() else None

    def label(self, value: Any) -> Tensor | None:
        known = self.known(value)
        return known if isinstance(known, Tensor) else None

    def set(self, value: Tensor, known: Tensor | Alias | None) -> bool:
        """Note what a value is; True, so that a rule can end with it."""
        if known is None:
            self._values.pop(id(value), None)
        else:
            assert isinstance(known, Alias) or known.shape == value.shape, (known.shape, value.shape)
            self._values[id(value)] = (value, known)
        return True

    def hide(self, alias: Alias, reason: str) -> None:
        """The parameter is used in a way that no view describes: it must not move."""
        self.opaque.setdefault(alias.name, reason)

    def shared(self, value: Tensor) -> list[Tensor]:
        """Labels of all values in the same memory."""
        key = value.untyped_storage()._cdata
        held = [v for v in self._values.values() if v[0].layout == torch.strided]
        return [k for v, k in held if isinstance(k, Tensor) and v.untyped_storage()._cdata == key]

    def axes(self, alias: Alias) -> list[tuple[int, Tensor] | None]:
        """For each dimension of the view: the parameter's axis that it runs along, and the indices on it."""
        parameter = self.tensors[alias.name]
        offset = alias.view.storage_offset() - parameter.storage_offset()
        found: list[tuple[int, Tensor] | None] = []
        for size, step in zip(alias.view.shape, alias.view.stride(), strict=True):
            flat = offset + torch.arange(size) * step
            places = [(flat // max(s, 1)) % n for n, s in zip(parameter.shape, parameter.stride(), strict=True)]
            moving = [a for a, place in enumerate(places) if size > 1 and bool((place != place[0]).any())]
            if size == 1:
                moving = [a for a, s in enumerate(parameter.stride()) if s == step and parameter.shape[a] == 1]
                moving = (moving or [a for a, s in enumerate(parameter.stride()) if s == step])[:1]
            found.append((moving[0], places[moving[0]]) if len(moving) == 1 else None)
        return found

    def use(
        self,
        alias: Alias,
        dim: int,
        units: Tensor,
        exponent: float,
        shift: float | None = None,
    ) -> None:
        """Entries along the view's dimension `dim` belong to `units` (size,)."""
        place = self.axes(alias)[dim]
        if place is None:
            self.hide(alias, "it is reshaped across its axes")
            self.units.pin(units, f"{alias.name!r} is reshaped across its axes")
            return
        axis, index = place
        region = self._part(alias, axis, len(index))
        self.note(alias.name, axis, index, units, exponent, region, alias.shift if shift is None else shift)

    def note(
        self,
        name: str,
        axis: int,
        index: Tensor,
        units: Tensor,
        exponent: float,
        region: tuple[int, Tensor, int] | None = None,
        shift: float = 0.0,
    ) -> None:
        real = units >= 0  # entries that meet plain data follow no unit
        if region is not None:
            region = (region[0], region[1][real], region[2])
        index, units = index[real], units[real]
        if len(units):
            self.uses.append(Use(name, axis, index, units, exponent, shift, self._event, name in self._buffers, region))

    def events(self, name: str) -> int:
        """How many operators use a parameter."""
        return len({use.event for use in self.uses if use.parameter == name})

    def column(self, label: Tensor, dim: int) -> Tensor:
        """The units along one dimension, those at equal places tied: what acts on a place acts on all of them."""
        columns = label.movedim(dim, 0).reshape(label.shape[dim], -1)
        self.units.tie(columns[:, :1], columns)
        return columns[:, 0]

    def _part(self, alias: Alias, axis: int, count: int) -> tuple[int, Tensor, int] | None:
        """Which part of the other axes a view shows: None for all, else that of the one axis that it cuts."""
        parameter = self.tensors[alias.name]
        covered = {a: index for place in self.axes(alias) if place is not None for a, index in [place]}
        offset = alias.view.storage_offset() - parameter.storage_offset()
        for other, (size, step) in enumerate(zip(parameter.shape, parameter.stride(), strict=True)):
            if other == axis or size == 1:
                continue
            index = covered.get(other, torch.tensor([(offset // max(step, 1)) % size]))
            if len(index) < size:
                return other, index[:1].expand(count), len(index)
        return None

    def data(self, alias: Alias) -> Tensor:
        """A parameter taken as data: fresh units along its last axis, which it writes."""
        shape = alias.view.shape
        units = self.units.new(shape[-1])
        self.use(alias, len(shape) - 1, units, 1.0)
        return units.expand(shape)

    def with_shift(self, alias: Alias, shift: float) -> Alias:
        return replace(alias, shift=alias.shift + shift)
