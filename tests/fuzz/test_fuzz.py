"""Every op under arbitrary shapes, strides, dtypes, offsets and overlaps; and from threads, forks and data-loader workers."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import teleport_fast as tf
from teleport_fast import ops

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("boundary", HERE / "boundary.py")
assert spec is not None and spec.loader is not None
boundary: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(boundary)
EXAMPLES = int(os.environ.get("TELEPORT_FAST_FUZZ", "150"))


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_an_op_refuses_or_computes_alike_in_plain_torch_and_in_cpp(data: st.DataObject) -> None:
    torch.set_num_threads(1)
    boundary.check(lambda below: data.draw(st.integers(0, max(0, below - 1))))


@pytest.mark.parametrize("name", [name for name, _ in boundary.OPS])
def test_every_op_is_reached_and_computed(name: str) -> None:
    """A fuzzer that only sees refusals would prove nothing: well-formed numbers are computed."""
    number, computed = [op for op, _ in boundary.OPS].index(name), 0
    torch.set_num_threads(1)
    for seed in range(8):
        # heads, width, joints, dtype, seed, exact, no mistake, columns, op; contiguous views
        head = [2, 2, 0, seed % 2, seed, 7, 1, 1, 2, 2, number]
        numbers = iter(head)
        computed += boundary.check(lambda below, numbers=numbers: next(numbers, 1 if below in (2, 3) else 0) % below)
    assert computed >= 6


def test_the_corpus_passes() -> None:
    files = sorted((HERE / "corpus").iterdir())
    assert len(files) >= 20
    torch.set_num_threads(1)
    computed = sum(boundary.check(boundary.reader(file.read_bytes())) for file in files)
    assert 0 < computed < len(files)


@pytest.mark.skipif(tf.backends()["cpp"] is not True, reason="compares plain torch with itself without the C++ kernels; make setup")
def test_the_check_notices_a_wrong_kernel_and_a_write_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: 1 in 100 too large, or an entry beside the view, is found."""
    numbers = [2, 2, 0, 0, 3, 7, 1, 1, 2, 2, 1]
    works = ops.diagonal_action_
    for wrong in ("value", "place"):

        def broken(tensors: list[Tensor], *rest: Any, wrong: str = wrong, **options: Any) -> None:
            works(tensors, *rest, **options)
            if tf.ops.backend.current_backend() == "cpp":
                if wrong == "value":
                    tensors[0].mul_(1.01)
                else:
                    tensors[0].as_strided((1,), (1,), 250).add_(1.0)

        monkeypatch.setattr(ops, "diagonal_action_", broken)
        script = iter(numbers)
        with pytest.raises(AssertionError):
            boundary.check(lambda below, script=script: next(script, 0) % below)


def moved(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    A, G = torch.randn(2, 8, 33, generator=generator), torch.randn(2, 8, 7, generator=generator)
    with torch.no_grad():
        difference, _ = ops.gram_difference(A, G)
        g = ops.matrix_exp(0.01 * difference)
        ops.group_action_([A], [G], g)
        ops.diagonal_action_([A], torch.rand(2, 8, generator=generator) + 0.5)
    return torch.cat((A.flatten(), G.flatten()))


def test_threads_do_not_disturb_each_other() -> None:
    """Each with its own backend: a context's choice holds in its thread."""
    expected = {}
    for backend in ("reference", "auto"):
        with tf.set_backend(backend):
            expected[backend] = [moved(seed) for seed in range(8)]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        with tf.set_backend(("reference", "auto")[number % 2]):
            found[number] = [moved(seed) for seed in range(8) for _ in range(3)][::3]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in found.items():
        for one, other in zip(results, expected[("reference", "auto")[number % 2]], strict=True):
            assert torch.equal(one, other)
    assert len(found) == 6


def test_a_teleporter_per_thread_is_as_good_as_one_alone() -> None:
    def train(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        views = (tf.View("0.weight", 0, 1, 4), tf.View("0.bias", 0, 1, 4)), (tf.View("1.weight", 1, 1, 4),)
        joint = tf.Joint("joint", "test", tf.symmetry.GeneralLinear(4), 1, 4, *views)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        teleporter = tf.attach(optimizer, tf.Symmetries((joint,), model=model), schedule=tf.Every(2), radius=0.1)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().mean().backward()
            optimizer.step()
        assert len(teleporter.history) == 2
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    alone = [train(seed) for seed in range(4)]
    together: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda seed=seed: together.update({seed: train(seed)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[seed], alone[seed]) for seed in range(4))


class Moved(Dataset[Tensor]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return moved(index)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system does not have")
def test_the_kernels_work_in_a_fork_after_they_were_used() -> None:
    torch.set_num_threads(1)  # GNU's OpenMP does not outlive a fork: torch's own data loader runs its workers so
    expected = moved(0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if torch.equal(moved(0), expected) else 2
        finally:
            os.write(write, bytes((code,)))
            os._exit(code)
    os.close(write)
    assert os.read(read, 1) == b"\0"
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_eight_data_loader_workers_compute_what_one_process_does() -> None:
    torch.set_num_threads(1)
    expected = [moved(index) for index in range(16)]
    loaded = [*DataLoader(Moved(), batch_size=2, num_workers=8, multiprocessing_context="fork")]
    assert torch.equal(torch.cat(loaded), torch.stack(expected))
