"""find_symmetries finds what is there, says why it rejects the rest, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_fast import Symmetries, find_symmetries
from teleport_fast.experiments.gpt import GPT, GPTConfig


def gpt(**changes: Any) -> GPT:
    sizes = {"vocab": 13, "context": 8, "d_model": 16, "layers": 1, "heads": 4, "hidden": 12}
    return GPT(GPTConfig(**{**sizes, **changes}))


def table(symmetries: Symmetries) -> dict[str, str]:
    """Joint → "kind, group, heads, dim" for short comparisons; the block's prefix is left out."""
    return {
        joint.name.removeprefix("blocks.0."): f"{joint.kind}, {joint.group}, {joint.heads}, {joint.dim}"
        for joint in symmetries
    }


def reasons(symmetries: Symmetries) -> dict[str, str]:
    return {
        finding.name.removeprefix("blocks.0."): f"{finding.status}: {finding.reason}"
        for finding in symmetries.findings
        if finding.status not in ("found", "noted")
    }


PLAIN = {
    "attention.value-output": "value-output, GL(4), 4, 64",
    "attention.query-key": "query-key, GL(4), 4, 64",
    "attention.heads": "heads, permutation(4), 1, 0",
    "mlp.up-down": "up-down-squared, positive diagonal(12), 1, 12",
    "mlp.neurons": "neurons, permutation(12), 1, 0",
    "residual": "residual, O(16), 1, 120",
}
GAINS = {f"{name}.readers": "norm-readers, diagonal(16), 1, 16" for name in ("norm", "norm1", "norm2")} | {
    "residual": "",  # rejected, its order and signs are what is left of it
    "residual.order": "residual-order, permutation(16), 1, 0",
    "residual.signs": "residual-signs, signs(16), 1, 0",
}
ONE_SIGN = {"residual.signs": "residual-signs, signs(1), 1, 0"}
# what differs from PLAIN: another row, "" for a rejection, None for a joint that there is no candidate for
EXPECTED: dict[str, tuple[dict[str, Any], dict[str, str | None]]] = {
    "the demo": ({}, {}),
    "relu": ({"mlp": "relu"}, {"mlp.up-down": "up-down, positive diagonal(12), 1, 12"}),
    "gelu": ({"mlp": "gelu"}, {"mlp.up-down": ""}),
    "swiglu": ({"mlp": "swiglu"}, {"mlp.up-down": "up-down, diagonal(12), 1, 12"}),
    "layernorm": ({"norm": "layer"}, {"residual": "residual, O(16) fixing ones, 1, 105"}),
    "biases, fused": ({"bias": True, "fused_qkv": True}, {}),
    "tied": ({"tied": True}, {}),
    "grouped": (
        {"kv_heads": 2},
        {
            "attention.value-output": "value-output, GL(4), 2, 32",
            "attention.query-key": "query-key, GL(4), 2, 32",
            "attention.heads": "heads, permutation(2), 1, 0",
            "attention.query-heads": "query-heads, permutation(2), 2, 0",
        },
    ),
    "rotary": ({"positions": "rotary"}, {"attention.query-key": "query-key-rotary, rotary(4) half, 4, 16"}),
    "rotary, one key head, fused": (
        {"positions": "rotary", "kv_heads": 1, "fused_qkv": True},
        {
            "attention.value-output": "value-output, GL(4), 1, 16",
            "attention.query-key": "query-key-rotary, rotary(4) half, 1, 4",
            "attention.query-heads": "query-heads, permutation(4), 1, 0",
            "attention.heads": None,
        },
    ),
    "gains": ({"gains": True}, GAINS),
    "gains and biases under layernorm": ({"gains": True, "norm": "layer", "bias": True}, GAINS | ONE_SIGN),
    "gains, tied head": ({"gains": True, "tied": True}, {**GAINS, "norm.readers": ""}),
}


@pytest.mark.parametrize(("changes", "differences"), EXPECTED.values(), ids=EXPECTED.keys())
def test_a_gpt_has_these_joints(changes: dict[str, Any], differences: dict[str, str | None]) -> None:
    wanted = {name: row for name, row in {**PLAIN, **differences}.items() if row}
    found = find_symmetries(gpt(**changes))
    assert table(found) == wanted
    left_out = {name for name, row in {**PLAIN, **differences}.items() if row == ""}
    assert set(reasons(found)) == left_out
    assert all(finding.deviation <= 1e-10 for finding in found.findings if finding.status == "found")


def test_each_layer_has_joints_of_its_own() -> None:
    names = [joint.name for joint in find_symmetries(gpt(layers=3))]
    assert len(names) == 3 * 5 + 1
    assert names[5:10] == [name.replace("0", "1", 1) for name in names[:5]]


