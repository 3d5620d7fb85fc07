"""The demo's model: every variant is causal and trains, and impossible sizes are refused with a remedy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from teleport_fast.experiments.gpt import GPT, MLPS, GPTConfig

VARIANTS = [
    {"mlp": mlp, "norm": norm, "positions": positions, "fused_qkv": fused, "kv_heads": 1 if fused else None}
    for mlp, norm, positions, fused in itertools.product(MLPS, ("rms", "layer"), ("learned", "rotary"), (False, True))
] + [{"tied": True}, {"gains": True}, {"gains": True, "bias": True, "norm": "layer"}]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_every_variant_is_causal_and_trains_every_parameter(variant: dict[str, Any]) -> None:
    model = GPT(GPTConfig(d_model=16, layers=2, heads=2, context=8, **variant))
    with torch.no_grad():
        model.head.weight.normal_()
    ids = torch.randint(256, (2, 8))
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    before.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.any() for name, p in model.named_parameters() if not name.endswith("k.bias")
    )


def test_the_head_starts_at_zero_so_the_first_loss_is_the_logarithm_of_the_vocabulary() -> None:
    logits = GPT(GPTConfig(d_model=16, layers=1))(torch.randint(256, (2, 8)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(256, (16,)))
    assert loss.item() == pytest.approx(math.log(256))


def test_the_demo_model_has_about_a_million_parameters() -> None:
    assert 0.8e6 < sum(p.numel() for p in GPT().parameters()) < 1.2e6


def test_a_gated_mlp_has_as_many_parameters_as_a_plain_one() -> None:
    plain, gated = (sum(p.numel() for p in GPT(GPTConfig(mlp=mlp)).parameters()) for mlp in ("relu2", "swiglu"))
    assert gated == pytest.approx(plain, rel=0.02)


def test_rotary_positions_depend_on_distance_alone() -> None:
    attention = GPT(GPTConfig(d_model=16, heads=2, context=8, positions="rotary")).blocks[0].attention
    x = torch.randn(1, 2, 1, 8).expand(1, 2, 8, 8)
    turned = attention._rotate(x)
    products = turned @ turned.mT
    for distance in range(8):
        diagonal = products.diagonal(distance, -2, -1)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "multiple of heads, got d_model=128 and heads=3; pass"),
        ({"kv_heads": 3}, "multiple of kv_heads, got heads=4 and kv_heads=3; pass"),
        ({"layers": 0}, "layers must be a positive integer, got 0; pass"),
        ({"d_model": 128.0}, "d_model must be a positive integer, got 128.0; pass"),
        ({"mlp": "tanh"}, "mlp must be one of relu2, relu, gelu, swiglu, got 'tanh'; pass"),
        ({"norm": "batch"}, "norm must be one of rms, layer, got 'batch'; pass"),
        ({"positions": "none"}, "positions must be one of learned, rotary, got 'none'; pass"),
        ({"d_model": 12, "positions": "rotary"}, "needs an even d_model / heads, got 3; pass"),
    ],
)
def test_impossible_sizes_are_refused_by_name_with_value_and_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**fields)


@pytest.mark.parametrize(("shape", "message"), [((8,), "must be .batch, time."), ((1, 9), "at most 8 columns, got 9")])
def test_ids_of_a_wrong_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(d_model=16, layers=1, context=8))(torch.zeros(shape, dtype=torch.long))
