"""gram_difference: D = S₋ − S₊ and J = tr S₊ + tr S₋ of a bucket of joints, from one read of the gradients.

Computes S± = Σ G±G±ᵀ over a joint's views (docs/mathematics.md: the Lie-algebra gradient is 2D, J the gradient norm).
Moves every gradient entry once and D once; partial Grams add at most 8% (kernels/gram.py).
Launch: one program per (joint, head, run of columns) keeps D in registers (kernels/gram.py has the kernel and its
configurations); where columns were split, or h is no power of two, a second launch adds the partial sums in order.
D is symmetric to the bit. Wider h goes to BLAS, one product per view, which wins there: a tile of a wide Gram would
read its operands again for every block of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.kernels.gram import fits, grams, total, widest_accumulator


def gram_difference(
    G_plus: Tensor | Sequence[Tensor], G_minus: Tensor | Sequence[Tensor], joints: int = 1
) -> tuple[Tensor, Tensor]:
    """D = S₋ − S₊ (joints·heads, h, h) and J = tr S₊ + tr S₋ (joints·heads,); see `ops.gram_difference`."""
    plus, minus = ([G] if isinstance(G, Tensor) else list(G) for G in (G_plus, G_minus))
    if not (plus or minus) or len(plus) % joints or len(minus) % joints:
        raise ValueError(
            f"G_plus and G_minus must be {joints} equal runs, got {len(plus)} and {len(minus)} tensors; "
            f"pass one run per joint"
        )
    acc = widest_accumulator([*plus, *minus])
    like = (plus + minus)[0]
    heads, h = like.shape[:2]
    p, m = len(plus) // joints, len(minus) // joints
    if not fits(h, acc):
        return _by_blas([plus[j * p : (j + 1) * p] for j in range(joints)],
                        [minus[j * m : (j + 1) * m] for j in range(joints)], acc)  # fmt: skip
    # The sum so far is negated where the minus views begin; a joint without them gets an empty one.
    nothing = like.new_empty((heads, h, 0))
    runs = []
    for j in range(joints):
        added = minus[j * m : (j + 1) * m] or [nothing]
        signs = [1] * p + [-1] + [1] * (len(added) - 1)
        runs.append(list(zip(plus[j * p : (j + 1) * p] + added, signs, strict=True)))
    return total(grams(runs, acc), joints * heads, h)


def _by_blas(plus: list[list[Tensor]], minus: list[list[Tensor]], acc: torch.dtype) -> tuple[Tensor, Tensor]:
    differences, traces = [], []
    for views_plus, views_minus in zip(plus, minus, strict=True):
        like = (views_plus + views_minus)[0]
        D = torch.zeros((like.shape[0], like.shape[1], like.shape[1]), dtype=acc, device=like.device)
        J = torch.zeros((like.shape[0],), dtype=acc, device=like.device)
        for sign, tensor in [(-1, t) for t in views_plus] + [(1, t) for t in views_minus]:
            rows = tensor.flatten(2).to(acc)
            D.baddbmm_(rows, rows.mT, alpha=sign)
            J += rows.square().sum((1, 2))
        differences.append((D + D.mT) / 2)
        traces.append(J)
    return torch.cat(differences), torch.cat(traces)