def test_rejections_say_why() -> None:
    why = reasons(find_symmetries(gpt(mlp="gelu", gains=True, tied=True)))
    assert why == {
        "mlp.up-down": "rejected: the activation is not homogeneous: no scaling leaves the function",
        "residual": "rejected: gain of 'blocks.0.norm1' is not folded; call fold_norm_gains_(model) first",
        "norm.readers": "rejected: no set of linear layers reads this norm alone (a tied head keeps its gain)",
    }


def test_a_frozen_parameter_keeps_its_joints_from_moving() -> None:
    model = gpt()
    model.blocks[0].attention.o.weight.requires_grad_(False)
    found = find_symmetries(model)
    reason = "rejected: 'blocks.0.attention.o.weight' is frozen (requires_grad=False), a move would change it"
    assert reasons(found) == {"attention.value-output": reason, "attention.heads": reason, "residual": reason, "attention.q.neurons": reason}
    assert set(table(found)) == {"attention.query-key", "mlp.up-down", "mlp.neurons"}


def test_a_joint_that_the_outputs_do_not_see_is_rejected() -> None:
    model = gpt()
    model.unused = nn.Module()
    model.unused.up, model.unused.down = nn.Linear(6, 8), nn.Linear(8, 6)
    found = find_symmetries(model)
    assert table(found) == PLAIN
    reason = "rejected: a wrong move passes too (deviation 0e+00): the outputs do not see this joint"
    assert reasons(found) == {"unused.up-down": reason, "unused.neurons": reason}


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values @ self.kernel


def test_an_unknown_module_is_skipped_aloud() -> None:
    found = find_symmetries(nn.Sequential(nn.Linear(4, 5), Odd(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)))
    assert reasons(found) == {"0": "skipped: no builder knows its role: operator sort has no rule"}
    assert set(table(found)) == {"2.up-down", "4.up-down", "4.neurons"}


@pytest.mark.parametrize(
    "inputs",
    [torch.randint(13, (2, 5)), (torch.randint(13, (2, 5)),), {"ids": torch.randint(13, (2, 5))}, None],
    ids=["tensor", "tuple", "keywords", "guessed"],
)
def test_example_inputs_come_in_every_form(inputs: Any) -> None:
    assert table(find_symmetries(gpt(), inputs)) == PLAIN


def test_without_proof_names_and_a_recorded_call_are_trusted() -> None:
    found = find_symmetries(gpt(mlp="swiglu", gains=True), verify=False)
    assert {joint.kind for joint in found} == {"value-output", "query-key", "up-down", "neurons", "norm-readers"}
    assert table(found)["mlp.up-down"] == "up-down, diagonal(12), 1, 12"
    assert table(found)["attention.query-key"] == "query-key, GL(4), 4, 64"
    assert "call with verify=True" in reasons(found)["attention.heads"]
    assert "unproven" in found.explain()
    turned = table(find_symmetries(gpt(positions="rotary"), verify=False))
    assert "attention.query-key" not in turned


def test_without_inputs_and_proof_only_names_are_trusted() -> None:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.block = nn.Parameter(torch.ones(3)), gpt().blocks[0]

    found = find_symmetries(Closed(), verify=False)
    assert {joint.kind for joint in found} == {"value-output", "neurons"}


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list; pass the module itself"):
        find_symmetries([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="model has no parameters, so it has no symmetries"):
        find_symmetries(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="example_inputs is None and cannot be guessed"):
        find_symmetries(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_untouched_bit_for_bit(training: bool) -> None:
    model = gpt(gains=True, bias=True).train(training)
    model.blocks[0].norm1.weight.requires_grad_(False)
    model(torch.randint(13, (2, 8))).square().mean().backward()
    before = {name: (p.detach().clone(), p.grad, p.requires_grad, id(p)) for name, p in model.named_parameters()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    find_symmetries(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module in model.modules())
    for name, p in model.named_parameters():
        weight, gradient, trains, identity = before[name]
        assert torch.equal(p, weight)
        assert (p.requires_grad, id(p)) == (trains, identity)
        assert p.grad is gradient
        assert gradient is None or torch.equal(gradient, gradients[name])


def test_dropout_between_writer_and_reader_leaves_diagonals_and_permutations_only() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    without = nn.Sequential(layers[0], nn.Identity(), layers[2])
    assert [str(joint.group) for joint in find_symmetries(layers)] == ["diagonal(8)", "permutation(8)"]
    assert [str(joint.group) for joint in find_symmetries(without)] == ["GL(8)", "permutation(8)"]


def test_dropout_on_the_residual_stream_rejects_its_rotations_and_says_why() -> None:
    class Dropped(GPT):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.token(ids)
            for block in self.blocks:
                x = F.dropout(block(x), 0.2, self.training)
            return self.head(self.norm(x))

    symmetries = find_symmetries(Dropped(GPTConfig(d_model=16, layers=1, heads=2, positions="rotary")))
    assert "residual" not in symmetries
    assert "dropout" in symmetries.explain()
