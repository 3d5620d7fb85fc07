"""The largest eigenvalues of a loss's Hessian by Lanczos on Hessian-vector products, without forming the Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from teleport_fast.minima.point import Closure, check_graph, checked_loss, checked_parameters

Product = Callable[[Tensor], Tensor]

# From a random start an eigenvalue that stands out is met to a percent in some ln(P) products: 20 for P of 1e8.
LOOK = 20


class Spectrum(NamedTuple):
    """`eigenvalues` (k,) largest first, `vectors` (P, k), `residuals` ‖Hv − λv‖ (k,), Hessian-vector `products` taken.

    >>> Spectrum(torch.tensor([3.0, 2.0, 0.1]), torch.eye(5, 3), torch.zeros(3), 5, 5).count_under(1.0)
    3
    """

    eigenvalues: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    size: int

    def product(self) -> float:
        """The product of the k eigenvalues found."""
        return float(self.eigenvalues.double().prod())

    def count_under(self, threshold: float) -> int:
        """How many of all P eigenvalues are under the threshold: P less those found that reach it.

        ValueError where all k reach it, since then more may: ask for a larger k.
        """
        reached = int((self.eigenvalues >= threshold).sum())
        if reached == len(self.eigenvalues) < self.size:
            raise ValueError(f"threshold must exceed the smallest eigenvalue found, {float(self.eigenvalues[-1]):.4g}, got "
                             f"{threshold}; more than k = {reached} eigenvalues may reach it, pass a larger k")
        return self.size - reached


def hessian_spectrum(
    loss_fn: Closure,
    params: Iterable[Tensor],
    k: int,
    *,
    tolerance: float | None = None,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """The k largest (algebraically) eigenvalues of the Hessian of loss_fn() in params, P entries; params are not moved.

    Lanczos with full reorthogonalisation, restarted beside the vectors found until no larger eigenvalue shows there in 20
    products or more, so that repeated eigenvalues are all found. tolerance: of ‖Hv − λv‖ over the largest |λ|, default 1e-10 (float64), 1e-4
    (float32); memory is one (P,) vector per product. RuntimeWarning where max_products (default P + 10 k + 200) ran out.

    >>> w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    >>> found = hessian_spectrum(lambda: (w ** 3).sum() / 6 + w[0] ** 2, [w], 2)
    >>> [round(value, 6) for value in found.eigenvalues.tolist()]
    [3.0, 1.0]
    """
    tensors = checked_parameters(params)
    size = sum(p.numel() for p in tensors)
    if not 1 <= k <= size:
        raise ValueError(f"k must be in 1..{size}, the number of parameters, got {k}")
    if tolerance is None:
        tolerance = 1e-10 if tensors[0].dtype == torch.float64 else 1e-4
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}; the default is 1e-10 in float64")
    run = _Run(hessian_product(loss_fn, tensors), tensors[0], size, tolerance, generator)
    run.budget = size + 10 * k + 200 if max_products is None else max_products
    if run.budget < 1:
        raise ValueError(f"max_products must be at least 1, got {max_products}; leave it out for P + 10 k + 200")
    values, vectors, residuals = run.top(k)
    return Spectrum(values, vectors, residuals, run.products, size)


def hessian_product(loss_fn: Closure, params: list[Tensor]) -> Product:
    """v (P,) -> Hv (P,) at the present parameters, by backward of one retained graph."""
    with torch.enable_grad():
        loss = checked_loss(loss_fn())
        check_graph(loss, params)
        gradients = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    curved = [g for g in gradients if g is not None and g.requires_grad]
    kept = [index for index, g in enumerate(gradients) if g is not None and g.requires_grad]
    sizes = [p.numel() for p in params]

    def product(v: Tensor) -> Tensor:
        parts = v.split(sizes)
        if not curved:
            return torch.zeros_like(v)
        found = torch.autograd.grad(
            curved, params, [parts[i].reshape(params[i].shape) for i in kept], retain_graph=True, allow_unused=True
        )
        return torch.cat([(torch.zeros_like(p) if x is None else x).flatten() for p, x in zip(params, found, strict=True)])

    return product


class _Run:
    """One search: what is locked stays out of every later Krylov space."""

    def __init__(
        self, product: Product, like: Tensor, size: int, tolerance: float, generator: torch.Generator | None
    ) -> None:
        self.product, self.size, self.tolerance, self.generator = product, size, tolerance, generator
        self.dtype, self.device = like.dtype, like.device
        self.products = self.budget = 0
        self.scale = 0.0

    def top(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(values, vectors, residuals) of the k largest: k from one run, then one at a time until none is larger."""
        locked = torch.zeros(self.size, 0, dtype=self.dtype, device=self.device)
        values, residuals = locked.new_zeros(0), locked.new_zeros(0)
        done = False
        while not done and locked.shape[1] < self.size:
            known = len(values) >= k
            floor = float(values[k - 1]) if known else float("-inf")
            *more, settled = self.lanczos(locked, 1 if known else k - len(values), floor)
            # Without this look beside what was found, the second copy of an equal eigenvalue would be missed.
            done = known and settled and bool(more[0][0] <= floor + self.tolerance * self.scale)
            values, order = torch.cat([values, more[0]]).sort(descending=True)
            locked, residuals = torch.cat([locked, more[1]], 1)[:, order], torch.cat([residuals, more[2]])[order]
            if self.products >= self.budget and not done:
                reached = "" if len(values) >= k else f" and only {len(values)} of {k} were found"
                warnings.warn(
                    f"Lanczos stopped at max_products={self.budget}{reached}; residuals reach {float(residuals[:k].max()):.1e}, "
                    "pass a larger max_products or tolerance", RuntimeWarning, stacklevel=4,
                )
                break
        return values[:k], locked[:, :k], residuals[:k]

    def lanczos(self, locked: Tensor, want: int, floor: float) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The largest `want` Ritz pairs of H beside `locked`, and whether they converged or clearly stay under `floor`."""
        room = self.size - locked.shape[1]
        want = min(want, room)
        # Rows, doubled when full: stacking a list anew for every product would double memory and add a third to its traffic.
        rows = locked.new_empty(min(room, 16), self.size)
        rows[0] = self._fresh(locked)
        diagonal: list[Tensor] = []
        off: list[Tensor] = []
        while True:
            count = len(diagonal) + 1
            Q = rows[:count].mT
            column = self.product(rows[count - 1])
            self.products += 1
            if not bool(torch.isfinite(column).all()):
                raise ValueError("loss_fn must have a finite Hessian at params, got NaN or infinity in a Hessian-vector product")
            diagonal.append(torch.dot(rows[count - 1], column))
            column = _orthogonal(column, Q, locked)
            beta = torch.linalg.vector_norm(column)
            last = count == room or self.products >= self.budget
            T = torch.stack(diagonal).diag() + (torch.stack(off).diag(1) + torch.stack(off).diag(-1) if off else 0)
            values, S = torch.linalg.eigh(T)
            self.scale = max(self.scale, float(values.abs().max()))
            residuals = beta * S[-1].abs()
            best = values.argsort(descending=True)[:want]
            closed = bool(beta <= 16 * torch.finfo(self.dtype).eps * self.scale)
            converged = count >= want and bool((residuals[best] <= self.tolerance * self.scale).all())
            clear = count >= LOOK and bool(values[-1] + 10 * residuals[-1] < floor)
            if last or converged or clear:
                return values[best], Q @ S[:, best], residuals[best], converged or clear or count == room
            if count == len(rows):
                rows = torch.cat([rows, rows.new_empty(min(room - count, count), self.size)])
            # Where the Krylov space is invariant, go on beside it, with no coupling to it.
            rows[count] = self._fresh(torch.cat([locked, Q], 1)) if closed else column / beta
            off.append(torch.zeros_like(beta) if closed else beta)

    def _fresh(self, against: Tensor) -> Tensor:
        """A random unit vector at right angles to the columns of `against`."""
        q = torch.randn(self.size, dtype=self.dtype, device=self.device, generator=self.generator)
        q = _orthogonal(q, against, None)
        length: Tensor = torch.linalg.vector_norm(q)
        return q / length


def _orthogonal(v: Tensor, Q: Tensor, locked: Tensor | None) -> Tensor:
    """v less its part in Q and locked; twice, because once leaves rounding that grows from product to product."""
    for _ in range(2):
        v = v - Q @ (Q.mT @ v)
        if locked is not None and locked.shape[1]:
            v = v - locked @ (locked.mT @ v)
    return v
