"""The activation between two layers decides their group; the most general one that holds is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from teleport_fast import find_symmetries
from teleport_fast.discovery.candidates import Views, attention_candidates, mlp_candidates, norm_candidate
from teleport_fast.discovery.roles import Attention, Mlp, Slot, canonical_names
from teleport_fast.symmetry import Symmetries


def table(symmetries: Symmetries) -> dict[str, str]:
    return {joint.name: f"{joint.group}" for joint in symmetries}


CHAINS = {
    "relu": (nn.ReLU(), "positive diagonal(6)", True),
    "leaky relu": (nn.LeakyReLU(0.1), "positive diagonal(6)", True),
    "one slope": (nn.PReLU(), "positive diagonal(6)", True),
    "a slope per channel": (nn.PReLU(6, 0.3), "positive diagonal(6)", True),
    "tanh": (nn.Tanh(), None, True),
    "gelu": (nn.GELU(), None, True),
    "nothing": (nn.Identity(), "GL(6)", True),
}


@pytest.mark.parametrize(("between", "up_down", "neurons"), CHAINS.values(), ids=CHAINS.keys())
def test_a_chain_of_layers_has_the_symmetry_of_its_activation(
    between: nn.Module, up_down: str | None, neurons: bool
) -> None:
    if isinstance(between, nn.PReLU) and between.num_parameters > 1:
        between.weight.data = torch.linspace(0.1, 0.9, 6)
    found = table(find_symmetries(nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 3))))
    assert found.get("2.up-down") == up_down
    assert ("2.neurons" in found) == neurons


def test_two_neighbours_without_anything_between_have_gl() -> None:
    found = table(find_symmetries(nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3))))
    assert found["1.up-down"] == "GL(6)"


def test_a_longer_chain_has_a_joint_between_every_two_layers() -> None:
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
    found = find_symmetries(nn.Sequential(*layers))
    assert set(table(found)) == {"2.up-down", "2.neurons", "4.up-down", "4.neurons", "6.neurons"}


def test_a_layer_used_twice_is_not_taken_for_two() -> None:
    layer = nn.Linear(6, 6)
    found = find_symmetries(nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), layer))
    assert len(found) == 0
    assert {finding.status for finding in found.findings} == {"rejected", "noted"}


def views_of(*modules: nn.Module) -> tuple[list[nn.Module], Views]:
    whole = nn.ModuleList(modules)
    return list(modules), Views(canonical_names(whole))


def slot(module: nn.Module, start: int = 0, size: int | None = None) -> Slot:
    assert isinstance(module, nn.Linear)
    return Slot("layer", module, start, size or module.out_features)


def test_attention_proposes_gl_before_both_rotary_layouts() -> None:
    (qkv, output), views = views_of(nn.Linear(8, 16), nn.Linear(8, 8))
    role = Attention("a", slot(qkv, 0, 8), slot(qkv, 8, 4), slot(qkv, 12, 4), slot(output), heads=4, kv_heads=2)
    value_output, query_key, *_ = attention_candidates(role, views)
    assert [str(joint.group) for joint in value_output.alternatives] == ["GL(2)"]
    assert [str(joint.group) for joint in query_key.alternatives] == [
        "GL(2)",
        "rotary(2) half",
        "rotary(2) interleaved",
    ]
    weight, bias = value_output.alternatives[0].plus
    assert (weight.parameter, weight.start, weight.heads, weight.width) == ("0.weight", 12, 2, 2)
    assert (bias.parameter, bias.start, bias.counts) == ("0.bias", 12, False)
    (reader,) = value_output.alternatives[0].minus
    assert (reader.parameter, reader.axis, reader.repeats, reader.extent) == ("1.weight", 1, 2, 8)
    queries, keys = query_key.alternatives[0].plus[0], query_key.alternatives[0].minus[0]
    assert (queries.repeats, queries.extent, keys.start, keys.extent) == (2, 8, 8, 12)


def test_an_odd_head_has_no_rotary_alternative() -> None:
    (q, k, v, o), views = views_of(*(nn.Linear(6, 6) for _ in range(4)))
    _, query_key, _ = attention_candidates(Attention("a", slot(q), slot(k), slot(v), slot(o), 2, 2), views)
    assert [str(joint.group) for joint in query_key.alternatives] == ["GL(3)"]


def test_a_gate_leaves_the_diagonal_as_the_only_scale() -> None:
    (up, gate, down), views = views_of(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4))
    scale, neurons = mlp_candidates(Mlp("m", slot(up), slot(down), slot(gate)), views)
    assert [str(joint.group) for joint in scale.alternatives] == ["diagonal(6)"]
    assert scale.wider is None
    assert [view.parameter for view in scale.alternatives[0].plus] == ["0.weight", "0.bias"]
    assert [view.parameter for view in neurons.alternatives[0].plus] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_without_a_gate_the_scales_come_from_the_general_to_the_special() -> None:
    (up, down), views = views_of(nn.Linear(4, 6), nn.Linear(6, 4))
    scale, _ = mlp_candidates(Mlp("m", slot(up), slot(down)), views)
    assert [(str(j.group), j.minus[0].power) for j in scale.alternatives] == [
        ("diagonal(6)", 1.0),
        ("positive diagonal(6)", 1.0),
        ("positive diagonal(6)", 2.0),
    ]
    assert str(scale.wider and scale.wider.group) == "GL(6)"


def test_a_single_neuron_has_nothing_to_permute() -> None:
    (up, down), views = views_of(nn.Linear(4, 1), nn.Linear(1, 4))
    assert [candidate.kind for candidate in mlp_candidates(Mlp("m", slot(up), slot(down)), views)] == ["up-down"]


def test_a_norm_proposes_its_readers_only_if_it_has_a_gain_that_trains() -> None:
    (norm, plain, reader), views = views_of(nn.LayerNorm(4), nn.RMSNorm(4, elementwise_affine=False), nn.Linear(4, 6))
    readers = [("block", [slot(reader)])]
    candidate = norm_candidate("norm", norm, readers, views, 4)
    assert candidate is not None
    (joint,) = candidate.alternatives
    assert [view.parameter for view in joint.plus] == ["0.weight", "0.bias"]
    assert [(view.parameter, view.axis) for view in joint.minus] == [("2.weight", 1)]
    assert norm_candidate("norm", plain, readers, views, 4) is None
    assert norm_candidate("norm", norm, readers, views, 5) is None
    norm.weight.requires_grad_(False)
    assert norm_candidate("norm", norm, readers, views, 4) is None

