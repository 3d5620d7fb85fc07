"""The host functions of csrc/cuda as Python functions over lists of views, outputs poisoned with NaN."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

emulated: Any = importlib.import_module("cuda_on_cpu_emulated")  # loaded by conftest.py

I64, I32, F64 = ctypes.c_int64, ctypes.c_int32, ctypes.c_double
SHARED_LIMIT = 160 << 10


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class JointRows(ctypes.Structure):
    _fields_ = [("partial", I64), ("out", I64), ("rows", I32), ("slots", I32), ("first_block", I32), ("unused", I32)]


class DiagonalView(ctypes.Structure):
    _fields_ = [("view", emulated.ViewStruct), ("scale", ctypes.c_void_p), ("exponent", F64), ("shift", F64)]


class AdamwView(ctypes.Structure):
    _fields_ = [
        ("view", emulated.ViewStruct),
        ("others", ctypes.c_void_p * 3),
        ("strides", I64 * 4 * 3),
        ("parameter_factors", ctypes.c_void_p),
        ("gradient_factors", ctypes.c_void_p),
        ("shift", F64),
        ("alike", I64),
    ]


class PermutedView(ctypes.Structure):
    _fields_ = [("view", emulated.ViewStruct), ("index", ctypes.c_void_p)]


class GramPlan(ctypes.Structure):
    _fields_ = [
        *[(name, I32) for name in ("joints", "heads", "h", "plus", "minus", "float64", "keep_partials")],
        *[(name, I32) for name in ("splits", "micro", "side", "pairs", "groups", "multipliers", "threads")],
        ("shared_bytes", I64),
        ("partials", I64),
    ]


class ObjectivePlan(ctypes.Structure):
    _fields_ = [(name, I64) for name in ("candidates", "matrices", "h", "float64", "stride", "threads", "shared_bytes")]


class ExpPlan(ctypes.Structure):
    _fields_ = [
        *[(name, I64) for name in ("batch", "h", "float64")],
        *[(name, I64) for name in ("stride", "tiles", "per_block", "threads", "shared_bytes")],
    ]


class ActedView(ctypes.Structure):
    _fields_ = [("view", emulated.ViewStruct), ("matrix", ctypes.c_void_p)]


class GroupActionPlan(ctypes.Structure):
    _fields_ = [
        *[(name, I32) for name in ("h", "row_groups", "column_groups", "width")],
        *[(name, I32) for name in ("swizzle", "matrix_stride", "slice", "float64")],
        ("tiles", I64),
        ("shared_bytes", I64),
    ]


class RotateView(ctypes.Structure):
    _fields_ = [("views", emulated.ViewStruct * 4), ("bases", ctypes.c_void_p * 2)]


class RotatePlan(ctypes.Structure):
    _fields_ = [
        *[(name, I32) for name in ("left", "right", "base", "part", "float64", "fused_left", "fused_right")],
        *[(name, I32) for name in ("heads", "rows", "columns", "panel_rows", "row_groups", "column_groups", "width")],
        *[(name, I32) for name in ("panels", "row_blocks", "splits", "run", "whole_rows", "resume", "tiles")],
        ("shared_bytes", I64),
        ("workspace", I64),
    ]


WHOLE_STEP, TURNED_PART, UPDATE = range(3)


def interleaved(plus: Sequence[Tensor], minus: Sequence[Tensor], joints: int) -> list[Tensor]:
    """Joint-major, each joint's plus views first."""
    p, m = len(plus) // joints, len(minus) // joints
    return [t for j in range(joints) for t in (*plus[j * p : (j + 1) * p], *minus[j * m : (j + 1) * m])]


