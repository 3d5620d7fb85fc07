"""What is measured: every op at a few shapes, with torch's own route, its bytes and its operations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.problems import Problem, problems, size_of
from bench.ops import (
    bench_gram_difference,
    bench_group_action,
    bench_matrix_exp,
    bench_orthogonal_iteration,
    bench_rotate_step,
)
from bench.ratios.formulas import EXPONENT, FLOPS
from teleport_fast import ops
from teleport_fast.data_dependent import CrossEntropy
from teleport_fast.data_dependent.activation import leaky_relu
from teleport_fast.data_dependent.network import Network
from teleport_fast.data_dependent.published_loop import published_v_exact
from teleport_fast.ops.backend import set_backend

CPU = torch.device("cpu")
# (heads, h, n): the demo's heads, those of a 100M model, wide heads beyond the caches, a residual stream.
SIZES = ((4, 32, 128), (12, 64, 768), (16, 128, 2048), (1, 256, 1024))
MIDDLE = SIZES[1]
# Widths and batch of data_dependent_steps_, in place of the sizes.
NETWORKS = {SIZES[0]: ((20, 8, 6, 3), 30), SIZES[1]: ((784, 16, 10, 10), 200), SIZES[2]: ((300, 256, 256, 10), 1000)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """`call` runs the op on tensors of its own; `by_torch` is how torch alone does it, None: the op's plain reference is that."""

    op: str
    dtype: str
    size: str
    bytes: int
    flops: float
    call: Callable[[], object]
    by_torch: Callable[[], object] | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype} {self.size}"


def cases(quick: bool = False, only: tuple[str, ...] = ()) -> Iterator[Case]:
    """float32 at every size and the other dtypes at the middle one; `quick`: float32 at the middle one."""
    for dtype in DTYPES[:1] if quick else DTYPES:
        for size in SIZES if dtype == torch.float32 and not quick else (MIDDLE,):
            yield from (case for case in cases_of(dtype, *size) if not only or case.op in only)


def cases_of(dtype: torch.dtype, heads: int, h: int, n: int) -> Iterator[Case]:
    """Every op at one size."""
    name, double = str(dtype).removeprefix("torch."), dtype == torch.float64
    torch.manual_seed(0)
    for problem in (*problems(dtype, CPU, heads, h, n), *more_problems(dtype, heads, h, n)):
        if problem.op == "matrix_exp" and "norm" not in problem.label:
            continue  # that one's norm is under 2/h, where two products do
        if problem.op == "rotate_step_ both sides" and n > 1024:
            continue  # 34 GFLOP a call
        if problem.op in ("diagonal_action_", "teleport_adamw_"):
            problem.inputs[-1].fill_(1.0)  # called again and again: nothing may grow or vanish
        yield Case(
            problem.op, name, f"{heads} x {h} x {n}", problem.bytes, FLOPS[problem.op](heads, h, n, double),
            lambda p=problem: p.call(*p.inputs), torch_route(problem),
        )  # fmt: skip
    if dtype != torch.bfloat16 and (heads, h, n) in NETWORKS:
        yield data_dependent(dtype, *NETWORKS[heads, h, n])


def more_problems(dtype: torch.dtype, heads: int, h: int, n: int) -> Iterator[Problem]:
    """Those that bench/gpu leaves out, and exponents of a norm that a search meets."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    M = bench_matrix_exp.matrices(heads, h, EXPONENT, dtype)
    yield Problem("matrix_exp", "norm", (M,), lambda M: (ops.matrix_exp(M),), 2 * size_of(M))
    yield Problem("matrix_exp_pair", "norm", (M,), ops.matrix_exp_pair, 3 * size_of(M))
    if dtype in (torch.float32, torch.float64):
        basis, covariance = bench_orthogonal_iteration.warm(heads, h, dtype)
        yield Problem(
            "orthogonal_iteration_", "", (basis, covariance), lambda b, c: (ops.orthogonal_iteration_(b, c),), 4 * size_of(basis)
        )
    Z, g = torch.randn(h, n).to(dtype), (torch.eye(h, dtype=wide) + 0.3 * torch.randn(h, h, dtype=wide) / h**0.5).to(dtype)
    bytes_moved = 2 * size_of(Z) + size_of(g)
    yield Problem(
        "activation_action_tangent", "", (Z, g), lambda Z, g: (ops.activation_action_tangent(Z, g, 0.1),), bytes_moved
    )


def torch_route(problem: Problem) -> Callable[[], object] | None:
    """How torch alone does it, where that is another way than the op's reference, which has more to compute or to keep."""
    inputs = problem.inputs
    if problem.op == "gram_difference":
        return lambda: bench_gram_difference.by_torch(*inputs)
    if problem.op == "group_action_":
        plus, minus, g = inputs
        rounded = g.to(plus.dtype)  # torch multiplies no mixed dtypes
        return lambda: bench_group_action.by_torch([plus], [minus], rounded)
    if problem.op.startswith("rotate_step_"):
        lists, left, right = [[t] for t in inputs[:4]], [inputs[4]], [inputs[5]] if len(inputs) > 5 else None
        if inputs[0].dtype != inputs[2].dtype:
            return None  # torch's foreach takes no mixed dtypes
        return lambda: bench_rotate_step.by_torch(lists, [left, right])
    if problem.op == "teleport_adamw_":
        return mul_then_adamw(*inputs)
    return None


def mul_then_adamw(p: Tensor, gradient: Tensor, m: Tensor, v: Tensor, s: Tensor) -> Callable[[], object]:
    """Weights and state multiplied one after the other, then torch's fused AdamW."""
    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = gradient.clone()
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    optimizer.step()
    state = optimizer.state[parameter]
    moved = [(parameter.detach(), 1.0), (parameter.grad, -1.0), (state["exp_avg"], -1.0), (state["exp_avg_sq"], -2.0)]

    def call() -> None:
        for tensor, exponent in moved:
            tensor.mul_(s[..., None].pow(exponent))
        optimizer.step()

    return call


def data_dependent(dtype: torch.dtype, widths: tuple[int, ...], batch: int) -> Case:
    """Ten steps of the published loop as in bench/ops/bench_data_dependent_steps.py; operations: those of its matrix products."""
    weights = [torch.randn(b, a, dtype=dtype) / a**0.5 for a, b in itertools.pairwise(widths)]
    X, loss = torch.randn(widths[0], batch, dtype=dtype), CrossEntropy(torch.randint(widths[-1], (batch,)))
    net = Network(weights[0] @ X, weights[1:], X.mT @ X, leaky_relu(0.1))

    def call() -> object:
        return published_v_exact(net, loss, 10, 1e-4, math.inf, 1)

    with set_backend("reference"), FlopCounterMode(display=False) as counter:
        call()
    once = size_of(net.Z0, *weights[1:], X.mT @ X) + size_of(net.Z0, *weights[1:])
    label = f"{'-'.join(map(str, widths))}, batch {batch}"
    return Case("data_dependent_steps_", str(dtype).removeprefix("torch."), label, once, float(counter.get_total_flops()), call)
