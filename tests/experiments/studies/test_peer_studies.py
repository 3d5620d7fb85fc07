"""The studies of learned and level-set teleportation: what they compare is exact, fair and reproducible."""

from __future__ import annotations

import math

import pytest
import torch

from teleport_fast.experiments.studies import learned, level_set
from teleport_fast.experiments.studies.level_set import WAYS, Trace, descend, equal_time, logistic, mlp


@pytest.mark.parametrize("way", [name for name, teleport in WAYS.items() if teleport])
def test_every_way_keeps_the_loss_of_the_network_and_raises_its_gradient_under_the_cap(way: str) -> None:
    problem = mlp(0)
    params = list(problem.model.parameters())

    def squared() -> float:
        return sum(float(G.square().sum()) for G in torch.autograd.grad(problem.loss(), params))

    before, loss = squared(), float(problem.loss().detach())
    teleport = WAYS[way]
    assert teleport is not None
    teleport(problem, 4 * before)
    assert float(problem.loss().detach()) == pytest.approx(loss, rel=1e-11)
    assert 1.1 * before < squared() <= 4 * before


def test_plain_descent_never_rises_and_a_teleport_changes_its_path() -> None:
    plain = descend(logistic(0), 12, None)
    once = descend(logistic(0), 12, WAYS["level set"], 3.0, 1)
    assert all(after <= before for before, after in zip(plain.losses, plain.losses[1:], strict=False))
    assert once.losses[:6] == plain.losses[:6]
    assert once.losses[7] != plain.losses[7]
    assert plain.moved == 0 and once.moved <= 1e-12
    assert once.seconds == sorted(once.seconds)


def test_equal_time_is_the_last_loss_within_it() -> None:
    trace = Trace([4.0, 2.0, 1.0], [1.0, 2.0, 3.0])
    assert [equal_time(trace, seconds) for seconds in (0.5, 1.0, 2.9, 9.0)] == [4.0, 4.0, 2.0, 1.0]


def test_a_training_is_reproducible_and_tested_on_tasks_that_no_one_tuned_on() -> None:
    job = learned.Job("rate+element", 0.1, 0, 1e-3, 4, 2, 10, 5)
    first, again = learned.trained(job)[0], learned.trained(job)[0]
    assert torch.equal(first, again)
    assert first.shape == (21, 5)
    starts = learned.fresh_tasks(job)
    torch.testing.assert_close(first[0], starts.loss_and_gradients(starts.U, starts.V)[0].log())
    other = learned.fresh_tasks(job._replace(seed=1))
    assert not torch.equal(starts.U, other.U)


def test_the_tuned_rate_is_the_grids_best_and_not_at_its_edge() -> None:
    lr = learned.tuned(20, 0.1, 100, 0.0)
    assert learned.RATES[0] < lr < learned.RATES[-1]
    tasks = learned.Tasks.draw(32, 20, torch.Generator().manual_seed(9), 0.1)
    ends = [float(learned.descend(tasks, 100, rate)[-1].log().mean()) for rate in learned.RATES]
    assert float(learned.descend(tasks, 100, lr)[-1].log().mean()) == min(end for end in ends if math.isfinite(end))


def test_time_is_counted_in_plains_and_claims_count_seeds() -> None:
    assert level_set.GAINS[0] > 1 and set(level_set.SCHEDULES) == {"once", f"every {level_set.EVERY}"}
    table = level_set._table("x", {"plain": [Trace([2.0, 1.0], [0.1, 0.2])], "level set": [Trace([2.0, 0.5], [0.1, 0.4])]},
                             {"x, level set": (3.0, "once")}, 1)
    assert [str(cell) for cell in table.rows[1]] == ["level set", "×3, once", "0.5", "2", "2", "0e+00"]
    claims = level_set._claims("x", {"plain": [Trace([2.0, 1.0], [0.1, 0.2])], "level set": [Trace([2.0, 0.5], [0.1, 0.4])]})
    assert [claim.holds for claim in claims] == [True, False]
