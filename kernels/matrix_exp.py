"""matrix_exp, matrix_exp_pair: exp(M), or exp(±M), of a batch of small matrices in one launch that the host need not await.

Computes cosh and sinh of M/2ˢ from their Taylor series (to degree 15, in float64 to 23), which both signs share:
exp(±M) = (cosh ± sinh)^(2ˢ), s squarings for each sign. The series are in M², so s follows from ‖M²‖₁ ≤ 4·4ˢ, which
squares less often than ‖M‖₁ would: 0.2 to 1 times torch's error in float32 against up to 4 times. Moves M in and both
results out. With M² and M⁴ at hand the series take 2·3 + 1 products (2·5 + 1 in float64).
Launch: one program per matrix (512 at once where products need scratch), s found by the program itself; h ≤ 64 (16 in
float64), wider goes to torch, which synchronises but works on the whole GPU. At h = 64 products go through
scratch, 24 times the traffic, which is meant to stay in cache. A single matrix of h = 64 occupies one multiprocessor
and may lose to torch: unmeasured.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import factorial

import torch
import triton
import triton.language as tl
from torch import Tensor

from teleport_fast.kernels.configuration import Configuration
from teleport_fast.kernels.gram import padded
from teleport_fast.kernels.views import TRITON_TYPES, TYPE_NAMES, accumulator, launches_on

# Warps, and whether products are whole or in pieces, by bytes of the accumulator and padded width. Chosen so that
# nothing spills on any target (bench/resources.md); speed unmeasured, no GPU was at hand.
TUNED = {4: {16: (4, True), 32: (4, True), 64: (8, False)}, 8: {16: (4, True)}}
PROGRAMS = 512  # at once, where they need scratch: 16 MiB of it at h = 64
# Blocks of four terms after the first: the remainder at ‖M²‖ = 4 is 2¹⁶/16! (float32), 2²⁴/24! (float64): under an ulp.
BLOCKS = {4: 3, 8: 5}


@triton.jit
def _multiply(a, b, scratch, H: tl.constexpr, WHOLE: tl.constexpr):
    """a @ b; unless WHOLE by way of this program's scratch, in pieces of 16.

    On CUDA cores a product keeps its operands in registers over all of the inner axis, which spills from h = 64 on, and
    a block in registers cannot be cut.
    """
    acc = tl.zeros((H, H), a.dtype)
    if WHOLE:
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=a.dtype)
    else:
        i, j, k = tl.arange(0, H)[:, None], tl.arange(0, H)[None, :], tl.arange(0, 16)
        # Reads of the last product end before these stores, and these stores before the reads below.
        tl.debug_barrier()
        tl.store(scratch + i * H + j, a)
        tl.store(scratch + H * H + i * H + j, b)
        tl.debug_barrier()
        for first in tl.range(0, H, 16):
            left = tl.load(scratch + i * H + first + k[None, :])
            right = tl.load(scratch + H * H + (first + k[:, None]) * H + j)
            acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=a.dtype)
    return acc


@triton.jit
def _exp_of_one(M, plus, minus, scratch, index, h, batch_stride, row_stride, column_stride, ACC: tl.constexpr,
                H: tl.constexpr, BLOCKS: tl.constexpr, FACTORIAL: tl.constexpr, WHOLE: tl.constexpr,
                BOTH: tl.constexpr):  # fmt: skip
    i, j = tl.arange(0, H)[:, None], tl.arange(0, H)[None, :]
    inside = (i < h) & (j < h)
    pointers = M + index * batch_stride + i.to(tl.int64) * row_stride + j.to(tl.int64) * column_stride
    m = tl.load(pointers, mask=inside, other=0.0).to(ACC)
    m2 = _multiply(m, m, scratch, H, WHOLE)
    norm = tl.max(tl.sum(tl.abs(m2), 0), 0)
    scale = tl.full((), 1.0, ACC)
    halvings = 0
    # The bound ends the loop for an infinite norm; NaN never enters it.
    while (norm > 4.0) & (halvings < 64):
        norm *= 0.25
        scale *= 0.5
        halvings += 1
    m *= scale
    m2 *= scale * scale
    m4 = _multiply(m2, m2, scratch, H, WHOLE)
    one = tl.where(i == j, 1.0, 0.0).to(ACC)
    # f3 = (4q + 3)! as an integer: exact, where literals would be rounded to float32; only the last block's pass int64.
    f3 = tl.full((), FACTORIAL, tl.int64)
    last = f3.to(ACC) * (4 * BLOCKS)
    even = one / last + m2 / (last * ((4 * BLOCKS + 1) * (4 * BLOCKS + 2)))
    last *= 4 * BLOCKS + 1
    odd = one / last + m2 / (last * ((4 * BLOCKS + 2) * (4 * BLOCKS + 3)))
    for step in tl.range(1, BLOCKS + 1):
        q = BLOCKS - step
        f2 = f3 // (4 * q + 3)
        f1 = f2 // (4 * q + 2)
        f0 = f1 // (4 * q + 1)
        even = _multiply(m4, even, scratch, H, WHOLE) + (one / f0.to(ACC) + m2 / f2.to(ACC))
        odd = _multiply(m4, odd, scratch, H, WHOLE) + (one / f1.to(ACC) + m2 / f3.to(ACC))
        f3 = f0 // tl.maximum(4 * q, 1)
    odd = _multiply(m, odd, scratch, H, WHOLE)
    positive = even + odd
    negative = even - odd
    for _ in tl.range(0, halvings):
        positive = _multiply(positive, positive, scratch, H, WHOLE)
        if BOTH:
            negative = _multiply(negative, negative, scratch, H, WHOLE)
    out = index * h * h + i * h + j
    tl.store(plus + out, positive.to(plus.dtype.element_ty), mask=inside)
    if BOTH:
        tl.store(minus + out, negative.to(minus.dtype.element_ty), mask=inside)


@triton.jit
def exp_kernel(M, plus, minus, scratch, batch, h, batch_stride, row_stride, column_stride, ACC: tl.constexpr,
               H: tl.constexpr, BLOCKS: tl.constexpr, FACTORIAL: tl.constexpr, WHOLE: tl.constexpr,
               BOTH: tl.constexpr):  # fmt: skip
    scratch += tl.program_id(0).to(tl.int64) * 2 * H * H
    index = tl.program_id(0).to(tl.int64)
    while index < batch:
        _exp_of_one(M, plus, minus, scratch, index, h, batch_stride, row_stride, column_stride, ACC, H, BLOCKS,
                    FACTORIAL, WHOLE, BOTH)  # fmt: skip
        index += tl.num_programs(0)


def matrix_exp_pair(M: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(M), exp(−M)) of matrices M (…, h, h), any strides, in M's dtype.

    float32, float64, float16 or bfloat16; half types are computed in float32 and rounded once.
    Errors: ValueError if M is not square. Source: scaling and squaring with a Taylor series, checked by tests/kernels.
    """
    plus, minus = _exponentials(M, both=True)
    return plus, minus


