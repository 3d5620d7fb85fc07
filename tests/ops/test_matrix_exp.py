"""matrix_exp equals Σ Mᵏ/k! at every norm, width, dtype and memory layout, and matrix_exp_pair its inverse too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from teleport_fast.ops import matrix_exp, matrix_exp_pair

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
# Around the norms at which the degree and the number of squarings change, and far beyond.
NORMS = [0.0, 1e-6, 1e-3, 0.01, 0.1, 0.3, 0.7, 0.9, 1.5, 2.5, 5.0, 20.0]


def of_norm(matrices: Tensor, norms: Tensor) -> Tensor:
    sums = matrices.abs().sum(-2).amax(-1)
    return matrices * (norms / sums)[:, None, None]


def draw(h: int, kind: str, norms: list[float] = NORMS) -> Tensor:
    """Float64 matrices, several per norm where they are small: the worst of them is compared, not each one's luck."""
    norms = norms * (4 if h < 40 else 1)
    M = torch.randn(len(norms), h, h, dtype=torch.float64)
    if kind != "general":
        M = M + M.mT
    if kind == "negative":
        M = -(M @ M)
    return of_norm(M, torch.tensor(norms, dtype=torch.float64)) if h else M


def exact_exp(M: Tensor) -> np.ndarray:
    """Scaling to norm 2⁻⁶, 16 terms and squaring, in extended precision (64 bits)."""
    A = M.double().numpy().astype(np.longdouble)
    norm = float(np.abs(A).sum(-2).max()) if A.size else 0.0
    times = max(0, int(np.ceil(np.log2(norm * 64)))) if norm else 0
    A = A / np.longdouble(2) ** times
    X = np.zeros_like(A) + np.eye(A.shape[-1], dtype=np.longdouble)
    for k in range(16, 0, -1):
        X = np.eye(A.shape[-1], dtype=np.longdouble) + A @ X / k
    for _ in range(times):
        X = X @ X
    return X


def error_of(result: Tensor, truth: np.ndarray) -> np.ndarray:
    """Relative error of each matrix in the Frobenius norm."""
    difference = result.double().numpy().astype(np.longdouble) - truth
    return np.sqrt((difference**2).sum((-1, -2)) / (truth**2).sum((-1, -2))).astype(float)


def assert_as_accurate_as_torch(M: Tensor, truth_plus: np.ndarray, truth_minus: np.ndarray) -> None:
    plus, pair = matrix_exp(M), matrix_exp_pair(M)
    assert plus.dtype == M.dtype and plus.shape == M.shape and plus.is_contiguous()
    # Granted where torch happens to be exact: two roundings of the result, and of M, which move exp(M) by up to ‖M‖ of them.
    norms = M.double().abs().sum(-2).amax(-1).clamp(min=1).numpy()
    floor = 2 * torch.finfo(M.dtype).eps * norms
    for ours, argument, truth in ((plus, M, truth_plus), (pair[0], M, truth_plus), (pair[1], -M, truth_minus)):
        error, allowed = error_of(ours, truth), 2 * error_of(torch.linalg.matrix_exp(argument), truth) + floor
        worst = [np.reshape(e, (-1, len(NORMS)) if len(e) % len(NORMS) == 0 else (1, -1)).max(0) for e in (error, allowed)]
        assert (worst[0] <= worst[1]).all()


@pytest.mark.parametrize("kind", ["general", "symmetric", "negative"])
@pytest.mark.parametrize("size", SIZES[1:])
def test_float32_error_is_at_most_twice_torchs_own_at_every_norm(way, size, kind, nan_filled_memory):
    M = draw(size, kind).float()
    truths = (torch.linalg.matrix_exp(sign * M.double()).numpy().astype(np.longdouble) for sign in (1, -1))
    assert_as_accurate_as_torch(M, *truths)


@pytest.mark.parametrize("kind", ["general", "symmetric", "negative"])
@pytest.mark.parametrize("size", [1, 3, 7, 8, 17])
def test_float64_error_is_at_most_twice_torchs_own_at_every_norm(way, size, kind, nan_filled_memory):
    M = draw(size, kind)
    assert_as_accurate_as_torch(M, exact_exp(M), exact_exp(-M))


