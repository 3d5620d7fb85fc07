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
# What a move takes along: the parameter, its gradient, its first moment.
MOVED = 3
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
    """A way to step. `every`: steps between refreshes; `parts`: of a gradient, one of which a covariance takes up at a step."""

    name: str
    every: int = 1
    parts: int = 1
    hidden: bool | int = 64
    stream: str = "matrix"
    max_side: int = 4096

    @property
    def rotated(self) -> bool:
        return self.name not in (GRAD_NORM, ROTATIONS)


def every_step(shape: Shape, method: Method) -> Work:
    """What is done at each step beside the base optimizer's own."""
    if method.name == GRAD_NORM:
        return Work()
    if method.name == ROTATIONS:
        return total(_covariance(joint, method.parts) for joint in shape.joints if joint.turns)
    return total(_rotated_step(matrix, method, shape) for matrix in shape.turned())


def at_refresh(shape: Shape, method: Method) -> Work:
    """What is done once every `method.every` steps."""
    if method.name == GRAD_NORM:
        return total(_gradient_norm(joint) for joint in shape.joints if joint.stretches)
    if method.name == ROTATIONS:
        return total(_turn(joint) for joint in shape.joints if joint.turns)
    return total(_rotated_refresh(matrix, method, shape) for matrix in shape.turned())


def state(shape: Shape, method: Method) -> int:
    """Bytes of covariances and bases, all ranks together, each kept once; the base optimizer's moments are not counted."""
    if method.name == GRAD_NORM:
        return 0
    if method.name == ROTATIONS:
        return sum(FLOAT * joint.count * joint.heads * joint.width**2 for joint in shape.joints if joint.turns)
    return sum(2 * FLOAT * count * heads * width**2 for heads, width, count in _bases(shape, method))


def total(parts: Iterable[Work]) -> Work:
    return sum(parts, Work())


def _covariance(joint: Joint, parts: int) -> Work:
    """C ← β C + (1 − β) Σ G Gᵀ/‖G‖²: each rank over its own rows; writers' gradients are laid out anew where rows are cut."""
    entries = sum(view.entries for view in joint.views if view.counts) * joint.count
    cut = sum(view.entries for view in joint.views if view.counts and view.axis == "rows") * joint.count
    products = 2.0 * joint.width * entries / parts
    return Work(products, streamed=FLOAT * entries / parts, exchanged=FLOAT * cut / parts)


def _turn(joint: Joint) -> Work:
    """Q of C, C ← QᵀCQ on every rank alike; then Q Aᵀ of all that moves, there and back where the joint's axis is cut."""
    matrices = joint.count * joint.heads
    moved, cut = _moved(joint)
    factorisations = 0.0 if joint.group == "rotary" else QR * matrices * joint.width**3
    return Work(
        products=2.0 * joint.width * moved,
        own_products=4.0 * matrices * joint.width**3,
        own_factorisations=factorisations,
        streamed=2 * FLOAT * moved + 4 * FLOAT * matrices * joint.width**2,
        reduced=FLOAT * matrices * joint.width**2,
        exchanged=2 * FLOAT * cut,
    )


def _moved(joint: Joint) -> tuple[int, int]:
    """Entries of parameters, gradients and first moments that move, and those of them whose joint axis the rows are."""
    rows = sum(view.entries for view in joint.views if view.axis == "rows")
    return MOVED * joint.count * sum(view.entries for view in joint.views), MOVED * joint.count * rows


def _gradient_norm(joint: Joint) -> Work:
    """S₋ − S₊ from the gradients, a matrix exponential and its inverse's, and the move; a diagonal's sums and its move."""
    matrices = joint.count * joint.heads
    moved, cut = _moved(joint)
    gradient = moved / MOVED
    if joint.group == "diagonal":
        # rows that are cut across ranks keep their own units' sums: only columns' are reduced
        return Work(streamed=FLOAT * (gradient + 2 * moved), reduced=2 * FLOAT * matrices * joint.width)
    exponential = 2 * EXPONENTIAL_PRODUCTS * matrices * float(joint.width) ** 3
    return Work(
        products=2.0 * joint.width * (gradient + moved),
        own_products=exponential,
        streamed=FLOAT * (gradient + 2 * moved) + 4 * FLOAT * matrices * joint.width**2,
        reduced=FLOAT * matrices * joint.width**2,
        exchanged=2 * FLOAT * cut,
    )


# Products of h × h matrices in exp(M) and exp(−M) together at norms up to 1: degree 12 by Paterson and Stockmeyer's blocks.
EXPONENTIAL_PRODUCTS = 8


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


