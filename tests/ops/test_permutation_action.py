"""permutation_action_ reorders rows bit by bit on every backend, instruction set, dtype and layout, and touches nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teleport_fast.ops import permutation_action_
from teleport_fast.ops.backend import availability, set_backend

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def orders(heads: int, h: int) -> Tensor:
    return torch.stack([torch.randperm(h) for _ in range(heads)]) if heads else torch.empty(0, h, dtype=torch.int64)


def reordered(A: Tensor, index: Tensor) -> Tensor:
    return torch.stack([head[rows] for head, rows in zip(A, index, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_reordered_exactly_at_every_width_and_number_of_columns(way, dtype, layout):
    for heads, h, n in [*((2, size, 18) for size in SIZES), *((3, 5, size) for size in [*SIZES, 5000])]:
        A, index = torch.randn(heads, h, n).to(dtype), orders(heads, h)
        moved = layout(A.clone())
        permutation_action_(moved, index)
        assert torch.equal(moved.flatten(2), reordered(A, index)), (heads, h, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_the_view_is_touched(way, dtype):
    sizes = (2, 33, 70)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        around = torch.full([2 * sizes[d] + 3 for d in order], 7.0, dtype=dtype)
        turned = around.permute([order.index(d) for d in range(3)])
        for inside in (turned[1:-2:2, 1:-2:2, 1:-2:2], turned[1:3, 1:34, 1:71]):
            around.fill_(7.0)
            A, index = torch.randn(sizes).to(dtype), orders(2, 33)
            inside.copy_(A)
            permutation_action_(inside, index)
            assert torch.equal(inside, reordered(A, index))
            inside.fill_(7.0)
            assert bool((around == 7.0).all())


def test_a_joints_product_is_kept_where_both_sides_move(way):
    plus, minus, index = torch.randn(2, 6, 5), torch.randn(2, 6, 3), orders(2, 6)
    product = minus.mT @ plus
    permutation_action_([plus, minus], index)
    torch.testing.assert_close(minus.mT @ plus, product)
    permutation_action_([plus], torch.tensor([[1, 2, 3, 4, 5, 0]] * 2))
    assert not torch.allclose(minus.mT @ plus, product, rtol=1e-2, atol=1e-2)


def test_each_joint_of_a_call_gets_its_own_heads_of_index(way):
    index = orders(6, 4)
    tensors = [torch.randn(2, 4, *n) for n in ((3,), (20, 2), (1,), (0,), (7,), (9,))]
    wanted = [reordered(t, index[2 * (i // 2) : 2 * (i // 2) + 2]) for i, t in enumerate(tensors)]
    permutation_action_(tensors, index, joints=3)
    assert all(torch.equal(tensor, expected) for tensor, expected in zip(tensors, wanted, strict=True))


def test_dtypes_of_one_call_may_differ(way):
    tensors = [torch.arange(4).to(dtype).view(1, 4, 1) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    tensors.append(torch.tensor([float("inf"), float("nan"), -0.0, 1.0]).view(1, 4, 1))
    permutation_action_(tensors, torch.tensor([[3, 0, 2, 1]]))
    assert all(tensor.flatten().tolist() == [3.0, 0.0, 2.0, 1.0] for tensor in tensors[:3])
    assert str(tensors[3].flatten().tolist()) == "[1.0, inf, -0.0, nan]"


def test_views_of_the_same_memory_move_one_after_the_other(way):
    W, index = torch.randn(300, 300), orders(1, 300)
    wanted = W[index[0]][:, index[0]]
    permutation_action_([W[None], W.mT[None]], index)
    assert torch.equal(W, wanted)


@settings(max_examples=60)
@given(data=st.data())
def test_cpp_equals_the_reference_on_any_shape(data):
    if availability("cpp") is not True:
        pytest.skip(str(availability("cpp")))
    heads, h, dtype = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40)), data.draw(st.sampled_from(DTYPES))
    shape = [heads, h, *data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=2))]
    order = data.draw(st.permutations(range(len(shape))))
    stored, index = torch.randn([shape[d] for d in order]).to(dtype), orders(heads, h)
    moved = {}
    for backend in ("reference", "cpp"):
        moved[backend] = stored.clone()
        with set_backend(backend):
            permutation_action_(moved[backend].permute([order.index(d) for d in range(len(shape))]), index)
    assert torch.equal(moved["cpp"], moved["reference"])


def test_opcheck(way):
    tensors = [torch.randn(2, 3, 4), torch.randn(2, 3, 2, 2)]
    torch.library.opcheck(torch.ops.teleport_fast.permutation_action_.default, (tensors, orders(4, 3), 2))


def test_compiles_without_a_graph_break(way):
    def fn(A: Tensor, index: Tensor) -> Tensor:
        A = A.sin()
        permutation_action_([A], index)
        return A

    inputs = torch.randn(2, 4, 3), orders(2, 4)
    assert torch.equal(torch.compile(fn, fullgraph=True, backend="aot_eager")(*inputs), fn(*inputs))


def test_autograd_notices_the_move(way):
    w = torch.randn(1, 3, 4, requires_grad=True)
    loss = w.square().sum()
    with torch.no_grad():
        permutation_action_(w, orders(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("index", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]])
def test_an_index_that_is_no_permutation_is_refused(way, index):
    A = torch.arange(3.0).view(1, 3, 1)
    with pytest.raises(ValueError, match="permutation_action_: each row of index must be a permutation"):
        permutation_action_(A, torch.tensor([index]))
    assert A.flatten().tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"tensors": []}, ValueError, ["0 tensors"]),
        ({"joints": 2}, ValueError, ["2 equal run(s)", "1 tensors"]),
        ({"index": torch.zeros(2, 3).long()}, ValueError, ["index must be (1, 3)", "(2, 3)", "(1, 3, 4)"]),
        ({"index": torch.zeros(1, 3)}, TypeError, ["index must be int64", "torch.float32"]),
        ({"tensors": torch.ones(1, 3, 1).expand(1, 3, 4)}, ValueError, ["share memory"]),
        ({"tensors": torch.ones(1, 3, 4, requires_grad=True)}, RuntimeError, ["torch.no_grad()"]),
    ],
)
def test_bad_input_names_the_argument_and_both_shapes(change, error, words):
    arguments = {"tensors": torch.ones(1, 3, 4), "index": torch.tensor([[0, 1, 2]]), **change}
    with pytest.raises(error) as caught:
        permutation_action_(**arguments)
    assert all(word in str(caught.value) for word in ["permutation_action_", *words])
