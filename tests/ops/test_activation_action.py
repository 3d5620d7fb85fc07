"""activation_action equals σ⁻¹(g σ(Z)) and acts as a group; its tangent is that action's derivative, on every backend and dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from teleport_fast.ops import activation_action, activation_action_tangent, matrix_exp
from teleport_fast.ops.activation_action import reference, reference_tangent

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPS = [(activation_action, reference), (activation_action_tangent, reference_tangent)]


def elements(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Group elements near the identity: (…, h, h)."""
    h = shape[-1]
    return torch.eye(h, dtype=dtype) + 0.3 * torch.randn(*shape, h, dtype=dtype) / max(1, h) ** 0.5


def exact(op, Z: Tensor, matrix: Tensor, slope: Tensor) -> np.ndarray:
    """The formula in extended precision."""
    z, m = (t.double().numpy().astype(np.longdouble) for t in (Z, matrix))
    a = slope.double().expand(Z.shape[-2]).numpy().astype(np.longdouble)[:, None]
    moved = m @ np.where(z < 0, a * z, z)
    return np.where((moved if op is activation_action else z) < 0, moved / a, moved)


def assert_as_accurate_as_torch(op, plain, Z: Tensor, matrix: Tensor, slope: float | Tensor) -> None:
    found = op(Z, matrix, slope)
    assert found.shape == Z.shape and found.dtype == Z.dtype and found.is_contiguous()
    if not Z.numel():
        return
    slopes = slope if isinstance(slope, Tensor) else torch.tensor([slope], dtype=matrix.dtype)
    truth = exact(op, Z, matrix, slopes.to(matrix.dtype))
    batched = [t if t.dim() == 3 else t[None] for t in (Z, matrix)]
    theirs = plain(*batched, slopes.to(matrix.dtype).expand(Z.shape[-2])).view(Z.shape)
    error, allowed = (np.abs(t.double().numpy() - truth).max() for t in (found, theirs))
    # Roundings of the largest entry are granted where torch happens to be exact.
    assert error <= 2 * allowed + 4 * torch.finfo(Z.dtype).eps * float(np.abs(truth).max())


