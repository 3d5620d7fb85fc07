"""The papers' action of GL(h) on an MLP's hidden layers on a fixed batch: apply it, differentiate along it, teleport with it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from teleport_fast.data_dependent import reference
from teleport_fast.data_dependent.activation import Activation, leaky_relu
from teleport_fast.data_dependent.ascent import Arrival, Path, ascend_with_search, identity_plus
from teleport_fast.data_dependent.checks import all_finite, check_elements, check_network, check_teleport
from teleport_fast.data_dependent.losses import LossFunction, output_loss
from teleport_fast.data_dependent.moves import Frame, joint_factors, lie_gradient, move
from teleport_fast.data_dependent.network import Network, backward, hessian_product, with_ones
from teleport_fast.data_dependent.pseudo_inverse import factor
from teleport_fast.data_dependent.published_loop import published_v_exact
from teleport_fast.data_dependent.report import MoveReport, RoundOffWarning, StepRecord, Teleported, TeleportReport
from teleport_fast.data_dependent.sequential import read_sequential, write_sequential

PUBLISHED = {"iclr24": "v_exact", "neurips22": "u_exact", "l2t": "u_exact"}


class MLPAction:
    """Y = W_L σ(… σ(W_1 σ(W_0 X))), columns of X (n, batch) are samples; float32 or float64. Nothing is changed in place.

    form "u_exact": V → V + (σ⁻¹(gσ(Z)) − Z)h⁺, U → U g⁻¹ ([NeurIPS22] eq. 8); "v_exact": V → gV, U → U + (Uσ(Z) − Uσ(gZ))σ(gZ)⁺
    ([ICLR24], published code). keep_null_space=False drops what the batch does not see, as published. bias: each weight is [W b].
    hidden "stale" uses the inputs of the start, as published. ValueError on shapes, NaN, and activations without an inverse.

    >>> W = [torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    >>> action = MLPAction(W, torch.randn(5, 3, dtype=torch.float64))
    >>> moved = action.apply([torch.eye(4, dtype=torch.float64) * 2])
    >>> action.report.exact
    True
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        X: Tensor,
        negative_slope: float = 0.1,
        form: str = "u_exact",
        *,
        activation: Activation | None = None,
        bias: bool = False,
        keep_null_space: bool = True,
        hidden: str = "recomputed",
    ) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.activation = leaky_relu(negative_slope) if activation is None else activation
        self.X = check_network(self.weights, X.detach(), form, hidden, bias)
        self.form, self.bias, self.keep_null_space, self.hidden = form, bias, keep_null_space, hidden
        self.report: MoveReport | None = None
        self._X = with_ones(self.X) if bias else self.X
        self._gram: Tensor | None = None
        self._frame: Frame | None = None

    @classmethod
    def from_sequential(cls, model: nn.Sequential, inputs: Tensor, form: str = "u_exact", **options: bool | str) -> MLPAction:
        """The action of a Sequential of Linear and one kind of activation on inputs (batch, n), torch's layout; biases included.

        >>> model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LeakyReLU(0.1), torch.nn.Linear(4, 2)).double()
        >>> MLPAction.from_sequential(model, torch.randn(3, 5, dtype=torch.float64)).bias
        True
        """
        weights, activation, bias = read_sequential(model)
        return cls(weights, inputs.mT, form=form, activation=activation, bias=bias, **options)  # type: ignore[arg-type]

    def write_(self, model: nn.Sequential, weights: Sequence[Tensor]) -> None:
        """Copies moved weights into the Sequential that they came from, biases included."""
        write_sequential(model, weights)

    def at(self, weights: Sequence[Tensor]) -> MLPAction:
        """The same action, batch and options at other weights of the same shapes."""
        moved = copy.copy(self)
        moved.weights, moved.report = [weight.detach() for weight in weights], None
        return moved

    @property
    def widths(self) -> list[int]:
        """The hidden widths: g_m is (widths[m], widths[m])."""
        return [len(weight) for weight in self.weights[:-1]]

    def outputs(self, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Y (out, batch) of the given weights, by a plain forward pass."""
        h = self._X
        weights = self.weights if weights is None else weights
        for weight in weights[:-1]:
            h = self.activation.function(weight @ h)
            h = with_ones(h) if self.bias else h
        return weights[-1] @ h

    def apply(
        self, gs: Sequence[Tensor], loss_fn: LossFunction | None = None, *, inverse: str = "exact"
    ) -> list[Tensor]:
        """The weights moved by g_m of each joint; `report` says whether exactly. inverse "first_order": 2I − g for g⁻¹, as published.

        ValueError for elements of another shape, not finite or singular.
        """
        gs = check_elements(gs, self.widths, self.weights[0])
        frame, net = self._shared(), self._network()
        if inverse not in ("exact", "first_order"):
            raise ValueError(f"inverse must be 'exact' or 'first_order', got {inverse!r}")
        inverses = None
        if self.form == "u_exact":
            inverses = [torch.linalg.inv(g) if inverse == "exact" else identity_plus(identity_plus(-g)) for g in gs]
        stale = [h for h in net.inputs[1:] if h is not None] if self.hidden == "stale" else None
        moved = move(net, gs, inverses, frame, stale)
        weights = self._weights(moved.net.Z0, moved.net.tail, moved.lead)
        faithful = self.hidden == "recomputed" and (self.form == "v_exact" or inverse == "exact")
        ranks, kinds = tuple(f.rank for f in moved.factors), tuple(f.kind for f in moved.factors)
        self.report = self._report(weights, ranks, kinds, faithful, loss_fn)
        self.report.warn()
        return weights

    def apply_exp(self, Ms: Sequence[Tensor], t: float = 1.0, loss_fn: LossFunction | None = None) -> list[Tensor]:
        """apply with g = exp(t M)."""
        return self.apply([torch.linalg.matrix_exp(t * M) for M in Ms], loss_fn)

    def random_teleport(
        self, radius: float = 0.5, generator: torch.Generator | None = None, loss_fn: LossFunction | None = None
    ) -> list[Tensor]:
        """apply with g = exp(M), M of every joint uniform on ‖M‖_F = radius; how exact it was stands in `report`.

        The published code draws I + T with T of positive entries only, so that all its moves point one way. ValueError for a
        radius that is not positive and finite.

        >>> action = MLPAction([torch.randn(4, 5).double(), torch.randn(2, 4).double()], torch.randn(5, 3).double())
        >>> moved = action.random_teleport(0.5, torch.Generator().manual_seed(0))
        >>> action.report.exact, action.report.output_change < 1e-12
        (True, True)
        """
        if not (radius > 0 and math.isfinite(radius)):
            raise ValueError(f"radius must be positive and finite, got {radius}; 0.5 changes scales by at most a factor of e^0.5")
        draws = [torch.randn(k, k, generator=generator, dtype=self.X.dtype, device=self.X.device) for k in self.widths]
        return self.apply_exp([M * (radius / torch.linalg.vector_norm(M)) for M in draws], 1.0, loss_fn)

    def apply_first_order(self, Ts: Sequence[Tensor], loss_fn: LossFunction | None = None) -> list[Tensor]:
        """apply with g = I + T; U-exact with I − T as its inverse, as published and not exact."""
        return self.apply([identity_plus(T) for T in Ts], loss_fn, inverse="first_order")

    def lie_gradient(self, loss_fn: LossFunction) -> list[Tensor]:
        """d‖∇L‖²/dM_m at the identity, (h_m, h_m) by joint, all from one Hessian-vector product; loss_fn of outputs (out, batch).

        Equal to reference.lie_gradient's double backward (tests/data_dependent/test_lie_gradient.py).
        """
        frame, net, loss = self._shared(), self._network(), output_loss(loss_fn)
        if not self.keep_null_space:
            eyes = [torch.eye(k, dtype=self.X.dtype, device=self.X.device) for k in self.widths]
            net = move(net, eyes, eyes, frame).net
        back = backward(net, loss)
        return lie_gradient(net, back, hessian_product(net, back, loss), frame, joint_factors(net, frame))

    def moved_gradients(self, gs: Sequence[Tensor], loss_fn: LossFunction) -> list[Tensor]:
        """∇L at the moved weights, one per layer, without a forward or autograd there: E σ(Z)ᵀgᵀ and [σ'(Z') ⊙ (g⁻ᵀUᵀE)]hᵀ (own)."""
        gs = check_elements(gs, self.widths, self.weights[0])
        inverses = [torch.linalg.inv(g) for g in gs] if self.form == "u_exact" else None
        back = backward(move(self._network(), gs, inverses, self._shared()).net, output_loss(loss_fn))
        return [back.E[0] @ self._X.mT, *back.G[1:]]

    def teleport(
        self,
        loss_fn: LossFunction,
        steps: int = 10,
        lr: float = 1e-2,
        cap: float = math.inf,
        ascend: bool = True,
        *,
        radius: float = 1.0,
        group: str = "exp",
        parity: bool | str = False,
        recheck: Callable[[Sequence[Tensor]], Tensor | float] | None = None,
        recheck_factor: float = 2.0,
    ) -> Teleported:
        """Steps T = ±lr dJ/dT on J = ‖∇L‖² with line search, ‖T‖_F ≤ radius; J ends no lower (higher) than it began, under the cap.

        parity: the published loop instead, fixed lr, cap looked at before the step ("iclr24", "neurips22", "l2t"; True: the
        form's). recheck(weights): the loss on more data; a teleport that multiplies it by over recheck_factor is undone.
        """
        cap = math.inf if cap is None else float(cap)
        code = check_teleport(self, steps, lr, cap, radius, group, parity, PUBLISHED)
        loss, sign = output_loss(loss_fn), 1 if ascend else -1
        if code in ("neurips22", "l2t"):
            return self._published(loss_fn, code, steps, lr, cap, ascend, recheck, recheck_factor)
        net = self._network()
        if code:
            end = published_v_exact(net, loss, steps, lr, cap, sign)
            if not end.full_rank:
                return self._published(loss_fn, code, steps, lr, cap, ascend, recheck, recheck_factor)
        else:
            end = ascend_with_search(net, self._shared(), loss, steps, lr, cap, sign, group, radius).arrival()
        before = end.steps[0].objective if end.steps else end.objective
        weights = self._weights(end.Z0, end.tail, end.lead) if any(step.T for step in end.steps) else self.weights
        return self._teleported(
            weights, end, loss_fn, before, not code, recheck, recheck_factor, net.outputs, "published" if code else group
        )

    def _published(
        self,
        loss_fn: LossFunction,
        code: str,
        steps: int,
        lr: float,
        cap: float,
        ascend: bool,
        recheck: Callable[[Sequence[Tensor]], Tensor | float] | None,
        recheck_factor: float,
    ) -> Teleported:
        records: list[StepRecord] = []
        weights, stopped = reference.published_teleport(
            self.weights, self._X, loss_fn, code, self.activation, steps, lr, cap, ascend,
            lambda loss, J, Ts: records.append(StepRecord(loss, J, Ts, 1.0 if Ts else 0.0)),
        )
        if not all(all_finite(weight) for weight in weights):
            raise torch.linalg.LinAlgError(f"the published loop left the finite numbers within {steps} steps at lr {lr:g}; take a smaller lr")
        end = MLPAction(weights, self.X, form=self.form, activation=self.activation)._network()
        path = Path(end, backward(end, output_loss(loss_fn)), joint_factors(end, self._shared()), None, records, stopped)
        return self._teleported(weights, path.arrival(), loss_fn, records[0].objective, False, recheck, recheck_factor)

    def _teleported(
        self,
        weights: list[Tensor],
        end: Arrival,
        loss_fn: LossFunction,
        before: float,
        faithful: bool,
        recheck: Callable[[Sequence[Tensor]], Tensor | float] | None,
        recheck_factor: float,
        old: Tensor | None = None,
        group: str = "published",
    ) -> Teleported:
        checks = (None, None) if recheck is None else (float(recheck(self.weights)), float(recheck(weights)))
        undone = checks[0] is not None and checks[1] is not None and not checks[1] <= recheck_factor * checks[0]
        # V-exact's Z₀ is the first weight's factor times VX: the steps' outputs are the new weights' to rounding.
        new = end.outputs if self.form == "v_exact" else None
        base = self._report(weights, end.ranks, end.factorisations, faithful, loss_fn, old, new)
        eps = torch.finfo(self.X.dtype).eps
        pairs = list(zip(weights, self.weights, strict=True))
        # A few eps of every entry is what the products alone leave behind: below it nothing was teleported.
        # The last layers are the small ones, and one that moved settles it.
        still = not any(_relative(new, old) > 16 * eps for new, old in reversed(pairs))
        idle = bool(end.steps) and (still or abs(end.objective - before) <= 16 * eps * abs(before))
        report = TeleportReport(
            **vars(base), objective_before=before, objective_after=end.objective, steps=end.steps, at_round_off=idle,
            stopped="undone: the recheck's loss rose from {:.6g} to {:.6g}".format(*checks) if undone else end.stopped,
            recheck_before=checks[0], recheck_after=checks[1], undone=undone, group=group,
        )
        self.report = report
        report.warn(4)
        if idle:
            warnings.warn(
                f"the teleport is at {self.X.dtype}'s round-off: weights moved by "
                f"{max(_relative(new, old) for new, old in pairs):.1e}, the objective by "
                f"{abs(end.objective - before) / max(abs(before), 1e-300):.1e} of itself; raise lr or use float64",
                RoundOffWarning, stacklevel=3,
            )
        return Teleported(self.weights if undone else weights, report)

    def _report(
        self,
        weights: list[Tensor],
        ranks: tuple[int, ...],
        factorisations: tuple[str, ...],
        faithful: bool,
        loss_fn: LossFunction | None,
        old: Tensor | None = None,
        new: Tensor | None = None,
    ) -> MoveReport:
        old, new = self.outputs() if old is None else old, self.outputs(weights) if new is None else new
        losses = (None, None) if loss_fn is None else (float(loss_fn(old)), float(loss_fn(new)))
        batch = self.X.shape[1]
        exact = faithful and all(rank == batch for rank in ranks)
        return MoveReport(exact, batch, ranks, factorisations, _relative(new, old), *losses)

    def _shared(self) -> Frame:
        if self._frame is None:
            inverse = factor(self._X, self._batch_gram()) if self.form == "u_exact" else None
            self._frame = Frame(self.form, self.keep_null_space, self._X, inverse)
        return self._frame

    def _batch_gram(self) -> Tensor:
        if self._gram is None:
            self._gram = self._X.mT @ self._X
        return self._gram

    def _network(self) -> Network:
        return Network(self.weights[0] @ self._X, self.weights[1:], self._batch_gram(), self.activation, self.bias)

    def _weights(self, Z0: Tensor, tail: list[Tensor], lead: Tensor | None) -> list[Tensor]:
        first = self.weights[0]
        if self.form == "v_exact":
            return [first if lead is None else lead @ first, *tail]
        inverse = self._shared().X_inverse
        assert inverse is not None
        if self.keep_null_space:
            return [first + inverse.right(Z0 - first @ self._X), *tail]
        return [inverse.right(Z0), *tail]


def at(action: MLPAction, weights: Sequence[Tensor]) -> MLPAction:
    """The same action at other weights of the same shapes: what depends on X alone is shared."""
    moved = copy.copy(action)
    moved.weights, moved.report = list(weights), None
    return moved


def _relative(new: Tensor, old: Tensor) -> float:
    scale = float(torch.linalg.vector_norm(old))
    return float(torch.linalg.vector_norm(new - old)) / (scale if scale > 0 else 1.0)
