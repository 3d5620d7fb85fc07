"""rotate_step.cu against the step in float64: bases, sides, base maps, odd and wide sizes, strided views, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.ops.rotate_step import reference_

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STEP = (3.0, 1e-2, 0.9, 0.99, 1e-8, 0.1)  # step, lr, beta1, beta2, eps, weight_decay; nesterov is apart
ADAM, SIGN, ROW_NORM = range(3)


def orthogonal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0].to(dtype).contiguous()


def layouts(heads: int, h: int, n: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(storage, view) pairs: a part of a fused tensor, columns in memory, a part of them, a convolution's reader."""
    fused = torch.randn(3 * heads * h, n).to(dtype)
    plain = torch.randn(n, heads * h).to(dtype)
    readers = torch.randn(n, heads * h + 5).to(dtype)
    convolution = torch.randn(n // 3, heads * h, 3).to(dtype)
    return [
        (fused, fused[heads * h : 2 * heads * h].view(heads, h, n)),
        (plain, plain.as_strided((heads, h, n), (h, 1, heads * h))),
        (readers, readers.as_strided((heads, h, n), (h, 1, heads * h + 5), 3)),
        (convolution, convolution.as_strided((heads, h, n // 3, 3), (h * 3, 3, heads * h * 3, 1))),
    ]


def state(
    heads: int, h: int, n: int, dtype: torch.dtype, moments: torch.dtype | None = None
) -> tuple[list[Any], list[Any]]:
    """Storages and views of parameters, gradients, first and second moments, the latter well away from 0."""
    moments = moments or torch.promote_types(dtype, torch.float32)
    pairs = [layouts(heads, h, n, d) for d in (dtype, dtype, moments, moments)]
    for storage, _ in pairs[3]:
        storage.abs_().add_(0.5)
    return [[s for s, _ in p] for p in pairs], [[v for _, v in p] for p in pairs]


def stepped(
    lists: list[list[Tensor]],
    left: list[Tensor],
    right: list[Tensor],
    base: int,
    dtype: torch.dtype | None,
    nesterov: bool,
) -> Any:
    """By the formula: in float64, or as torch would do it."""
    copies = [[t.to(dtype or t.dtype).clone() for t in tensors] for tensors in lists]
    sides = [[b.to(dtype or b.dtype) for b in bases] for bases in (left, right)]
    reference_(*copies, *sides, base, *STEP, nesterov)
    return copies


def check(
    kernels: Any,
    lists: list[list[Tensor]],
    left: list[Tensor],
    right: list[Tensor],
    base: int,
    nesterov: bool = False,
    **limits: int,
) -> Any:
    true, theirs = (stepped(lists, left, right, base, dtype, nesterov) for dtype in (torch.float64, None))
    gradients = [g.clone() for g in lists[1]]
    plan = kernels.rotate_step_(lists, left, right, base, *STEP, nesterov, **limits)
    for t in (0, 2, 3):
        for ours, exact, torchs in zip(lists[t], true[t], theirs[t], strict=True):
            if ours.numel():
                # a rounding of the storage; float64 has no better reference than torch itself
                unit = torch.finfo(ours.dtype).eps * (16 if ours.dtype == torch.float64 else 1)
                allowed = 2 * (torchs.double() - exact).abs().max() + unit * exact.abs().max()
                error = (ours.double() - exact).abs().max()
                assert error <= allowed, (t, error / allowed)
    assert all(map(torch.equal, lists[1], gradients))
    return plan


def bases(count: int, heads: int, h: int, n: int, sides: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    acc = torch.promote_types(dtype, torch.float32)
    left = [orthogonal(heads, h, h, dtype=acc) for _ in range(count)] if sides in ("left", "both") else []
    return left, [orthogonal(n, n, dtype=acc) for _ in range(count)] if sides in ("right", "both") else []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sides", ["none", "left", "right", "both"])
@pytest.mark.parametrize(("heads", "h", "n"), [(1, 1, 3), (2, 7, 36), (1, 65, 30), (2, 8, 0)])
def test_every_layout_steps_as_in_float64_and_leaves_the_rest_alone(
    kernels: Any, heads: int, h: int, n: int, sides: str, dtype: torch.dtype
) -> None:
    storages, lists = state(heads, h, n, dtype)
    before = [[s.clone() for s in of_kind] for of_kind in storages]
    for kind in range(4):
        one = [[tensors[kind]] for tensors in lists]
        check(kernels, one, *bases(1, heads, h, n, sides, dtype), ADAM, wanted_blocks=3)
    for kept, storage, views in zip(before, storages, lists, strict=True):
        for old, new, view in zip(kept, storage, views, strict=True):
            view.copy_(old.as_strided(view.shape, view.stride(), view.storage_offset()))
            assert torch.equal(new, old)


@pytest.mark.parametrize("base", [ADAM, SIGN, ROW_NORM])
@pytest.mark.parametrize("sides", ["none", "left", "right", "both"])
@pytest.mark.parametrize("n", [20, 300])
@pytest.mark.parametrize("nesterov", [False, True])
def test_every_base_steps_on_every_side(kernels: Any, nesterov: bool, base: int, sides: str, n: int) -> None:
    heads, h = 2, 63 if n < 100 else 33
    _, lists = state(heads, h, n, torch.float32)
    # The rows of n = 300 are in several panels, and its right side is the BLAS's.
    one = [[tensors[0]] for tensors in lists]
    plan = check(kernels, one, *bases(1, heads, h, n, sides, torch.float32), base, nesterov)
    assert plan.fused_left == (sides in ("left", "both")) and plan.fused_right == (
        sides in ("right", "both") and n < 100
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_row_norms_over_several_panels_lose_nothing_to_the_moments_storage(
    kernels: Any, dtype: torch.dtype, moments: torch.dtype
) -> None:
    if dtype == torch.float64:
        moments = dtype
    _, lists = state(1, 64, 150, dtype, moments)
    one = [[tensors[1]] for tensors in lists]
    plan = check(kernels, one, *bases(1, 1, 64, 150, "left", dtype), ROW_NORM)
    assert not plan.whole_rows and plan.resume == (moments != torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("h", [127, 128, 129])
def test_the_line_between_the_kernel_and_the_blas_is_at_128(kernels: Any, h: int, dtype: torch.dtype) -> None:
    _, lists = state(1, h, 36, dtype)
    plan = check(kernels, [[tensors[1]] for tensors in lists], *bases(1, 1, h, 36, "left", dtype), ADAM)
    assert plan.fused_left == (h <= 128)


def test_what_shared_memory_does_not_hold_is_the_blass(kernels: Any) -> None:
    _, lists = state(1, 100, 36, torch.float32)
    sides = bases(1, 1, 100, 36, "both", torch.float32)
    fused = []
    for limit in (163 << 10, 80 << 10, 40 << 10, 12 << 10):
        plan = check(kernels, [[tensors[0]] for tensors in lists], *sides, ADAM, shared_limit=limit)
        fused.append((plan.fused_left, plan.fused_right))
    assert fused == [(1, 1), (1, 0), (0, 1), (0, 0)]


def test_a_bucket_steps_in_one_launch_with_shared_and_own_bases(kernels: Any) -> None:
    _, lists = state(2, 12, 40 * 3, torch.bfloat16)
    flat = [[t.reshape(2, 12, 120) if t.dim() == 4 else t for t in tensors] for tensors in lists]
    left = [orthogonal(2, 12, 12)] * 3 + [orthogonal(2, 12, 12)]
    check(kernels, flat, left, [], ADAM, wanted_blocks=30)


def test_moments_that_lie_across_their_parameter_step_all_the_same(kernels: Any) -> None:
    _, lists = state(2, 9, 36, torch.float32)
    crossed = [[tensors[i]] for i, tensors in zip((0, 1, 2, 0), lists, strict=True)]
    check(kernels, crossed, *bases(1, 2, 9, 36, "left", torch.float32), ADAM)


def test_unaligned_neighbours_fall_back_to_single_entries(kernels: Any) -> None:
    lists = [[torch.rand(8 * 64 + t)[t:].view(1, 8, 64)] for t in range(4)]
    check(kernels, lists, *bases(1, 1, 8, 64, "both", torch.float32), ADAM)


def test_an_eps_of_zero_reaches_nothing_that_is_not_there(kernels: Any) -> None:
    _, lists = state(1, 7, 33, torch.float32)
    one = [[tensors[0]] for tensors in lists]
    kernels.rotate_step_(one, *bases(1, 1, 7, 33, "both", torch.float32), ADAM, 3.0, 0.1, 0.9, 0.99, 0.0, 0.0, False)
    assert all(t.isfinite().all() for (t,) in one)


def test_a_wrong_basis_steps_elsewhere(kernels: Any) -> None:
    for sides in ("left", "right"):
        _, lists = state(1, 16, 36, torch.float32)
        one = [[tensors[0]] for tensors in lists]
        left, right = bases(1, 1, 16, 36, sides, torch.float32)
        true = stepped(one, left, right, ADAM, None, False)
        wrong = [[b.mT.contiguous() for b in of_side] for of_side in (left, right)]
        kernels.rotate_step_(one, *wrong, ADAM, *STEP, False)
        assert not torch.allclose(one[0][0], true[0][0], rtol=1e-3)


@pytest.mark.parametrize("base", [ADAM, ROW_NORM])
def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(kernels: Any, base: int) -> None:
    _, lists = state(2, 24, 330, torch.float32)
    sides, found = bases(1, 2, 24, 330, "left", torch.float32), []
    for seed in range(3):
        kernels.emulator.seed = seed
        one = [[tensors[1].clone()] for tensors in lists]
        kernels.rotate_step_(one, *sides, base, *STEP, False, wanted_blocks=4)
        found.append(torch.stack([t for (t,) in one]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_storages_do_not_mix_with_float64_and_shapes_not_at_all(kernels: Any) -> None:
    for second in (torch.rand(1, 4, 8).double(), torch.rand(1, 4, 9)):
        lists = [[torch.rand(1, 4, 8), second] for _ in range(4)]
        with pytest.raises(RuntimeError, match="returned -1"):
            kernels.rotate_step_(lists, [], [], ADAM, *STEP, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sides", "columns_fast", "h", "n"), [("left", True, 64, 512), ("left", False, 64, 512), ("right", True, 512, 64)]
)
def test_traffic_is_each_entry_once_and_the_basis_once_a_block(
    kernels: Any, dtype: torch.dtype, sides: str, columns_fast: bool, h: int, n: int
) -> None:
    made = [torch.rand(h, n) if columns_fast else torch.rand(n, h).t() for _ in range(4)]
    lists = [[t.to(d)[None]] for t, d in zip(made, (dtype, dtype, torch.float32, torch.float32), strict=True)]
    left, right = bases(1, 1, h, n, sides, torch.float32)
    kernels.rotate_step_(lists, left, right, ADAM, *STEP, False)
    traffic = kernels.emulator.traffic()
    p, g, m, v = (tensors[0].nbytes for tensors in lists)
    assert traffic.bytes <= 1.05 * (2 * p + g + 2 * m + 2 * v + [*left, *right][0].nbytes), traffic
    assert traffic.sector_ratio <= 1.1, traffic
