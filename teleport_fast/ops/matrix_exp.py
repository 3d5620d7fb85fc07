"""matrix_exp: exp(M) of many small matrices, each with a degree and a scaling of its own; matrix_exp_pair gives exp(−M) with it."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import STORAGE, accumulation_dtype


def matrix_exp(M: Tensor) -> Tensor:
    """exp(M) = Σ Mᵏ/k! for every matrix of a batch.

    M: (..., h, h), float32, float64, bfloat16 or float16 (the last two computed in float32); the result is contiguous,
    M's shape and dtype. A matrix with a NaN or an infinity gives NaN (h > 1). Differentiable any number of times.
    Errors: TypeError for other dtypes, ValueError unless the matrices are square; RuntimeError if the backend asked for
    cannot be used. Source: scaling and squaring of a Taylor polynomial; own even-odd scheme and bounds, checked by
    tests/ops/test_matrix_exp.py.

    >>> matrix_exp(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    tensor([[1., 1.],
            [0., 1.]])
    """
    _check("matrix_exp", M)
    if direct((M,)):
        return _run(M)
    result: Tensor = torch.ops.teleport_fast.matrix_exp(M)
    return result


def matrix_exp_pair(M: Tensor) -> tuple[Tensor, Tensor]:
    """exp(M) and its inverse exp(−M), from shared powers of M: cheaper than two calls, and no inversion.

    M: (..., h, h) as for `matrix_exp`; two results of M's shape and dtype. Differentiable any number of times.
    Errors and source: as for `matrix_exp`.

    >>> matrix_exp_pair(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))[1]
    tensor([[ 1., -1.],
            [ 0.,  1.]])
    """
    _check("matrix_exp_pair", M)
    if direct((M,)):
        return _run_pair(M)
    result: tuple[Tensor, Tensor] = torch.ops.teleport_fast.matrix_exp_pair(M)
    return result


def reference(M: Tensor) -> Tensor:
    """torch's own."""
    exponential: Tensor = torch.linalg.matrix_exp(M)
    return exponential


def reference_pair(M: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own, twice."""
    plus, minus = torch.linalg.matrix_exp(torch.stack((M, -M)))
    return plus, minus.clone()


_OP, _PAIR = Op("matrix_exp", reference), Op("matrix_exp_pair", reference_pair)


def _check(op: str, M: Tensor) -> None:
    if M.dtype not in STORAGE:
        raise TypeError(f"{op}: M must be float32, float64, bfloat16 or float16, got {M.dtype}; convert it first")
    if M.dim() < 2 or M.shape[-1] != M.shape[-2]:
        raise ValueError(f"{op}: M must be (..., h, h), got shape {tuple(M.shape)}; pass square matrices")


def _flat(M: Tensor) -> Tensor:
    h = M.shape[-1]
    return M.detach().to(accumulation_dtype(M.dtype)).contiguous().view(M.shape[:-2].numel(), h, h)


def _run(M: Tensor) -> Tensor:
    result: Tensor = _OP.choose((M,), size=M.shape[-1])(_flat(M))
    return result.view(M.shape).to(M.dtype)


def _run_pair(M: Tensor) -> tuple[Tensor, Tensor]:
    plus, minus = _PAIR.choose((M,), size=M.shape[-1])(_flat(M))
    return plus.view(M.shape).to(M.dtype), minus.view(M.shape).to(M.dtype)


@torch.library.custom_op("teleport_fast::matrix_exp", mutates_args=(), schema="(Tensor M) -> Tensor")
def _op(M: Tensor) -> Tensor:
    return _run(M)


@torch.library.custom_op("teleport_fast::matrix_exp_pair", mutates_args=(), schema="(Tensor M) -> (Tensor, Tensor)")
def _op_pair(M: Tensor) -> tuple[Tensor, Tensor]:
    return _run_pair(M)


@_op.register_fake
def _(M: Tensor) -> Tensor:
    return M.new_empty(M.shape)


@_op_pair.register_fake
def _(M: Tensor) -> tuple[Tensor, Tensor]:
    return M.new_empty(M.shape), M.new_empty(M.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _frechet(M: Tensor, grad: Tensor) -> Tensor:
    """The derivative of exp at Mᵀ along `grad`: the upper right block of exp([[Mᵀ, grad], [0, Mᵀ]])."""
    M, grad = M.mT.to(accumulation_dtype(M.dtype)), grad.to(accumulation_dtype(M.dtype))
    rows = torch.cat((M, grad), -1), torch.cat((torch.zeros_like(M), M), -1)
    h = M.shape[-1]
    derivative: Tensor = torch.linalg.matrix_exp(torch.cat(rows, -2))[..., :h, h:]
    return derivative


def _backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    (M,) = ctx.saved_tensors
    return _frechet(M, grad).to(M.dtype)


def _backward_pair(ctx, plus_grad: Tensor, minus_grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    (M,) = ctx.saved_tensors
    return (_frechet(M, plus_grad) - _frechet(-M, minus_grad)).to(M.dtype)


_op.register_autograd(_backward, setup_context=_save)
_op_pair.register_autograd(_backward_pair, setup_context=_save)