@pytest.mark.parametrize("size", [63, 64, 65, 127, 128])
def test_float64_error_is_at_most_twice_torchs_own_at_large_widths(way, size):
    M = draw(size, "general", [0.5])
    assert_as_accurate_as_torch(M, exact_exp(M), exact_exp(-M))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(way, dtype):
    M = draw(9, "general", NORMS[:10]).to(dtype)
    truth = torch.linalg.matrix_exp(M.double())
    for result in (matrix_exp(M), matrix_exp_pair(M)[0]):
        assert result.dtype == dtype
        torch.testing.assert_close(result, truth.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("h", [2, 5, 16, 40])
def test_the_pair_is_a_matrix_and_its_inverse(way, h):
    M = draw(h, "general", [0.2, 1.0, 3.0])
    plus, minus = matrix_exp_pair(M)
    torch.testing.assert_close(plus @ minus, torch.eye(h, dtype=torch.float64).expand_as(M), rtol=0, atol=1e-12)
    torch.testing.assert_close(minus, matrix_exp(-M), rtol=1e-12, atol=1e-12)
    # Negative control: the transpose is an inverse for antisymmetric M only.
    assert not torch.allclose(plus @ plus.mT, torch.eye(h, dtype=torch.float64).expand_as(M))


def test_any_batch_shape_and_strides_and_nothing_at_all(way):
    M = torch.randn(4, 3, 2, 5, 10).transpose(0, 2)[..., ::2]
    torch.testing.assert_close(matrix_exp(M), torch.linalg.matrix_exp(M.contiguous()))
    torch.testing.assert_close(matrix_exp(M.mT), torch.linalg.matrix_exp(M.mT.contiguous()))
    for shape in ((0, 3, 3), (2, 0, 0), (0, 0)):
        assert [t.shape for t in (matrix_exp(torch.zeros(shape)), *matrix_exp_pair(torch.zeros(shape)))] == [shape] * 3
    assert torch.equal(matrix_exp(torch.zeros(3, 3)), torch.eye(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("h", [2, 9, 33])
def test_a_non_finite_matrix_gives_nan_and_leaves_the_others_alone(cpp_way, h, bad):
    M = torch.randn(3, h, h)
    M[1, h - 1, 0] = bad
    for result in (matrix_exp(M), *matrix_exp_pair(M)):
        assert result[1].isnan().all() and result[::2].isfinite().all()


@pytest.mark.parametrize("h", [2, 9, 40])
def test_bits_do_not_depend_on_the_number_of_threads(cpp_way, h):
    M, before, results = torch.randn(50, h, h), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((matrix_exp(M), *matrix_exp_pair(M)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_of_any_order_match_finite_differences(way):
    M = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    for fn in (matrix_exp, matrix_exp_pair):
        assert torch.autograd.gradcheck(fn, (M,))
        assert torch.autograd.gradgradcheck(fn, (M,))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(way, requires_grad):
    M = torch.randn(2, 3, 3, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.teleport_fast.matrix_exp.default, (M,))
    torch.library.opcheck(torch.ops.teleport_fast.matrix_exp_pair.default, (M.mT,))


def test_compiles_without_a_graph_break(way):
    def trace(M: Tensor) -> Tensor:
        plus, minus = matrix_exp_pair(M.sin())
        return (matrix_exp(M) @ minus).sum() + plus.sum()

    M = torch.randn(3, 4, 4, requires_grad=True)
    torch.testing.assert_close(torch.compile(trace, fullgraph=True, backend="aot_eager")(M), trace(M))


@pytest.mark.parametrize("fn", [matrix_exp, matrix_exp_pair])
@pytest.mark.parametrize(
    "M, error, words",
    [
        (torch.ones(2, 3, 4), ValueError, ["(..., h, h)", "(2, 3, 4)"]),
        (torch.ones(3), ValueError, ["(..., h, h)", "(3,)"]),
        (torch.ones(2, 2, dtype=torch.int32), TypeError, ["float32", "torch.int32"]),
    ],
)
def test_bad_input_names_the_argument_and_its_shape(fn, M, error, words):
    with pytest.raises(error) as caught:
        fn(M)
    assert all(word in str(caught.value) for word in [fn.__name__, "M", *words])


@pytest.mark.parametrize("h", [2, 3, 5])
def test_a_matrix_does_not_feel_its_neighbours_in_the_batch(way, h):
    M = draw(h, "general")
    M[5] = float("inf")
    M[7] *= 1e3
    together = (matrix_exp(M), *matrix_exp_pair(M))
    apart = [torch.cat(parts) for parts in zip(*[(matrix_exp(m), *matrix_exp_pair(m)) for m in M.split(1)], strict=True)]
    for ours, alone in zip(together, apart, strict=True):
        if way == "reference":
            torch.testing.assert_close(ours, alone, equal_nan=True)
        else:
            torch.testing.assert_close(ours, alone, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("h", [17, 33, 40, 65])
def test_the_exponential_of_a_symmetric_matrix_is_symmetric_bit_for_bit(cpp_way, h):
    M = draw(h, "symmetric", [0.01, 0.7, 20.0])
    for result in (matrix_exp(M), *matrix_exp_pair(M), matrix_exp(M.float())):
        assert torch.equal(result, result.mT)
    general = draw(h, "general", [0.7])
    assert not torch.equal(matrix_exp(general), matrix_exp(general).mT)
