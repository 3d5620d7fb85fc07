"""Rotated: every matrix steps in the eigenbasis of its gradient covariance and comes back; all else steps by AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.called import full_precision
from teleport_fast.ops.checks import accumulation_dtype
from teleport_fast.optim.assigned import Assigned, Place
from teleport_fast.optim.plain_adamw import plain_adamw_
from teleport_fast.optim.refresh import AXES, Refresh, count_up_, view_of
from teleport_fast.optim.sides import Known, Rules
from teleport_fast.optim.table import Line, Memory, memory_of, render
from teleport_fast.optim.turned_step import BASES, step_bucket_
from teleport_fast.symmetry.symmetries import Symmetries

COUNTERS = ("step", "rows_age", "columns_age")


class Rotated(Optimizer):
    """Rotational teleportation in the return frame: G' = R_l G R_rᵀ, A ← (1 − lr·weight_decay) A − lr R_lᵀ U(G') R_r.

    params: `model.named_parameters()` (names decide what a matrix is), plain parameters, or groups of either; a group
    with `rotate=False` is AdamW's. symmetries: `find_symmetries(model)`, which tells heads and stream for certain.
    base: "adam", "sign", "row_norm" or "sinkhorn", per group. Per side of a matrix: stream: one basis per "matrix", per
    reading "site" (q, k, v; gate, up), per "layer", one for the "model", or "none"; heads: one per attention head;
    hidden: the MLP's inner side in bases of about this width (its largest divisor up to there), True: in one basis,
    dearest and best, False: left; sides: {name pattern: (rows, columns)} of "stream",
    "heads:N", "hidden", "whole", "none", before all rules; max_side: a wider basis is not made. Bases turn every `every` steps,
    hidden ones every `hidden_every` (None: as often), by one step of orthogonal iteration on
    C ← decay·C + (1 − decay) Σ G Gᵀ/‖G‖², of which each step takes one of covariance_parts runs of G's columns, in turn;
    normalise: by the "tensor"'s own ‖G‖², by that of the whole "joint" (all of a basis), or "none". second_moments at a
    turn: "keep", "project" (by the turn's squares) or "reset" (first ones too). basis_dtype: float32 (float64 for
    float64 parameters) or bfloat16. nesterov: the step looks one gradient ahead, β₁ m + (1 − β₁) G' in m's place, per
    group. match_rms: scale every matrix's update to this root mean square. table_lr: a rate of its own for what AdamW
    steps.
    skip_nonfinite: a step with a non-finite gradient is skipped, for one number read back.
    State of a matrix: step, exp_avg and (base "adam") exp_avg_sq in the turned basis; of the first matrix of a basis:
    rows_basis, rows_covariance (heads, h, h), rows_age, and the same for columns. `table()` and `memory()` say it all.
    Errors: ValueError for values out of range, TypeError for sparse gradients. Source: math.md section 5, ARO
    arXiv 2602.09006, SOAP arXiv 2409.11321; checked by tests/optim/test_rotated.py.

    >>> optimizer = Rotated([("up.weight", torch.nn.Parameter(torch.ones(8, 4)))], lr=0.006)
    >>> print(optimizer.table().splitlines()[2])
    up.weight  8 x 4  hidden 8  stream 4
    """

    teleports_itself = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 6e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        base: str = "adam",
        symmetries: Symmetries | None = None,
        stream: str = "matrix",
        heads: bool = True,
        hidden: bool | int = 64,
        sides: Mapping[str, tuple[str, str]] | None = None,
        every: int = 3,
        hidden_every: int | None = None,
        covariance_parts: int = 3,
        decay: float = 0.95,
        normalise: str = "tensor",
        second_moments: str = "keep",
        max_side: int = 4096,
        basis_dtype: torch.dtype | None = None,
        nesterov: bool = True,
        match_rms: float | None = None,
        table_lr: float | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        if symmetries is not None and not isinstance(symmetries, Symmetries):
            raise TypeError(
                f"symmetries must be a Symmetries, got {type(symmetries).__name__}; pass find_symmetries(model)"
            )
        if table_lr is not None and not table_lr >= 0:
            raise ValueError(f"table_lr must be at least 0, got {table_lr}; 0.01 is usual for embeddings and head")
        hidden_every = every if hidden_every is None else hidden_every
        self._refresh = Refresh(every, hidden_every, covariance_parts, decay, basis_dtype, normalise, second_moments)
        rules = Rules(stream, heads, hidden, max_side, dict(sides or {}))
        self._assigned = Assigned(rules, Known.of(symmetries), symmetries)
        self.skip_nonfinite = skip_nonfinite
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {**defaults, "base": base, "match_rms": match_rms, "rotate": True})
        self._assigned.extend(self.param_groups)
        if table_lr is not None:
            self.param_groups = self._assigned.split(self.param_groups, table_lr)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Torch's, with the values checked; the new parameters' sides are decided with the stream's width known by then."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def table(self) -> str:
        """Which side of which parameter is turned, and why not, and the state's memory."""
        return render(self._lines())

    def memory(self) -> Memory:
        """Bytes of parameters, moments, bases and covariances, once every parameter has had a gradient."""
        return memory_of(self._lines())

    def _lines(self) -> list[Line]:
        self._assigned.extend(self.param_groups)
        lines = []
        for g, group in enumerate(self.param_groups):
            for i, parameter in enumerate(group["params"]):
                assignment, owned = self._assigned.of(g, i), self._assigned.owned(g, i)
                moments = 2 if group["base"] == "adam" or not assignment.turned else 1
                dtype = self._refresh.dtype_for(parameter)
                lines.append(Line(assignment, parameter.dtype, dtype, moments, sum(side.entries for side in owned)))
        return lines

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure, if any, runs once, before it. Parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._assigned.extend(self.param_groups):
            self._refresh.forget()
        places = [
            (g, i)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        ]
        for g, i in places:
            if self.param_groups[g]["params"][i].grad.layout != torch.strided:
                raise TypeError(
                    f"gradient of {self._assigned.of(g, i).name!r} is sparse, which Rotated does not step; "
                    f"build its module with sparse=False"
                )
        if self.skip_nonfinite and not self._all_finite(places):
            return loss
        turned = [place for place in places if self._assigned.of(*place).turned]
        for g, i in turned:
            self._begin(self.param_groups[g]["params"][i], self.param_groups[g]["base"])
        with full_precision({self.param_groups[g]["params"][i].device.type for g, i in places}):
            self._refresh.step_(self.param_groups, self.state, self._assigned.members(turned), self._assigned.everyone())
            self._step_turned(turned)
            self._step_rest([place for place in places if not self._assigned.of(*place).turned])
        return loss

    def _all_finite(self, places: list[Place]) -> bool:
        found = {place: self.param_groups[place[0]]["params"][place[1]].grad for place in places}
        if not found:
            return True
        device = next(iter(found.values())).device
        # a sum is not finite where an entry is not, and costs a third of a norm; it may also overflow
        real = [torch.view_as_real(g) if g.is_complex() else g for g in found.values()]
        sums = [gradient.sum(dtype=accumulation_dtype(gradient.dtype)).to(device) for gradient in real]
        if bool(torch.stack(sums).isfinite().all()):
            return True
        bad = next((place for place, gradient in found.items() if not bool(gradient.isfinite().all())), None)
        if bad is None:
            return True
        name = self._assigned.of(*bad).name
        warnings.warn(
            f"teleport_fast: gradient of {name!r} is not finite: this optimizer step is skipped",
            RuntimeWarning,
            stacklevel=4,
        )
        return False

    def _begin(self, parameter: Tensor, base: str) -> None:
        state = self.state[parameter]
        if "exp_avg" not in state:
            dtype = accumulation_dtype(parameter.dtype)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            if base == "adam":
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)

    def _step_turned(self, places: list[Place]) -> None:
        buckets: dict[tuple[Any, ...], list[tuple[Tensor, int, int, list[Tensor | None]]]] = {}
        count_up_([self.state[self.param_groups[g]["params"][i]]["step"] for g, i in places])
        for g, i in places:
            group, parameter, sides = (
                self.param_groups[g],
                self.param_groups[g]["params"][i],
                self._assigned.of(g, i).sides,
            )
            assert sides is not None
            state = self.state[parameter]
            bases = [self._refresh.basis(self.param_groups, self.state, self._assigned.owner(g, i, a)) for a in (0, 1)]
            # the side with more heads goes to the left, which takes them in one view
            left = 1 if sides[1].heads > sides[0].heads else 0
            numbers = (
                float(state["step"]),
                float(group["lr"]),
                tuple(group["betas"]),
                group["eps"],
                group["weight_decay"],
                bool(group["nesterov"]),
            )
            shape = tuple(view_of(parameter, left, sides[left].heads).shape)
            blocks = (basis is not None and len(basis) for basis in bases)
            key = (shape, *blocks, parameter.dtype, parameter.device, group["base"], group["match_rms"], numbers)
            buckets.setdefault(key, []).append((parameter, left, sides[left].heads, bases))
        for (*_, base, match_rms, numbers), run in buckets.items():
            step, lr, betas, eps, weight_decay, nesterov = numbers
            states = [self.state[p] for p, *_ in run]
            places_of = [(left, heads) for _, left, heads, _ in run]

            def views(tensors: list[Tensor], at: list[tuple[int, int]] = places_of) -> list[Tensor]:
                return [view_of(tensor, *place) for tensor, place in zip(tensors, at, strict=True)]

            left_bases = [bases[left] for _, left, _, bases in run]
            right_bases = [bases[1 - left] for _, left, _, bases in run]
            step_bucket_(
                views([p for p, *_ in run]),
                views([p.grad for p, *_ in run if p.grad is not None]),
                views([state["exp_avg"] for state in states]),
                views([state["exp_avg_sq"] for state in states]) if base == "adam" else [],
                [basis for basis in left_bases if basis is not None] or None,
                [basis for basis in right_bases if basis is not None] or None,
                base=base,
                step=step,
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                nesterov=nesterov,
                match_rms=match_rms,
            )

    def _step_rest(self, places: list[Place]) -> None:
        for g, group in enumerate(self.param_groups):
            plain_adamw_([group["params"][i] for of, i in places if of == g], self.state, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's, but moments, bases and counters keep their precision; a state of other bases is refused whole."""
        self._assigned.extend(self.param_groups)
        wanted = [
            (g, i, key, value)
            for g, saved in enumerate(state_dict["param_groups"][: len(self.param_groups)])
            for i, index in enumerate(saved["params"][: len(self.param_groups[g]["params"])])
            for key, value in state_dict["state"].get(index, {}).items()
            if isinstance(value, Tensor)
        ]
        kept = [(g, i, key, self._restored(key, value, g, i)) for g, i, key, value in wanted]
        super().load_state_dict(state_dict)
        for g, i, key, value in kept:
            self.state[self.param_groups[g]["params"][i]][key] = value
        self._refresh.forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state of AdamW, or an older one, lacks what only Rotated has
            for key in ("base", "match_rms", "rotate"):
                group.setdefault(key, self.defaults[key])
            group.setdefault("nesterov", False)

    def _restored(self, key: str, value: Tensor, g: int, i: int) -> Tensor:
        """A copy in the dtype and on the device where this optimizer keeps it. Errors: ValueError for another shape."""
        if key in COUNTERS:
            return value.detach().to("cpu", torch.float32, copy=True)
        parameter, assignment = self.param_groups[g]["params"][i], self._assigned.of(g, i)
        if key.endswith("_ill"):
            return value.detach().to(parameter.device, copy=True)
        dtype = accumulation_dtype(parameter.dtype) if assignment.turned else parameter.dtype
        shape: tuple[int, ...] = tuple(parameter.shape)
        for axis, name in enumerate(AXES):
            if key.startswith(name):
                side = self._assigned.owned_side(g, i, axis)
                shape = (side.heads, side.width, side.width) if side else ()
                dtype = self._refresh.dtype_for(parameter)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"state_dict: {key!r} of {assignment.name!r} is {tuple(value.shape)} and this optimizer holds {shape}; "
                f"load it into a Rotated made with the same stream, heads, hidden, sides, symmetries and max_side"
            )
        return value.detach().to(parameter.device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_refresh": self._refresh, "_assigned": self._assigned, "skip_nonfinite": self.skip_nonfinite}
        return {**super().__getstate__(), **own}


def _check_group(group: dict[str, Any]) -> None:
    lr, betas, eps, decay, rms = (group[key] for key in ("lr", "betas", "eps", "weight_decay", "match_rms"))
    if group["base"] not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {group['base']!r}; 'adam' is the default")
    for name, value, example in (("lr", lr, 0.006), ("eps", eps, 1e-8), ("weight_decay", decay, 0.1)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}; pass a value such as {example}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}; (0.9, 0.98) is the default")
    if rms is not None and not rms > 0:
        raise ValueError(f"match_rms must be positive or None, got {rms}; 0.2 matches AdamW's usual updates")
