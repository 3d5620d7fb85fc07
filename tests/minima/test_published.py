"""The published loops that change sharpness and curvature give the recorded steps, weights and values to 1e-9."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from teleport_fast.data_dependent import CrossEntropy, MLPAction
from teleport_fast.minima.published import PublishedTrace, published_curvature, published_sharpness

from .conftest import FIXTURES, Case, relative

PARITY = 1e-9
RADII = [k / 10 for k in range(1, 10)]


def recorded(case: Case) -> dict[str, Tensor]:
    with numpy.load(FIXTURES / "minima_teleports.npz") as data:
        start = case.name + "/"
        return {key.removeprefix(start): torch.from_numpy(data[key]) for key in data.files if key.startswith(start)}


def check_weights(trace: PublishedTrace, record: dict[str, Tensor], tag: str) -> None:
    for m, W in enumerate(trace.weights):
        assert relative(W, record[f"{tag}_W_{m}"]) < PARITY


def drawn(case: Case, record: dict[str, Tensor]) -> Tensor:
    """The recorded directions, drawn again: (2, 9, 100, P) of the seed they came from, checked against what is kept of them."""
    u = torch.rand(2, 9, 100, sum(W.numel() for W in case.weights), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    assert torch.equal(u[0, :, : case.directions.shape[1]], case.directions)
    assert torch.equal(u[-1, -1, -1], record["telesharp_last_u"])
    return u / u.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("tag", ["up", "down"])
def test_sharpness_teleports_follow_the_published_steps(case: Case, tag: str) -> None:
    record, key = recorded(case), f"telesharp_{tag}"
    action = MLPAction(case.weights, case.X, form="v_exact")
    trace = published_sharpness(
        action, CrossEntropy(case["labels"]), float(record[f"{key}_lr"]), drawn(case, record), RADII, tag == "up"
    )
    for k, Ts in enumerate(trace.moves):
        for m, T in enumerate(Ts):
            assert relative(T, record[f"{key}_Ttrace_{m}"][k]) < PARITY
    assert [round(value, 4) for value in trace.values] == record[f"{key}_values_printed4"].tolist()
    check_weights(trace, record, key)


@pytest.mark.parametrize("tag", ["up", "down"])
@pytest.mark.parametrize("name", ["w7543_b6", "w7543_b20"])
def test_curvature_teleports_follow_the_published_steps(name: str, tag: str) -> None:
    case = Case(name)
    record, key = recorded(case), f"telecurv_{tag}"
    Ms = [record[f"{key}_M_{k}"] for k in range(3)]
    trace = published_curvature(MLPAction(case.weights, case.X, form="v_exact"), float(record[f"{key}_lr"]), Ms, tag == "up")
    assert relative(torch.tensor(trace.values, dtype=torch.float64), record[f"{key}_kappa_trace"]) < PARITY
    check_weights(trace, record, key)


def test_the_loops_go_the_other_way_with_the_other_sign_and_stop_at_the_cap() -> None:
    case = Case("w7543_b20")
    record = recorded(case)
    action, loss = MLPAction(case.weights, case.X, form="v_exact"), CrossEntropy(case["labels"])
    wrong = published_sharpness(action, loss, 0.05, drawn(case, record)[:, :, :20], RADII, ascend=False)
    assert relative(wrong.weights[0], record["telesharp_up_W_0"]) > 1e-3
    stopped = published_sharpness(action, loss, 0.05, drawn(case, record)[:, :, :20], RADII, cap=1.0)
    assert len(stopped.values) == 1 and stopped.moves == []


def test_bad_arguments_are_named() -> None:
    case = Case("w7543_b6")
    u_exact, v_exact = (MLPAction(case.weights, case.X, form=form) for form in ("u_exact", "v_exact"))
    with pytest.raises(ValueError, match="v_exact without biases, as published, got form='u_exact'"):
        published_curvature(u_exact, 0.1, [])
    with pytest.raises(ValueError, match="lr must be positive and finite, got 0"):
        published_curvature(v_exact, 0, [])
    with pytest.raises(ValueError, match=r"joint must be in 0\.\.1, got 2"):
        published_curvature(v_exact, 0.1, [], joint=2)
