"""The symmetries of a model: its proven joints, what was rejected and why, and the moves along them."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from teleport_fast.distributed.layout import described
from teleport_fast.symmetry.bucket import PARAMETER, Bucket, Element
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.verify import VerifyReport, verify


@dataclass(frozen=True)
class Finding:
    """One line of `explain()`: what was proposed, whether it stands, the probe's deviation, and why not."""

    name: str
    kind: str
    status: str
    reason: str = ""
    deviation: float | None = None


@dataclass(repr=False)
class Symmetries:
    """An iterable of joints, found and proven on one model; joints are looked up by name.

    Joints made by hand: `Symmetries(joints, model=model)`. Parameters are known by name; the model is not kept alive.
    """

    joints: tuple[Joint, ...]
    findings: tuple[Finding, ...] = ()
    model: InitVar[nn.Module | None] = None
    _parameters: dict[str, weakref.ref[Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _model: weakref.ref[nn.Module] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self, model: nn.Module | None) -> None:
        if model is not None:
            self._parameters = {name: weakref.ref(tensor) for name, tensor in named_tensors(model).items()}
            self._model = weakref.ref(model)
        self.joints = tuple(self.joints)
        self._by_name = {joint.name: joint for joint in self.joints}
        if len(self._by_name) != len(self.joints):
            raise ValueError("joints must have distinct names; rename the duplicates")

    def __iter__(self) -> Iterator[Joint]:
        return iter(self.joints)

    def __len__(self) -> int:
        return len(self.joints)

    def __repr__(self) -> str:
        return f"Symmetries({self._total()})"

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Joint:
        if name not in self._by_name:
            raise KeyError(f"no joint named {name!r}; the joints are {', '.join(self._by_name) or 'none'}")
        return self._by_name[name]

    @property
    def dim(self) -> int:
        """Continuous symmetric dimensions of all joints."""
        return sum(joint.dim for joint in self.joints)

    def select(self, keep: Callable[[Joint], bool] | Iterable[str]) -> Symmetries:
        """The joints for which `keep(joint)` holds, or whose kind or name is in `keep`.

        >>> from teleport_fast import find_symmetries
        >>> from teleport_fast.experiments.gpt import GPT, GPTConfig
        >>> symmetries = tf.find_symmetries(GPT(GPTConfig(d_model=16, layers=1, heads=2)))
        >>> [joint.kind for joint in symmetries.select(["value-output"])]
        ['value-output']
        """
        if callable(keep):
            chosen = tuple(joint for joint in self.joints if keep(joint))
        else:
            wanted = {keep} if isinstance(keep, str) else set(keep)
            chosen = tuple(joint for joint in self.joints if joint.kind in wanted or joint.name in wanted)
            unknown = wanted - {joint.kind for joint in self.joints} - set(self._by_name)
            if unknown:
                raise ValueError(
                    f"keep names no joint and no kind: {sorted(unknown)}; "
                    f"kinds here are {sorted({joint.kind for joint in self.joints})}"
                )
        return Symmetries(chosen, self.findings, _parameters=self._parameters, _model=self._model)

    def parameter(self, name: str) -> Tensor | None:
        """The live parameter of that name on the model where the joints were found, if it is still there."""
        reference = self._parameters.get(name)
        return None if reference is None else reference()

    def candidates(self, name: str) -> Iterator[Tensor]:
        """The parameter of that name where the joints were found, then the one that a wrapper (fully_shard) put in its place."""
        model = None if self._model is None else self._model()
        for parameter in (self.parameter(name), None if model is None else _get(model, name)):
            if parameter is not None:
                yield parameter

    def buffers(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The live buffers of these names on the model where the joints were found (moving a model replaces them).

        Errors: ValueError once the model is gone, or where it has no such buffer.
        """
        names = list(names)
        model = None if self._model is None else self._model()
        if names and model is None:
            raise ValueError(
                f"buffer {names[0]!r} moves with a joint, but the model it was found on is gone; find_symmetries again"
            )
        return {name: model.get_buffer(name) for name in names} if model is not None else {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parameters": {}, "_model": None}

    @torch.no_grad()
    def apply_(self, model: nn.Module, elements: Mapping[str, Tensor]) -> None:
        """Move the model's parameters along the named joints, in place, in the order given.

        elements: {joint name: g}; g (heads, h, h) for dense groups, (heads, h) for diagonals, (heads, h) int64 for
        permutations; cast to each parameter's dtype. A₊ → g A₊, A₋ → g⁻ᵀ A₋ (docs/mathematics.md). Of a sharded model every
        rank must call this, with the same elements.
        Errors: TypeError for elements that are no mapping, KeyError for an unknown joint, ValueError for an element that is not
        in the group or has a wrong shape; all elements are checked before anything moves.
        """
        if not isinstance(elements, Mapping):
            raise TypeError(f"elements must be a dict {{joint name: g}}, got {type(elements).__name__}; symmetries.random() gives one")
        tensors = {**dict(model.named_buffers()), **named_tensors(model)}
        shapes, moves = described(tensors), []
        for name, g in elements.items():
            joint = self[name]
            joint.check_shapes(shapes)
            g = joint.group.check(g, joint.heads, name)
            if g.is_floating_point():
                first = tensors[joint.parameters()[0]]
                g = g.to(first.device, torch.float64 if first.dtype == torch.float64 else g.dtype)
            try:
                moves.append((joint, Element.of(joint.group, g)))
            except torch.linalg.LinAlgError:
                raise ValueError(f"element of joint {name!r} is singular; pass an invertible element") from None
        from teleport_fast.plan import place_of  # which stands on this module

        place = place_of(tensors.values())
        for joint, element in moves:
            for write in place.writes(Bucket((joint,)), element, [(PARAMETER, tensors)]):
                write()

    def random(
        self, radius: float = 0.5, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
    ) -> dict[str, Tensor]:
        """A random element of every joint, each independent factor at distance `radius` from the identity.

        Returns {joint name: g} in float64 by default. Without a generator each joint draws from one seeded by its name,
        so that two calls agree. Errors: ValueError if radius is not positive and finite.
        """
        if not 0 < radius < float("inf"):
            raise ValueError(f"radius must be positive and finite, got {radius}; 0.5 is the usual choice")
        drawn = {}
        for joint in self.joints:
            source = generator or torch.Generator().manual_seed(zlib.crc32(joint.name.encode()))
            if joint.group.form == "permutation":
                drawn[joint.name] = joint.group.random(joint.heads, radius, source)
            else:
                drawn[joint.name] = joint.group.random(joint.heads, radius, source, dtype)
        return drawn

    def verify(self, model: nn.Module, inputs: Any = None, tolerance: float = 1e-10) -> VerifyReport:
        """Prove every joint on a perturbed float64 copy of the model: a random element must leave the outputs alone.

        Returns a VerifyReport with `.ok`, `.max_deviation` and a row per joint, negative control included.
        """
        return verify(self.joints, model, inputs, tolerance)

    def explain(self) -> str:
        """A table of what was found, what was rejected or skipped, and why."""
        rows = [("joint", "kind", "group", "heads", "dim", "deviation", "status")]
        proven = {f.name: f for f in self.findings if f.status == "found"}
        for joint in self.joints:
            found = proven.get(joint.name)
            shown = "unproven" if found is None or found.deviation is None else f"{found.deviation:.0e}"
            status = "found" if found is None or not found.reason else f"found: {found.reason}"
            rows.append((joint.name, joint.kind, str(joint.group), str(joint.heads), str(joint.dim), shown, status))
        for finding in self.findings:
            if finding.status != "found":
                shown = "" if finding.deviation is None else f"{finding.deviation:.0e}"
                rows.append((finding.name, finding.kind, "", "", "", shown, f"{finding.status}: {finding.reason}"))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        columns = [[cell.ljust(width) for cell, width in zip(row, widths, strict=False)] for row in rows]
        lines = ["  ".join([*cells, row[6]]).rstrip() for cells, row in zip(columns, rows, strict=True)]
        lines.insert(1, "-" * min(120, max(map(len, lines))))
        return "\n".join([*lines, self._total()])

    def _total(self) -> str:
        return f"{len(self)} joint{'s'[: len(self) != 1]}, {self.dim} continuous dimensions"


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by name, each parameter once under its first name."""
    return dict(model.named_parameters())


def _get(model: nn.Module, name: str) -> Tensor | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None
