"""teleport_adamw_ is diagonal_action_ and torch's AdamW in one pass, on every backend, instruction set, dtype and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from teleport_fast.ops import diagonal_action_, teleport_adamw_
from teleport_fast.ops.backend import set_backend

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NUMBERS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def scales(heads: int, h: int) -> Tensor:
    return torch.randn(heads, h).div(3).exp()


def state(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    p, g, m, v = (torch.randn(shape).to(dtype) for _ in range(4))
    return [p, g, m, v.square()]


def apart(tensors: list[Tensor], s: Tensor, exponent: float, shift: float, step: int) -> None:
    """Move by diagonal_action_, then let torch.optim.AdamW step; the gradient's move is undone."""
    p, g, m, v = tensors
    e = exponent
    diagonal_action_([p, g, m, v], s, [e, -e, -e, -2 * e], [shift, 0.0, 0.0, 0.0])
    parameter = torch.nn.Parameter(p)
    parameter.grad = g.clone()
    optimizer = torch.optim.AdamW([parameter], foreach=False, **NUMBERS)
    optimizer.state[parameter] = {"step": torch.tensor(float(step - 1)), "exp_avg": m, "exp_avg_sq": v}
    optimizer.step()
    diagonal_action_(g, s, [e])


def exactly(tensors: list[Tensor], s: Tensor, exponent: float, shift: float, step: int, exact) -> list[np.ndarray]:
    """p, m and v after the move and the step, in extended precision."""
    p, g, m, v = (exact(tensor) for tensor in tensors)
    f = exact(s[..., None]) ** np.longdouble(exponent)
    (beta1, beta2), lr, eps, decay = NUMBERS["betas"], NUMBERS["lr"], NUMBERS["eps"], NUMBERS["weight_decay"]
    one = np.longdouble(1)
    p, g, m, v = (p + shift) * f - shift, g / f, m / f, v / f**2
    m, v = beta1 * m + (one - beta1) * g, beta2 * v + (one - beta2) * g**2
    update = m / (one - one * beta1**step) / (np.sqrt(v / (one - one * beta2**step)) + eps)
    return [p * (one - one * lr * decay) - lr * update, m, v]


def assert_as_accurate_as_apart(tensors: list[Tensor], exponent: float, shift: float, step: int, exact) -> None:
    s = scales(*tensors[0].shape[:2])
    separate, gradient = [t.clone() for t in tensors], tensors[1].clone()
    truth = exactly(tensors, s, exponent, shift, step, exact)
    with set_backend("reference"):
        apart(separate, s, exponent, shift, step)
    teleport_adamw_(*tensors, s, [exponent], [shift], step=step, **NUMBERS)
    assert torch.equal(tensors[1], gradient)
    for ours, theirs, true in zip(*([t[0], *t[2:]] for t in (tensors, separate)), truth, strict=True):
        assert not ours.isnan().any()
        if true.size:
            error, allowed = (np.abs(exact(t) - true).max() for t in (ours, theirs))
            assert error <= 2 * allowed + torch.finfo(ours.dtype).eps * np.abs(true).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_moving_and_stepping_apart(way, dtype, layout, exact):
    for step, (heads, h, n) in enumerate([*((2, size, 18) for size in SIZES), *((3, 5, size) for size in [*SIZES, 600])]):
        tensors = [layout(t) for t in state(heads, h, n, dtype=dtype)]
        assert_as_accurate_as_apart(tensors, (1.0, -1.0, -2.0)[step % 3], step % 2, step + 1, exact)


@pytest.mark.parametrize("inputs, taps", [(3, 9), (1030, 2)])
def test_convolutions_read_along_their_inputs_step_as_accurately(way, inputs, taps, exact):
    tensors = [t.transpose(1, 2) for t in state(2, 30, inputs, taps)]
    assert_as_accurate_as_apart(tensors, -1.0, 0.0, 2, exact)


@pytest.mark.parametrize("h", [2, 5, 31])
def test_narrow_joints_with_many_columns_step_as_accurately(way, h, exact):
    assert_as_accurate_as_apart([t.transpose(0, 2) for t in state(1500, h, 1)], 1.0, 1.0, 2, exact)


def test_views_of_an_entry_may_lie_in_memory_differently(way, exact):
    p, g, m, v = state(2, 9, 33)
    g, m = g.transpose(0, 2).contiguous().transpose(0, 2), m.mT.contiguous().mT
    assert_as_accurate_as_apart([p, g, m, v], 1.0, 0.0, 2, exact)


def test_without_a_move_it_is_torchs_step(way):
    tensors = state(2, 5, 40)
    separate = [t.clone() for t in tensors]
    apart(separate, torch.ones(2, 5), 0.0, 0.0, 3)
    teleport_adamw_(*tensors, scales(2, 5), [0.0], step=3, **NUMBERS)
    torch.testing.assert_close(tensors, separate)
    # The scales matter where the exponent is not 0.
    moved = state(2, 5, 40)
    still = [t.clone() for t in moved]
    teleport_adamw_(*moved, scales(2, 5), [1.0], step=3, **NUMBERS)
    teleport_adamw_(*still, scales(2, 5), [0.0], step=3, **NUMBERS)
    assert not torch.allclose(moved[0], still[0], rtol=1e-2, atol=1e-2)