@pytest.mark.parametrize(("op", "plain"), OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_torchs_own_at_every_width(way, op, plain, size, dtype, nan_filled_memory):
    g = elements(2, size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_accurate_as_torch(op, plain, torch.randn(2, size, 19).to(dtype), g, 0.1)


@pytest.mark.parametrize(("op", "plain"), OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_torchs_own_at_every_number_of_columns(way, op, plain, size, dtype, nan_filled_memory):
    g = elements(3, 9, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for Z in (torch.randn(3, 9, size), torch.randn(size, 9, 3).permute(2, 1, 0), torch.randn(3, 18, 2 * size)[:, ::2, ::2]):
        assert_as_accurate_as_torch(op, plain, Z.to(dtype), g.mT, torch.rand(9) + 0.05)


@pytest.mark.parametrize(("op", "plain"), OPS)
def test_wide_layers_are_as_accurate(way, op, plain):
    assert_as_accurate_as_torch(op, plain, torch.randn(1, 600, 70), elements(1, 600), torch.rand(600) + 0.05)


@pytest.mark.parametrize("slope", [0.1, 2.0, torch.tensor(0.3), torch.rand(6) + 0.1])
def test_acting_twice_is_acting_by_the_product(way, slope):
    Z, first, second = torch.randn(2, 6, 40).double(), *elements(2, 6, dtype=torch.float64)
    twice = activation_action(activation_action(Z, first, slope), second, slope)
    torch.testing.assert_close(twice, activation_action(Z, second @ first, slope), rtol=1e-10, atol=1e-10)
    # Negative controls: the other order, and the move without σ⁻¹, are no action.
    assert not torch.allclose(twice, activation_action(Z, first @ second, slope), rtol=1e-3)
    slopes = torch.as_tensor(slope).double().expand(6)[:, None]

    def forgetful(Z: Tensor, g: Tensor) -> Tensor:
        return g @ torch.where(Z < 0, slopes * Z, Z)

    assert not torch.allclose(forgetful(forgetful(Z, first), second), forgetful(Z, second @ first), rtol=1e-3)


def test_the_identity_moves_nothing_and_activations_move_linearly(way):
    Z, g = torch.randn(5, 30).double(), elements(5, dtype=torch.float64)
    torch.testing.assert_close(activation_action(Z, torch.eye(5).double(), 0.25), Z, rtol=1e-15, atol=0)
    activations = torch.nn.functional.leaky_relu(activation_action(Z, g, 0.25), 0.25)
    torch.testing.assert_close(activations, g @ torch.nn.functional.leaky_relu(Z, 0.25))
    assert not torch.allclose(activation_action(Z, g, 0.25), g @ Z, rtol=1e-3)


@pytest.mark.parametrize("slope", [0.1, torch.rand(6, dtype=torch.float64) + 0.1])
def test_the_tangent_is_the_derivative_of_the_action(way, slope):
    Z, M, t = torch.randn(6, 40).double(), torch.randn(6, 6).double(), 1e-6
    ahead, behind = (activation_action(Z, matrix_exp(s * t * M), slope) for s in (1, -1))
    tangent = activation_action_tangent(Z, M, slope)
    torch.testing.assert_close((ahead - behind) / (2 * t), tangent, rtol=1e-6, atol=1e-6)
    assert not torch.allclose((ahead - behind) / (2 * t), M @ Z, rtol=1e-2, atol=1e-2)


def test_zero_belongs_to_the_positive_side(way):
    Z = torch.tensor([[0.0, -0.0, 1.0, -1.0]])
    assert activation_action_tangent(Z + torch.zeros(2, 1), torch.ones(2, 2), 0.5).tolist() == [[0, 0, 2, -2]] * 2
    Z.requires_grad_()
    (slope_of_sigma,) = torch.autograd.grad(activation_action(Z, 2 * torch.eye(1), 0.5).sum(), Z)
    assert slope_of_sigma.tolist() == [[2, 2, 2, 2]]
    kinked = activation_action_tangent(Z, -torch.ones(1, 1), 0.5)
    assert torch.autograd.grad(kinked.sum(), Z)[0].tolist() == [[-1, -1, -1, -1]]


def test_a_missing_batch_is_shared(way):
    Z, g = torch.randn(3, 5, 7), elements(3, 5)
    for op, _ in OPS:
        alone = torch.stack([op(z, g[0], 0.1) for z in Z])
        torch.testing.assert_close(op(Z, g[0], 0.1), alone)
        torch.testing.assert_close(op(Z[0], g, 0.1), torch.stack([op(Z[0], e, 0.1) for e in g]))
        torch.testing.assert_close(op(Z[0], g[0], torch.full((5,), 0.1)), alone[0])


def test_half_types_are_summed_in_float32_and_rounded_once(way):
    Z, g = torch.randn(40, 50).bfloat16(), elements(40)
    wide = activation_action(Z.float(), g, 0.1)
    torch.testing.assert_close(activation_action(Z, g, 0.1).float(), wide, rtol=2**-8, atol=1e-6)


def test_not_a_number_stays_in_its_column(way):
    Z = torch.randn(4, 20)
    Z[1, 7] = float("nan")
    found = activation_action(Z, elements(4), 0.1)
    assert found[:, 7].isnan().all() and found[:, :7].isfinite().all() and found[:, 8:].isfinite().all()


@pytest.mark.parametrize(("batch", "h", "B"), [(1, 9, 33), (3, 64, 300), (1, 200, 700)])
def test_bits_do_not_depend_on_the_number_of_threads(cpp_way, batch, h, B):
    Z, g, before, results = torch.randn(batch, h, B), elements(batch, h), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((activation_action(Z, g, 0.1), activation_action_tangent(Z, g, 0.1)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", [activation_action, activation_action_tangent])
@pytest.mark.parametrize("slopes", [(), (1,), (3,)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_of_any_order_match_finite_differences(way, op, slopes, batch):
    Z = torch.randn(*batch, 3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    slope = (torch.rand(slopes, dtype=torch.float64) + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(op, (Z, g, slope))
    assert torch.autograd.gradgradcheck(op, (Z, g, slope))
    assert torch.autograd.gradcheck(lambda Z: op(Z, g, 0.2), (Z,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_come_in_the_dtypes_of_the_arguments(way, dtype):
    arguments = torch.randn(3, 4).to(dtype), elements(3), torch.tensor([0.2]).double()
    leaves = [t.requires_grad_() for t in arguments]
    gradients = torch.autograd.grad(activation_action(*leaves).float().sum(), leaves)
    assert [t.dtype for t in gradients] == [dtype, torch.float32, torch.float64]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["activation_action", "activation_action_tangent"])
def test_opcheck(way, name, requires_grad):
    Z, g = torch.randn(2, 4, 3, requires_grad=requires_grad).mT, elements(2, 3).requires_grad_(requires_grad)
    slope = (torch.rand(3) + 0.1).requires_grad_(requires_grad)
    torch.library.opcheck(getattr(torch.ops.teleport_fast, name).default, (Z, g, slope))


@pytest.mark.parametrize("slope", [0.1, torch.tensor([0.1])])
def test_compiles_without_a_graph_break(way, slope):
    def trace(Z: Tensor, g: Tensor) -> Tensor:
        return activation_action(Z.sin(), g, slope).sum() + activation_action_tangent(Z, g, slope).square().sum()

    Z, g = torch.randn(4, 5, requires_grad=True), elements(4).requires_grad_()
    compiled = torch.compile(trace, fullgraph=True, backend="aot_eager")(Z, g)
    torch.testing.assert_close(compiled, trace(Z, g))
    torch.testing.assert_close(*(torch.autograd.grad(value, (Z, g)) for value in (compiled, trace(Z, g))))


ZERO_ROW = torch.tensor([0.1, 0.0, 0.1])


@pytest.mark.parametrize("op, name", [(activation_action, "g"), (activation_action_tangent, "M")])
@pytest.mark.parametrize(
    "Z, matrix, slope, error, words",
    [
        # A ReLU has no inverse.
        (torch.ones(3, 4), torch.eye(3), 0.0, ValueError, ["negative_slope must be positive", "got 0.0", "0.01"]),
        (torch.ones(3, 4), torch.eye(3), -0.1, ValueError, ["negative_slope must be positive", "got -0.1"]),
        (torch.ones(3, 4), torch.eye(3), float("inf"), ValueError, ["positive and finite", "got inf"]),
        (torch.ones(3, 4), torch.eye(3), float("nan"), ValueError, ["positive and finite", "got nan"]),
        (torch.ones(3, 4), torch.eye(3), 1e-60, ValueError, ["positive and finite", "got 1e-60"]),
        (torch.ones(3, 4), torch.eye(3), ZERO_ROW, ValueError, ["positive and finite", "got 0.0"]),
        (torch.ones(3, 4), torch.eye(3), torch.tensor(float("nan")), ValueError, ["positive and finite", "got nan"]),
        (torch.ones(3, 4), torch.eye(3), torch.ones(2), ValueError, ["(3,)", "(3, 4)", "(2,)"]),
        (torch.ones(3, 4), torch.eye(3), torch.ones(3, dtype=torch.int64), TypeError, ["negative_slope", "int64"]),
        (torch.ones(3, 4), torch.eye(4), 0.1, ValueError, ["(3, 4)", "(4, 4)"]),
        (torch.ones(3), torch.eye(3), 0.1, ValueError, ["(3,)", "(3, 3)"]),
        (torch.ones(2, 3, 4), torch.eye(3).expand(5, 3, 3), 0.1, ValueError, ["(2, 3, 4)", "(5, 3, 3)"]),
        (torch.ones(3, 4).int(), torch.eye(3), 0.1, TypeError, ["Z must be float32", "torch.int32"]),
        (torch.ones(3, 4), torch.eye(3).int(), 0.1, TypeError, ["must be float32", "torch.int32"]),
        (torch.ones(3, 4), torch.eye(3, device="meta"), 0.1, ValueError, ["cpu", "meta"]),
        (torch.ones(3, 4), torch.eye(3), torch.ones(3, device="meta"), ValueError, ["cpu", "negative_slope on meta", "move"]),
    ],
)
def test_bad_input_names_the_argument_its_value_and_the_remedy(op, name, Z, matrix, slope, error, words):
    with pytest.raises(error) as caught:
        op(Z, matrix, slope)
    assert all(word in str(caught.value) for word in [op.__name__, *words])
