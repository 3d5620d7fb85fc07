"""Roles are read off names and shapes, whatever the model calls its layers; what does not fit is said, not guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_fast import find_symmetries
from teleport_fast.discovery.roles import Attention, Mlp, Unusable, canonical_names, roles
from teleport_fast.experiments.gpt import GPT, GPTConfig


class OtherAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class ProjAttention(nn.Module):
    """Interleaved rotary embedding by complex numbers, two key heads for four query heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        angles = torch.outer(torch.arange(12.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def turn(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.turns[: x.shape[-2]]
        return torch.view_as_real(turned).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class OtherBlock(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class OtherGPT(nn.Module):
    """A GPT under other names, a bias in its head, positions as a bare parameter."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, width), nn.Parameter(0.1 * torch.randn(1, 12, width))
        self.h = nn.ModuleList([OtherBlock(attention, mlp, width)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe[:, : ids.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


OTHER_NAMES = {
    "c_attn, c_proj, fc1, fc2": (OtherAttention(16, 2), FeedForward(16), "h.0.mlp", "GL(8)"),
    "q_proj, a Sequential": (
        ProjAttention(16),
        nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 16)),
        "h.0.mlp.2",
        "rotary(4) interleaved",
    ),
}


@pytest.mark.parametrize(("attention", "mlp", "name", "query_key"), OTHER_NAMES.values(), ids=OTHER_NAMES.keys())
def test_a_gpt_under_other_names_is_understood(
    attention: nn.Module, mlp: nn.Module, name: str, query_key: str
) -> None:
    model = OtherGPT(attention, mlp)
    found = find_symmetries(model)
    assert {joint.name for joint in found} - {"h.0.attn.query-heads"} == {
        *(f"h.0.attn.{kind}" for kind in ("value-output", "query-key", "heads")),
        *(f"{name}.{kind}" for kind in ("up-down", "neurons")),
        *(f"{norm}.readers" for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f")),
        *("residual.order", "residual.signs"),
    }
    assert ("h.0.attn.query-heads" in found) == isinstance(attention, ProjAttention)
    assert str(found["h.0.attn.query-key"].group) == query_key
    for norm in (model.ln_f, model.h[0].ln_1, model.h[0].ln_2):
        norm.weight.requires_grad_(False)
    residual = find_symmetries(model)["residual"]
    assert str(residual.group) == "O(16) fixing ones"
    assert {"wpe", "wte.weight"} <= set(residual.parameters())


def of_names(**parts: Any) -> nn.Module:
    """A module with the given layers and numbers as attributes."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def only_role(**parts: Any) -> Attention | Mlp | Unusable:
    (role,) = roles(nn.ModuleDict({"block": of_names(**parts)}))
    assert role.name == "block"
    return role


def test_separate_layers_and_their_head_counts() -> None:
    layers = {name: nn.Linear(8, size) for name, size in (("wq", 8), ("wk", 4), ("wv", 4), ("wo", 8))}
    role = only_role(**layers, n_heads=4, n_kv_heads=2)
    assert isinstance(role, Attention)
    assert (role.heads, role.kv_heads, role.head_dim) == (4, 2, 2)
    assert [slot.layer for slot in role.reads()] == ["block.wq", "block.wk", "block.wv"]


def test_key_heads_are_counted_by_shape_when_nothing_names_them() -> None:
    parts = {name: nn.Linear(8, size) for name, size in (("q_proj", 8), ("k_proj", 2), ("v_proj", 2), ("o_proj", 8))}
    role = only_role(**parts, num_heads=4)
    assert isinstance(role, Attention)
    assert (role.heads, role.kv_heads) == (4, 1)


def test_a_fused_layer_is_cut_into_query_key_and_value() -> None:
    role = only_role(qkv=nn.Linear(8, 16), proj=nn.Linear(8, 8), num_heads=4, num_kv_heads=2)
    assert isinstance(role, Attention)
    assert [(slot.start, slot.size) for slot in role.reads()] == [(0, 8), (8, 4), (12, 4)]


def test_head_counts_may_live_on_the_config() -> None:
    role = only_role(qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), config=of_names(num_attention_heads=2))
    assert isinstance(role, Attention)
    assert role.heads == role.kv_heads == 2


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"qkv": (8, 24), "o": (8, 8)}, "attention without a number of heads (looked for heads, num_heads, n_heads"),
        ({"qkv": (8, 20), "o": (8, 8), "heads": 4}, "fused layer has 20 rows, 4 + 2·4 heads need 24"),
        (
            {"q": (8, 8), "k": (8, 6), "v": (8, 8), "o": (8, 8), "heads": 4},
            "sizes do not fit 4 heads and 3 key/value heads: q 8, k 6, v 8, output reads 8",
        ),
        (
            {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (6, 8), "heads": 4},
            "sizes do not fit 4 heads and 4 key/value heads: q 8, k 8, v 8, output reads 6",
        ),
    ],
)
def test_attention_that_does_not_fit_is_named_with_its_sizes(parts: dict[str, Any], reason: str) -> None:
    layers = {name: nn.Linear(*part) if isinstance(part, tuple) else part for name, part in parts.items()}
    role = only_role(**layers)
    assert isinstance(role, Unusable)
    assert role.reason.startswith(reason)


def test_unusable_attention_is_a_rejection_and_the_rest_is_still_found() -> None:
    model = GPT(GPTConfig(vocab=13, context=8, d_model=16, layers=1, heads=4, hidden=12))
    del model.blocks[0].attention.heads
    model.blocks[0].attention.forward = lambda x: x  # it cannot run without its count; the rest of the model can
    found = find_symmetries(model)
    (finding,) = [f for f in found.findings if f.name == "blocks.0.attention"]
    assert (finding.kind, finding.status) == ("attention", "rejected")
    assert "blocks.0.mlp.up-down" in found


def test_an_mlp_needs_matching_sizes() -> None:
    assert isinstance(only_role(up_proj=nn.Linear(4, 6), gate_proj=nn.Linear(4, 6), down_proj=nn.Linear(6, 4)), Mlp)
    assert list(roles(of_names(fc1=nn.Linear(4, 6), fc2=nn.Linear(5, 4)))) == []
    assert list(roles(of_names(up=nn.Linear(4, 6), gate=nn.Linear(4, 5), down=nn.Linear(6, 4)))) == []


def test_a_chain_ends_at_a_layer_with_other_parameters() -> None:
    first, second = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)], [nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 2)]
    found = [role for role in roles(nn.Sequential(*first, nn.LayerNorm(6), *second)) if isinstance(role, Mlp)]
    assert [(role.name, role.up.layer, role.down.layer) for role in found] == [("2", "0", "2"), ("6", "4", "6")]
    assert all(role.chain for role in found)


def test_tied_parameters_have_their_first_name() -> None:
    model = of_names(first=nn.Linear(3, 3), second=nn.Linear(3, 3))
    model.second.weight = model.first.weight
    names = canonical_names(model)
    assert names[id(model.second.weight)] == "first.weight"
    assert sorted(names.values()) == ["first.bias", "first.weight", "second.bias"]