def test_large_and_zero_decay_rates_step_as_torch_does(way):
    for betas in ((0.0, 0.0), (0.3, 0.5), (0.99, 0.9999)):
        tensors, numbers = state(1, 3, 20), {**NUMBERS, "betas": betas}
        parameter = torch.nn.Parameter(tensors[0].clone())
        parameter.grad = tensors[1].clone()
        optimizer = torch.optim.AdamW([parameter], foreach=False, **numbers)
        moments = {"exp_avg": tensors[2].clone(), "exp_avg_sq": tensors[3].clone()}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        optimizer.step()
        teleport_adamw_(*tensors, torch.ones(1, 3), step=1, **numbers)
        torch.testing.assert_close(tensors[0], parameter.data)


def test_each_joint_and_each_entry_of_a_run_moves_by_its_own(way):
    s, shapes, exponents = scales(6, 4), [(3,), (20, 2), (1,), (0,), (7,), (9,)], [1.0, -2.0]
    entries = [state(2, 4, *n) for n in shapes]
    singly = [[t.clone() for t in entry] for entry in entries]
    lists = [list(tensors) for tensors in zip(*entries, strict=True)]
    teleport_adamw_(*lists, s, exponents, [1.0, 0.0], step=1, joints=3, **NUMBERS)
    for i, entry in enumerate(singly):
        rows = s[2 * (i // 2) : 2 * (i // 2) + 2]
        teleport_adamw_(*entry, rows, [exponents[i % 2]], [1.0 - i % 2], step=1, **NUMBERS)
    torch.testing.assert_close(entries, singly)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_the_views_is_touched(way, dtype):
    for order in ((0, 1, 2), (2, 0, 1)):
        sizes = (2, 9, 20)
        around = [torch.full([2 * sizes[d] + 3 for d in order], 7.0, dtype=dtype) for _ in range(4)]
        turned = [t.permute([order.index(d) for d in range(3)]) for t in around]
        for corner in ((slice(1, -2, 2),) * 3, (slice(1, 3), slice(1, 10), slice(1, 21))):
            inside = [t[corner] for t in turned]
            for view in inside:
                view.fill_(1.0)
            teleport_adamw_(*inside, scales(2, 9), step=1, **NUMBERS)
            for view, whole in zip(inside, around, strict=True):
                assert not bool((view == 7.0).any())
                view.fill_(7.0)
                assert bool((whole == 7.0).all())


def test_bits_do_not_depend_on_the_number_of_threads(cpp_way, layout):
    start, s, before = state(3, 33, 1500), scales(3, 33), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tensors = [layout(t.clone()) for t in start]
        teleport_adamw_(*tensors, s, step=1, **NUMBERS)
        results.append(torch.stack([t.flatten(2) for t in tensors]))
    torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])


def test_opcheck(way):
    lists = [list(tensors) for tensors in zip(state(2, 3, 4), state(2, 3, 2, 2), strict=True)]
    numbers = (1.0, 0.1, 0.9, 0.99, 1e-8, 0.1)
    arguments = (*lists, scales(4, 3), [1.0, -1.0], [0.0, 1.0], *numbers, 2)
    torch.library.opcheck(torch.ops.teleport_fast.teleport_adamw_.default, arguments)


def test_compiles_without_a_graph_break(way):
    def fn(p: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Tensor) -> Tensor:
        p, m, v = p.sin(), m.clone(), v.clone()
        teleport_adamw_(p, g, m, v, s, step=2)
        return p + m + v

    inputs = (*state(2, 4, 3), scales(2, 4))
    torch.testing.assert_close(torch.compile(fn, fullgraph=True, backend="aot_eager")(*inputs), fn(*inputs))


def test_autograd_notices_the_step(way):
    w = torch.randn(1, 3, 4, requires_grad=True)
    loss = w.square().sum()
    _, *others = state(1, 3, 4)
    with torch.no_grad():
        teleport_adamw_(w, *others, scales(1, 3), step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"gradients": torch.ones(1, 3, 5)}, ValueError, ["gradients[0]", "(1, 3, 4)", "(1, 3, 5)"]),
        ({"first_moments": torch.ones(1, 3, 4).half()}, ValueError, ["first_moments[0]", "torch.float16"]),
        ({"second_moments": []}, ValueError, ["second_moments", "one length", "1 and 0"]),
        ({"second_moments": [torch.ones(1, 3, 4)] * 2}, ValueError, ["one length", "1 and 2"]),
        ({"parameters": torch.ones(1, 3, 4, requires_grad=True)}, RuntimeError, ["torch.no_grad()"]),
        ({"parameters": torch.ones(1, 3, 1).expand(1, 3, 4)}, ValueError, ["share memory"]),
        ({"s": torch.ones(2, 3)}, ValueError, ["s must be (1, 3)", "(2, 3)"]),
        ({"exponents": [1.0, 2.0]}, ValueError, ["exponents must be 1 values", "got 2"]),
        ({"step": 0}, ValueError, ["step must be at least 1", "step=0"]),
        ({"betas": (1.0, 0.9)}, ValueError, ["betas in [0, 1)", "(1.0, 0.9)"]),
        ({"lr": -1.0}, ValueError, ["lr=-1.0"]),
    ],
)
def test_bad_input_names_the_argument_and_both_shapes(change, error, words):
    names = ("parameters", "gradients", "first_moments", "second_moments")
    arguments = {**{name: torch.ones(1, 3, 4) for name in names}, "s": torch.ones(1, 3), "step": 1, **change}
    with pytest.raises(error) as caught:
        teleport_adamw_(**arguments)
    assert all(word in str(caught.value) for word in ["teleport_adamw_", *words])
