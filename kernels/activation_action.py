"""activation_action: σ⁻¹(g σ(Z)) for LeakyReLU and PReLU, and its tangent (M σ(Z)) / σ'(Z): one product with both ends fused.

Computes a batched h × h by h × B product that activates Z's tiles as they arrive and divides the sums as they leave, so
that neither σ(Z) nor g σ(Z) is ever in memory. Reads Z once per block of rows and g once per block of columns, writes
the result once. Launch: one program per (batch, block of columns, block of rows), blocks of rows of one batch's columns
side by side, so that they meet Z in the second-level cache.
float32 runs on CUDA cores ("ieee", no tf32). Half types run on tensor cores in four products that lose nothing the
result's rounding would keep: g σ(Z) = g Z⁺ + (g diag a) Z⁻, where Z⁺ and Z⁻ are of the storage type exactly, and either
matrix is split into high + low. Wide float32 layers lose to BLAS once the product dwarfs the passes saved (unmeasured).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from teleport_fast.kernels.configuration import Configuration
from teleport_fast.kernels.views import TRITON_TYPES, TYPE_NAMES, accumulator, launches_on

# Rows, columns and depth of a tile and warps, by bytes of an entry and by whether h ≤ 16. Chosen so that nothing spills
# on any target (bench/resources.md); speed unmeasured, no GPU was at hand.
TUNED = {
    2: {True: (16, 128, 16, 4), False: (64, 64, 32, 8)},
    4: {True: (16, 128, 16, 4), False: (64, 64, 16, 8)},
    8: {True: (16, 64, 16, 4), False: (32, 64, 16, 8)},
}


@triton.jit
def _split_dot(matrix, x, total, ACC: tl.constexpr):
    """total + matrix x, with the matrix as high + low of x's type."""
    high = matrix.to(x.dtype)
    low = (matrix - high.to(ACC)).to(x.dtype)
    total = tl.dot(high, x, total, input_precision="ieee", out_dtype=ACC)
    return tl.dot(low, x, total, input_precision="ieee", out_dtype=ACC)


@triton.jit
def activation_kernel(Z, matrix, slope, out, h, columns, head_stride, row_stride, column_stride, matrix_stride,
                      DTYPE: tl.constexpr, ACC: tl.constexpr, TANGENT: tl.constexpr,
                      M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    row_blocks, column_blocks = tl.cdiv(h, M), tl.cdiv(columns, N)
    place = tl.program_id(0) // row_blocks
    i = tl.program_id(0) % row_blocks * M + tl.arange(0, M)
    j = (place % column_blocks).to(tl.int64) * N + tl.arange(0, N)
    head = (place // column_blocks).to(tl.int64)
    Z += head * head_stride
    matrix += head * matrix_stride
    rows, inside = (i < h)[:, None], (j < columns)[None, :]
    total = tl.zeros((M, N), ACC)
    for first in tl.range(0, h, K):
        k = first + tl.arange(0, K)
        pointers = Z + k[:, None].to(tl.int64) * row_stride + j[None, :] * column_stride
        z = tl.load(pointers, mask=(k < h)[:, None] & inside, other=0.0).to(ACC)
        a = tl.load(slope + k, mask=k < h, other=1.0)
        x = tl.load(matrix + i[:, None].to(tl.int64) * h + k[None, :], mask=rows & (k < h)[None, :], other=0.0)
        if DTYPE.primitive_bitwidth == 16:
            total = _split_dot(x, tl.where(z < 0, 0.0, z).to(DTYPE), total, ACC)
            total = _split_dot(x * a[None, :], tl.where(z < 0, z, 0.0).to(DTYPE), total, ACC)
        else:
            total = tl.dot(x, tl.where(z < 0, a[:, None] * z, z), total, input_precision="ieee", out_dtype=ACC)
    a = tl.load(slope + i, mask=i < h, other=1.0)
    if TANGENT:
        pointers = Z + i[:, None].to(tl.int64) * row_stride + j[None, :] * column_stride
        sign = tl.load(pointers, mask=rows & inside, other=0.0).to(ACC)
    else:
        sign = total
    result = tl.where(sign < 0, total / a[:, None], total).to(DTYPE)
    tl.store(out + (head * h + i[:, None]) * columns + j[None, :], result, mask=rows & inside)


def activation_action(Z: Tensor, g: Tensor, slope: Tensor) -> Tensor:
    """σ⁻¹(g σ(Z)), contiguous, of Z's type; see `ops.activation_action`.

    Z: (batch, h, B), any strides, float32, float64, float16 or bfloat16. g: (batch or 1, h, h) and slope: (h,), of the
    accumulator's type. Errors: ValueError if they do not fit. Source: [NeurIPS22 eq. 8], docs/mathematics.md.
    """
    return _launch(Z, g, slope, False)


def activation_action_tangent(Z: Tensor, M: Tensor, slope: Tensor) -> Tensor:
    """(M σ(Z)) / σ'(Z), arguments, errors and source as for `activation_action`."""
    return _launch(Z, M, slope, True)


def _launch(Z: Tensor, matrix: Tensor, slope: Tensor, tangent: bool) -> Tensor:
    batch, h, columns = Z.shape
    if matrix.shape[0] not in (1, batch) or matrix.shape[1:] != (h, h) or slope.shape != (h,):
        raise ValueError(
            f"matrix and slope must be ({batch} or 1, {h}, {h}) and ({h},) to fit Z {tuple(Z.shape)}, got "
            f"{tuple(matrix.shape)} and {tuple(slope.shape)}"
        )
    out = torch.empty(Z.shape, dtype=Z.dtype, device=Z.device)
    if not out.numel():
        return out
    acc = accumulator(Z.dtype)
    matrix, slope = matrix.to(acc).contiguous(), slope.to(acc).contiguous()
    rows, wide, depth, warps = TUNED[Z.dtype.itemsize][h <= 16]
    grid = batch * triton.cdiv(h, rows) * triton.cdiv(columns, wide)
    step = h * h if matrix.shape[0] > 1 else 0
    with launches_on(Z.device):
        activation_kernel[(grid,)](
            Z, matrix, slope, out, h, columns, *Z.stride(), step, TRITON_TYPES[Z.dtype], TRITON_TYPES[acc], tangent,
            rows, wide, depth, num_warps=warps,
        )  # fmt: skip
    return out


def shipped() -> Iterator[Configuration]:
    """Every configuration that the two launch, with Z's strides free."""
    for dtype, name in TYPE_NAMES.items():
        acc = accumulator(dtype)
        types = {"Z": f"*{name}", "out": f"*{name}"} | dict.fromkeys(("matrix", "slope"), f"*{TYPE_NAMES[acc]}")
        types |= {"h": "i32", "columns": "i32"}
        types |= dict.fromkeys(("head_stride", "row_stride", "column_stride", "matrix_stride"), "i64")
        for narrow, (rows, wide, depth, warps) in TUNED[dtype.itemsize].items():
            for tangent in (False, True):
                constants = {"DTYPE": TRITON_TYPES[dtype], "ACC": TRITON_TYPES[acc], "TANGENT": tangent}
                yield Configuration(
                    f"activation_action{'_tangent' if tangent else ''} {name}{' h≤16' if narrow else ''}",
                    activation_kernel, types, constants | {"M": rows, "N": wide, "K": depth}, warps,
                )  # fmt: skip
