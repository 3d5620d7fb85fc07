"""grad_norm_objective: J = tr(P⁻¹S₊) + tr(P S₋), P = gᵀg, of many candidates g in one launch, from the Grams.

Computes Σ (k S₊) ⊙ k + Σ (g S₋) ⊙ g with k = g⁻ᵀ (docs/mathematics.md): the gradient norm after the move by g, without
moving anything. Reads the gradients once whatever the number of candidates (kernels/gram.py), then g, g⁻ᵀ and the two
Grams once per candidate and head.
Launch: one program per (candidate, head), h ≤ 64 (32 in float64); wider h goes to BLAS. For one candidate torch's two
products are as good; a line search of eight or more is what this is for (unmeasured).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from teleport_fast.kernels.configuration import Configuration
from teleport_fast.kernels.gram import grams, padded, total, widest_accumulator
from teleport_fast.kernels.views import TRITON_TYPES, launches_on

# Warps by bytes of an entry and padded width. Chosen so that nothing spills on any target (bench/resources.md);
# speed unmeasured, no GPU was at hand.
TUNED = {4: {16: 4, 32: 4, 64: 8}, 8: {16: 4, 32: 4}}


@triton.jit
def _form(factor, gram, h, ACC: tl.constexpr, H: tl.constexpr):
    i, j = tl.arange(0, H)[:, None], tl.arange(0, H)[None, :]
    product = tl.zeros((H, H), ACC)
    # In pieces of 16: a product over all of h at once spills 700 bytes a thread at h = 64.
    for first in tl.range(0, H, 16):
        k = first + tl.arange(0, 16)
        x = tl.load(factor + i * h + k[None, :], mask=(i < h) & (k < h)[None, :], other=0.0)
        s = tl.load(gram + k[:, None] * h + j, mask=(k < h)[:, None] & (j < h), other=0.0)
        product = tl.dot(x, s, product, input_precision="ieee", out_dtype=ACC)
    x = tl.load(factor + i * h + j, mask=(i < h) & (j < h), other=0.0)
    return tl.sum(tl.sum(product * x, 1), 0)


@triton.jit
def objective_kernel(grams_of, g, g_inverse_t, J, heads, h, ACC: tl.constexpr, H: tl.constexpr):
    index, size = tl.program_id(0).to(tl.int64), h * h
    plus = grams_of + tl.program_id(0) % heads * size
    J_plus = _form(g_inverse_t + index * size, plus, h, ACC, H)
    J_minus = _form(g + index * size, plus + heads * size, h, ACC, H)
    tl.store(J + index, J_plus + J_minus)


def grad_norm_objective(
    G_plus: Tensor | Sequence[Tensor], G_minus: Tensor | Sequence[Tensor], g: Tensor, joints: int = 1
) -> Tensor:
    """J = tr(P⁻¹S₊) + tr(P S₋), P = gᵀg, of candidates g (n, joints·heads, h, h): J (n, joints·heads).

    G_plus, G_minus: joint-major lists of views (heads, h, …), any strides; a missing side counts as zero, a singular g
    as inf. Float32, float64 for float64 gradients. Errors: ValueError if g does not fit. See `ops.grad_norm_objective`.
    """
    plus, minus = ([G] if isinstance(G, Tensor) else list(G) for G in (G_plus, G_minus))
    heads, h = (plus + minus)[0].shape[:2]
    if g.shape[1:] != (joints * heads, h, h):
        raise ValueError(
            f"g must be (candidates, {joints * heads}, {h}, {h}) to fit the gradients, got {tuple(g.shape)}"
        )
    acc = widest_accumulator([*plus, *minus])
    g = g.to(acc).contiguous()
    # inv_ex leaves its error code on the device; inv reads it back.
    inverse, failed = torch.linalg.inv_ex(g)
    # Without a plus side the inverse meets zeros only, and NaN · 0 would be NaN.
    g_inverse_t = inverse.mT.contiguous() if plus else g
    nothing = (plus + minus)[0].new_empty((heads, h, 0))
    runs = [
        side[j * len(side) // joints : (j + 1) * len(side) // joints] for side in (plus, minus) for j in range(joints)
    ]
    signed = [[(tensor, 1) for tensor in run or [nothing]] for run in runs]
    if h > max(TUNED[acc.itemsize]):
        rows = [[t.flatten(2).to(acc) for t, _ in run] for run in signed]
        wide = [torch.stack([G @ G.mT for G in run]).sum(0) for run in rows]
        S_plus, S_minus = torch.cat(wide[:joints]), torch.cat(wide[joints:])
        J = ((g_inverse_t @ S_plus) * g_inverse_t + (g @ S_minus) * g).sum((-2, -1))
    else:
        S, _ = total(grams(signed, acc), 2 * joints * heads, h)
        J = torch.empty(g.shape[:2], dtype=acc, device=g.device)
        if g.numel():
            width = padded(h)
            with launches_on(g.device):
                objective_kernel[(J.numel(),)](
                    S, g, g_inverse_t, J, joints * heads, h, TRITON_TYPES[acc], width,
                    num_warps=TUNED[acc.itemsize][width],
                )  # fmt: skip
    return J.masked_fill_(failed != 0, float("inf")) if plus else J


def shipped() -> Iterator[Configuration]:
    """Every configuration that `grad_norm_objective` launches after kernels/gram.py's."""
    for dtype, name in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        types = dict.fromkeys(("grams_of", "g", "g_inverse_t", "J"), f"*{name}") | {"heads": "i32", "h": "i32"}
        for width, warps in TUNED[dtype.itemsize].items():
            constants = {"ACC": TRITON_TYPES[dtype], "H": width}
            yield Configuration(f"grad_norm_objective {name} h≤{width}", objective_kernel, types, constants, warps)
