"""The residual stream: one joint through every tensor on it, or the reason why there is none."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport_fast import Symmetries, find_symmetries
from teleport_fast.discovery.gains import is_norm
from teleport_fast.discovery.residual import stream_width
from teleport_fast.discovery.roles import Attention, Mlp, roles
from teleport_fast.experiments.gpt import GPT, GPTConfig


def gpt(**changes: Any) -> GPT:
    sizes = {"vocab": 13, "context": 8, "d_model": 16, "layers": 1, "heads": 4, "hidden": 12}
    return GPT(GPTConfig(**{**sizes, **changes}))


def reason(symmetries: Symmetries) -> str:
    (finding,) = [f for f in symmetries.findings if f.name == "residual"]
    return f"{finding.status}: {finding.reason}"


def test_the_joint_reaches_every_tensor_on_the_stream() -> None:
    joint = find_symmetries(gpt(bias=True, fused_qkv=True, mlp="swiglu"))["residual"]
    block = "blocks.0."
    assert {view.parameter for view in joint.minus} == {
        *(f"{block}{name}.weight" for name in ("attention.qkv", "mlp.gate", "mlp.up")),
        "head.weight",
    }
    writers = [f"{block}{name}.{part}" for name in ("attention.o", "mlp.down") for part in ("weight", "bias")]
    assert {view.parameter for view in joint.plus} == {*writers, "token.weight", "position.weight"}
    counted = {view.parameter for view in joint.views() if view.counts}
    assert counted == {view.parameter for view in joint.views() if ".weight" in view.parameter} - {
        "token.weight",
        "position.weight",
        "head.weight",
    }


def test_a_tied_table_is_turned_once() -> None:
    joint = find_symmetries(gpt(tied=True))["residual"]
    assert [view.parameter for view in joint.views()].count("token.weight") == 1
    assert "head.weight" not in joint.parameters()


def test_gains_must_be_folded_or_one() -> None:
    model = gpt(gains=True)
    assert reason(find_symmetries(model)).startswith("rejected: gain of 'blocks.0.norm1' is not folded; call fold_norm")
    norms = [module for module in model.modules() if is_norm(module)]
    for norm in norms:
        norm.weight.requires_grad_(False)
    assert "residual" in find_symmetries(model)
    norms[1].weight.data[3] = 1.5
    assert "gain of 'blocks.0.norm2' is not folded" in reason(find_symmetries(model))


def test_a_layernorms_bias_turns_with_the_stream() -> None:
    model = gpt(gains=True, bias=True, norm="layer")
    for norm in filter(is_norm, model.modules()):
        norm.weight.requires_grad_(False)
    joint = find_symmetries(model)["residual"]
    assert {"norm.bias", "blocks.0.norm1.bias", "blocks.0.norm2.bias"} <= {view.parameter for view in joint.plus}


class FixedScale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0.5, 2, x.shape[-1], dtype=x.dtype)


def test_a_stream_that_something_scales_has_no_joint() -> None:
    model = gpt()
    model.norm = nn.Sequential(FixedScale(), nn.RMSNorm(16, elementwise_affine=False))
    assert reason(find_symmetries(model)) == "rejected: something on the stream is not rotation-equivariant"


class PreNorm(nn.Module):
    """x + f(norm(x)) with a Sequential for f, whose inner layers may have the stream's width."""

    def __init__(self, *hidden: int) -> None:
        super().__init__()
        sizes = [8, *hidden, 8]
        layers = [layer for size in pairwise(sizes) for layer in (nn.Linear(*size), nn.ReLU())]
        self.table = nn.Embedding(7, 8)
        self.norm = nn.RMSNorm(8, elementwise_affine=False)
        self.f = nn.Sequential(*layers[:-1])
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.f(self.norm(x)))


def test_a_sequential_reads_the_stream_with_its_first_layer_and_writes_it_with_its_last() -> None:
    for hidden in ((12,), (8, 12), (12, 8)):
        joint = find_symmetries(PreNorm(*hidden))["residual"]
        last = f"f.{2 * len(hidden)}"
        assert {view.parameter for view in joint.plus} == {"table.weight", f"{last}.weight", f"{last}.bias"}
        assert {view.parameter for view in joint.minus} == {"f.0.weight", "head.weight"}


def test_roles_of_another_width_stay_out_of_the_stream() -> None:
    model = gpt()
    model.side = nn.Module()
    model.side.fc1, model.side.fc2 = nn.Linear(6, 5), nn.Linear(5, 6)
    assert not any("side" in name for name in find_symmetries(model)["residual"].parameters())


@pytest.mark.parametrize("middle", [8, 12])
def test_inner_layers_of_the_streams_width_are_not_on_the_stream(middle: int) -> None:
    sizes = [(4, 8), (8, 8), (8, middle), (middle, 8), (8, 2)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
    found = find_symmetries(nn.Sequential(*layers[:-1]))
    assert reason(found) == "rejected: no stream of width 8: nothing writes one outside a chain"


def test_without_a_block_there_is_no_stream_to_speak_of() -> None:
    found = find_symmetries(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert not [f for f in found.findings if f.kind == "residual"]


def test_the_stream_is_what_most_roles_read_and_write() -> None:
    model = gpt(layers=2)
    model.side = nn.Module()
    model.side.fc1, model.side.fc2 = nn.Linear(6, 5), nn.Linear(5, 6)
    found = [role for role in roles(model) if isinstance(role, (Attention, Mlp))]
    assert stream_width(found) == 16
    assert stream_width([]) is None


def test_a_norm_is_known_by_its_class_or_by_its_name_and_its_vectors() -> None:
    class T5LayerNorm(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(*shape))

    assert is_norm(nn.LayerNorm(4))
    assert is_norm(nn.RMSNorm(4))
    assert is_norm(T5LayerNorm(4))
    assert not is_norm(T5LayerNorm(4, 4))
    assert not is_norm(nn.Linear(4, 4))
