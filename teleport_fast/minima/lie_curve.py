"""γ(t) = exp(tM)·w of the papers' action to second order at t = 0, in closed form and for many M at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.data_dependent.action import MLPAction
from teleport_fast.data_dependent.pseudo_inverse import factor
from teleport_fast.minima.jet import Jet, activated, constant, deactivated, exponential, pseudo_inverse


def curve_derivatives(
    action: MLPAction, Ms: Sequence[Tensor], interactions: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """(γ', γ'') at 0, one tensor (draws, out, in) per layer; Ms[m] (h_m, h_m) or (draws, h_m, h_m), all joints turn together.

    One joint, U-exact, σ piecewise linear: γ' = (−UM, ((Mσ(Z))/σ'(Z))h⁺), γ'' = (UM², ((M²σ(Z))/σ'(Z))h⁺). Of more joints, and
    V-exact, every h⁺ turns too (own; tests/minima/test_curvature.py, against differentiation and `apply_exp`).
    interactions=False: the sum of the joints' own γ'', as published, which lacks the terms between neighbouring joints.
    ValueError for shapes, values that are not finite, and stale hidden inputs.

    >>> W = [torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    >>> M = torch.randn(4, 4, dtype=torch.float64)
    >>> first, second = curve_derivatives(MLPAction(W, torch.randn(5, 3, dtype=torch.float64)), [M])
    >>> torch.allclose(first[1], -W[1] @ M)
    True
    """
    generators, single = check_generators(action, Ms)
    if interactions:
        layers = _jets(action, generators)
        parts = [([jet.first for jet in layers], [jet.second for jet in layers])]
    else:
        parts = []
        for m in range(len(generators)):
            layers = _jets(action, [M if m == n else torch.zeros_like(M) for n, M in enumerate(generators)])
            parts.append(([jet.first for jet in layers], [jet.second for jet in layers]))
    draws = len(generators[0])
    totals = []
    for which in (0, 1):
        layers_of = zip(*(part[which] for part in parts), strict=True)
        total = [torch.stack([x.expand(draws, *W.shape) for x in xs]).sum(0) for xs, W in zip(layers_of, action.weights, strict=True)]
        totals.append([x[0] for x in total] if single else total)
    return totals[0], totals[1]


def check_generators(action: MLPAction, Ms: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """(Ms as (draws, h, h) in the weights' dtype, whether they came without draws); ValueError unless they fit the action."""
    if action.hidden != "recomputed":
        raise ValueError(f"action must recompute hidden inputs, got hidden={action.hidden!r}, along which exp(tM) is no group action")
    if len(Ms) != len(action.widths):
        raise ValueError(f"Ms must hold one M per hidden layer, got {len(Ms)} for widths {action.widths}; see random_generators")
    for m, (M, k) in enumerate(zip(Ms, action.widths, strict=True)):
        if M.dim() not in (2, 3) or M.shape[-2:] != (k, k) or M.shape[:-2] != Ms[0].shape[:-2]:
            raise ValueError(f"Ms[{m}] must be ({k}, {k}) or (draws, {k}, {k}) with as many draws as Ms[0], got {tuple(M.shape)}")
        if not bool(torch.isfinite(M).all()):
            raise ValueError(f"Ms[{m}] must be finite, got NaN or infinity")
    single = Ms[0].dim() == 2
    return [(M.unsqueeze(0) if single else M).detach().to(action.X) for M in Ms], single


def _jets(action: MLPAction, Ms: Sequence[Tensor]) -> list[Jet]:
    """The weights as jets, joint after joint as in the finite move."""
    return _u_exact(action, Ms) if action.form == "u_exact" else _v_exact(action, Ms)


def _u_exact(action: MLPAction, Ms: Sequence[Tensor]) -> list[Jet]:
    sigma, frame, keep = action.activation, action._shared(), action.keep_null_space
    assert frame.X_inverse is not None
    jets = [constant(W) for W in action.weights]
    h: Jet | None = None
    for m, M in enumerate(Ms):
        Z = constant(action._network().Z0) if h is None else jets[m] @ h
        target = deactivated(exponential(M) @ activated(Z, sigma), Z.value, sigma)
        change = target - Z if keep else target
        if h is None:
            X_inverse = frame.X_inverse
            weight = Jet(X_inverse.right(change.value), X_inverse.right(change.first), X_inverse.right(change.second))
            moved = Jet(frame.project(change.value), frame.project(change.first), frame.project(change.second))
            Z_new = Z + moved if keep else moved
            jets[m] = jets[m] + weight if keep else weight
        else:
            weight = change @ pseudo_inverse(h, factor(h.value))
            jets[m] = jets[m] + weight if keep else weight
            Z_new = jets[m] @ h
        jets[m + 1] = _read(action, jets[m + 1], exponential(M, -1.0))
        if m + 1 < len(Ms):
            h = activated(Z_new, sigma)
            h = h.with_row(1.0) if action.bias else h
    return jets


def _v_exact(action: MLPAction, Ms: Sequence[Tensor]) -> list[Jet]:
    sigma, keep = action.activation, action.keep_null_space
    jets = [constant(W) for W in action.weights]
    Z = constant(action._network().Z0)
    for m, M in enumerate(Ms):
        g = exponential(M)
        H, H_new = activated(Z, sigma), activated(g @ Z, sigma)
        jets[m] = g @ jets[m]
        U = action.weights[m + 1][:, :-1] if action.bias else action.weights[m + 1]
        inverse = pseudo_inverse(H_new, factor(H_new.value))
        reader = (H - H_new if keep else H).left(U) @ inverse
        if keep:
            reader = reader + constant(U)
        jets[m + 1] = _with_bias(action, reader, m + 1)
        Z = jets[m + 1] @ (H_new.with_row(1.0) if action.bias else H_new)
    return jets


def _read(action: MLPAction, weight: Jet, inverse: Jet) -> Jet:
    """The reader U g⁻¹, its bias column left alone."""
    return _join(weight, Jet(*(x[..., :-1] for x in (weight.value, weight.first, weight.second))) @ inverse) if action.bias else (
        weight @ inverse
    )


def _with_bias(action: MLPAction, reader: Jet, layer: int) -> Jet:
    """The reader with its layer's bias column, which does not move."""
    return _join(constant(action.weights[layer]), reader) if action.bias else reader


def _join(weight: Jet, reader: Jet) -> Jet:
    """`reader` beside the last column of `weight`."""
    pairs = zip((weight.value, weight.first, weight.second), (reader.value, reader.first, reader.second), strict=True)
    return Jet(*(torch.cat([new, old[..., -1:].expand(*new.shape[:-1], 1)], -1) for old, new in pairs))