def block(size: int, most: int) -> int:
    """The largest divisor of `size` up to `most`."""
    return next(width for width in range(min(size, most), 0, -1) if size % width == 0)


def _rotated_step(matrix: Matrix, method: Method, shape: Shape) -> Work:
    """There and back on every turned side, and a part of the gradient into each side's covariance.

    Whole matrices are dealt out to the ranks, which keep their moments and bases: a gradient goes there, an update comes back.
    """
    sides = [(found, other.size) for side, other in (matrix.sides, matrix.sides[::-1]) if (found := _widths(side, method))]
    if not sides:
        return Work()
    entries = float(matrix.entries)
    turns = sum(2 * 2 * width * entries for (_, width), _ in sides)
    covariances = sum(2 * width * entries / _parts(method.parts, other) for (_, width), other in sides)
    # a turn reads and writes the matrix once; a covariance reads its part
    streamed = sum(FLOAT * entries * (4 + 1 / _parts(method.parts, other)) for _, other in sides)
    return Work(
        products=matrix.count * (turns + covariances),
        streamed=matrix.count * streamed,
        exchanged=matrix.count * 2 * FLOAT * entries,
        alone_products=turns + covariances,
    )


def _parts(parts: int, columns: int) -> int:
    return max(1, min(parts, columns // LEAST_PART))


def _rotated_refresh(matrix: Matrix, method: Method, shape: Shape) -> Work:
    """R C and its QR factor, the turn Q Rᵀ, and the first moment to it, per side; a shared basis is made once and sent to its sharers."""
    found, lonely, lonely_factorisations = Work(), 0.0, 0.0
    for side in matrix.sides:
        widths = _widths(side, method)
        if widths is None:
            continue
        heads, width = widths
        own = _owned(matrix, side, method, shape)
        made, shared = matrix.count * own, matrix.count if own < 1 else 0
        cube, square = heads * float(width) ** 3, heads * float(width) ** 2
        moment = 2.0 * width * matrix.entries
        found = found + Work(
            products=matrix.count * moment + made * 4 * cube,
            factorisations=made * QR * cube,
            streamed=matrix.count * 2 * FLOAT * matrix.entries + made * 6 * FLOAT * square,
            exchanged=2 * FLOAT * shared * square,
        )
        lonely, lonely_factorisations = lonely + moment + 4 * cube, lonely_factorisations + QR * cube
    return replace(found, alone_products=lonely, alone_factorisations=lonely_factorisations)


def _owned(matrix: Matrix, side: Side, method: Method, shape: Shape) -> float:
    """Bases per matrix that are this matrix's own to make, on average: sharers divide one."""
    if side.kind != "stream" or method.stream in ("matrix", "none"):
        return 1.0
    if method.stream == "site":
        return 1 / sum(1 for m in shape.turned() if m.site and m.site == matrix.site) if matrix.site else 1.0
    group = [m for m in shape.turned() if "stream" in (m.rows.kind, m.columns.kind)]
    if method.stream == "model":
        return 1 / sum(m.count for m in group)
    # every layer's matrices share its one basis: as many bases as layers
    return shape.layers / sum(m.count for m in group)


def _bases(shape: Shape, method: Method) -> Iterator[tuple[int, int, int]]:
    """(heads, width, how many) of the bases that are kept."""
    for matrix in shape.turned():
        for side in matrix.sides:
            widths = _widths(side, method)
            if widths is not None and not (side.kind == "stream" and method.stream in ("site", "layer", "model")):
                yield *widths, matrix.count
    stream = [m for m in shape.turned() if any(s.kind == "stream" and _widths(s, method) for s in m.sides)]
    if not stream or method.stream not in ("site", "layer", "model"):
        return
    if method.stream == "site":
        sites: dict[str, int] = {m.site: m.count for m in stream if m.site}
        count = sum(sites.values()) + sum(m.count for m in stream if not m.site)
    else:
        count = shape.layers if method.stream == "layer" else 1
    yield 1, shape.width, count


def largest_state(shape: Shape, method: Method) -> int:
    """Bytes that the rank with the largest matrix must keep for it alone: covariances and bases are not cut."""
    if method.name == ROTATIONS:
        return state(shape, method)
    if method.name == GRAD_NORM:
        return 0
    widths = ([found for side in matrix.sides if (found := _widths(side, method))] for matrix in shape.turned())
    return max(sum(2 * FLOAT * heads * width**2 for heads, width in sides) for sides in widths)


def parameter_bytes(shape: Shape) -> int:
    """Weights, gradients and two moments in float32: what a plain AdamW run holds, all ranks together."""
    return 4 * FLOAT * shape.parameters

