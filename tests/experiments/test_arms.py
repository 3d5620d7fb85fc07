"""The arms: names, what each attaches, and which parameters run at which rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import teleport_fast as tf
from teleport_fast.experiments.arms import ARMS, BASES, arm_named, attach, make_optimizer
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.experiments.text import Text
from teleport_fast.experiments.train import Setting, train


def small(**fields: Any) -> GPT:
    return GPT(GPTConfig(d_model=16, layers=1, heads=2, context=8, **fields))


def test_the_default_arms_are_adamw_and_exact_rotations_every_third_step() -> None:
    plain, turned = arm_named("adamw"), arm_named("rotations")
    assert (plain.objective, plain.label) == (None, "adamw")
    assert (turned.objective, turned.every, turned.label) == ("eigenbasis", 3, "adamw + rotations")
    model = small()
    assert make_optimizer(plain, model, 0.003).param_groups[0]["betas"] == (0.9, 0.95)
    assert make_optimizer(turned, model, 0.003).param_groups[0]["betas"] == (0.9, 0.98)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_every_parameter_is_in_one_group_and_tables_have_a_rate_of_their_own(base: str, tied: bool) -> None:
    model = small(tied=tied)
    optimizer = make_optimizer(arm_named(base), model, rate=0.123, table_rate=0.456)
    blocks, tables = optimizer.param_groups
    assert (blocks["lr"], tables["lr"]) == (0.123, 0.456)
    assert {id(p) for p in tables["params"]} == {id(m.weight) for m in (model.token, model.position, model.head)}
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(group.get("weight_decay", 0) == 0 for group in optimizer.param_groups)


def test_frozen_parameters_are_left_out() -> None:
    model = small()
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    optimizer = make_optimizer(arm_named("sgd"), model, rate=0.1)
    assert all(p is not model.blocks[0].mlp.up.weight for group in optimizer.param_groups for p in group["params"])


def test_a_base_replaces_the_optimizer_under_a_teleport() -> None:
    arm = arm_named("grad_norm", base="sgd", every=7, radius=0.25, direction="descend")
    assert arm.label == "sgd + grad_norm, every 7, radius 0.25, direction descend"
    assert (arm.every, arm.radius, arm.direction) == (7, 0.25, "descend")
    assert isinstance(make_optimizer(arm, small(), 0.1), torch.optim.SGD)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("adamv", {}, "arm must be one of adamw, .*, got 'adamv'; pass"),
        ("rotations", {"base": "lion"}, "base must be one of adamw, .*, got 'lion'; pass"),
        ("rotations", {"every": 0}, "every must be at least 1, got 0; pass"),
        ("grad_norm", {"radius": -0.5}, "radius must be positive, got -0.5; pass"),
        ("adamw:beta2=1", {}, r"beta2 must be in \[0, 1\), got 1; pass"),
        ("rotations:every=0", {}, "every must be at least 1, got 0; pass"),
        ("rotations:decay=2", {}, r"decay must be in \[0, 1\), got 2; 0.95"),
        ("rotations:second_moments=drop", {}, "second_moments must be one of keep, reset, project, got 'drop'"),
        ("rotations:stream=site", {}, "a setting of rotations must be key=value with a key of beta2, decay, .*'stream=site'"),
        ("rotations:decay", {}, "a setting of rotations must be key=value .* got 'decay'"),
        ("rotated:stream=all", {}, "stream must be one of .*, got 'all'"),
        ("rotated:lr=0.1", {}, "a setting of rotated must be key=value with a key of base, .*, got 'lr=0.1'"),
        ("adamw:every=3", {}, "a setting of adamw must be key=value with a key of amsgrad, .*, got 'every=3'"),
    ],
)
def test_unknown_names_and_impossible_values_are_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arm_named(name, **fields)


def test_a_rate_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="rate must be positive, got 0; pass a learning rate"):
        make_optimizer(arm_named("adamw"), small(), 0)


def test_every_listed_arm_has_a_name_of_its_own() -> None:
    assert len({arm_named(name).label for name in ARMS}) == len(ARMS)


@pytest.mark.parametrize(
    ("name", "key"), [("adamw", "betas"), ("rotations", "betas"), ("muon", "momentum"), ("sgd", "momentum")]
)
def test_momentum_replaces_the_first_moments_decay_and_names_the_arm(name: str, key: str) -> None:
    arm, usual = arm_named(name, momentum=0.7), arm_named(name)
    assert arm.label == f"{usual.label}, momentum 0.7"
    values = [make_optimizer(a, small(), 0.1).param_groups[0][key] for a in (arm, usual)]
    assert values[0] == ((0.7, values[1][1]) if key == "betas" else 0.7)
    assert values[0] != values[1]


def test_momentum_out_of_range_or_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.5; pass"):
        arm_named("adamw", momentum=1.5)
    with pytest.raises(ValueError, match=r"momentum means nothing to adagrad, got 0.9"):
        make_optimizer(arm_named("adagrad", momentum=0.9), small(), 0.1)


def test_settings_reach_the_objective_and_the_teleport() -> None:
    arm = arm_named("rotations:decay=0.8:normalise=joint:takes=turns:second_moments=project:every=2", every=7)
    assert arm.label == "adamw + rotations, every 2, decay 0.8, normalise joint, second_moments project, takes turns"
    assert arm.usual == arm_named("rotations")
    model = small()
    teleporter = attach(arm, make_optimizer(arm, model, 0.003), model, torch.zeros(1, 8, dtype=torch.long), 0)
    objective = teleporter.objective
    assert isinstance(objective, tf.objectives.Eigenbasis)
    assert (objective.decay, objective.normalise, objective.takes) == (0.8, "joint", "turns")
    assert (teleporter.second_moments, repr(teleporter.schedule)) == ("project", "Every(2)")


def test_settings_reach_an_optimizer_alone() -> None:
    arm = arm_named("rotated:stream=site:every=1:decay=0.5:normalise=none:second_moments=reset:hidden=true:beta2=0.9")
    optimizer = make_optimizer(arm, small(), rate=0.006)
    assert isinstance(optimizer, tf.optim.Rotated)
    refresh = optimizer._refresh
    assert (refresh.every, refresh.decay, refresh.normalise, refresh.second_moments) == (1, 0.5, "none", "reset")
    assert "hidden 64" in optimizer.table()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    decayed = make_optimizer(arm_named("adamw:weight_decay=0.1:beta2=0.99"), small(), rate=0.1)
    assert (decayed.param_groups[0]["weight_decay"], decayed.param_groups[0]["betas"]) == (0.1, (0.9, 0.99))


def test_settings_make_runs_of_their_own_that_leave_the_function_alone(tiny: Setting, tiny_text: Text) -> None:
    names = ("rotations", "rotations:every=1", "rotations:every=1:takes=turns", "rotations:every=1:second_moments=project")
    longer = replace(tiny, steps=8, dtype="float64")
    runs = [train(arm_named(name), 0.003, 0, longer, tiny_text) for name in names]
    assert [len(run.teleports) for run in runs] == [2, 7, 7, 7]
    assert all(run.complete and run.max_deviation < 1e-12 for run in runs)
    assert len({run.losses[-1] for run in runs}) == len({run.arm for run in runs}) == len(names)


def test_muon_steps_matrices_by_torchs_muon_and_all_else_by_adamw() -> None:
    """Against the two optimizers of torch side by side; biases are no matrices."""
    models = [small(bias=True) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    joined = make_optimizer(arm_named("muon"), models[0], rate=0.02, table_rate=0.01)
    blocks = list(models[1].blocks.parameters())
    rest = [p for p in models[1].parameters() if all(p is not b for b in blocks)] + [p for p in blocks if p.ndim == 1]
    apart = [
        torch.optim.Muon([p for p in blocks if p.ndim == 2], lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.95, 0.98), weight_decay=0.0),
    ]
    ids = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for model, optimizers in zip(models, ([joined], apart), strict=True):
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert not torch.equal(models[0].token.weight, small(bias=True).token.weight)


def test_the_optimizers_that_move_within_their_step_train_and_go_ways_of_their_own(
    tiny: Setting, tiny_text: Text
) -> None:
    """Each ends complete, and no two with the same losses; the first loss, before any step, is everybody's."""
    names = ("adamw", "rotated", "rotated-hidden", "muon")
    setting = replace(tiny, model=replace(tiny.model, hidden=128))
    runs = [train(arm_named(name), 0.01, 0, setting, tiny_text) for name in names]
    assert all(run.complete and run.arm == name for run, name in zip(runs, names, strict=True))
    assert len({run.losses[0] for run in runs}) == 1
    assert len({run.losses[-1] for run in runs}) == len(names)


def test_rotated_knows_the_heads_and_keeps_tables_at_their_rate() -> None:
    optimizer = make_optimizer(arm_named("rotated", momentum=0.8), small(hidden=128), rate=0.006)
    assert isinstance(optimizer, tf.optim.Rotated)
    assert "heads 2 x 8" in optimizer.table() and "hidden 2 x 64" in optimizer.table()
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [
        (0.006, (0.8, 0.98)),
        (0.01, (0.8, 0.98)),
    ]
    assert "hidden 128" in make_optimizer(arm_named("rotated-hidden"), small(hidden=128), rate=0.006).table()


def test_a_teleport_cannot_be_attached_to_an_optimizer_with_moves_of_its_own() -> None:
    with pytest.raises(
        ValueError, match=r"base must be one of adamw, adam, sgd, adagrad, rmsprop, got 'rotated'; pass"
    ):
        arm_named("rotations", base="rotated")