def matrix_exp(M: Tensor) -> Tensor:
    """exp(M) alone, as `matrix_exp_pair` computes it."""
    return _exponentials(M, both=False)[0]


def _exponentials(M: Tensor, both: bool) -> list[Tensor]:
    if M.dim() < 2 or M.shape[-1] != M.shape[-2]:
        raise ValueError(f"M must be (..., h, h), got {tuple(M.shape)}; pass square matrices")
    h, acc = M.shape[-1], accumulator(M.dtype)
    if h > max(TUNED[acc.itemsize]):
        wide = M.to(acc)
        return [torch.matrix_exp(signed).to(M.dtype) for signed in ((wide, -wide) if both else (wide,))]
    batch = M.reshape(M.shape[:-2].numel(), h, h)
    out = [torch.empty(M.shape, dtype=M.dtype, device=M.device) for _ in range(1 + both)]
    if M.numel():
        width, blocks = padded(h), BLOCKS[acc.itemsize]
        warps, whole = TUNED[acc.itemsize][width]
        programs = len(batch) if whole else min(len(batch), PROGRAMS)
        scratch = torch.empty(0 if whole else (programs, 2, width, width), dtype=acc, device=M.device)
        with launches_on(M.device):
            exp_kernel[(programs,)](
                batch, out[0], out[-1], scratch, len(batch), h, *batch.stride(), TRITON_TYPES[acc], width, blocks,
                factorial(4 * blocks - 1), whole, both, num_warps=warps,
            )  # fmt: skip
    return out


def shipped() -> Iterator[Configuration]:
    """Every configuration that `matrix_exp_pair` launches; `matrix_exp` launches a part of each."""
    strides = ("batch_stride", "row_stride", "column_stride")
    for dtype, name in TYPE_NAMES.items():
        acc = accumulator(dtype)
        types = dict.fromkeys(("M", "plus", "minus"), f"*{name}") | dict.fromkeys(("h", *strides), "i32")
        blocks = BLOCKS[acc.itemsize]
        types |= {"scratch": f"*{TYPE_NAMES[acc]}", "batch": "i32"}
        for width, (warps, whole) in TUNED[acc.itemsize].items():
            constants = {"ACC": TRITON_TYPES[acc], "H": width, "BLOCKS": blocks, "FACTORIAL": factorial(4 * blocks - 1)}
            constants |= {"WHOLE": whole, "BOTH": True}
            yield Configuration(f"matrix_exp {name} h≤{width}", exp_kernel, types, constants, warps)
