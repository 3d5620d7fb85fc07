"""bench.peers and bench.growth: every arm steps, weights stay, memory and exponents are what they say."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from bench.growth.__main__ import exponent
from bench.growth.__main__ import run as growth
from bench.growth.picture import draw
from bench.peers.__main__ import BASE, measure
from bench.peers.arms import GPT_ARMS, MLP_ARMS, Arm
from bench.peers.models import Workload, gpt, mlp
from teleport_fast.experiments.gpt import GPTConfig
from teleport_fast.experiments.memory import usage

ARMS = [*(("gpt", arm) for arm in GPT_ARMS), *(("mlp", arm) for arm in MLP_ARMS)]

pytestmark = pytest.mark.usefixtures("one_thread")


def small(kind: str) -> Workload:
    return gpt(GPTConfig(d_model=16, layers=1, heads=2, context=8), 2) if kind == "gpt" else mlp((12, 6, 5, 4), 9)


@pytest.mark.filterwarnings("ignore:the batch", "ignore::teleport_fast.data_dependent.RankWarning")
@pytest.mark.parametrize(("kind", "arm"), ARMS, ids=lambda value: getattr(value, "name", value))
def test_every_arm_steps_and_leaves_the_weights(kind: str, arm: Arm) -> None:
    if arm.name in ("SOAP", "SAM"):
        pytest.importorskip("pytorch_optimizer")
    work = small(kind)
    work.backward()
    before = [p.detach().clone() for p in work.parameters]
    with work.kept():
        arm.make(work)()
    assert all(torch.equal(a, b) for a, b in zip(before, work.parameters, strict=True))


def test_a_cost_is_a_share_of_forward_plus_backward() -> None:
    work = small("mlp")
    work.backward()

    def burn(share: float) -> Callable[[Workload], Callable[[], object]]:
        def call() -> None:
            end = time.thread_time() + share
            while time.thread_time() < end:
                pass

        return lambda _: call

    real = work.backward

    def slow() -> torch.Tensor:
        burn(0.004)(work)()
        return real()

    work.backward = slow  # type: ignore[method-assign]
    rows = {row["arm"]: row for row in measure(work, (Arm("twice", burn(0.008)), Arm("in four", burn(0.008), 4)), 3, lambda line: None)}
    assert rows[BASE]["cost"]["median"] == 1.0
    assert 1.2 < rows["twice"]["cost"]["median"] < 2.1
    assert rows["in four"]["cost"]["median"] == pytest.approx(rows["twice"]["cost"]["median"] / 4, rel=0.3)


def test_the_state_of_adam_is_two_copies_of_the_parameters() -> None:
    row = measure(small("gpt"), GPT_ARMS[:1], 2, lambda line: None)[1]
    assert row["state"] == pytest.approx(2.0, abs=0.05) and row["peak"] > 0
    held: list[torch.Tensor] = []
    assert usage(lambda: held.append(torch.ones(1000)))[1] >= 4000
    assert usage(lambda: torch.ones(1000).sum())[1] < 4000


def test_growth_is_the_slope_of_the_logarithms(tmp_path: object) -> None:
    assert exponent([1.0, 2.0, 8.0], [5.0, 20.0, 320.0]) == pytest.approx(2.0)
    assert exponent([1.0, 2.0, 8.0], [5.0, 5.0, 5.0]) == pytest.approx(0.0)
    rows = list(growth({"width": {16: (16, 1, 2), 32: (32, 1, 2)}}, 1, 10**9, lambda line: None))
    assert [row.get("value") for row in rows] == [16, 32, None] and set(rows[2]["exponents"]) == {*rows[0]["time"], BASE}
    assert rows[0]["over_first"] == dict.fromkeys(rows[0]["over_first"], 1.0)
    path = tmp_path / "growth.png"  # type: ignore[operator]
    draw({"rows": rows}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
