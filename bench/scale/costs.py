"""Work and state of a teleport and of a rotated step: products, factorisations, bytes touched and bytes sent, from shapes alone.

Checked against the library in tests/scale: its calls on small models, its state, `Rotated.memory()` on the large ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

from bench.scale.shapes import Joint, Matrix, Shape, Side

FLOAT = 4
# Householder's QR of an h × h matrix with Q formed: 4/3 h³ for the factor and 4/3 h³ for Q (Golub and Van Loan, 5.2).
QR = 8 / 3
# Products of h × h matrices in exp(M) and exp(−M) together at norms up to 1, roughly; nothing here hangs on it.
EXPONENTIAL_PRODUCTS = 8
# What a move takes along: the parameter, its gradient, its first moment.
MOVED = 3
# Fewest columns of a gradient that a covariance takes up.
LEAST_PART = 32
GRAD_NORM, ROTATIONS = "grad_norm teleport", "exact rotations"


@dataclass(frozen=True)
class Work:
    """Of the whole model, once. Flops that ranks share out (products, factorisations), that every rank repeats (own_...), and of the
    largest part that one rank does by itself (alone_...); bytes read and written (streamed, shared out), payload bytes of an
    all-reduce (reduced), bytes that all ranks together lay out anew (exchanged).
    """

    products: float = 0.0
    factorisations: float = 0.0
    own_products: float = 0.0
    own_factorisations: float = 0.0
    alone_products: float = 0.0
    alone_factorisations: float = 0.0
    streamed: float = 0.0
    reduced: float = 0.0
    exchanged: float = 0.0

    @property
    def flops(self) -> float:
        """Counted once, whoever repeats them."""
        return self.products + self.factorisations + self.own_products + self.own_factorisations

    def __add__(self, other: Work) -> Work:
        both = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(Work)}
        return Work(**{name: max(pair) if name.startswith("alone") else sum(pair) for name, pair in both.items()})


@dataclass(frozen=True)
class Method:
    """A way to step. `every`: steps between refreshes; `parts`: of a gradient, one of which a covariance takes up at a step.

    layout of a rotated matrix: "shards", as the library has it (rows over ranks; every basis made on one and kept on all), or
    "dealt": whole matrices to one rank each with all that belongs to them, which it has not.
    """

    name: str
    every: int = 1
    parts: int = 1
    hidden: bool | int = 64
    stream: str = "matrix"
    max_side: int = 4096
    layout: str = "shards"


def every_step(shape: Shape, method: Method, ranks: int = 1) -> Work:
    """What is done at each step beside the base optimizer's own, with every tensor's rows cut over so many ranks."""
    if method.name == GRAD_NORM:
        return Work()
    if method.name == ROTATIONS:
        return total(_covariance(joint, method.parts, ranks) for joint in shape.joints if joint.turns)
    found = total(_rotated_step(matrix, method, ranks) for matrix in shape.turned())
    # in shards, every step sums all covariances over ranks, a half of each symmetric matrix
    halves = sum(FLOAT * count * heads * width * (width + 1) / 2 for heads, width, count in bases(shape, method))
    return found if method.layout == "dealt" else found + Work(reduced=halves)


def at_refresh(shape: Shape, method: Method, ranks: int = 1) -> Work:
    """What is done once every `method.every` steps."""
    if method.name == GRAD_NORM:
        return total(_gradient_norm(joint, ranks) for joint in shape.joints if joint.stretches)
    if method.name == ROTATIONS:
        return total(_turn(joint, ranks) for joint in shape.joints if joint.turns)
    return total(_rotated_refresh(matrix, method, shape, ranks) for matrix in shape.turned())


def state(shape: Shape, method: Method) -> int:
    """Bytes of covariances and bases, each counted once; the base optimizer's moments are not counted."""
    if method.name == GRAD_NORM:
        return 0
    if method.name == ROTATIONS:
        return sum(FLOAT * joint.count * joint.heads * joint.width**2 for joint in shape.joints if joint.turns)
    return sum(2 * FLOAT * count * heads * width**2 for heads, width, count in bases(shape, method))


def state_of_a_rank(shape: Shape, method: Method, ranks: int) -> float:
    """Bytes of covariances and bases that a rank keeps: all of them, or those of the matrices dealt to it, of one at least."""
    if method.name in (GRAD_NORM, ROTATIONS) or method.layout == "shards":
        return float(state(shape, method))
    widths = ([found for side in matrix.sides if (found := _widths(side, method))] for matrix in shape.turned())
    largest = max(sum(2 * FLOAT * heads * width**2 for heads, width in sides) for sides in widths)
    return max(state(shape, method) / ranks, float(largest))


