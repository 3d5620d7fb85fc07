"""rotate_step_: an optimizer's step in a turned basis and back, fused: turn, moments, base map, turn back, update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import accumulation_dtype, as_list, check_views
from teleport_fast.ops.runs import check_in_place, check_runs, written

# A kernel's number for a base map is its place here.
BASES = ("adam", "sign", "row_norm")


def rotate_step_(
    parameters: Tensor | Sequence[Tensor],
    gradients: Tensor | Sequence[Tensor],
    first_moments: Tensor | Sequence[Tensor],
    second_moments: Tensor | Sequence[Tensor],
    left: Tensor | Sequence[Tensor] | None = None,
    right: Tensor | Sequence[Tensor] | None = None,
    *,
    base: str = "adam",
    step: float,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.98,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> None:
    """Step `base` in the bases L, R and come back, in place: G' = L G Rᵀ, A ← (1 − lr·weight_decay) A − lr Lᵀ U R.

    parameters, gradients: views of one shape, (heads, h, n) or (heads, h, outer, inner), n = outer·inner, any strides,
    float32, float64, bfloat16 or float16. first_moments, second_moments: the same shapes, held in the turned basis, float32
    also where the parameters are half types. left: None, or an orthogonal (heads, h, h) per parameter; right: None, or an
    orthogonal (n, n) per parameter, shared by its heads; a tensor may stand in them many times. Rows of a basis Q are the
    new basis vectors: a turn is `group_action_` with g = Q. A refresh of the basis turns the first moments by it; second
    moments are kept. m ← β₁ m + (1 − β₁) G', and U by `base`:
    "adam": v ← β₂ v + (1 − β₂) G'², U = m / (1 − β₁^step) / (√(v / (1 − β₂^step)) + eps);
    "sign": U = sign m; "row_norm": each row of m over its root mean square + eps; both take second_moments=[].
    nesterov: U is made of β₁ m + (1 − β₁) G' in m's place, corrected by 1 − β₁^(step + 1): but for that NAdam (Dozat, 2016).
    `step` counts this step, from 1. Gradients and bases are read only. No two views may share an entry. That the bases are
    orthogonal is not checked. Errors: TypeError and ValueError naming argument and value; RuntimeError if gradients are
    being recorded. Source: docs/mathematics.md, arXiv 2602.09006; checked by tests/ops/test_rotate_step.py.

    >>> p, g, m, v = (torch.tensor([[[x], [0.0]]]) for x in (1.0, 3.0, 0.0, 0.0))
    >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> rotate_step_(p, g, m, v, swap, step=1, lr=0.5)
    >>> p.flatten(), m.flatten()
    (tensor([0.5000, 0.0000]), tensor([0.0000, 0.3000]))
    """
    if base not in BASES:
        raise ValueError(f"rotate_step_: base must be one of {', '.join(BASES)}, got {base!r}; pass base='adam'")
    names = ("parameters", "gradients", "first_moments", "second_moments")
    lists = [as_list(tensors) for tensors in (parameters, gradients, first_moments, second_moments)]
    parameters, gradients, first_moments, second_moments = lists
    check_runs("rotate_step_", parameters, 1, "parameters")
    first = check_views("rotate_step_", parameters, [], ("parameters", "parameters"), 1)
    needed = 4 if base == "adam" or second_moments else 3
    for tensors, name in zip(lists[:needed], names, strict=False):
        _check_alike(first, len(parameters), tensors, name)
    heads, h, n = first.shape[0], first.shape[1], math.prod(first.shape[2:])
    turns = [
        _bases(first, len(parameters), bases, name, shape)
        for bases, name, shape in ((left, "left", (heads, h, h)), (right, "right", (n, n)))
    ]
    if not (step >= 1 and lr >= 0 and eps >= 0 and weight_decay >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(
            f"rotate_step_: step must be at least 1, lr, eps and weight_decay at least 0, beta1 and beta2 in [0, 1), got "
            f"step={step}, lr={lr}, eps={eps}, weight_decay={weight_decay}, beta1={beta1}, beta2={beta2}; pass such values"
        )
    changed = [*parameters, *first_moments, *second_moments]
    check_in_place("rotate_step_", changed)
    numbers = (float(step), float(lr), float(beta1), float(beta2), float(eps), float(weight_decay), bool(nesterov))
    arguments = (parameters, gradients, first_moments, second_moments, turns[0], turns[1], BASES.index(base), *numbers)
    if direct([*changed, *gradients, *turns[0], *turns[1]]):
        _run_(*arguments)
        written(changed)
    else:
        with torch.no_grad():
            torch.ops.teleport_fast.rotate_step_(*arguments)


def _check_alike(first: Tensor, count: int, tensors: Sequence[Tensor], name: str) -> None:
    """As many tensors as parameters, of the first one's shape, on its device, float64 with float64 only."""
    if len(tensors) != count:
        raise ValueError(
            f"rotate_step_: {name} must be as many as parameters, got {len(tensors)} for {count}; pass one per parameter"
        )
    check_views("rotate_step_", [first], tensors, ("parameters", name), 1)
    for index, tensor in enumerate(tensors):
        if tensor.shape != first.shape or (name == "parameters" and tensor.dtype != first.dtype):
            raise ValueError(
                f"rotate_step_: parameters[0] is {tuple(first.shape)} {first.dtype} and {name}[{index}] "
                f"{tuple(tensor.shape)} {tensor.dtype}; pass one bucket of equal shapes and parameters of one dtype"
            )


