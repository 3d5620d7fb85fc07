"""data_dependent_steps_: whole steps of the published V-exact teleport of an MLP on a fixed batch, in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from teleport_fast.ops.backend import Op, direct

NOT_REACHED = -math.inf


@torch.no_grad()
def data_dependent_steps_(
    Z0: Tensor,
    tail: Sequence[Tensor],
    gram: Tensor,
    target: Tensor,
    lead: Tensor,
    Ts: Sequence[Tensor],
    outputs: Tensor,
    trace: Tensor,
    *,
    slope: float,
    scale: float,
    cap: float,
    gram_limit: float,
    square_limit: float,
) -> None:
    """V → (I + T)V, U → Uσ(Z)σ((I + T)Z)⁺ pair by pair, T = scale/2 · d‖∇L‖²/dT; hidden inputs follow as h ← (I + T)h.

    Moved in place: Z0 (k₀, B), V₀ on the batch, and tail, the weights (k_m, k_{m−1}) after the first. gram: XᵀX (B, B).
    target: labels (B,), int64, for the mean cross entropy, or (k_J, B) for ½‖Y − target‖². σ: LeakyReLU of `slope`.
    Written: lead (k₀, k₀), the product of the first weight's factors; Ts[m] (steps, k_m, k_m); outputs Y (k_J, B); trace
    (steps + 1, 2), float64, loss and ‖∇L‖² before each step and at the end. No step is made from over `cap`: rows of
    trace that were not reached hold −inf. All of them do where a σ(Z) has no full row rank to speak of, its condition
    number (Frobenius norm, probed where square) over square_limit or that of σ(Z)σ(Z)ᵀ over gram_limit; then nothing
    else written has a meaning, and Z0 and tail may have been left alone or not. float64 or float32, contiguous.
    Errors: TypeError and ValueError that name the argument; RuntimeError if the backend asked for cannot be used.
    Source: [ICLR24] released code; Gram form and closed double backward own, checked by tests/ops/test_data_dependent_steps.py.

    >>> Z0, U, target = torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0]]), torch.zeros(1, 2)
    >>> T, trace = torch.zeros(1, 1, 1), torch.zeros(2, 2, dtype=torch.float64)
    >>> limits = {"gram_limit": 8e2, "square_limit": 10.0}
    >>> data_dependent_steps_(
    ...     Z0, [U], torch.eye(2), target, torch.zeros(1, 1), [T], target.clone(), trace, slope=0.5, scale=0.01, cap=10.0, **limits
    ... )
    >>> trace[0]
    tensor([1.0000, 5.2500], dtype=torch.float64)
    """
    _check(Z0, tail, gram, target, lead, Ts, outputs, trace)
    written = (Z0, *tail, lead, *Ts, outputs, trace)
    numbers = (slope, scale, cap, gram_limit, square_limit)
    if direct((*written, gram)):
        _run_(Z0, tail, gram, target, lead, Ts, outputs, trace, *numbers)
        for tensor in written:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
    else:
        torch.ops.teleport_fast.data_dependent_steps_(Z0, tail, gram, target, lead, Ts, outputs, trace, *numbers)


class _Refused(Exception):
    """A matrix that is not well enough of full row rank."""


def reference_(
    Z0: Tensor,
    tail: Sequence[Tensor],
    gram: Tensor,
    target: Tensor,
    lead: Tensor,
    Ts: Sequence[Tensor],
    outputs: Tensor,
    trace: Tensor,
    slope: float,
    scale: float,
    cap: float,
    gram_limit: float,
    square_limit: float,
) -> None:
    """The formulas, in plain torch; W[m] reads h[m] and gives Z[m + 1], W[0] stays unknown."""
    if not target.is_floating_point() and target.numel() and not (target.min() >= 0 and target.max() < len(outputs)):
        low, high = int(target.min()), int(target.max())
        raise ValueError(f"data_dependent_steps_: target must hold labels in 0..{len(outputs) - 1}, got {low}..{high}")
    trace.fill_(NOT_REACHED)
    lead.copy_(torch.eye(len(lead)))
    moved = [Z0.clone(), *(weight.clone() for weight in tail)]
    try:
        _steps(moved, gram, target, lead, Ts, outputs, trace, slope, scale, cap, (gram_limit, square_limit))
    except _Refused:
        trace.fill_(NOT_REACHED)
    for old, new in zip((Z0, *tail), moved, strict=True):
        old.copy_(new)


def _steps(
    moved: list[Tensor],
    gram: Tensor,
    target: Tensor,
    lead: Tensor,
    Ts: Sequence[Tensor],
    outputs: Tensor,
    trace: Tensor,
    slope: float,
    scale: float,
    cap: float,
    limits: tuple[float, float],
) -> None:
    J = len(Ts)
    W, stale = moved, [leaky_relu(moved[0], slope)]
    for m in range(1, J):
        stale.append(leaky_relu(W[m] @ stale[-1], slope))
    _right_inverse(stale[0], limits)
    for step in range(len(trace)):
        Z = [W[0]]
        for m in range(J):
            Z.append(W[m + 1] @ leaky_relu(Z[m], slope))
        h, derivative = [leaky_relu(z, slope) for z in Z], [torch.where(z > 0, z.new_ones(()), z.new_tensor(slope)) for z in Z]
        loss, E_out, hessian = _loss(Z[J], target)
        E, G = {J: E_out}, {}
        for m in reversed(range(J)):
            G[m + 1] = E[m + 1] @ h[m].mT
            E[m] = derivative[m] * (W[m + 1].mT @ E[m + 1])
        norm = sum(float(G[m].double().square().sum()) for m in range(1, J + 1)) + float((E[0] @ gram * E[0]).sum())
        trace[step, 0], trace[step, 1] = loss, norm
        outputs.copy_(Z[J])
        if step == len(trace) - 1 or cap < norm:
            return
        RZ, Rh = {0: E[0] @ gram}, {}
        for m in range(J):
            Rh[m] = derivative[m] * RZ[m]
            RZ[m + 1] = G[m + 1] @ h[m] + W[m + 1] @ Rh[m]
        RE, K = {J: hessian(RZ[J])}, {}
        for m in reversed(range(J)):
            K[m + 1] = RE[m + 1] @ h[m].mT + E[m + 1] @ Rh[m].mT
            RE[m] = derivative[m] * (G[m + 1].mT @ E[m + 1] + W[m + 1].mT @ RE[m + 1])
        for m in range(J):
            Zs = W[m] @ stale[m - 1] if m else Z[0]
            below = W[m + 1].mT @ (K[m + 1] @ _right_inverse(leaky_relu(Zs, slope), limits).mT)
            K_V = K[m] @ W[m].mT if m else RE[0] @ Z[0].mT
            Ts[m][step] = scale * (K_V - (torch.where(Zs > 0, below, slope * below)) @ Zs.mT)
        for m in range(J):
            Zs = W[m] @ stale[m - 1] if m else Z[0]
            gZ = Zs + Ts[m][step] @ Zs
            W[m] = W[m] + Ts[m][step] @ W[m]
            W[m + 1] = W[m + 1] @ leaky_relu(Zs, slope) @ _right_inverse(leaky_relu(gZ, slope), limits)
        stale = [s + T[step] @ s for s, T in zip(stale, Ts, strict=True)]
        lead.add_(Ts[0][step] @ lead)


def _right_inverse(H: Tensor, limits: tuple[float, float]) -> Tensor:
    """H⁺ of H (k, B)."""
    square, finite = H.shape[0] == H.shape[1], bool(torch.isfinite(H).all())
    A = H if square or not finite else H @ H.mT
    if H.shape[0] > H.shape[1] or not finite or not torch.linalg.cond(A, "fro") <= limits[square]:
        raise _Refused
    inverse: Tensor = torch.linalg.inv(A)
    return inverse if square else H.mT @ inverse


def _loss(Y: Tensor, target: Tensor):  # type: ignore[no-untyped-def]
    """(loss, dL/dY, R → its Hessian times R)."""
    if target.is_floating_point():
        return float(0.5 * (Y - target).square().sum()), Y - target, lambda R: R
    B, p = Y.shape[1], torch.softmax(Y, 0)
    one_hot = torch.nn.functional.one_hot(target, len(Y)).mT.to(Y.dtype)
    loss = float(torch.nn.functional.cross_entropy(Y.mT, target))
    return loss, (p - one_hot) / B, lambda R: (p * R - p * (p * R).sum(0)) / B


_OP = Op("data_dependent_steps_", reference_)


def can_use_cpp(like: Tensor) -> bool:
    """Whether one fused call computes this: the backend chosen allows it, and torch's BLAS is within reach.

    >>> isinstance(can_use_cpp(torch.ones(1)), bool)
    True
    """
    return like.dtype in (torch.float32, torch.float64) and _OP.choose((like,), size=like.shape[-1]) is not reference_


def _check(
    Z0: Tensor, tail: Sequence[Tensor], gram: Tensor, target: Tensor, lead: Tensor, Ts: Sequence[Tensor], outputs: Tensor, trace: Tensor
) -> None:
    if Z0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"data_dependent_steps_: Z0 must be float32 or float64, got {Z0.dtype}; convert it first")
    if Z0.dim() != 2 or not tail or len(tail) != len(Ts):
        raise ValueError(
            f"data_dependent_steps_: Z0 must be (k, B) with one T for every weight of tail, got {tuple(Z0.shape)}, {len(tail)} "
            f"weights and {len(Ts)} T; pass tail of length ≥ 1 and as many Ts"
        )
    (k, B), steps, dtype = Z0.shape, trace.shape[0] - 1, Z0.dtype
    wanted: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("Z0", Z0, (k, B), dtype), ("gram", gram, (B, B), dtype), ("lead", lead, (k, k), dtype),
        ("trace", trace, (steps + 1, 2), torch.float64),
    ]  # fmt: skip
    for m, (weight, T) in enumerate(zip(tail, Ts, strict=True)):
        wanted += [(f"tail[{m}]", weight, (len(weight), k), dtype), (f"Ts[{m}]", T, (steps, k, k), dtype)]
        k = len(weight)
    wanted.append(("outputs", outputs, (k, B), dtype))
    if target.is_floating_point():
        wanted.append(("target", target, (k, B), dtype))
    else:
        wanted.append(("target", target, (B,), torch.int64))
    for name, tensor, shape, kind in wanted:
        if tuple(tensor.shape) != shape or tensor.device != Z0.device or not tensor.is_contiguous():
            raise ValueError(
                f"data_dependent_steps_: {name} must be contiguous {shape} on {Z0.device}, got {tuple(tensor.shape)} on "
                f"{tensor.device} with strides {tensor.stride()}; shapes follow Z0, tail and trace"
            )
        if tensor.dtype != kind:
            raise TypeError(f"data_dependent_steps_: {name} must be {kind}, got {tensor.dtype}; convert it first")


def _run_(
    Z0: Tensor,
    tail: Sequence[Tensor],
    gram: Tensor,
    target: Tensor,
    lead: Tensor,
    Ts: Sequence[Tensor],
    outputs: Tensor,
    trace: Tensor,
    *numbers: float,
) -> None:
    _OP.choose((Z0,), size=Z0.shape[1])(Z0, tail, gram, target, lead, Ts, outputs, trace, *numbers)


@torch.library.custom_op(
    "teleport_fast::data_dependent_steps_",
    mutates_args=("Z0", "tail", "lead", "Ts", "outputs", "trace"),
    schema="(Tensor(a!) Z0, Tensor(b!)[] tail, Tensor gram, Tensor target, Tensor(c!) lead, Tensor(d!)[] Ts, Tensor(e!) outputs, "
    "Tensor(f!) trace, float slope, float scale, float cap, float gram_limit, float square_limit) -> ()",
)
def _op_(
    Z0: Tensor,
    tail: Sequence[Tensor],
    gram: Tensor,
    target: Tensor,
    lead: Tensor,
    Ts: Sequence[Tensor],
    outputs: Tensor,
    trace: Tensor,
    slope: float,
    scale: float,
    cap: float,
    gram_limit: float,
    square_limit: float,
) -> None:
    _run_(Z0, tail, gram, target, lead, Ts, outputs, trace, slope, scale, cap, gram_limit, square_limit)


@_op_.register_fake
def _(
    Z0: Tensor,
    tail: Sequence[Tensor],
    gram: Tensor,
    target: Tensor,
    lead: Tensor,
    Ts: Sequence[Tensor],
    outputs: Tensor,
    trace: Tensor,
    slope: float,
    scale: float,
    cap: float,
    gram_limit: float,
    square_limit: float,
) -> None:
    return None
