"""How far to move: closed forms on diagonals, monotone geodesic ascent and the matrix geometric mean on dense groups.

The objective along a joint depends on P = gᵀg alone: J(P) = tr(P⁻¹S₊) + tr(P S₋) (docs/mathematics.md). It is
geodesically convex: along g = exp(tM), M symmetric, it is convex in t, so a step along its gradient never lowers it,
and its minimum is the geometric mean P S₋ P = S₊. Everything here takes batched (heads, h, h) or (heads, h) tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teleport_fast.ops.matrix_exp import matrix_exp_pair
from teleport_fast.symmetry.bucket import Element
from teleport_fast.symmetry.groups import DenseGroup, Group


def exponential(algebra: Tensor) -> Element:
    """The element exp(M) with its inverse transpose exp(−Mᵀ), for M (heads, h, h).

    Both factors come from one call that shares the powers of M.
    """
    g, inverse = matrix_exp_pair(algebra)
    return Element("dense", g, inverse.mT)


def lie_step(group: Group, lie_gradient: Tensor, radius: float, sign: float = 1.0) -> Tensor:
    """The algebra element of length `radius` (each factor) that raises the linearised objective most; (heads, h, h).

    lie_gradient: S₋ − S₊, any positive multiple. Ascent along it is monotone, since J is geodesically convex.
    """
    assert isinstance(group, DenseGroup)
    return group.scale_to(group.project(lie_gradient), radius) * sign


def trust_region_ascent(
    group: Group, gram_plus: Tensor, gram_minus: Tensor, radius: float, steps: int = 4
) -> tuple[Element, Tensor]:
    """Raise J(P) over the geodesic ball of `radius` by `steps` geodesics of equal length along its Lie gradient.

    gram_plus S₊, gram_minus S₋: (heads, h, h) symmetric. Returns the element and the length used, a 0-d tensor. Each
    step is a geodesic with positive initial slope, so J never falls; the lengths add up to `radius`, so the ball holds.
    Errors: ValueError if radius is not positive and finite or steps < 1.
    Source: own derivation, checked by tests/test_search.py.
    """
    check_radius(radius)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}; 4 is the default")
    assert isinstance(group, DenseGroup)
    plus, minus = group.project(gram_plus), group.project(gram_minus)
    element: Element | None = None
    for _ in range(steps):
        step = exponential(lie_step(group, minus - plus, radius / steps))
        assert step.g_inverse_t is not None
        plus = step.g_inverse_t @ plus @ step.g_inverse_t.mT
        minus = step.g @ minus @ step.g.mT
        element = step if element is None else step.after(element)
    assert element is not None
    moved = (minus - plus).abs().amax() > 0 if minus.numel() else minus.new_zeros((), dtype=torch.bool)
    return element, radius * moved.to(minus.dtype)


def geometric_mean(gram_plus: Tensor, gram_minus: Tensor, ridge: float | None = None) -> Tensor:
    """log P of the minimiser of tr(P⁻¹S₊) + tr(P S₋), where P S₋ P = S₊; (heads, h, h) symmetric, float64.

    With the Cholesky factors S₊ = K Kᵀ, S₋ = L Lᵀ and the SVD Kᵀ L = U Σ Vᵀ: P = (L⁻ᵀ V) Σ (L⁻ᵀ V)ᵀ. A Gram with a pivot
    below `ridge`·trace/h is given that much on its diagonal first, so that rank-deficient Grams give a finite answer; None
    is 1e-9, or 8 eps of a coarser dtype. A head where one Gram is zero gets log P = 0.
    Source: own derivation, tests/test_search.py.
    """
    if ridge is None:
        ridge = max(1e-9, 8 * torch.finfo(gram_plus.dtype).eps)
    plus, minus = gram_plus.double(), gram_minus.double()
    size_plus, size_minus = _mean_eigenvalue(plus), _mean_eigenvalue(minus)
    usable = (size_plus > 0) & (size_minus > 0)
    eye = torch.eye(plus.shape[-1], dtype=plus.dtype, device=plus.device)
    factor_plus = _cholesky(torch.where(usable, plus, eye), ridge * size_plus)
    factor_minus = _cholesky(torch.where(usable, minus, eye), ridge * size_minus)
    # an SVD of the factors: with a ridge in both Grams, the eigenvalues of LᵀS₊L spread by ridge⁻², past float64
    _, sigma, v_t = torch.linalg.svd(factor_plus.mT @ factor_minus)
    half = torch.linalg.solve_triangular(factor_minus.mT, v_t.mT, upper=True) * sigma.sqrt().unsqueeze(-2)
    values, vectors = torch.linalg.eigh(half @ half.mT)
    smallest = values[..., -1:] * torch.finfo(values.dtype).eps
    log = values.maximum(smallest).log()
    return torch.where(usable, (vectors * log.unsqueeze(-2)) @ vectors.mT, 0.0)


def geodesic_descent(
    group: Group, gram_plus: Tensor, gram_minus: Tensor, radius: float, max_condition: float = math.inf
) -> tuple[Element, Tensor]:
    """Lower J(P) along the geodesic to its minimum, as far as `radius` allows; returns the element and the length used.

    J is a sum over the group's factors, each convex along its part of that geodesic with its minimum at the end, so any
    part of the way lowers it. radius may be inf. A head whose g would have a condition number above `max_condition` goes as far
    as this one.
    """
    check_radius(radius, finite=False)
    assert isinstance(group, DenseGroup)
    algebra = group.project(geometric_mean(group.project(gram_plus), group.project(gram_minus)) / 2)
    if not math.isinf(radius):
        algebra = group.scale_to(algebra, radius, only_down=True)
    if not math.isinf(max_condition) and algebra.numel():
        values = torch.linalg.eigvalsh(algebra)
        spread = (values[..., -1:] - values[..., :1]).unsqueeze(-1)
        # g is computed in the Grams' dtype: a hair below the bound stays below it
        algebra = algebra * (0.999 * math.log(max_condition) / spread).clamp(max=1.0)
    return exponential(algebra.to(gram_plus.dtype)), group.factor_norm(algebra).to(gram_plus.dtype)


def diagonal_extremum(a: Tensor, p: float, b: Tensor, q: float, radius: float, descend: bool) -> Tensor:
    """t that raises or lowers J(t) = a e^{−pt} + b e^{qt} most over |t| ≤ radius, entry by entry; a, b ≥ 0 (heads, h).

    J is convex: the maximum lies at an end, the minimum at t = ln(pa/(qb)) / (p + q) clipped to the ball. An entry
    whose a or b is zero has no minimum; it goes to the end of a finite ball and stays at 0 under an infinite one.
    Source: docs/mathematics.md (p = q = 2: squared norm, p = q = 1: l1, ReLU² consumers: q = 2k); tests/test_search.py.
    """
    check_radius(radius, finite=not descend)
    if descend:
        t = (a * p).log().sub_((b * q).log()) / (p + q)
        t = torch.where((a > 0) & (b > 0), t, torch.zeros_like(t) if math.isinf(radius) else t.nan_to_num(0.0))
        # the squares of s^p and s^q, which second moments take, and of their inverses stay normal numbers
        furthest = min(radius, math.log(torch.finfo(t.dtype).max) / (2.1 * max(p, q)))
        return t.clamp(-furthest, furthest)
    # filled in a's dtype: where() of two Python numbers gives float32, whose 0.3 lies outside a ball of radius 0.3
    outwards = torch.full_like(a, radius)
    # J(radius) − J(−radius) = 2 (b sinh(q·radius) − a sinh(p·radius)); the ratio of the two sinh does not overflow
    ratio = math.exp(_log_sinh(q * radius) - _log_sinh(p * radius))
    t = torch.where(b * ratio >= a, outwards, -outwards)
    return torch.where((a > 0) | (b > 0), t, 0.0)


def check_radius(radius: float, finite: bool = True) -> None:
    """Raise ValueError unless radius is positive (and finite, where the search is unbounded without it)."""
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}; 0.5 is the usual choice")
    if finite and math.isinf(radius):
        raise ValueError("radius must be finite for an ascent, got inf; the objective grows without bound, try 0.5")


def _log_sinh(x: float) -> float:
    return x + math.log(-math.expm1(-2 * x) / 2)


def _cholesky(gram: Tensor, ridge: Tensor) -> Tensor:
    """The lower Cholesky factor; where a pivot lies below `ridge`, that of gram + ridge·I. Never reads back to the host."""
    plain, failed = torch.linalg.cholesky_ex(gram)
    pivots = plain.diagonal(dim1=-2, dim2=-1).square().amin(-1)[..., None, None]
    thin = (failed[..., None, None] != 0) | ~(pivots > ridge)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor: Tensor = torch.linalg.cholesky_ex(torch.where(thin, gram + ridge * eye, gram))[0]
    return factor


def _mean_eigenvalue(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
