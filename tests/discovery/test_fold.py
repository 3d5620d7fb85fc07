"""Folding gains changes no function, can be undone, and frees the residual stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport_fast import find_symmetries, fold_norm_gains_
from teleport_fast.discovery.gains import is_norm
from teleport_fast.experiments.gpt import GPT, GPTConfig

IDS = torch.randint(13, (3, 8), generator=torch.Generator().manual_seed(0))


def gpt(**changes: Any) -> GPT:
    """A GPT with gains of both signs, in float64, off its initialisation."""
    sizes = {"vocab": 13, "context": 8, "d_model": 16, "layers": 2, "heads": 4, "hidden": 12, "gains": True}
    model = GPT(GPTConfig(**{**sizes, **changes})).double()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    gains(model)["blocks.0.norm1"].data[3] = -0.7
    return model


def gains(model: nn.Module) -> dict[str, Tensor]:
    norms = [(name, module) for name, module in model.named_modules() if is_norm(module)]
    return {name: norm.weight for name, norm in norms if norm.weight is not None}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def deviation(after: Tensor, before: Tensor) -> float:
    return float((after - before).detach().norm() / before.detach().norm())


VARIANTS = {
    "rmsnorm": {},
    "layernorm": {"norm": "layer"},
    "layernorm with bias": {"norm": "layer", "bias": True},
    "fused, gated, rotary": {"fused_qkv": True, "mlp": "swiglu", "positions": "rotary", "kv_heads": 2},
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


@every_variant
def test_folding_leaves_the_function_alone_and_gains_of_one(changes: dict[str, Any]) -> None:
    model = gpt(**changes)
    before, readers = model(IDS), model.blocks[0].mlp.up.weight.detach().clone()
    gain = model.blocks[0].norm2.weight.detach().clone()
    folded = fold_norm_gains_(model)
    assert deviation(model(IDS), before) <= 1e-14
    assert set(folded.gains) == {f"{name}.weight" for name in gains(model)}
    for parameter in gains(model).values():
        assert torch.equal(parameter, torch.ones_like(parameter))
        assert not parameter.requires_grad
    torch.testing.assert_close(model.blocks[0].mlp.up.weight.detach(), readers * gain)


def test_a_gain_set_to_one_without_its_readers_is_noticed() -> None:
    model = gpt()
    before = model(IDS)
    gains(model)["norm"].data.fill_(1.0)
    assert deviation(model(IDS), before) > 1e-3


@every_variant
def test_the_residual_joint_appears(changes: dict[str, Any]) -> None:
    model = gpt(**changes)
    assert "residual" not in find_symmetries(model)
    fold_norm_gains_(model)
    after = find_symmetries(model)
    assert str(after["residual"].group) == ("O(16) fixing ones" if model.config.norm == "layer" else "O(16)")
    assert not [joint for joint in after if joint.kind == "norm-readers"]
    assert after.verify(model, IDS).ok


@every_variant
def test_unfolding_restores_weights_and_training(changes: dict[str, Any]) -> None:
    model = gpt(**changes)
    before = weights(model)
    folded = fold_norm_gains_(model)
    assert any(deviation(tensor, before[name]) > 1e-3 for name, tensor in weights(model).items())
    folded.unfold_()
    assert max(deviation(tensor, before[name]) for name, tensor in weights(model).items()) <= 1e-14
    assert all(torch.equal(gain, before[f"{name}.weight"]) for name, gain in gains(model).items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unfolding_after_training_leaves_the_function_alone() -> None:
    model = gpt(norm="layer", bias=True)
    folded = fold_norm_gains_(model)
    start = model(IDS)
    start.square().mean().backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(0.1 * parameter.grad)
    trained = model(IDS)
    assert deviation(trained, start) > 1e-3
    folded.unfold_()
    assert deviation(model(IDS), trained) <= 1e-14


def test_folding_twice_changes_nothing_more() -> None:
    model = gpt()
    fold_norm_gains_(model)
    before = weights(model)
    again = fold_norm_gains_(model)
    assert again.gains == {}
    again.unfold_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_a_model_without_gains_is_left_alone() -> None:
    model = GPT(GPTConfig(vocab=13, context=8, d_model=16, layers=1, heads=4, hidden=12))
    before = weights(model)
    assert fold_norm_gains_(model).gains == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def tied() -> tuple[GPT, str]:
    return gpt(tied=True), "gain 'norm.weight' cannot be folded: .*a tied head does not count.*; untie the head"


def zero() -> tuple[GPT, str]:
    model = gpt()
    gains(model)["blocks.1.norm2"].data[2] = 0.0
    return model, "gain 'blocks.1.norm2.weight' has a zero entry, folding could not be undone"


def frozen_reader() -> tuple[GPT, str]:
    model = gpt()
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    return model, "gain 'blocks.0.norm2.weight' cannot be folded"


@pytest.mark.parametrize("make", [tied, zero, frozen_reader])
def test_what_cannot_be_folded_is_refused_and_nothing_changes(make: Any) -> None:
    model, message = make()
    before = weights(model)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        fold_norm_gains_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains


def test_a_gain_of_one_that_no_layer_alone_reads_may_be_frozen() -> None:
    """A fresh model with a tied head: its last norm keeps its gain of one, and the stream may turn."""
    model = gpt(tied=True)
    gains(model)["norm"].data.fill_(1.0)
    before, kept = model(IDS), weights(model)
    with pytest.raises(ValueError, match=r"'norm.weight' cannot be folded: .*; all of it is one: pass freeze_ones=True"):
        fold_norm_gains_(model)
    folded = fold_norm_gains_(model, freeze_ones=True)
    assert (folded.frozen, "norm.weight" in folded.gains) == (("norm.weight",), False)
    assert deviation(model(IDS), before) <= 1e-14
    assert not any(gain.requires_grad for gain in gains(model).values())
    found = find_symmetries(model)
    assert str(found["residual"].group) == "O(16)"
    found.apply_(model, found.random(0.5))
    assert deviation(model(IDS), before) <= 1e-13
    folded.unfold_()
    assert deviation(model(IDS), before) <= 1e-13
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(gain, kept[f"{name}.weight"]) for name, gain in gains(model).items())


def test_a_gain_that_is_not_one_is_never_frozen() -> None:
    model = gpt(tied=True)
    gains(model)["norm"].data.fill_(1.0)
    gains(model)["norm"].data[5] = 1.0 + 1e-9
    before = weights(model)
    with pytest.raises(ValueError, match=r"'norm.weight' cannot be folded: .*does not count\); untie the head"):
        fold_norm_gains_(model, freeze_ones=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_example_inputs_are_passed_on() -> None:
    class Shifted(GPT):
        def forward(self, ids: Tensor, *, shift: float) -> Tensor:
            return super().forward(ids) + shift

    model = Shifted(gpt().config).double()
    model.load_state_dict(gpt().state_dict())
    before = model(IDS, shift=1.0)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'shift'"):
        fold_norm_gains_(model)
    fold_norm_gains_(model, {"ids": IDS, "shift": 1.0})
    assert deviation(model(IDS, shift=1.0), before) <= 1e-14
