"""The ICLR 2024 teleport in one native call, where the network and the loss are ones that the op knows."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_fast.data_dependent.ascent import Arrival
from teleport_fast.data_dependent.losses import CrossEntropy, OutputLoss, SquaredError
from teleport_fast.data_dependent.network import Network
from teleport_fast.data_dependent.pseudo_inverse import GRAM_LIMIT
from teleport_fast.data_dependent.report import StepRecord
from teleport_fast.ops.data_dependent_steps import NOT_REACHED, can_use_cpp, data_dependent_steps_


def fused_v_exact(net: Network, loss: OutputLoss, steps: int, lr: float, cap: float, sign: int) -> Arrival | None:
    """The end of the published loop by ops.data_dependent_steps_; None where it does not apply or a σ(Z) is too ill conditioned.

    It applies to LeakyReLU without biases, cross entropy and squared error, and hidden layers no wider than the batch.
    """
    Z0, slope = net.Z0, net.activation.slope
    target = _target(net, loss)
    fits = all(len(h) <= h.shape[1] for h in net.hidden)
    if target is None or slope is None or net.bias or steps < 1 or not fits or not can_use_cpp(Z0):
        return None
    tensors = [tensor.clone(memory_format=torch.contiguous_format) for tensor in (Z0, *net.tail)]
    Z0, tail = tensors[0], tensors[1:]
    lead, outputs = Z0.new_empty(len(Z0), len(Z0)), torch.empty_like(net.outputs)
    Ts = [Z0.new_empty(steps, len(h), len(h)) for h in net.hidden]
    trace = Z0.new_empty(steps + 1, 2, dtype=torch.float64)
    data_dependent_steps_(
        Z0, tail, net.gram, target, lead, Ts, outputs, trace, slope=slope, scale=2 * sign * lr, cap=cap,
        gram_limit=GRAM_LIMIT[Z0.dtype], square_limit=1e-3 / (Z0.shape[1] * torch.finfo(Z0.dtype).eps),
    )
    rows = [(value, J) for value, J in trace.tolist() if J != NOT_REACHED]
    if not rows:
        return None
    records = [StepRecord(value, J, list(T), 1.0) for (value, J), *T in zip(rows[:-1], *(T.unbind() for T in Ts), strict=False)]
    J, stopped = rows[-1][1], "all steps done"
    if len(rows) <= steps:
        records.append(StepRecord(*rows[-1], [], 0.0))
        stopped = f"squared gradient norm {J:.3g} over the cap {cap:.3g}"
    ranks = tuple(len(h) for h in net.hidden)
    kinds = tuple("lu" if len(h) == h.shape[1] else "cholesky" for h in net.hidden)
    moved = len(rows) > 1
    return Arrival(Z0, tail, outputs, J, ranks, kinds, lead if moved else None, records, stopped)


def _target(net: Network, loss: OutputLoss) -> Tensor | None:
    """The labels or the targets, where they fit the outputs as the loss asks."""
    if type(loss) is CrossEntropy:
        return loss.labels.contiguous() if loss.labels.dtype == torch.int64 and loss.labels.device == net.Z0.device else None
    if type(loss) is SquaredError and loss.targets.shape == net.outputs.shape and loss.targets.dtype == net.Z0.dtype:
        return loss.targets.detach().contiguous() if loss.targets.device == net.Z0.device else None
    return None