def parameter_bytes(shape: Shape) -> int:
    """Weights, gradients and two moments in float32: what a plain AdamW run holds, all ranks together."""
    return 4 * FLOAT * shape.parameters


def total(parts: Iterable[Work]) -> Work:
    return sum(parts, Work())


def aligned(width: int, size: int, ranks: int) -> bool:
    """Whether an axis cut over ranks leaves every block of `width` on one of them.

    >>> aligned(128, 4096, 32), aligned(128, 4096, 64)
    (True, False)
    """
    return ranks == 1 or (size % ranks == 0 and size // ranks % width == 0)


def block(size: int, most: int) -> int:
    """The largest divisor of `size` up to `most`."""
    return next(width for width in range(min(size, most), 0, -1) if size % width == 0)


def _parts(parts: int, columns: int) -> int:
    return max(1, min(parts, columns // LEAST_PART))


def _covariance(joint: Joint, parts: int, ranks: int) -> Work:
    """C ← β C + (1 − β) Σ G Gᵀ/‖G‖²: each rank over what it holds, then one sum; where rows are cut, G's part is laid out anew."""
    counted = [(view.axis, view.entries / _parts(parts, view.rest)) for view in joint.views if view.counts]
    taken = joint.count * sum(entries for _, entries in counted)
    whole = aligned(joint.width, joint.heads * joint.width, ranks)
    cut = 0.0 if whole else joint.count * sum(entries for axis, entries in counted if axis == "rows")
    return Work(
        products=2.0 * joint.width * taken,
        streamed=FLOAT * taken,
        reduced=FLOAT * joint.count * joint.heads * joint.width**2,
        exchanged=FLOAT * cut,
    )


def _turn(joint: Joint, ranks: int) -> Work:
    """Q of C, C ← QᵀCQ on every rank alike; then Q Aᵀ of all that moves, there and back where the joint's axis is cut."""
    matrices = joint.count * joint.heads
    moved, cut = _moved(joint, ranks)
    return Work(
        products=2.0 * joint.width * moved,
        own_products=4.0 * matrices * joint.width**3,
        own_factorisations=0.0 if joint.group == "rotary" else QR * matrices * joint.width**3,
        streamed=2 * FLOAT * moved + 4 * FLOAT * matrices * joint.width**2,
        exchanged=2 * FLOAT * cut,
    )


def _moved(joint: Joint, ranks: int) -> tuple[int, int]:
    """Entries of parameters, gradients and first moments that move, and those of them that ranks must lay out anew for it."""
    rows = sum(view.entries for view in joint.views if view.axis == "rows")
    cut = 0 if aligned(joint.width, joint.heads * joint.width, ranks) else rows
    return MOVED * joint.count * sum(view.entries for view in joint.views), MOVED * joint.count * cut


def _gradient_norm(joint: Joint, ranks: int) -> Work:
    """S₋ − S₊ from the gradients, a matrix exponential and its inverse's, and the move; a diagonal's sums and its move."""
    matrices = joint.count * joint.heads
    moved, cut = _moved(joint, ranks)
    gradient = moved / MOVED
    streamed = FLOAT * (gradient + 2 * moved)
    if joint.group == "diagonal":
        return Work(streamed=streamed, reduced=2 * FLOAT * matrices * joint.width)
    return Work(
        products=2.0 * joint.width * (gradient + moved),
        own_products=2.0 * EXPONENTIAL_PRODUCTS * matrices * joint.width**3,
        streamed=streamed + 4 * FLOAT * matrices * joint.width**2,
        reduced=FLOAT * matrices * joint.width**2,
        # the gradient for its Gram, then all that moves there and back
        exchanged=FLOAT * cut * (2 + 1 / MOVED),
    )


def _widths(side: Side, method: Method) -> tuple[int, int] | None:
    """(heads, width) of a side's bases; None where it is not turned."""
    heads, width = side.heads, side.width
    if side.kind in ("none", "tokens") or (side.kind == "stream" and method.stream == "none"):
        return None
    if side.kind == "hidden":
        if method.hidden is False:
            return None
        if method.hidden is not True:
            width = block(side.width, method.hidden)
            heads = side.width // width
    return (heads, width) if 1 < width <= method.max_side else None


def _rotated_step(matrix: Matrix, method: Method, ranks: int) -> Work:
    """There and back on every turned side, and a part of the gradient into each side's covariance.

    Shards: a matrix whose rows are turned and cut goes to columns and comes back, and once more where its columns' blocks are then cut.
    Dealt: a gradient goes to the rank that has the matrix, an update comes back.
    """
    sides = [(found, other.size) for side, other in (matrix.sides, matrix.sides[::-1]) if (found := _widths(side, method))]
    if not sides:
        return Work()
    entries = float(matrix.entries)
    turns = sum(2 * 2 * width * entries for (_, width), _ in sides)
    covariances = sum(2 * width * entries / _parts(method.parts, other) for (_, width), other in sides)
    # a turn reads and writes the matrix once; a covariance reads its part
    streamed = sum(FLOAT * entries * (4 + 1 / _parts(method.parts, other)) for _, other in sides)
    dealt = method.layout == "dealt"
    return Work(
        products=matrix.count * (turns + covariances),
        alone_products=turns + covariances if dealt else 0.0,
        streamed=matrix.count * streamed,
        exchanged=matrix.count * FLOAT * entries * (2 if dealt else _layouts(matrix, method, ranks)),
    )


def _layouts(matrix: Matrix, method: Method, ranks: int) -> int:
    """How often a step in shards lays a matrix out anew: 0, 2 where rows are cut, 3 where columns would be cut, too."""
    rows, columns = (_widths(side, method) for side in matrix.sides)
    if rows is None or aligned(rows[1], matrix.rows.size, ranks):
        return 0
    return 2 if columns is None or aligned(columns[1], matrix.columns.size, ranks) else 3


def _rotated_refresh(matrix: Matrix, method: Method, shape: Shape, ranks: int) -> Work:
    """R C and its QR factor, the turn Q Rᵀ, and the first moment to it, per side; a shared basis is made once.

    Shards: one rank makes a basis and sends it to all, which turn their part of a moment out of the old and into the new one.
    Dealt: one rank makes a basis and sends it to those that share it.
    """
    found, lonely, lonely_factorisations = Work(), 0.0, 0.0
    dealt, sent = method.layout == "dealt", method.layout != "dealt" and ranks > 1
    for side in matrix.sides:
        widths = _widths(side, method)
        if widths is None:
            continue
        heads, width = widths
        own = _owned(matrix, side, method, shape)
        made, shared = matrix.count * own, matrix.count if own < 1 else 0
        cube, square = heads * float(width) ** 3, heads * float(width) ** 2
        moment = 2.0 * width * matrix.entries * (2 if sent else 1)
        found = found + Work(
            products=matrix.count * moment + made * 4 * cube,
            factorisations=made * QR * cube,
            # a rank makes whole bases: in shards one at least, dealt a matrix' own
            alone_products=4 * cube if sent else 0.0,
            alone_factorisations=QR * cube if sent else 0.0,
            streamed=matrix.count * 2 * FLOAT * matrix.entries + made * 6 * FLOAT * square,
            # what one rank sends to all takes half of an all-reduce's way
            reduced=FLOAT * made * square / 2 if sent else 0.0,
            exchanged=2 * FLOAT * shared * square if dealt else 0.0,
        )
        lonely, lonely_factorisations = lonely + moment + 4 * cube, lonely_factorisations + QR * cube
    if dealt:
        return replace(found, alone_products=lonely, alone_factorisations=lonely_factorisations)
    # moments lie where the step is taken: only those of matrices with both sides cut go home for a turn
    home = 2 if _layouts(matrix, method, ranks) == 3 else 0
    return replace(found, exchanged=matrix.count * FLOAT * float(matrix.entries) * home)


def _owned(matrix: Matrix, side: Side, method: Method, shape: Shape) -> float:
    """Bases per matrix that are this matrix's own to make, on average: sharers divide one."""
    if side.kind != "stream" or method.stream in ("matrix", "none"):
        return 1.0
    if method.stream == "site":
        return 1 / sum(1 for m in shape.turned() if m.site == matrix.site) if matrix.site else 1.0
    sharers = sum(m.count for m in shape.turned() if "stream" in (m.rows.kind, m.columns.kind))
    return (1 if method.stream == "model" else shape.layers) / sharers


def bases(shape: Shape, method: Method) -> Iterator[tuple[int, int, int]]:
    """(heads, width, how many) of the bases that are kept."""
    shares = method.stream in ("site", "layer", "model")
    stream = []
    for matrix in shape.turned():
        for side in matrix.sides:
            widths = _widths(side, method)
            if widths is not None and side.kind == "stream" and shares:
                stream.append(matrix)
            elif widths is not None:
                yield *widths, matrix.count
    if stream:
        sites = {m.site: m.count for m in stream if m.site}
        per_site = sum(sites.values()) + sum(m.count for m in stream if not m.site)
        yield 1, shape.width, {"site": per_site, "layer": shape.layers, "model": 1}[method.stream]
