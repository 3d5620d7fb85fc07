"""What arms are made of: budgets, names, and the references that no package gives."""

from __future__ import annotations

import pytest
import torch

from bench.convergence.additions import ADDITIONS, arm_space, parse
from bench.convergence.interface import RATES, TRIALS
from bench.convergence.optimizers import BASES
from bench.convergence.peers.shampoo import Shampoo
from bench.convergence.tasks import variants, written


@pytest.mark.parametrize("name", sorted(BASES))
def test_every_optimizer_has_a_space_within_the_budget(name: str) -> None:
    space = arm_space(name)
    assert len(space.grid()) * len(space.choices) == TRIALS and len(space.grid()) >= RATES


def test_what_is_added_brings_its_own_options_beside_the_optimizers() -> None:
    space = arm_space("momentum+grad-norm")
    assert space.choices[0] == {"momentum": 0.9, "radius": 0.2}
    assert {choice["radius"] for choice in space.choices} == {0.2, 0.05}
    assert {choice["momentum"] for choice in space.choices} == {0.9, 0.95}
    assert arm_space("adamw+clip").choices == arm_space("adamw").choices


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer must be one of .*, got 'adamx'"):
        parse("adamx+clip")
    with pytest.raises(ValueError, match=r"addition must be one of .*, got 'jump' in 'adamw\+jump'"):
        parse("adamw+jump")
    with pytest.raises(ValueError, match=r"task must be one of .*, got 'mnist'"):
        variants("mnist")
    with pytest.raises(ValueError, match=r"task factorisation has .*, got 'factorisation-k7'"):
        variants("factorisation-k7")


def test_every_task_that_is_written_knows_its_own_arms() -> None:
    for name in written():
        for task in variants(name, quick=True):
            for arm in task.arms:
                assert len(task.space(arm).grid()) >= RATES
                assert arm not in task.references(arm)


def test_a_variant_is_picked_by_its_whole_name() -> None:
    assert [task.name for task in variants("factorisation-k10")] == ["factorisation-k10-balanced", "factorisation-k10-unbalanced"]


@pytest.mark.parametrize("name", ["muon", "soap", "shampoo", "sam", "schedule-free", "rotated"])
def test_a_peer_trains(name: str) -> None:
    if name in ("soap", "sam"):
        pytest.importorskip("pytorch_optimizer")
    if name == "schedule-free":
        pytest.importorskip("schedulefree")
    pytest.importorskip("sklearn")
    (task,) = variants("digits-mlp", quick=True)
    from bench.convergence.interface import Trial

    (result,) = task.train(Trial(name, BASES[name].rate, BASES[name].choices[0]), (0,))
    start = result.curve[0][1]
    assert result.final < 0.95 * start, (start, result.final)


def test_shampoo_takes_adams_step_along_the_preconditioned_direction() -> None:
    W = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    G = torch.randn(4, 3, dtype=torch.float64)
    before, W.grad = W.detach().clone(), G.clone()
    Shampoo([W], lr=0.1, ridge=1e-12).step()
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    # one gradient: L^(−1/4) G R^(−1/4) is its orthogonal factor, Adam's step its signs
    direction = U @ Vh
    expected = before - 0.1 * direction * (G.sign().norm() / direction.norm())
    torch.testing.assert_close(W.detach(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(W.grad, G)


def test_a_teleport_added_to_sam_leaves_sam_its_second_gradient() -> None:
    pytest.importorskip("pytorch_optimizer")
    pytest.importorskip("sklearn")
    from bench.convergence.interface import Trial

    (task,) = variants("digits-mlp", quick=True)
    options = BASES["sam"].choices[0]
    (plain,) = task.train(Trial("sam", 0.01, options), (0,))
    (moved,) = task.train(Trial("sam+balance-once", 0.01, options), (0,))
    assert moved.final < 0.95 * moved.curve[0][1] and moved.final != plain.final


def test_every_addition_says_whether_it_stacks() -> None:
    assert {name for name, addition in ADDITIONS.items() if not addition.stacks} == {"rotations", "random", "level-set"}