def _bases(
    first: Tensor, count: int, bases: Tensor | Sequence[Tensor] | None, name: str, shape: tuple[int, ...]
) -> list[Tensor]:
    if bases is None:
        return []
    bases = as_list(bases)
    if len(bases) != count:
        raise ValueError(
            f"rotate_step_: {name} must hold one basis per parameter, got {len(bases)} for {count}; pass None for no turn"
        )
    for index, basis in enumerate(bases):
        if basis.shape != shape:
            raise ValueError(
                f"rotate_step_: {name}[{index}] must be {shape} for parameters of shape {tuple(first.shape)}, "
                f"got {tuple(basis.shape)}; pass one basis of that shape per parameter"
            )
        if basis.device != first.device:
            raise ValueError(
                f"rotate_step_: {name}[{index}] is on {basis.device}, the parameters are on {first.device}; move one of them"
            )
        if not basis.is_floating_point():
            raise TypeError(
                f"rotate_step_: {name}[{index}] must be a floating tensor, got {basis.dtype}; pass {name}[{index}].float()"
            )
    return bases


def turn(G: Tensor, left: Tensor | None, right: Tensor | None, back: bool = False) -> Tensor:
    """L G Rᵀ, or Lᵀ G R on the way back; G: (heads, h, n)."""
    if left is not None:
        G = (left.mT if back else left) @ G
    if right is not None:
        G = G @ (right if back else right.mT)
    return G


def base_map_(
    G: Tensor,
    m: Tensor,
    v: Tensor | None,
    base: int,
    step: float,
    beta1: float,
    beta2: float,
    eps: float,
    nesterov: bool = False,
) -> Tensor:
    """U, once m and v have taken up the turned gradient in place."""
    m.lerp_(G, 1 - beta1)
    if nesterov:
        m = m.lerp(G, 1 - beta1)
    if BASES[base] == "sign":
        return m.sign()
    if BASES[base] == "row_norm":
        return m / (m.square().mean(-1, keepdim=True).sqrt() + eps)
    assert v is not None
    v.mul_(beta2).addcmul_(G, G, value=1 - beta2)
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    return torch.div(m, denominator, out=denominator).div_(1 - beta1 ** (step + nesterov))


def reference_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    base: int,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """The formula, in plain torch; `left` and `right` may be empty, `base` is a place in BASES."""
    dtype = accumulation_dtype(parameters[0].dtype)
    for i in range(len(parameters)):
        changed = [parameters[i], first_moments[i], *second_moments[i : i + 1]]
        # Aliases where dtype and strides allow.
        A, m, *rest = (tensor.flatten(2).to(dtype) for tensor in changed)
        L, R = left[i] if left else None, right[i] if right else None
        G = turn(gradients[i].flatten(2).to(dtype), L, R)
        U = base_map_(G, m, rest[0] if rest else None, base, step, beta1, beta2, eps, nesterov)
        A.mul_(1 - lr * weight_decay).add_(turn(U, L, R, back=True), alpha=-lr)
        for tensor, value in zip(changed, (A, m, *rest), strict=True):
            if value.data_ptr() != tensor.data_ptr():
                tensor.copy_(value.view(tensor.shape))


_OP = Op("rotate_step_", reference_)


def _run_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    base: int,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    dtype = accumulation_dtype(parameters[0].dtype)
    # A basis that stands for several parameters is converted once.
    converted = {id(basis): basis.detach().to(dtype).contiguous() for basis in (*left, *right)}
    turns = [[converted[id(basis)] for basis in bases] for bases in (left, right)]
    width = max([1, *(bases[0].shape[-1] for bases in turns if bases)])
    lists = (parameters, gradients, first_moments, second_moments)
    _OP.choose(parameters, size=width)(*lists, *turns, base, step, lr, beta1, beta2, eps, weight_decay, nesterov)


_op_ = torch.library.custom_op(
    "teleport_fast::rotate_step_",
    _run_,
    mutates_args=("parameters", "first_moments", "second_moments"),
    schema="(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, "
    "Tensor[] left, Tensor[] right, int base, float step, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool nesterov) -> ()",
)


@_op_.register_fake
def _(*arguments: object) -> None:
    return None
