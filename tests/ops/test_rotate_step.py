"""rotate_step_ turns, steps and turns back as torch does apart, on every backend, instruction set, dtype and layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from teleport_fast.ops import group_action_, rotate_step_
from teleport_fast.ops.rotate_step import BASES, reference_

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIDES = ["none", "left", "right", "both"]
NUMBERS = {"step": 3, "lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def orthogonal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0].to(dtype)


def state(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameter, gradient and moments, the moments in the accumulation dtype; no second moment so small that its root
    makes a rounding of the turn large."""
    p, g = (torch.randn(shape).to(dtype) for _ in range(2))
    m, v = (torch.randn(shape, dtype=accumulation(dtype)) for _ in range(2))
    return [p, g, m, v.square() + 0.5]


def rms(error: np.ndarray) -> float:
    return float(np.sqrt((error**2).mean()))


def bases(tensor: Tensor, sides: str) -> tuple[Tensor | None, Tensor | None]:
    heads, h, n = tensor.flatten(2).shape
    dtype = accumulation(tensor.dtype)
    left = orthogonal(heads, h, h, dtype=dtype) if sides in ("left", "both") else None
    return left, orthogonal(n, n, dtype=dtype) if sides in ("right", "both") else None


def in_double(tensor: Tensor) -> np.ndarray:
    """Exact enough where less than float64 is accumulated, and much faster than extended precision."""
    return tensor.flatten(2).double().numpy()


def exactly(
    tensors: list[Tensor], left: Tensor | None, right: Tensor | None, base: str, nesterov: bool, exact
) -> list[np.ndarray]:
    """p, m and v after the step, in extended precision."""
    p, g, m, v = (exact(tensor) for tensor in tensors)
    L = np.eye(g.shape[1]) if left is None else exact(left)
    R = np.eye(g.shape[2]) if right is None else exact(right[None])[0]
    one = np.longdouble(1)
    beta1, beta2, step = NUMBERS["beta1"], NUMBERS["beta2"], NUMBERS["step"]
    g = L @ g @ R.T
    m = beta1 * m + (one - beta1) * g
    # Nesterov: the moment that a gradient like this one would make of it, at the next step.
    u, seen = (beta1 * m + (one - beta1) * g, step + 1) if nesterov else (m, step)
    if base == "adam":
        v = beta2 * v + (one - beta2) * g**2
        u = u / (one - one * beta1**seen) / (np.sqrt(v / (one - one * beta2**step)) + NUMBERS["eps"])
    elif base == "sign":
        u = np.sign(u)
    else:
        u = u / (np.sqrt((u**2).sum(-1, keepdims=True) / max(m.shape[-1], 1)) + NUMBERS["eps"])
    keep = one - one * NUMBERS["lr"] * NUMBERS["weight_decay"]
    return [p * keep - NUMBERS["lr"] * (np.swapaxes(L, -1, -2) @ u @ R), m, v]


def apart(tensors: list[Tensor], left: Tensor | None, right: Tensor | None, base: str, nesterov: bool) -> list[Tensor]:
    """p, m and v after the same by torch's own matrix products, one operation after the other."""
    moved = [tensor.clone().flatten(2).contiguous() for tensor in tensors]
    sides = [[] if side is None else [side] for side in (left, right)]
    numbers = [float(NUMBERS[name]) for name in ("step", "lr", "beta1", "beta2", "eps", "weight_decay")]
    reference_(*[[tensor] for tensor in moved], *sides, BASES.index(base), *numbers, nesterov)
    return [moved[0], *moved[2:]]


