"""The ICLR 2024 teleport step by step, its double backward in closed form and nothing computed twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.data_dependent.ascent import Arrival, Path
from teleport_fast.data_dependent.deferred import Factors, RightInverse, full_rank_factor
from teleport_fast.data_dependent.fused_loop import fused_v_exact
from teleport_fast.data_dependent.losses import OutputLoss
from teleport_fast.data_dependent.network import Backward, Network, backward, hessian_product, pulled_back
from teleport_fast.data_dependent.pseudo_inverse import factor
from teleport_fast.data_dependent.report import StepRecord


@dataclass(frozen=True)
class Stale:
    """A hidden input as the published loop keeps it: lead h, (k, B), the factors of I + T multiplied among themselves if that is less."""

    h: Tensor
    lead: Tensor | None = None

    def read_by(self, W: Tensor) -> Tensor:
        """W lead h, W (n, k)."""
        return torch.mm(W if self.lead is None else torch.mm(W, self.lead), self.h)

    def turned(self, g: Tensor, rows: int) -> Stale:
        """g lead h, to be read twice by weights of `rows` rows before the next turn."""
        if self.h.shape[1] <= 2 * rows + len(g):
            return Stale(torch.mm(g, self.h))
        return Stale(self.h, g if self.lead is None else torch.mm(g, self.lead))


def published_v_exact(net: Network, loss: OutputLoss, steps: int, lr: float, cap: float, sign: int) -> Arrival:
    """The published V-exact loop: fixed lr, no kept null space, stale inputs h ← (I + T)h; no biases.

    Right where σ(Z) has full row rank; `full_rank` False says that it was not, and nothing after that step can be used.
    """
    fused = fused_v_exact(net, loss, steps, lr, cap, sign)
    if fused is not None:
        return fused
    deferred = all(h.shape[0] < h.shape[1] and factor(h).kind == "cholesky" for h in net.hidden)
    if deferred:
        factors = Factors(deferred=True)
        path = _steps(net, loss, steps, lr, cap, sign, factors)
        if factors.sound():
            return path.arrival()
    return _steps(net, loss, steps, lr, cap, sign, Factors(deferred=False)).arrival()


def _steps(net: Network, loss: OutputLoss, steps: int, lr: float, cap: float, sign: int, factors: Factors) -> Path:
    path = Path(net, backward(net, loss), [], None, [], "all steps done")
    stale, moved = [Stale(h) for h in net.hidden[:-1]], [factors(net.hidden[0], len(net.tail[0]))]
    eyes = [torch.eye(len(h), dtype=h.dtype, device=h.device) for h in net.hidden]
    for _ in range(steps):
        before = path.back
        if cap < before.J:
            path.steps.append(StepRecord(before.loss, before.J, [], 0.0))
            path.stopped = f"squared gradient norm {before.J:.3g} over the cap {cap:.3g}"
            break
        Ts = _scaled_gradients(path.net, before, loss, stale, moved[0], factors, 2 * sign * lr)
        if not factors.full_rank:
            path.full_rank = False
            break
        gs = [torch.add(eye, T) for eye, T in zip(eyes, Ts, strict=True)]
        path.net, moved = _move(path.net, gs, stale, factors)
        stale = [h.turned(g, len(U)) for g, h, U in zip(gs, stale, path.net.tail, strict=False)]
        shared = stale[0].lead if stale else None
        path.lead = shared if shared is not None else gs[0] if path.lead is None else torch.mm(gs[0], path.lead)
        path.back = backward(path.net, loss)
        # Read now, so that the pass's matrices are freed: kept to the end they cost fresh pages at every step.
        path.steps.append(StepRecord(before.loss, before.J, Ts, 1.0))
    path.factors = [full_rank_factor(inverse) for inverse in moved] if path.steps else []
    return path


def _scaled_gradients(
    net: Network, back: Backward, loss: OutputLoss, stale: list[Stale], first: RightInverse, factors: Factors, scale: float
) -> list[Tensor]:
    """scale [K_V Vᵀ − (σ' ⊙ (Uᵀ K_U H⁺ᵀ))Zᵀ] by joint, H and Z of the stale inputs, H of full row rank."""
    product = hessian_product(net, back, loss, first=False)
    # The first joint's inputs are never stale, so K_V Vᵀ is R(E₀) Z₀ᵀ and both of its terms share σ', Uᵀ and Z₀ᵀ.
    above = first.remainder(product.RE[1], product.K[1])
    Ts = [torch.addmm(net.tail[0].new_empty(1), pulled_back(net, back, 0, back.EG, above), net.Z0.t(), beta=0, alpha=scale)]
    for m in range(1, len(net.tail)):
        V, U = net.tail[m - 1], net.tail[m]
        Z = stale[m - 1].read_by(V)
        inverse = factors(net.activation.function(Z), len(U))
        pulled = net.activation.pull(torch.mm(U.t(), inverse.right_transposed(product.K[m + 1])), Z)
        Ts.append(torch.addmm(torch.mm(product.K[m], V.t()), pulled, Z.t(), beta=scale, alpha=-scale))
    return Ts


def _move(net: Network, gs: list[Tensor], stale: list[Stale], factors: Factors) -> tuple[Network, list[RightInverse]]:
    """V → gV, U → U σ(Z) σ(gZ)⁺ pair by pair; at the first pair σ(gZ₀) and Uσ(Z₀) are the network's own."""
    sigma, tail = net.activation.function, list(net.tail)
    Z0 = torch.mm(gs[0], net.Z0)
    H0 = sigma(Z0)
    inverses = [factors(H0, len(tail[0]))]
    tail[0] = inverses[0].right(net.Z[1])
    for m in range(1, len(gs)):
        Z = stale[m - 1].read_by(tail[m - 1])
        tail[m - 1] = torch.mm(gs[m], tail[m - 1])
        inverses.append(factors(sigma(torch.mm(gs[m], Z)), len(tail[m])))
        tail[m] = inverses[m].right(torch.mm(tail[m], sigma(Z)))
    return net.moved(Z0, tail, H0), inverses
