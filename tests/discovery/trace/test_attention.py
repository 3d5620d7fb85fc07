"""torch's own transformer layers, whatever path they take in eval mode, and timm's blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_fast import Symmetries, find_symmetries

Check = Callable[..., Symmetries]
Table = Callable[[Symmetries], dict[str, str]]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


ATTENTION = {"query-key": "query-key, GL(4), 2", "value-output": "value-output, GL(4), 2"}
RELU = {"up-down": "up-down, positive diagonal(12), 1", "neurons": "neurons, permutation(12), 1"}


def layer(kind: Any = nn.TransformerEncoderLayer, **options: Any) -> Any:
    return kind(8, 2, 12, **{"dropout": 0.0, "batch_first": True, "norm_first": True, **options})


def without_stream(found: dict[str, str]) -> dict[str, str]:
    return {name: row for name, row in found.items() if not name.startswith("residual")}


def test_encoder_layer(found_exactly: Check, table: Table) -> None:
    found = found_exactly(layer(), (noise(2, 5, 8),), (noise(3, 7, 8),))
    assert without_stream(table(found)) == {
        **{f"self_attn.{name}": row for name, row in ATTENTION.items()},
        **RELU,
        "norm1.readers": "norm-readers, diagonal(8), 1",
        "norm2.readers": "norm-readers, diagonal(8), 1",
    }
    query_key = found["self_attn.query-key"]
    assert [(v.parameter, v.start) for v in query_key.plus] == [
        ("self_attn.in_proj_weight", 0),
        ("self_attn.in_proj_bias", 0),
    ]
    assert [v.start for v in query_key.minus] == [8, 8]


@pytest.mark.parametrize("fast", [True, False])
def test_a_move_is_exact_on_the_fast_path_too(fast: bool) -> None:
    model, x = layer(norm_first=False, activation="gelu").double().eval(), noise(2, 5, 8)
    found = find_symmetries(model, x)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            before = model(x)
            found.apply_(model, found.random())
            torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-11)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_after_a_norm_on_the_stream_only_what_stays_inside_moves(found_exactly: Check, table: Table) -> None:
    found = without_stream(table(found_exactly(layer(norm_first=False), (noise(2, 5, 8),))))
    assert found == {**{f"self_attn.{name}": row for name, row in ATTENTION.items()}, **RELU}
    unproven = table(find_symmetries(layer(norm_first=False), noise(2, 5, 8), verify=False))
    assert not [name for name in unproven if "norm" in name]


def test_dropout_in_training_leaves_what_masks_commute_with(table: Table) -> None:
    model = layer(dropout=0.3)
    found = without_stream(table(find_symmetries(model, noise(2, 5, 8))))
    assert set(RELU) | {"self_attn.query-key", "self_attn.value-output"} <= set(found)


def test_encoder_without_biases_in_several_layers(found_exactly: Check, table: Table) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer(bias=False), 2, nn.LayerNorm(8), False), nn.Linear(8, 3))
    found = without_stream(table(found_exactly(model, (noise(2, 5, 6),))))
    for index in (0, 1):
        prefix = f"1.layers.{index}"
        assert found.pop(f"{prefix}.self_attn.query-key") == ATTENTION["query-key"]
        assert found.pop(f"{prefix}.self_attn.value-output") == ATTENTION["value-output"]
        for norm in ("norm1", "norm2"):
            assert found.pop(f"{prefix}.{norm}.readers") == "norm-readers, diagonal(8), 1"
        for name, row in RELU.items():
            assert found.pop(f"{prefix}.{name}") == row
    assert found.pop("1.norm.readers") == "norm-readers, diagonal(8), 1"


def test_decoder_layer(found_exactly: Check, table: Table) -> None:
    found = found_exactly(layer(nn.TransformerDecoderLayer), (noise(2, 5, 8), noise(2, 4, 8)))
    assert without_stream(table(found)) == {
        **{f"self_attn.{name}": row for name, row in ATTENTION.items()},
        **{f"multihead_attn.{name}": row for name, row in ATTENTION.items()},
        **RELU,
        **{f"norm{i}.readers": "norm-readers, diagonal(8), 1" for i in (1, 2, 3)},
    }
    (queries,) = found["norm2.readers"].minus
    assert (queries.parameter, queries.axis, queries.head_axis) == ("multihead_attn.in_proj_weight", 1, 0)
    assert (queries.head_start, queries.head_size) == (0, 8)


def test_both_readers_of_one_norm_in_a_fused_cross_attention_move(found_exactly: Check, table: Table) -> None:
    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            memory = self.norm(memory)
            return self.attention(x, memory, memory)[0]

    found = found_exactly(Encoded(), (noise(2, 5, 8), noise(2, 4, 8)))
    assert table(found)["norm.readers"] == "norm-readers, diagonal(8), 1"
    (view,) = found["norm.readers"].minus
    assert (view.head_start, view.head_size) == (8, 16)


class Lone(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.before, self.attention = nn.Linear(7, 8), nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(self.before(q), k, v)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(8, 8), (6, 5)])
def test_multihead_attention(sizes: tuple[int, int], bias: bool, found_exactly: Check, table: Table) -> None:
    key, value = sizes
    model = Lone(kdim=key, vdim=value, bias=bias)
    found = found_exactly(model, (noise(2, 3, 7), noise(2, 4, key), noise(2, 4, value)))
    assert table(found) == {
        **{f"attention.{name}": row for name, row in ATTENTION.items()},
        "attention.up-down": "up-down, GL(8), 1",
    }


def test_appended_keys_and_values_keep_their_spaces(found_exactly: Check, table: Table) -> None:
    model = Lone(add_bias_kv=True)
    found = table(found_exactly(model, (noise(2, 3, 7), noise(2, 4, 8), noise(2, 4, 8))))
    assert {f"attention.{name}" for name in ATTENTION} <= set(found)


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmAttention(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.scale, self.fused = heads, (width // heads) ** -0.5, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        x = F.scaled_dot_product_attention(q, k, v) if self.fused else scores.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class TimmBlock(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), TimmAttention(width, heads, fused), LayerScale(width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 10), nn.Linear(10, width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class TimmViT(nn.Module):
    def __init__(self, fused: bool = True, width: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.blocks = nn.Sequential(TimmBlock(width, 2, fused))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


@pytest.mark.parametrize("fused", [True, False])
def test_timm_vit(fused: bool, found_exactly: Check, table: Table) -> None:
    found = table(found_exactly(TimmViT(fused), (noise(2, 3, 8, 8),)))
    wanted = {
        "blocks.0.attn.query-key": ATTENTION["query-key"],
        "blocks.0.attn.value-output": ATTENTION["value-output"],
        "blocks.0.neurons": "neurons, permutation(10), 1",
        "blocks.0.norm1.readers": "norm-readers, diagonal(8), 1",
        "blocks.0.norm2.readers": "norm-readers, diagonal(8), 1",
        "norm.readers": "norm-readers, diagonal(8), 1",
        "blocks.0.attn.proj.layer-scale": "layer-scale, diagonal(8), 1",
        "blocks.0.fc2.layer-scale": "layer-scale, diagonal(8), 1",
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert "permutation(8)" in " ".join(found.values())  # the stream's order


class Nameless(nn.Module):
    """Attention under names that nobody knows, one weight for queries, keys and values, cut along columns."""

    def __init__(self, rotate: bool = False, normed: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(6, 24) / 3), nn.Parameter(torch.randn(8, 5) / 3)
        self.rotate, self.normed = rotate, normed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (x @ self.one).split(8, -1))
        if self.normed:
            q = F.rms_norm(q, (4,))
        if self.rotate:
            q, k = (self.turned(part) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.einsum("bti,ie->bte", mixed.transpose(1, 2).flatten(2), self.two)

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.3], dtype=x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def test_attention_without_a_known_name(found_exactly: Check, table: Table) -> None:
    found = table(found_exactly(Nameless(), (noise(2, 4, 6),)))
    assert found == ATTENTION
    turned = table(found_exactly(Nameless(rotate=True), (noise(2, 4, 6),)))
    assert turned.pop("value-output") == ATTENTION["value-output"]
    assert list(turned.values()) == ["up-down, diagonal(2), 2"]  # the scales of two planes in each of two heads
    normed = table(found_exactly(Nameless(normed=True), (noise(2, 4, 6),)))
    assert normed == {"value-output": ATTENTION["value-output"]}