def assert_as_accurate_as_torch(tensors: list[Tensor], sides: str, base: str, exact, nesterov: bool = False) -> None:
    left, right = bases(tensors[0], sides)
    if tensors[0].dtype != torch.float64:
        exact = in_double
    truth = exactly(tensors, left, right, base, nesterov, exact)
    theirs, gradient = apart(tensors, left, right, base, nesterov), tensors[1].clone()
    rotate_step_(*tensors, left, right, base=base, nesterov=nesterov, **NUMBERS)
    assert torch.equal(tensors[1], gradient)
    for our, their, true in zip([tensors[0], *tensors[2:]], theirs, truth, strict=True):
        assert not our.isnan().any()
        if true.size:
            error, allowed = (rms(exact(t) - true) for t in (our, their))
            assert error <= 2 * allowed + torch.finfo(our.dtype).eps * rms(true), (tensors[0].shape, sides, base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_torchs_own_at_every_size(way, dtype, layout, exact):
    for index, (heads, h, n) in enumerate([*((2, s, 18) for s in SIZES), *((3, 5, s) for s in SIZES)]):
        for offset, sides in enumerate(SIDES if dtype == torch.float32 else SIDES[1 + index % 3 :][:1]):
            tensors = [layout(tensor) for tensor in state(heads, h, n, dtype=dtype)]
            base = BASES[(index // 3 + offset) % 3]
            assert_as_accurate_as_torch(tensors, sides, base, exact, nesterov=(index + offset) % 2 == 1)


@pytest.mark.parametrize("heads, h, n", [(1, 130, 65), (2, 64, 200), (3, 20, 150)])
def test_tensors_of_several_panels_step_as_accurately(way, heads, h, n, layout, exact, nan_filled_memory):
    for index, (sides, base) in enumerate(itertools.product(SIDES, BASES)):
        tensors = [layout(tensor) for tensor in state(heads, h, n)]
        assert_as_accurate_as_torch(tensors, sides, base, exact, nesterov=index % 2 == 1)


@pytest.mark.parametrize("sides", SIDES)
def test_views_of_an_entry_may_lie_in_memory_differently(way, sides, exact):
    p, g, m, v = state(2, 9, 12, 3)
    p = p.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    g, m = g.transpose(0, 2).contiguous().transpose(0, 2), m.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    for base in BASES:
        assert_as_accurate_as_torch([p, g, m, v], sides, base, exact)


@pytest.mark.parametrize("sides", SIDES)
def test_moments_may_be_of_half_types_too(way, sides, exact):
    tensors = [tensor.bfloat16() for tensor in state(2, 9, 33)]
    assert_as_accurate_as_torch(tensors, sides, "adam", exact)


def test_without_a_turn_it_is_torchs_adamw(way):
    p, g, m, v = state(2, 5, 40)
    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = g.clone()
    optimizer = torch.optim.AdamW([parameter], lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False)
    optimizer.state[parameter] = {"step": torch.tensor(2.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    turned = [t.clone() for t in (p, g, m, v)]
    rotate_step_(p, g, m, v, **NUMBERS)
    torch.testing.assert_close(p, parameter.data)
    torch.testing.assert_close(m, optimizer.state[parameter]["exp_avg"])
    torch.testing.assert_close(v, optimizer.state[parameter]["exp_avg_sq"])
    rotate_step_(*turned, *bases(p, "left"), **NUMBERS)
    assert not torch.allclose(turned[0], p, rtol=1e-2, atol=1e-2)


def test_late_and_without_a_turn_nesterov_is_torchs_nadam(way):
    # Late, so that the corrections are one: early, NAdam's differ for the gradient and for the moment.
    p, g, m, v = state(2, 5, 40)
    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = g.clone()
    optimizer = torch.optim.NAdam([parameter], lr=0.05, betas=(0.8, 0.95), eps=1e-6, momentum_decay=1e6, foreach=False)
    counters = {"step": torch.tensor(2000.0), "mu_product": torch.tensor(0.0)}
    optimizer.state[parameter] = {**counters, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    numbers = {**NUMBERS, "step": 2001, "weight_decay": 0.0}
    plain = [t.clone() for t in (p, g, m, v)]
    rotate_step_(p, g, m, v, nesterov=True, **numbers)
    torch.testing.assert_close(p, parameter.data)
    torch.testing.assert_close(m, optimizer.state[parameter]["exp_avg"])
    rotate_step_(*plain, **numbers)
    assert not torch.allclose(plain[0], p, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_permutation_as_basis_steps_as_the_plain_step_does(way, side, base):
    # A permutation commutes with what works entry by entry, and with a norm over rows.
    p, g, m, v = state(2, 6, 9)
    order = torch.randperm(6 if side == "left" else 9)
    matrix = torch.eye(len(order))[order]
    axis = 1 if side == "left" else 2
    plain = [t.clone() for t in (p, g, m, v)]
    rotate_step_(*plain, base=base, **NUMBERS)
    turned = [p, g, m.index_select(axis, order), v.index_select(axis, order)]
    sides = (matrix.expand(2, 6, 6), None) if side == "left" else (None, matrix)
    rotate_step_(*turned, *sides, base=base, **NUMBERS)
    torch.testing.assert_close(turned[0], plain[0])
    torch.testing.assert_close(turned[2], plain[2].index_select(axis, order))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sides", ["left", "right", "both"])
def test_turning_the_problem_turns_the_step(way, sides, base):
    # A → Q A, G → Q G, L → L Qᵀ: G' and with it the moments stay, the step turns by Q. On the right A → A Qᵀ, R → R Qᵀ.
    p, g, m, v = state(2, 16, 24)
    left, right = bases(p, sides)
    Q, P = orthogonal(2, 16, 16), orthogonal(24, 24)
    Q = torch.eye(16).expand(2, 16, 16) if left is None else Q
    P = torch.eye(24) if right is None else P
    moved = [Q @ p @ P.mT, Q @ g @ P.mT, m.clone(), v.clone()]
    wrong = [t.clone() for t in moved]
    moved_left, moved_right = None if left is None else left @ Q.mT, None if right is None else right @ P.mT
    rotate_step_(p, g, m, v, left, right, base=base, **NUMBERS)
    rotate_step_(*moved, moved_left, moved_right, base=base, **NUMBERS)
    rotate_step_(*wrong, left, right, base=base, **NUMBERS)
    # A sign of what is almost zero may fall either way.
    close = (moved[0] - Q @ p @ P.mT).abs() < 1e-4
    assert close.all() or (base == "sign" and close.float().mean() > 0.9)
    torch.testing.assert_close(moved[2], m, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wrong[0], Q @ p @ P.mT, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("base", BASES)
def test_it_is_group_action_there_and_back(way, base):
    p, g, m, v = state(2, 8, 10)
    left, _ = bases(p, "left")
    turned, gradient = p.clone(), g.clone()
    moments = [m.clone(), v.clone()]
    group_action_([turned, gradient], [], left)
    rotate_step_(turned, gradient, *moments, base=base, **NUMBERS)
    group_action_(turned, [], left.mT)
    rotate_step_(p, g, m, v, left, base=base, **NUMBERS)
    torch.testing.assert_close(p, turned, rtol=1e-4, atol=1e-4)


def test_each_parameter_turns_by_its_own_basis_and_bases_may_be_shared(way):
    count, shape = 5, (2, 12, 70)
    entries = [state(*shape) for _ in range(count)]
    lefts = [orthogonal(2, 12, 12) for _ in range(2)]
    rights = [orthogonal(70, 70) for _ in range(2)]
    left, right = [lefts[i // 3] for i in range(count)], [rights[i % 2] for i in range(count)]
    singly = [[t.clone() for t in entry] for entry in entries]
    rotate_step_(*[list(tensors) for tensors in zip(*entries, strict=True)], left, right, **NUMBERS)
    for i, entry in enumerate(singly):
        rotate_step_(*entry, left[i], right[i], **NUMBERS)
    torch.testing.assert_close(entries, singly)


def test_sign_and_row_norm_need_no_second_moments_and_leave_them(way):
    for base in ("sign", "row_norm"):
        p, g, m, v = state(2, 5, 7)
        again, kept = [t.clone() for t in (p, g, m)], v.clone()
        rotate_step_(p, g, m, v, *bases(p, "none"), base=base, **NUMBERS)
        rotate_step_(*again, [], base=base, **NUMBERS)
        assert torch.equal(p, again[0]) and torch.equal(v, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sides", SIDES)
def test_nothing_outside_the_views_is_touched(way, sides, dtype):
    for order in ((0, 1, 2), (2, 0, 1)):
        sizes = (2, 9, 20)
        around = [torch.full([2 * sizes[d] + 3 for d in order], 7.0, dtype=dtype) for _ in range(4)]
        turned = [t.permute([order.index(d) for d in range(3)]) for t in around]
        for corner in ((slice(1, -2, 2),) * 3, (slice(1, 3), slice(1, 10), slice(1, 21))):
            inside = [t[corner] for t in turned]
            for view in inside:
                view.fill_(1.0)
            rotate_step_(*inside, *bases(inside[0], sides), **NUMBERS)
            for view, whole in zip(inside, around, strict=True):
                view.fill_(7.0)
                assert bool((whole == 7.0).all())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sides", SIDES)
def test_bits_do_not_depend_on_the_number_of_threads(cpp_way, sides, base, layout):
    start, before = state(3, 33, 300), torch.get_num_threads()
    turns = bases(start[0], sides)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tensors = [layout(t.clone()) for t in start]
        rotate_step_(*tensors, *turns, base=base, **NUMBERS)
        results.append(torch.stack([t.flatten(2) for t in tensors]))
    torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("sides", SIDES)
def test_opcheck(way, sides):
    lists = [list(tensors) for tensors in zip(state(2, 3, 4), state(2, 3, 4), strict=True)]
    left, right = bases(lists[0][0], sides)
    turns = [[] if side is None else [side, side.clone()] for side in (left, right)]
    arguments = (*lists, *turns, 0, 1.0, 0.1, 0.9, 0.99, 1e-8, 0.1, True)
    torch.library.opcheck(torch.ops.teleport_fast.rotate_step_.default, arguments)


def test_compiles_without_a_graph_break(way):
    def fn(p: Tensor, g: Tensor, m: Tensor, v: Tensor, left: Tensor) -> Tensor:
        p, m, v = p.sin(), m.clone(), v.clone()
        rotate_step_(p, g, m, v, left, step=2, lr=0.1)
        return p + m + v

    inputs = (*state(2, 4, 3), orthogonal(2, 4, 4))
    torch.testing.assert_close(torch.compile(fn, fullgraph=True, backend="aot_eager")(*inputs), fn(*inputs))


def test_autograd_notices_the_step(way):
    w = torch.randn(1, 3, 4, requires_grad=True)
    loss = w.square().sum()
    _, *others = state(1, 3, 4)
    with torch.no_grad():
        rotate_step_(w, *others, orthogonal(1, 3, 3), step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bases_and_gradients_that_require_grad_record_nothing(way):
    p, g, m, v = state(1, 3, 4)
    left = orthogonal(1, 3, 3).requires_grad_()
    rotate_step_(p, g.requires_grad_(), m, v, left, step=1, lr=0.1)
    assert not p.requires_grad and not m.requires_grad and not v.requires_grad


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"gradients": torch.ones(1, 3, 5)}, ValueError, ["gradients[0]", "(1, 3, 4)", "(1, 3, 5)"]),
        ({"parameters": [torch.ones(1, 3, 4), torch.ones(1, 3, 4).half()]}, ValueError, ["parameters[1]", "float16"]),
        ({"first_moments": torch.ones(1, 3, 4).double()}, ValueError, ["first_moments[0]", "float64"]),
        ({"second_moments": []}, ValueError, ["second_moments", "0 for 1"]),
        ({"second_moments": [torch.ones(1, 3, 4)] * 2}, ValueError, ["second_moments", "2 for 1"]),
        ({"parameters": []}, ValueError, ["parameters", "0 tensors"]),
        ({"parameters": torch.ones(1, 3, 4, requires_grad=True)}, RuntimeError, ["torch.no_grad()"]),
        ({"parameters": torch.ones(1, 3, 1).expand(1, 3, 4)}, ValueError, ["share memory"]),
        ({"left": torch.ones(2, 3, 3)}, ValueError, ["left[0] must be (1, 3, 3)", "(2, 3, 3)"]),
        ({"left": [torch.eye(3)[None]] * 2}, ValueError, ["left must hold one basis per parameter", "2 for 1"]),
        ({"right": torch.eye(3)}, ValueError, ["right[0] must be (4, 4)", "(3, 3)"]),
        ({"right": torch.eye(4).int()}, TypeError, ["right[0]", "torch.int32"]),
        ({"right": torch.eye(4, device="meta")}, ValueError, ["right[0]", "meta"]),
        ({"base": "lion"}, ValueError, ["base must be one of adam, sign, row_norm", "'lion'"]),
        ({"step": 0}, ValueError, ["step must be at least 1", "step=0"]),
        ({"beta1": 1.0}, ValueError, ["beta1=1.0"]),
        ({"lr": float("nan")}, ValueError, ["lr=nan"]),
    ],
)
def test_bad_input_names_the_argument_and_its_value(change, error, words):
    names = ("parameters", "gradients", "first_moments", "second_moments")
    arguments = {**{name: torch.ones(1, 3, 4) for name in names}, "step": 1, "lr": 0.1, **change}
    count = len(arguments["parameters"])
    if isinstance(arguments["parameters"], list) and count:
        arguments |= {name: [torch.ones(1, 3, 4)] * count for name in names[1:]}
    with pytest.raises(error) as caught:
        rotate_step_(**arguments)
    assert all(word in str(caught.value) for word in ["rotate_step_", *words])
