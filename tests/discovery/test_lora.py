"""PEFT's adapters: a GL(r) per adapter and layer, whatever its scaling; the frozen base keeps its own joints still."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport_fast import find_symmetries

peft = pytest.importorskip("peft")


class Base(nn.Module):
    """An embedding, two linear layers and a convolution, one of each kind that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 10), nn.Linear(10, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.down(torch.relu(self.up(self.table(ids)))).transpose(1, 2))


IDS, FRESH = torch.arange(12).reshape(2, 6) % 11, torch.arange(15).reshape(3, 5) * 7 % 11
ALL = ["table", "up", "down", "conv"]


def adapted(**options: Any) -> Any:
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 8, "target_modules": ALL, **options})
    model = peft.get_peft_model(Base(), config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def dense(found: Any) -> dict[str, str]:
    return {joint.name.removeprefix("base_model.model."): str(joint.group) for joint in found}


EVERY_LAYER = {
    "table.lora_embedding_B.up-down": "GL(3)",
    **{f"{layer}.lora_B.default.up-down": "GL(3)" for layer in ("up", "down", "conv")},
}


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.2}, {"init_lora_weights": "gaussian"}],
    ids=["plain", "rank-stabilised", "dropout before A", "another start"],
)  # fmt: skip
def test_every_adapter_has_its_gl(options: dict[str, Any]) -> None:
    model = adapted(**options)
    found = find_symmetries(model, IDS)
    assert dense(found) == EVERY_LAYER
    report = found.verify(model, FRESH)
    assert report.ok
    assert report.max_deviation <= 1e-10


def test_adapters_are_found_where_peft_begins_them() -> None:
    """B is zero then, where every move keeps the outputs; the proof is made on perturbed weights."""
    config = peft.LoraConfig(r=3, target_modules=["up", "down", "conv"])
    found = find_symmetries(peft.get_peft_model(Base(), config), IDS)
    assert dense(found) == {name: group for name, group in EVERY_LAYER.items() if "table" not in name}


def test_a_move_keeps_the_outputs_and_turns_gradients_contragrediently() -> None:
    model = adapted().eval()
    found = find_symmetries(model, IDS)
    name = "base_model.model.up.lora_B.default.up-down"
    g = found.random()[name][0]
    a, b = (model.get_parameter(f"base_model.model.up.lora_{x}.default.weight") for x in "AB")

    def run() -> tuple[Tensor, Tensor, Tensor]:
        y = model(FRESH)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (a, b))

    y, down, up = run()
    product = b @ a
    found.apply_(model, {name: g})
    torch.testing.assert_close(b @ a, product, rtol=1e-12, atol=1e-12)
    moved, new_down, new_up = run()
    torch.testing.assert_close(moved, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_down, torch.linalg.inv(g).T @ down, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new_up, up @ g.T, rtol=1e-9, atol=1e-9)


def test_the_frozen_base_is_named_and_stays() -> None:
    found = find_symmetries(adapted(), IDS)
    frozen = [f for f in found.findings if "is frozen (requires_grad=False)" in f.reason]
    assert {f.kind for f in frozen} >= {"up-down", "neurons"}
    assert all(f.status == "rejected" for f in frozen)
    assert not [joint for joint in found if "base_layer" in " ".join(joint.parameters())]


def test_a_trained_base_moves_with_its_adapters() -> None:
    model = adapted()
    model.requires_grad_(True)
    found = find_symmetries(model, IDS)
    scale = next(joint for joint in found if str(joint.group) == "positive diagonal(10)")
    writers = {view.parameter.removeprefix("base_model.model.") for view in scale.plus}
    assert writers == {"up.base_layer.weight", "up.base_layer.bias", "up.lora_B.default.weight"}
    readers = {view.parameter.removeprefix("base_model.model.") for view in scale.minus}
    assert readers == {"down.base_layer.weight", "down.lora_A.default.weight"}
    assert found.verify(model, FRESH).ok


def test_several_adapters_each_have_their_own() -> None:
    model = adapted(target_modules=["up", "down"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"]))
    model.double()
    one = dense(find_symmetries(model, IDS))
    assert one == {f"{layer}.lora_B.default.up-down": "GL(3)" for layer in ("up", "down")}
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        model.get_parameter("base_model.model.up.lora_B.other.weight").normal_()
    assert dense(find_symmetries(model, IDS)) == {**one, "up.lora_B.other.up-down": "GL(2)"}


def test_an_adapter_that_is_not_active_is_said_to_be_unseen() -> None:
    model = adapted(target_modules=["up"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"]))
    text = find_symmetries(model.double(), IDS).explain()
    line = next(line for line in text.splitlines() if line.startswith("base_model.model.up.lora_A.other"))
    assert "skipped: no builder knows its role" in line


def test_weights_that_dora_decomposes_keep_their_product() -> None:
    model = adapted(target_modules=["up", "down"], use_dora=True)
    found = find_symmetries(model, IDS)
    assert dense(found) == {f"{layer}.lora_B.default.up-down": "GL(3)" for layer in ("up", "down")}
    assert found.verify(model, FRESH).ok
    assert "lora_magnitude_vector" not in " ".join(name for joint in found for name in joint.parameters())


def test_structure_without_proof_finds_the_adapters_too() -> None:
    assert dense(find_symmetries(adapted(), IDS, verify=False)) == EVERY_LAYER