class Kernels:
    """One method per op; each takes what the op's Python function takes."""

    def __init__(self, emulator: Any) -> None:
        self.emulator = emulator
        self.library = emulator.library

    def square_sums(self, tensors: Sequence[Tensor], joints: int = 1) -> tuple[Tensor, Tensor]:
        acc = accumulator(tensors[0].dtype)
        views = emulated.view_table(tensors, joints)
        rows = [tensors[i].shape[0] * tensors[i].shape[1] for i in range(0, len(tensors), len(tensors) // joints)]
        joint_rows = (JointRows * joints)(*[JointRows(rows=r) for r in rows])
        plan = (I64 * 3)()
        arguments = (views, I64(len(tensors)), joint_rows, I64(joints))
        self.emulator.check(self.library.tf_cuda_square_sums_plan(*arguments, None, plan))
        owners = (I32 * (plan[0] + plan[1] + 1))()
        self.emulator.check(self.library.tf_cuda_square_sums_plan(*arguments, owners, plan))
        workspace = torch.full((2 * plan[2] + 1,), torch.nan, dtype=acc)
        squares, l1 = (torch.full((sum(rows) + 1,), torch.nan, dtype=acc) for _ in range(2))
        self.emulator.begin(tensors, [workspace, squares, l1])
        code = self.library.tf_cuda_square_sums(
            self.emulator.table(views),
            self.emulator.table(joint_rows),
            self.emulator.table(owners),
            plan,
            *map(pointer, (workspace, squares, l1)),
            acc == torch.float64,
            None,
        )
        self.emulator.check(code)
        assert squares[-1].isnan() and l1[-1].isnan()
        return squares[:-1], l1[:-1]

    def diagonal_action_(
        self, tensors: Sequence[Tensor], scales: Sequence[Tensor], exponents: Sequence[float], shifts: Sequence[float]
    ) -> None:
        views = (DiagonalView * len(tensors))(
            *[
                DiagonalView(emulated.view_struct(t), s.data_ptr(), e, c)
                for t, s, e, c in zip(tensors, scales, exponents, shifts, strict=True)
            ]
        )
        tiles = self.planned(self.library.tf_cuda_diagonal_action_plan, views, None)
        owners = (I32 * (tiles + 1))()
        self.library.tf_cuda_diagonal_action_plan(views, I64(len(tensors)), owners)
        self.emulator.begin(scales, tensors)
        code = self.library.tf_cuda_diagonal_action_(
            self.emulator.table(views),
            self.emulator.table(owners),
            I64(tiles),
            scales[0].dtype == torch.float64,
            tensors[0].dtype == torch.float64,
            None,
        )
        self.emulator.check(code)

    def permutation_action_(self, tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
        views = (PermutedView * len(tensors))(
            *[PermutedView(emulated.view_struct(t), i.data_ptr()) for t, i in zip(tensors, indices, strict=True)]
        )
        shared = I64()
        plan = self.library.tf_cuda_permutation_action_plan
        tiles = self.planned(plan, views, I64(SHARED_LIMIT), None, ctypes.byref(shared))
        owners = (I32 * (tiles + 1))()
        plan(views, I64(len(tensors)), I64(SHARED_LIMIT), owners, ctypes.byref(shared))
        self.emulator.begin(indices, tensors)
        code = self.library.tf_cuda_permutation_action_(
            self.emulator.table(views), self.emulator.table(owners), I64(tiles), shared, None
        )
        self.emulator.check(code)

    def teleport_adamw_(
        self,
        lists: Sequence[Sequence[Tensor]],
        factors: Tensor,
        which: Sequence[int],
        shifts: Sequence[float],
        *step: float,
    ) -> None:
        """lists: parameters, gradients, moments; factors (kinds, heads, h); step, lr, beta1, beta2, eps, weight_decay."""
        count = len(lists[0])
        views = (AdamwView * count)()
        for i, (parameter, *others) in enumerate(zip(*lists, strict=True)):
            views[i].view, views[i].shift = emulated.view_struct(parameter), shifts[i]
            for t, other in enumerate(others):
                views[i].others[t] = other.data_ptr()
                views[i].strides[t][:] = (other if other.dim() == 4 else other.unsqueeze(2)).stride()
            views[i].parameter_factors = factors[which[i]].data_ptr()
            views[i].gradient_factors = factors[which[count + i]].data_ptr()
        tiles = self.planned(self.library.tf_cuda_teleport_adamw_plan, views, None)
        owners = (I32 * (tiles + 1))()
        self.library.tf_cuda_teleport_adamw_plan(views, I64(count), owners)
        self.emulator.begin([*lists[1], factors], [*lists[0], *lists[2], *lists[3]])
        code = self.library.tf_cuda_teleport_adamw_(
            self.emulator.table(views),
            self.emulator.table(owners),
            I64(tiles),
            (F64 * 7)(*step),
            factors.dtype == torch.float64,
            None,
        )
        self.emulator.check(code)

    def rotate_step_(
        self,
        lists: Sequence[Sequence[Tensor]],
        left: Sequence[Tensor],
        right: Sequence[Tensor],
        base: int,
        *step: float,
        wanted_blocks: int = 1,
        shared_limit: int = 163 << 10,
    ) -> RotatePlan:
        """What launch.cpp does: the whole step in one launch, or torch's products around the part in the turned basis."""
        limits = wanted_blocks, shared_limit
        parameters, gradients, *moments = lists
        plan, views = self.rotate_plan(lists, left, right, base, WHOLE_STEP, *limits)
        if (plan.fused_left, plan.fused_right) == (plan.left, plan.right):
            self.rotate_launch(plan, views, lists, [*left, *right], step)
            return plan
        apart_left, apart_right = [] if plan.fused_left else left, [] if plan.fused_right else right
        acc = accumulator(parameters[0].dtype)
        turned = [g.flatten(2).to(acc) for g in gradients]
        turned = [left[i] @ x for i, x in enumerate(turned)] if apart_left else turned
        turned = [x @ right[i].mT for i, x in enumerate(turned)] if apart_right else turned
        kept_left, kept_right = [] if apart_left else left, [] if apart_right else right
        inner = [turned, turned, *moments]
        self.rotate_launch(
            *self.rotate_plan(inner, kept_left, kept_right, base, TURNED_PART, *limits), inner, [*left, *right], step
        )
        turned = [u @ right[i] for i, u in enumerate(turned)] if apart_right else turned
        turned = [left[i].mT @ u for i, u in enumerate(turned)] if apart_left else turned
        outer = [parameters, turned, turned, turned]
        self.rotate_launch(*self.rotate_plan(outer, [], [], base, UPDATE, *limits), outer, [], step)
        return plan

    def rotate_plan(
        self,
        lists: Sequence[Sequence[Tensor]],
        left: Sequence[Tensor],
        right: Sequence[Tensor],
        base: int,
        part: int,
        *limits: int,
    ) -> tuple[RotatePlan, ctypes.Array]:
        count = len(lists[0])
        views = (RotateView * count)()
        for i in range(count):
            seconds = lists[3] or lists[2]
            views[i].views[:] = [emulated.view_struct(tensors[i]) for tensors in (*lists[:3], seconds)]
            views[i].bases[:] = [bases[i].data_ptr() if bases else None for bases in (left, right)]
        float64 = lists[0][0].dtype == torch.float64
        plan = RotatePlan(left=bool(left), right=bool(right), base=base, part=part, float64=float64)
        planner = self.library.tf_cuda_rotate_step_plan
        self.emulator.check(planner(views, I64(count), *map(I64, limits), ctypes.byref(plan)))
        return plan, views

    def rotate_launch(
        self,
        plan: RotatePlan,
        views: ctypes.Array,
        lists: Sequence[Sequence[Tensor]],
        bases: Sequence[Tensor],
        step: Sequence[float],
    ) -> None:
        acc = accumulator(lists[0][0].dtype)
        workspace = torch.full((plan.workspace + 1,), torch.nan, dtype=acc)
        self.emulator.begin([*lists[1], *bases], [*lists[0], *lists[2], *lists[3], workspace])
        code = self.library.tf_cuda_rotate_step_(
            self.emulator.table(views), I64(len(views)), ctypes.byref(plan), (F64 * 7)(*step), pointer(workspace), None
        )
        self.emulator.check(code)
        assert workspace[-1].isnan()

    def planned(self, plan: Any, views: ctypes.Array, *arguments: Any) -> int:
        """The number of tiles that a planner counts; raises where it refuses."""
        plan.restype = I64
        tiles = plan(views, I64(len(views)), *arguments)
        if tiles < 0:
            raise emulated.EmulatorError(f"the planner returned {tiles}")
        return int(tiles)

    def gram_difference(
        self,
        plus: Sequence[Tensor],
        minus: Sequence[Tensor],
        joints: int = 1,
        wanted_blocks: int = 1,
        shared_limit: int = 227 << 10,
    ) -> tuple[Tensor, Tensor]:
        tensors = interleaved(plus, minus, joints)
        heads, h, acc = tensors[0].shape[0], tensors[0].shape[1], accumulator(tensors[0].dtype)
        plan = GramPlan(joints, heads, h, len(plus) // joints, len(minus) // joints, acc == torch.float64)
        views = emulated.view_table(tensors, joints)
        limits = I64(wanted_blocks), I64(shared_limit)
        code = self.library.tf_cuda_gram_difference_plan(views, ctypes.byref(plan), *limits)
        self.emulator.check(code)
        workspace = torch.full((plan.partials + 1,), torch.nan, dtype=acc)
        d = torch.full((joints * heads * h * h + 1,), torch.nan, dtype=acc)
        trace = torch.full((joints * heads + 1,), torch.nan, dtype=acc)
        self.emulator.begin(tensors, [workspace, d, trace])
        code = self.library.tf_cuda_gram_difference(
            self.emulator.table(views), ctypes.byref(plan), *map(pointer, (workspace, d, trace)), None
        )
        self.emulator.check(code)
        assert d[-1].isnan() and trace[-1].isnan()
        return d[:-1].view(-1, h, h), trace[:-1]

    def grad_norm_objective(
        self, minus_gram_plus: Tensor | None, gram_minus: Tensor | None, g: Tensor, shared_limit: int = 163 << 10
    ) -> Tensor:
        """g: (candidates, heads, h, h); the Grams (heads, h, h), None for an empty side."""
        candidates, heads, h = g.shape[:3]
        plan = ObjectivePlan(candidates, heads, h, g.dtype == torch.float64)
        planner = self.library.tf_cuda_grad_norm_objective_plan
        self.emulator.check(planner(ctypes.byref(plan), I64(shared_limit)))
        objective = torch.full((candidates * heads + 1,), torch.nan, dtype=g.dtype)
        grams = [S for S in (minus_gram_plus, gram_minus) if S is not None]
        self.emulator.begin([g, *grams], [objective])
        code = self.library.tf_cuda_grad_norm_objective(
            ctypes.byref(plan),
            pointer(g),
            *[None if S is None else pointer(S) for S in (minus_gram_plus, gram_minus)],
            pointer(objective),
            None,
        )
        self.emulator.check(code)
        assert objective[-1].isnan()
        return objective[:-1].view(candidates, heads)

    def matrix_exp(self, M: Tensor, pair: bool = False, shared_limit: int = 163 << 10) -> list[Tensor]:
        """exp(M), and exp(-M) where `pair`; M: (batch, h, h)."""
        plan = ExpPlan(*M.shape[:2], M.dtype == torch.float64)
        self.emulator.check(self.library.tf_cuda_matrix_exp_plan(ctypes.byref(plan), I64(shared_limit)))
        results = [torch.full((M.numel() + 1,), torch.nan, dtype=M.dtype) for _ in range(1 + pair)]
        self.emulator.begin([M], results)
        minus = pointer(results[1]) if pair else None
        code = self.library.tf_cuda_matrix_exp(ctypes.byref(plan), pointer(M), pointer(results[0]), minus, None)
        self.emulator.check(code)
        assert all(result[-1].isnan() for result in results)
        return [result[:-1].view_as(M) for result in results]

    def group_action_(
        self,
        plus: Sequence[Tensor],
        minus: Sequence[Tensor],
        g: Tensor,
        g_inverse_t: Tensor,
        joints: int = 1,
        wanted_blocks: int = 1,
    ) -> GroupActionPlan:
        acted = []
        for tensors, matrices in ((plus, g), (minus, g_inverse_t)):
            heads = len(matrices) // joints
            for i, tensor in enumerate(tensors):
                joint = i * joints // len(tensors)
                acted.append(ActedView(emulated.view_struct(tensor), matrices[joint * heads].data_ptr()))
        views, plan = (ActedView * max(1, len(acted)))(*acted), GroupActionPlan()
        arguments = (views, I64(len(acted)), I64(wanted_blocks))
        self.emulator.check(self.library.tf_cuda_group_action_plan(*arguments, None, ctypes.byref(plan)))
        owners = (I32 * (plan.tiles + 1))()
        self.library.tf_cuda_group_action_plan(*arguments, owners, ctypes.byref(plan))
        self.emulator.begin([g, g_inverse_t], [*plus, *minus])
        code = self.library.tf_cuda_group_action_(
            self.emulator.table(views), self.emulator.table(owners), ctypes.byref(plan), None
        )
        self.emulator.check(code)
        return plan

    def covariance_(
        self, covariance: Tensor, tensors: Sequence[Tensor], decay: float, joints: int = 1, wanted_blocks: int = 1
    ) -> None:
        heads, h = tensors[0].shape[:2]
        plan = GramPlan(len(tensors), heads, h, 0, 1, covariance.dtype == torch.float64)
        views = emulated.view_table(tensors, len(tensors))
        self.emulator.check(
            self.library.tf_cuda_covariance_plan(views, ctypes.byref(plan), I64(wanted_blocks), I64(227 << 10))
        )
        workspace = torch.full((plan.partials + 1,), torch.nan, dtype=covariance.dtype)
        self.emulator.begin(tensors, [workspace, covariance])
        code = self.library.tf_cuda_covariance_(
            self.emulator.table(views),
            ctypes.byref(plan),
            I64(joints),
            F64(decay),
            pointer(workspace),
            pointer(covariance),
            None,
        )
        self.emulator.check(code)
        assert workspace[-1].isnan()

    def activation_action(self, Z: Tensor, matrix: Tensor, slope: Tensor, tangent: bool = False) -> Tensor:
        out = torch.full((Z.numel() + 1,), torch.nan, dtype=Z.dtype)
        step = 0 if matrix.shape[0] == 1 else matrix[0].numel()
        self.emulator.begin([Z, matrix, slope], [out])
        code = self.library.tf_cuda_activation_action(
            ctypes.byref(emulated.view_struct(Z)),
            pointer(matrix),
            I64(step),
            pointer(slope),
            pointer(out),
            tangent,
            None,
        )
        self.emulator.check(code)
        assert out[-1].isnan()
        return out[:-1].view(Z.shape)
