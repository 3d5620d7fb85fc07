"""Which side of which matrix is turned, by what basis: from proven symmetries, then names, then shapes alone."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from teleport_fast.optim.names import is_table, layer, plain, role, site
from teleport_fast.symmetry.symmetries import Symmetries

STREAMS = ("matrix", "site", "layer", "model", "none")
HEAD_KINDS = ("value-output", "query-key")
HIDDEN_KINDS = ("up-down", "neurons")


@dataclass(frozen=True)
class Side:
    """One axis of a matrix, `heads` runs of `width`: turned by the bases called `basis`, or left (None), and why."""

    kind: str
    heads: int
    width: int
    basis: str | None
    why: str = ""

    @property
    def entries(self) -> int:
        """Entries of one basis tensor, (heads, width, width); 0 where nothing is turned."""
        return self.heads * self.width * self.width if self.basis else 0


@dataclass(frozen=True)
class Assignment:
    """A parameter's name, shape and two sides (rows, columns); `sides=None`: AdamW steps it, for the reason `why`."""

    name: str
    shape: tuple[int, ...]
    sides: tuple[Side, Side] | None
    why: str = ""

    @property
    def turned(self) -> bool:
        return self.sides is not None and any(side.basis for side in self.sides)


@dataclass(frozen=True)
class Known:
    """What proven symmetries say: (kind, width) by (parameter, axis), the tables, and the stream's width."""

    sides: Mapping[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    width: int | None = None

    @classmethod
    def of(cls, symmetries: Symmetries | None) -> Known:
        sides: dict[tuple[str, int], tuple[str, int]] = {}
        tables: set[str] = set()
        width = None
        for joint in symmetries or ():
            for view in joint.views():
                place = (view.parameter, view.axis)
                if joint.kind == "residual":
                    width = joint.width
                    if not view.counts:
                        tables.add(view.parameter)
                    sides[place] = ("stream", joint.width)
                elif joint.kind.startswith(HEAD_KINDS):
                    sides[place] = ("heads", joint.width)
                elif joint.kind.startswith(HIDDEN_KINDS):
                    sides.setdefault(place, ("hidden", joint.width))
        return cls(sides, frozenset(tables), width)


@dataclass(frozen=True)
class Rules:
    """The optimizer's arguments that decide sides; see `Rotated`."""

    stream: str = "matrix"
    heads: bool = True
    hidden: bool | int = 64
    max_side: int = 4096
    sides: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def block(self) -> int | None:
        """The width that a hidden side's bases are to have; None for one basis."""
        return None if isinstance(self.hidden, bool) else self.hidden

    def __post_init__(self) -> None:
        if self.stream not in STREAMS:
            raise ValueError(
                f"stream must be one of {', '.join(STREAMS)}, got {self.stream!r}; 'matrix' is the default"
            )
        if self.max_side < 0:
            raise ValueError(f"max_side must be at least 0, got {self.max_side}; 4096 is the default")
        if not isinstance(self.hidden, int) or (self.block is not None and self.block < 2):
            raise ValueError(
                f"hidden must be True, False or a width of at least 2, got {self.hidden!r}; 64 is the default"
            )
        for pattern, pair in self.sides.items():
            if len(pair) != 2 or any(_parse(word) is None for word in pair):
                raise ValueError(
                    f"sides[{pattern!r}] must be two of 'stream', 'heads:N', 'hidden', 'whole', 'none', got {pair!r}; "
                    f"rows first, for example ('heads:8', 'stream')"
                )


def stream_width(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """The size that most sides of the matrices have; of equally frequent ones the smallest.

    >>> stream_width([(8, 8), (32, 8), (8, 32)])
    8
    """
    counts = Counter(size for shape in shapes if len(shape) == 2 for size in shape)
    return min(counts, key=lambda size: (-counts[size], size)) if counts else None


def assign(
    parameters: Sequence[tuple[str, tuple[int, ...], bool, bool]], known: Known, rules: Rules, width: int | None
) -> list[Assignment]:
    """An Assignment per (name, shape, named, wanted); `named` says that the name is the model's, not made up."""
    return [
        Assignment(name, shape, None, "its group says rotate=False")
        if not wanted
        else _assignment(name, shape, named, known, rules, width)
        for name, shape, named, wanted in parameters
    ]


def _assignment(
    name: str, shape: tuple[int, ...], named: bool, known: Known, rules: Rules, width: int | None
) -> Assignment:
    if len(shape) != 2:
        return Assignment(name, shape, None, "no matrix")
    if 0 in shape:
        return Assignment(name, shape, None, "no entries")
    own = next((pair for pattern, pair in rules.sides.items() if fnmatch.fnmatch(plain(name), pattern)), None)
    if own is None and (plain(name) in known.tables or (named and is_table(name))):
        return Assignment(name, shape, None, "embedding or head")
    kind = role(name) if named else None
    words = own or _words(plain(name), shape, kind, named, known, rules, width)
    rows, columns = (_side(words[axis], shape[axis], axis, name, kind, named, rules, own) for axis in (0, 1))
    reason = "" if rows.basis or columns.basis else f"rows: {rows.why}; columns: {columns.why}"
    return Assignment(name, shape, (rows, columns) if not reason else None, reason)


def _words(
    name: str, shape: tuple[int, ...], kind: str | None, named: bool, known: Known, rules: Rules, width: int | None
) -> tuple[str, str]:
    """What each axis is, in the words of the argument `sides`."""
    found: list[str | None] = [None, None]
    for axis in (0, 1):
        said = known.sides.get((name, axis))
        if said is not None:
            what, size = said
            found[axis] = f"heads:{shape[axis] // size}" if what == "heads" and shape[axis] % size == 0 else what
    reads = {"attention": 1, "mlp": 1, "attention-writer": 0, "writer": 0}.get(kind or "")
    on_stream = [axis for axis in (0, 1) if found[axis] is None and shape[axis] == width]
    if "stream" not in found and on_stream:
        # both sides of a square matrix have the stream's size: the name decides, and without one both are turned
        chosen = [reads] if reads in on_stream and len(on_stream) == 2 else on_stream
        for axis in chosen:
            found[axis] = "stream"
    # heads whose number nobody told: one basis for all of them, as good and dearer
    attention = kind in ("attention", "attention-writer")
    # an embedding without a name looks like an MLP's layer, and its rows are best left
    inner = named or rules.hidden is True
    for axis in (0, 1):
        if found[axis] is None:
            found[axis] = (
                "whole" if attention and width is not None and shape[axis] <= width else "hidden" if inner else "none"
            )
    return found[0] or "none", found[1] or "none"


def divisor_near(size: int, block: int) -> int | None:
    """The largest divisor of `size` up to `block`; None where that is less than half of it.

    >>> divisor_near(344, 64), divisor_near(48, 64), divisor_near(62, 30)
    (43, 48, None)
    """
    found = next(width for width in range(min(size, block), 0, -1) if size % width == 0)
    return found if 2 * found >= min(size, block) else None


def _parse(word: str) -> tuple[str, int] | None:
    kind, _, count = word.partition(":")
    if kind == "heads":
        return (kind, int(count)) if count.isdigit() and int(count) > 0 else None
    return (kind, 1) if kind in ("stream", "hidden", "whole", "none") and not count else None


def _side(
    word: str,
    size: int,
    axis: int,
    name: str,
    role_of: str | None,
    named: bool,
    rules: Rules,
    own: tuple[str, str] | None,
) -> Side:
    parsed = _parse(word)
    assert parsed is not None
    kind, heads = parsed
    if size % heads:
        raise ValueError(f"sides of {name!r}: {word!r} does not divide its axis of {size}; pass a divisor as N")
    off = {
        "none": "left as it is",
        "stream": "stream='none'" if rules.stream == "none" else "",
        "hidden": "" if rules.hidden or own else "hidden=False",
        "heads": "" if rules.heads or own else "heads=False",
        "whole": "" if rules.heads or own else "heads=False",
    }[kind]
    width = size // heads
    if kind == "hidden" and rules.block is not None and not off:
        found = divisor_near(size, rules.block)
        if found is None:
            off = f"{size} has no divisor near hidden={rules.block}"
        else:
            heads, width = size // found, found
    if not off and width > rules.max_side:
        off = f"{width} is above max_side={rules.max_side}"
    if not off and width < 2:
        off = "one entry has nothing to turn"
    if off:
        return Side(kind, heads, width, None, off)
    basis = f"{name} {('rows', 'columns')[axis]}"
    if kind == "stream" and rules.stream != "matrix":
        if not named and rules.stream != "model":
            raise ValueError(
                f"stream={rules.stream!r} needs names, got plain parameters; pass model.named_parameters(), "
                f"or stream='matrix'"
            )
        shared: dict[str, Callable[[], str]]
        shared = {"site": lambda: site(name, role_of), "layer": lambda: layer(name), "model": lambda: "the stream"}
        group = shared[rules.stream]()
        # a matrix that is alone keeps a basis per side
        basis = basis if group == name else f"{group}, {width} wide"
    return Side(kind, heads, width, basis)
