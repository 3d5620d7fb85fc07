"""The emulator tells each planted fault, runs sound kernels, and counts traffic as a warp would make it."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor


def run(emulator: Any, name: str, values: Tensor, out: Tensor, n: int | None = None) -> None:
    emulator.begin([values], [out])
    code = emulator.library.planted(
        name.encode(), ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()), n or values.numel()
    )
    emulator.check(code)


@pytest.mark.parametrize("seed", range(3))
def test_a_sound_kernel_gives_its_result_under_every_order(emulator: Any, seed: int) -> None:
    values, out = torch.arange(256.0), torch.full((256,), torch.nan)
    emulator.seed = seed
    run(emulator, "sound", values, out)
    torch.testing.assert_close(out, values.view(4, 64).flip(1).flatten(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("race", "race|unwritten shared memory"),
        ("warp race", "race|unwritten shared memory"),
        ("unwritten", "read of unwritten shared memory"),
        ("divergent", r"divergent barrier: 32 threads wait for ever \(__syncthreads line \d+\), 32 have returned"),
        ("two barriers", r"divergent barrier: some threads wait at __syncthreads line \d+, this one came to"),
        ("out of bounds", "out of bounds: load of 4 bytes"),
        ("store into input", "store into an input"),
    ],
)
def test_a_planted_fault_is_told(emulator: Any, name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(emulator, name, torch.randn(64), torch.zeros(64))


def test_a_fault_does_not_reach_the_next_launch(emulator: Any) -> None:
    values, out = torch.randn(64), torch.zeros(64)
    with pytest.raises(RuntimeError, match="out of bounds"):
        run(emulator, "out of bounds", values, out)
    run(emulator, "sound", values, out)
    assert torch.equal(out, values.flip(0))


def test_a_missing_barrier_in_unchecked_shared_memory_shows_under_shuffling(emulator: Any) -> None:
    values, results = torch.randn(256), []
    for seed in range(4):
        out = torch.zeros(256)
        emulator.seed = seed
        run(emulator, "unchecked race", values, out)
        results.append(out)
    right = values.view(4, 64).flip(1).flatten()
    assert not any(torch.equal(result, right) for result in results)
    assert any(result.isnan().any() for result in results), "poisoned shared memory must be seen as NaN"
    assert not torch.equal(results[0].nan_to_num(9), results[1].nan_to_num(9))


def test_shuffles_votes_and_counting_barriers_match_their_definition(emulator: Any) -> None:
    values, out = torch.arange(-20.0, 44.0), torch.full((5,), torch.nan)
    run(emulator, "warp", values, out, 1)
    assert out.tolist() == [values.sum(), (values > 0).sum(), (values[32:] > 0).sum(), values[32], values[39]]


def test_a_warp_barrier_orders_shared_memory_within_the_warp(emulator: Any) -> None:
    values, out = torch.randn(64), torch.zeros(64)
    run(emulator, "warp swap", values, out)
    assert torch.equal(out, values.view(32, 2).flip(1).flatten())


@pytest.mark.parametrize(("stride", "sectors"), [(1, 8), (2, 16), (8, 64), (9, 64)])
def test_sectors_count_what_a_strided_warp_touches(emulator: Any, stride: int, sectors: int) -> None:
    storage = torch.empty(64 * 9 + 8)
    values = storage[(-storage.data_ptr() // 4) % 8 :]
    run(emulator, "warp", values.zero_(), torch.zeros(5), stride)
    traffic = emulator.traffic()
    assert (traffic.loaded, traffic.load_sectors, traffic.stored) == (256, sectors, 20)


def test_half_precision_rounds_as_torch_does(emulator: Any) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (20_000,)).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.randn(20_000), torch.randn(20_000) * 1e-5])
    special = [0.0, -0.0, 65504.0, 65519.99, 65520.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.01]
    values = torch.cat([values, torch.tensor([*special, torch.inf, -torch.inf, torch.nan])])
    as_bf16, as_fp16 = torch.empty_like(values), torch.empty_like(values)
    emulator.library.planted_round(
        *[ctypes.c_void_p(t.data_ptr()) for t in (values, as_bf16, as_fp16)], ctypes.c_int64(values.numel())
    )
    for ours, dtype in ((as_bf16, torch.bfloat16), (as_fp16, torch.float16)):
        torch.testing.assert_close(ours, values.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
