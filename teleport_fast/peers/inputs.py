"""The space that a Linear layer's inputs span on a batch, by forward hooks, and the projection on its complement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Collected:
    """The Linear layers that share one weight, by name, with their inputs [x 1] of a pass, (samples, in + bias)."""

    name: str
    linear: nn.Linear
    bias: bool
    inputs: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """One call's inputs, (..., in)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self.inputs.append(torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if self.bias else rows)

    @property
    def moved(self) -> list[Tensor]:
        """The parameters that may move: the weight and, where it is trained, the bias."""
        return [self.linear.weight, self.linear.bias] if self.bias else [self.linear.weight]


def movable(model: nn.Module, layers: Iterable[str] | None) -> tuple[list[Collected], dict[str, str]]:
    """(what can move, why the rest cannot by name); `layers`: only these. ValueError where a name is no Linear of the model."""
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)}
    wanted = set(linears) if layers is None else set(layers)
    if unknown := sorted(wanted - set(linears)):
        raise ValueError(f"layers must name torch.nn.Linear modules of the model, got {unknown}; there are {sorted(linears)}")
    readers: dict[int, set[str]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            readers.setdefault(id(parameter), set()).add(type(module).__name__)
    found: dict[int, Collected] = {}
    skipped: dict[str, str] = {}
    for name, linear in linears.items():
        if name not in wanted:
            continue
        if id(linear.weight) in found:
            continue  # a tied layer: its inputs join those of the first name
        if not linear.weight.requires_grad:
            skipped[name] = "its weight is frozen"
        elif others := readers.get(id(linear.weight), set()) - {type(linear).__name__}:
            skipped[name] = f"its weight is shared with {', '.join(sorted(others))}, whose inputs are not seen"
        else:
            bias = linear._parameters.get("bias")
            found[id(linear.weight)] = Collected(name, linear, bias is not None and bias.requires_grad)
    return list(found.values()), skipped


@contextmanager
def collecting(model: nn.Module, layers: list[Collected]) -> Iterator[None]:
    """Within, every forward of the layers adds its inputs to them."""
    by_weight = {id(layer.linear.weight): layer for layer in layers}

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        by_weight[id(module.weight)].add(args[0] if args else named["input"])

    readers = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module.weight) in by_weight]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_basis(X: Tensor, tolerance: float | None = None, energy: float = 1.0) -> Tensor:
    """Orthonormal Q (n, r) of the rows of X (samples, n): singular values under tolerance times the largest count as 0.

    tolerance: default max(samples, n) eps. energy under 1 keeps the fewest directions that hold this share of ‖X‖², as
    published (arXiv 2502.11362's threshold): a projection off them then moves the outputs.

    >>> input_basis(torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)).shape
    torch.Size([3, 1])
    """
    samples, n = X.shape
    tolerance = max(samples, n) * torch.finfo(X.dtype).eps if tolerance is None else tolerance
    if not samples:
        return X.new_zeros(n, 0)
    if energy == 1 and samples < n:
        Q: Tensor
        Q, R = torch.linalg.qr(X.mT)
        diagonal = R.diagonal().abs()
        # QR's columns hold every input whatever its rank; its diagonal says whether a smaller basis would.
        if bool(diagonal.min() > 1e3 * tolerance * diagonal.max()):
            return Q
    if samples > n:
        X = torch.linalg.qr(X, mode="r").R
    _, S, Vh = torch.linalg.svd(X, full_matrices=False)
    rank = int((tolerance * S[0] < S).sum())
    if energy < 1:
        held = S.square().cumsum(0) / S.square().sum()
        rank = min(rank, int((held < energy).sum()) + 1)
    basis: Tensor = Vh[:rank].mT
    return basis


def project(A: Tensor, Q: Tensor) -> Tensor:
    """A (out, n) less its part in Q; twice, since once leaves rounding of A's size along Q.

    >>> project(torch.ones(1, 2), torch.tensor([[1.0], [0.0]]))
    tensor([[0., 1.]])
    """
    for _ in range(2):
        A = A - (A @ Q) @ Q.mT
    return A
