"""γ(t) = exp(tM)·w of the papers' action to second order at t = 0, in closed form and for many M at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teleport_fast.data_dependent.action import MLPAction
from teleport_fast.data_dependent.pseudo_inverse import PseudoInverse, factor
from teleport_fast.minima.jet import (
    Jet,
    activated,
    constant,
    deactivated,
    from_zero_with_pseudo_inverse,
    turned,
    turned_back,
    turned_constant,
    with_pseudo_inverse,
)

Factor = Callable[[Tensor], PseudoInverse]


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
    return curve_of(action, check_generators(action, Ms), interactions)


def curve_of(
    action: MLPAction, generators: list[Tensor], interactions: bool = True, factors: Factor = factor
) -> tuple[list[Tensor], list[Tensor]]:
    """curve_derivatives of generators that were checked; with `turning_factor` it can be differentiated in the weights."""
    runs = [generators]
    if not interactions:
        joints = range(len(generators))
        runs = [[M if m == n else torch.zeros_like(M) for n, M in enumerate(generators)] for m in joints]
    form = _u_exact if action.form == "u_exact" else _v_exact
    layers = [form(action, run, factors) for run in runs]
    shapes = [(*generators[0].shape[:-2], *W.shape) for W in action.weights]
    first = [_sum([jets[n].first for jets in layers], shape) for n, shape in enumerate(shapes)]
    return first, [_sum([jets[n].second for jets in layers], shape) for n, shape in enumerate(shapes)]


def turning_factor(H: Tensor) -> PseudoInverse:
    """factor(H) whose first derivative in H is H⁺'s at constant rank: −P dH P + PPᵀdHᵀ(I − HP) + (I − PH)dHᵀPᵀP, P = H⁺."""
    known = factor(H.detach())
    if not H.requires_grad:
        return known
    fixed, P = H.detach(), known.dense()
    turn = H - fixed
    first, second = P @ P.mT @ turn.mT, turn.mT @ P.mT @ P
    dense = P - P @ turn @ P + first - first @ fixed @ P + second - P @ (fixed @ second)
    return PseudoInverse(dense, torch.eye(len(H), dtype=H.dtype, device=H.device), known.rank, known.kind)


def _sum(terms: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.expand(shape)


def check_generators(action: MLPAction, Ms: Sequence[Tensor]) -> list[Tensor]:
    """Ms in the weights' dtype; ValueError unless they fit the action."""
    if action.hidden != "recomputed":
        raise ValueError(f"action must recompute hidden inputs, got hidden={action.hidden!r}, along which exp(tM) is no group action")
    if len(Ms) != len(action.widths):
        raise ValueError(f"Ms must hold one M per hidden layer, got {len(Ms)} for widths {action.widths}; see random_generators")
    for m, (M, k) in enumerate(zip(Ms, action.widths, strict=True)):
        if M.dim() not in (2, 3) or M.shape[-2:] != (k, k) or M.shape[:-2] != Ms[0].shape[:-2]:
            raise ValueError(f"Ms[{m}] must be ({k}, {k}) or (draws, {k}, {k}) with as many draws as Ms[0], got {tuple(M.shape)}")
        if not bool(torch.isfinite(M).all()):
            raise ValueError(f"Ms[{m}] must be finite, got NaN or infinity")
    return [M.detach().to(action.X) for M in Ms]


def _u_exact(action: MLPAction, Ms: Sequence[Tensor], factors: Factor) -> list[Jet]:
    """The weights as jets, joint after joint as in the finite move."""
    sigma, keep = action.activation, action.keep_null_space
    jets = [constant(W) for W in action.weights]
    Z = _start(action)
    h: Jet | None = None
    for m, M in enumerate(Ms):
        target = deactivated(turned(M, activated(Z, sigma)), Z.value, sigma)
        change = target - Z if keep else target
        if h is None:
            jets[0], Z = _first_layer(action, Z, change)
        else:
            inverse = factors(h.value)
            if keep:
                jets[m] = jets[m] + from_zero_with_pseudo_inverse(change, h, inverse)
            else:
                jets[m] = with_pseudo_inverse(change, h, inverse)
            Z = jets[m] @ h if m + 1 < len(Ms) else Z
        reader = turned_back(_reader(action, jets[m + 1]), M)
        jets[m + 1] = _beside_bias(action, reader, m + 1)
        if m + 1 < len(Ms):
            h = activated(Z, sigma)
            h = h.with_row(1.0) if action.bias else h
            Z = jets[m + 1] @ h
    return jets


def _first_layer(action: MLPAction, Z: Jet, change: Jet) -> tuple[Jet, Jet]:
    """(the first weight, Z of the first layer) after its pre-activations were asked to change."""
    frame, keep, k = action._shared(), action.keep_null_space, len(action.weights[0])
    assert frame.X_inverse is not None
    derivatives = frame.X_inverse.right(torch.cat([change.first, change.second], -2)).tensor_split([k], -2)
    value = action.weights[0] if keep else frame.X_inverse.right(change.value)
    moved = Jet(change.value, frame.project(change.first), frame.project(change.second))
    return Jet(value, *derivatives), Jet(Z.value if keep else frame.project(change.value), moved.first, moved.second)


def _v_exact(action: MLPAction, Ms: Sequence[Tensor], factors: Factor) -> list[Jet]:
    """The weights as jets, joint after joint as in the finite move."""
    sigma = action.activation
    jets = [constant(W) for W in action.weights]
    Z = _start(action)
    for m, M in enumerate(Ms):
        H, H_new = activated(Z, sigma), activated(turned(M, Z), sigma)
        jets[m] = turned(M, jets[m]) if m else turned_constant(M, action.weights[0])
        U = _reader(action, jets[m + 1])
        inverse = factors(H_new.value)
        if action.keep_null_space:
            reader = U + from_zero_with_pseudo_inverse((H - H_new).left(U.value), H_new, inverse)
        else:
            reader = with_pseudo_inverse(H.left(U.value), H_new, inverse)
        jets[m + 1] = _beside_bias(action, reader, m + 1)
        if m + 1 < len(Ms):
            Z = jets[m + 1] @ (H_new.with_row(1.0) if action.bias else H_new)
    return jets


def _start(action: MLPAction) -> Jet:
    return constant(action.weights[0] @ action._X)


def _reader(action: MLPAction, weight: Jet) -> Jet:
    """U without its bias column."""
    if not action.bias:
        return weight
    return Jet(weight.value[..., :-1], weight.first[..., :-1], weight.second[..., :-1])


def _beside_bias(action: MLPAction, reader: Jet, layer: int) -> Jet:
    """The reader with its layer's bias column, which does not move."""
    if not action.bias:
        return reader
    column = action.weights[layer][:, -1:]
    value = torch.cat([reader.value, column], -1)
    return Jet(value, torch.nn.functional.pad(reader.first, (0, 1)), torch.nn.functional.pad(reader.second, (0, 1)))
