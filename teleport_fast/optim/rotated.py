"""Rotated: every matrix steps in the eigenbasis of its gradient covariance and comes back; all else steps by AdamW."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.called import full_precision
from teleport_fast.distributed.gradient import gradient_part, in_layout
from teleport_fast.distributed.layout import local_part
from teleport_fast.distributed.verdict import anywhere, meshes_of
from teleport_fast.ops.checks import accumulation_dtype
from teleport_fast.optim.assigned import Assigned, Place
from teleport_fast.optim.group import check_group
from teleport_fast.optim.moments import MOMENTS
from teleport_fast.optim.plain_adamw import plain_adamw_
from teleport_fast.optim.refresh import AXES, Refresh, count_up_
from teleport_fast.optim.restored import COUNTERS, restored_basis, restored_moment
from teleport_fast.optim.sharded import Placing, Placings, moment_like
from teleport_fast.optim.sharded_step import Task, Work, bring_home_, works_of
from teleport_fast.optim.sides import Known, Rules
from teleport_fast.optim.summed import Held
from teleport_fast.optim.table import Line, Memory, memory_of, render
from teleport_fast.optim.turned_step import step_bucket_
from teleport_fast.optim.views import view_of
from teleport_fast.symmetry.symmetries import Symmetries


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
    Errors: ValueError for values out of range, TypeError for sparse gradients. Source: docs/mathematics.md, ARO
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
        covariance_parts: int = 1,
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
        self._placings = Placings()
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
            check_group(self.param_groups[-1])
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
                placing = self._placings.of(assignment, parameter, group["base"], group["match_rms"])
                part = local_part(parameter).numel()
                held = part if placing is None else math.prod(placing.work.local_shape)
                note = "" if placing is None else placing.note
                owned_entries = sum(side.entries for side in owned)
                lines.append(Line(assignment, parameter.dtype, dtype, moments, owned_entries, part, held, note))
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
        placings = self._all_placings()
        for g, i in turned:
            self._begin(self.param_groups[g]["params"][i], self.param_groups[g]["base"], placings.get((g, i)))
        with full_precision({self.param_groups[g]["params"][i].device.type for g, i in places}):
            held = Held(self.param_groups, turned, placings)
            members, everyone = self._assigned.members(turned), self._assigned.everyone()
            self._refresh.step_(self.param_groups, self.state, members, everyone, held)
            self._step_turned(turned, held)
            self._step_rest([place for place in places if not self._assigned.of(*place).turned])
        return loss

    def _all_finite(self, places: list[Place]) -> bool:
        """Whether all gradients are finite on all ranks, the same answer on each."""
        found = {place: gradient_part(self.param_groups[place[0]]["params"][place[1]]) for place in places}
        if not found:
            return True
        meshes = meshes_of(p for group in self.param_groups for p in group["params"])
        device = next(iter(found.values())).device
        # a sum is not finite where an entry is not, and costs a third of a norm; it may also overflow
        real = [torch.view_as_real(g) if g.is_complex() else g for g in found.values()]
        sums = [gradient.sum(dtype=accumulation_dtype(gradient.dtype)).to(device) for gradient in real]
        if not anywhere(~torch.stack(sums).isfinite().all(), meshes):
            return True
        bad = next((place for place, gradient in found.items() if not bool(gradient.isfinite().all())), None)
        if not anywhere(torch.tensor(bad is not None, device=device), meshes):
            return True
        name = "a matrix that lies on another rank" if bad is None else repr(self._assigned.of(*bad).name)
        warnings.warn(
            f"teleport_fast: gradient of {name} is not finite: this optimizer step is skipped",
            RuntimeWarning,
            stacklevel=4,
        )
        return False

    def _all_placings(self) -> dict[Place, Placing]:
        """Where matrices that are sharded are stepped."""
        found = {
            (g, i): self._placings.of(self._assigned.of(g, i), parameter, group["base"], group["match_rms"])
            for g, group in enumerate(self.param_groups)
            for i, parameter in enumerate(group["params"])
        }
        return {place: placing for place, placing in found.items() if placing is not None}

    def _begin(self, parameter: Tensor, base: str, placing: Placing | None) -> None:
        state = self.state[parameter]
        if "exp_avg" not in state:
            dtype = accumulation_dtype(parameter.dtype)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = moment_like(parameter, placing, dtype)
            if base == "adam":
                state["exp_avg_sq"] = moment_like(parameter, placing, dtype)
        elif placing is not None:  # as it is stepped now, should its group's base have changed
            for key in MOMENTS[1:]:
                if key in state:
                    state[key] = in_layout(state[key], placing.work.layout)

    def _step_turned(self, places: list[Place], held: Held) -> None:
        buckets: dict[tuple[Any, ...], list[tuple[Work, dict[str, Any], int, int]]] = {}
        count_up_([self.state[self.param_groups[g]["params"][i]]["step"] for g, i in places])
        tasks = [self._task(place, held) for place in places]
        works = works_of(tasks, held)
        rates = []
        for task, work in zip(tasks, works, strict=True):
            group, state = self.param_groups[task.place[0]], self.state[task.parameter]
            rates.append((float(group["lr"]), group["weight_decay"]))
            if not work.parameter.numel():
                continue
            # the side with more heads goes to the left, which takes them in one view
            left = 1 if work.heads[1] > work.heads[0] else 0
            numbers = (
                float(state["step"]),
                float(group["lr"]),
                tuple(group["betas"]),
                group["eps"],
                group["weight_decay"] if task.placing is None or task.placing.stays else 0.0,
                bool(group["nesterov"]),
            )
            shape = tuple(view_of(work.parameter, left, work.heads[left]).shape)
            blocks = (basis is not None and len(basis) for basis in work.bases)
            parameter = work.parameter
            key = (shape, *blocks, parameter.dtype, parameter.device, group["base"], group["match_rms"], numbers)
            buckets.setdefault(key, []).append((work, state, left, work.heads[left]))
        for (*_, base, match_rms, numbers), run in buckets.items():
            step, lr, betas, eps, weight_decay, nesterov = numbers
            places_of = [(left, heads) for *_, left, heads in run]

            def views(tensors: list[Tensor], at: list[tuple[int, int]] = places_of) -> list[Tensor]:
                return [view_of(tensor, *place) for tensor, place in zip(tensors, at, strict=True)]

            left_bases = [work.bases[left] for work, _, left, _ in run]
            right_bases = [work.bases[1 - left] for work, _, left, _ in run]
            step_bucket_(
                views([work.parameter for work, *_ in run]),
                views([work.gradient for work, *_ in run]),
                views([local_part(state["exp_avg"]) for _, state, *_ in run]),
                views([local_part(state["exp_avg_sq"]) for _, state, *_ in run]) if base == "adam" else [],
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
        bring_home_(tasks, works, rates)

    def _task(self, place: Place, held: Held) -> Task:
        sides = self._assigned.of(*place).sides
        assert sides is not None
        owners = (self._assigned.owner(*place, axis) for axis in (0, 1))
        rows, columns = (self._refresh.basis(self.param_groups, self.state, owner) for owner in owners)
        return Task(place, self.param_groups[place[0]]["params"][place[1]], held.placings.get(place), sides, (rows, columns))

    def _step_rest(self, places: list[Place]) -> None:
        for g, group in enumerate(self.param_groups):
            plain_adamw_([group["params"][i] for of, i in places if of == g], self.state, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's, but moments, bases and counters keep their precision; a state of other bases is refused whole."""
        self._assigned.extend(self.param_groups)
        wanted = [
            (g, i, key, value, saved)
            for g, saved in enumerate(state_dict["param_groups"][: len(self.param_groups)])
            for i, index in enumerate(saved["params"][: len(self.param_groups[g]["params"])])
            for key, value in state_dict["state"].get(index, {}).items()
            if isinstance(value, Tensor)
        ]
        kept = [(g, i, key, self._restored(key, value, g, i, saved)) for g, i, key, value, saved in wanted]
        super().load_state_dict(state_dict)
        for g, i, key, value in kept:
            self.state[self.param_groups[g]["params"][i]][key] = value
        self._refresh.forget()

    def _restored(self, key: str, value: Tensor, g: int, i: int, saved: dict[str, Any]) -> Tensor:
        if key in COUNTERS:
            return value.detach().to("cpu", torch.float32, copy=True)
        parameter, assignment = self.param_groups[g]["params"][i], self._assigned.of(g, i)
        axis = next((axis for axis, name in enumerate(AXES) if key.startswith(name)), None)
        if axis is not None:
            side = self._assigned.owned_side(g, i, axis)
            return restored_basis(key, value, parameter, assignment, side, self._refresh.dtype_for(parameter))
        base, rms = (saved.get(name, self.defaults[name]) for name in ("base", "match_rms"))
        return restored_moment(key, value, parameter, assignment, self._placings.of(assignment, parameter, base, rms))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state of AdamW, or an older one, lacks what only Rotated has
            for key in ("base", "match_rms", "rotate"):
                group.setdefault(key, self.defaults[key])
            group.setdefault("nesterov", False)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("_refresh", "_assigned", "_placings", "skip_nonfinite")}
        return {**super().__getstate__(), **own}
