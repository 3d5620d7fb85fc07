"""What the simulator counts is what the library does: products call by call, QR factors, state, joints, parameters, bytes sent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import teleport_fast as tf
from bench.scale.costs import GRAD_NORM, QR, ROTATIONS, Method, Work, at_refresh, every_step, state
from bench.scale.machines import sent
from bench.scale.shapes import MODELS, Shape, decoder, mixture
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.objectives import Eigenbasis, GradNorm

# Sizes that are all distinct and leave every covariance whole parts of its columns.
SMALL = {"d_model": 48, "layers": 2, "heads": 3, "hidden": 128, "vocab": 256, "context": 128}
PLAIN = {"width": 48, "layers": 2, "heads": 3, "inner": 128, "vocab": 256, "context": 128, "tokens": 1}
KINDS = {"residual", "value-output", "query-key", "query-key-rotary", "up-down", "up-down-squared", "norm-readers"}


def demo() -> tuple[GPT, Shape]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, mlp="relu2"))
    torch.nn.init.normal_(model.head.weight)
    return model, decoder("demo", "", **PLAIN, gated=False, rotary=False, positions=128, gains=False)


def gated() -> tuple[GPT, Shape]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, "heads": 4}, mlp="swiglu", positions="rotary", kv_heads=2, gains=True))
    torch.nn.init.normal_(model.head.weight)
    return model, decoder("gated", "", **{**PLAIN, "heads": 4}, kv_heads=2)


@dataclass
class Calls(TorchFunctionMode):
    """Flops of every matrix product and QR factor that torch is called for in the block; products of two in one call count as two."""

    products: float = 0.0
    factors: float = 0.0
    names: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = function(*args, **(kwargs or {})), getattr(function, "__name__", "")
        if name in ("matmul", "__matmul__", "mm", "bmm", "__rmatmul__"):
            self.products += 2.0 * result_of(result, kwargs).numel() * args[0].shape[-1]
        elif name in ("baddbmm", "baddbmm_"):
            self.products += 2.0 * result.numel() * args[1].shape[-1]
        elif name == "linalg_qr":
            self.factors += QR * result[0].numel() * result[0].shape[-1]
        else:
            return result
        self.names[name] += 1
        return result


def result_of(result: Any, kwargs: Any) -> Tensor:
    found = result if isinstance(result, Tensor) else (kwargs or {})["out"]
    assert isinstance(found, Tensor)
    return found


@contextmanager
def counting() -> Iterator[Calls]:
    """By plain torch's formulas, whose products can be seen."""
    with tf.set_backend("reference"), Calls() as calls:
        yield calls


def fill(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def of_steps(shape: Shape, method: Method, steps: int, refreshes: int) -> tuple[float, float]:
    step, refresh = every_step(shape, method), at_refresh(shape, method)
    products = [work.products + work.own_products for work in (step, refresh)]
    factors = [work.factorisations + work.own_factorisations for work in (step, refresh)]
    return steps * products[0] + refreshes * products[1], steps * factors[0] + refreshes * factors[1]


@pytest.mark.parametrize("hidden", [False, 64, True])
def test_rotated_calls_for_the_products_and_factors_that_are_counted(hidden: bool | int) -> None:
    model, shape = demo()
    symmetries = tf.find_symmetries(model, verify="blocks")
    optimizer = tf.optim.Rotated(model.named_parameters(), symmetries=symmetries, hidden=hidden, every=3, covariance_parts=3)
    with counting() as calls:
        for _ in range(3):
            fill(model)
            optimizer.step()
    # a part's bounds are multiples of 16: thirds of 48 and 256 columns are uneven, and their sum over three steps is whole
    for layout in ("shards", "dealt"):
        method = Method("Rotated", every=3, parts=3, hidden=hidden, layout=layout)
        assert (calls.products, calls.factors) == pytest.approx(of_steps(shape, method, 3, 1), rel=1e-12)
    wrong = of_steps(replace(shape, matrices=shape.matrices[1:]), method, 3, 1)
    assert calls.products != pytest.approx(wrong[0], rel=1e-3)


@pytest.mark.parametrize("which", [demo, gated])
@pytest.mark.parametrize("parts", [1, 2])
def test_exact_rotations_call_for_the_products_and_factors_that_are_counted(which: Any, parts: int) -> None:
    model, shape = which()
    tf.fold_norm_gains_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    objective = Eigenbasis(parts=parts)
    tf.attach(optimizer, tf.find_symmetries(model), objective, tf.At(1))
    method = Method(ROTATIONS, every=2, parts=parts)
    with counting() as calls:
        for _ in range(2):
            fill(model)
            optimizer.step()
    # AdamW's state is there at the second step: its first moments move, second moments stay
    assert (calls.products, calls.factors) == pytest.approx(of_steps(shape, method, 2, 1), rel=1e-12)
    assert state(shape, method) == sum(c.nbytes for c in objective.covariances.values())


def test_a_grad_norm_teleport_calls_for_the_products_that_are_counted() -> None:
    model, shape = gated()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    teleporter = tf.attach(optimizer, tf.find_symmetries(model), GradNorm(), tf.At(1))
    fill(model)
    optimizer.step()
    fill(model)
    with counting() as calls:
        optimizer.step()
    assert len(teleporter.history) == 1
    assert calls.products == pytest.approx(at_refresh(shape, Method(GRAD_NORM)).products, rel=1e-12)


@pytest.mark.parametrize("which", [demo, gated])
def test_the_joints_are_those_that_the_library_finds(which: Any) -> None:
    model, shape = which()
    found = described(tf.find_symmetries(model))
    tf.fold_norm_gains_(model)
    found |= {key: value for key, value in described(tf.find_symmetries(model)).items() if key[0] == "residual"}
    assert found == listed(shape)


def test_the_mixtures_joints_are_those_that_the_library_finds() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"width": 24, "layers": 2, "heads": 4, "q_rank": 10, "kv_rank": 14, "nope": 6, "rope": 4, "value": 8, "inner": 28}
    small |= {"expert": 12, "experts": 6, "active": 2, "shared": 1, "vocab": 40}
    shape = mixture("small", "", **small, dense_layers=1, tokens=1, context=8)
    config = transformers.DeepseekV3Config(**deepseek(**small, dense_layers=1), max_position_embeddings=32)
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    symmetries = tf.find_symmetries(model, example_inputs=(torch.randint(40, (1, 8)),), verify="blocks")
    assert sum(p.numel() for p in model.parameters()) == shape.parameters - small["experts"]  # the one router's biases are buffers
    assert described(symmetries) == {key: value for key, value in listed(shape).items() if key[0] != "residual"}


def described(symmetries: tf.Symmetries) -> dict[tuple[str, int], tuple[int, int]]:
    """Heads and moved entries of the continuous joints, by kind and width."""
    found: Counter[tuple[str, int]] = Counter()
    heads: Counter[tuple[str, int]] = Counter()
    for joint in symmetries:
        if joint.kind in KINDS:
            key = (joint.kind.removesuffix("-rotary").removesuffix("-squared"), joint.width)
            heads[key] += joint.heads
            found[key] += sum(view.of(tensor).numel() for view in joint.views() if (tensor := symmetries.parameter(view.parameter)) is not None)
    return {key: (heads[key], found[key]) for key in found}


def listed(shape: Shape) -> dict[tuple[str, int], tuple[int, int]]:
    found: Counter[tuple[str, int]] = Counter()
    heads: Counter[tuple[str, int]] = Counter()
    for joint in shape.joints:
        key = (joint.kind.removesuffix("-rotary"), joint.width)
        heads[key] += joint.heads * joint.count
        found[key] += joint.count * sum(view.entries for view in joint.views)
    return {key: (heads[key], found[key]) for key in found}


def deepseek(**s: int) -> dict[str, Any]:
    return {
        "hidden_size": s["width"], "num_hidden_layers": s["layers"], "first_k_dense_replace": s["dense_layers"],
        "num_attention_heads": s["heads"], "num_key_value_heads": s["heads"], "q_lora_rank": s["q_rank"], "kv_lora_rank": s["kv_rank"],
        "qk_nope_head_dim": s["nope"], "qk_rope_head_dim": s["rope"], "v_head_dim": s["value"], "intermediate_size": s["inner"],
        "moe_intermediate_size": s["expert"], "n_routed_experts": s["experts"], "num_experts_per_tok": s["active"], "n_group": 1,
        "topk_group": 1, "n_shared_experts": s["shared"], "vocab_size": s["vocab"], "tie_word_embeddings": False,
    }  # fmt: skip


def test_the_large_models_have_their_published_numbers_of_parameters() -> None:
    # Llama-2-7B 6,738,415,616 and Llama-3-70B 70,553,706,496 by their checkpoints' indices; DeepSeek-V3 671B, 37B of them active
    seven, seventy, mixed = MODELS
    assert (seven.parameters, seventy.parameters) == (6_738_415_616, 70_553_706_496)
    assert round(mixed.parameters / 1e9) == 671 and round((mixed.active + mixed.width * 129280) / 1e9) == 38


@pytest.mark.parametrize(
    "options", [{}, {"hidden": False}, {"stream": "site"}, {"stream": "layer"}, {"hidden": True, "max_side": 11008}], ids=str
)
def test_the_state_of_a_7b_model_is_what_rotated_says_it_keeps(options: dict[str, Any]) -> None:
    shape = MODELS[0]
    memory = tf.optim.Rotated(named(shape), sides=sides(shape), **options).memory()
    assert state(shape, Method("Rotated", **options)) == memory.bases + memory.covariances
    assert memory.parameters == 4 * (shape.parameters - shape.other)


def named(shape: Shape) -> list[tuple[str, torch.nn.Parameter]]:
    """Its matrices on meta, under Llama's names."""
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    tables = {"embed": "embed_tokens.weight", "head": "lm_head.weight"}
    return [
        (f"layers.{i}.{names[m.name]}.weight" if m.name in names else tables[m.name], parameter(m.rows.size, m.columns.size))
        for m in shape.matrices
        for i in range(m.count)
    ]


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, device="meta"))


def sides(shape: Shape) -> dict[str, tuple[str, str]]:
    heads = f"heads:{shape.matrices[0].rows.heads}"
    return {"*.[qkv]_proj.weight": (heads, "stream"), "*.o_proj.weight": ("stream", heads)}


def test_rotateds_tensors_take_the_bytes_that_are_counted() -> None:
    model, shape = demo()
    optimizer = tf.optim.Rotated(model.named_parameters(), symmetries=tf.find_symmetries(model, verify="blocks"), stream="layer")
    fill(model)
    optimizer.step()
    kept = [v for entry in optimizer.state.values() for key, v in entry.items() if key.endswith(("_basis", "_covariance"))]
    assert sum(tensor.nbytes for tensor in kept) == state(shape, Method("Rotated", stream="layer"))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_sent_are_those_of_blocks_that_change_ranks(ranks: int) -> None:
    rows, columns = 16, 24
    # entry (r, c) lies with the rank of its row and goes to that of its column
    moves = [(r * ranks // rows, c * ranks // columns) for r in range(rows) for c in range(columns)]
    for rank in range(ranks):
        assert 4 * sum(a == rank != b for a, b in moves) == sent(4 * rows * columns, ranks)


def test_communication_is_that_of_the_librarys_own_count() -> None:
    """Rotated on 2 ranks of tests/distributed/checks_rotated.py: what its counter is held to there, in float32."""
    shape = decoder("two ranks", "", width=8, layers=1, heads=4, inner=16, vocab=8, tokens=1, context=8, gated=False, rotary=False, gains=False)
    step = every_step(shape, Method("Rotated", hidden=8), ranks=2)
    assert step.reduced == 4 * (6 * 36 + 4 * 4 * 3 + 2 * 2 * 36)
    assert sent(step.exchanged, 2) == 4 * (2 - 1) / 2**2 * (2 * 64 + 2 * 128)
    refresh = at_refresh(shape, Method("Rotated", hidden=8), ranks=2)
    assert refresh.exchanged == 0 and 2 * refresh.reduced == 4 * (6 * 64 + 4 * 4 * 4 + 2 * 2 * 64)


def test_a_grad_norm_teleports_communication_is_that_of_the_librarys_own_count() -> None:
    """As checks_engine.py counts it for a model of these sizes, with a first moment besides, and in float32."""
    shape = decoder("even", "", width=16, layers=2, heads=4, inner=24, vocab=16, tokens=1, context=6, gains=False)
    whole, cut = (at_refresh(shape, Method(GRAD_NORM), ranks) for ranks in (2, 8))
    # a, b by row of two diagonals; S₋ − S₊ of two dense joints with 4 heads of 4, in each of two layers
    assert whole.reduced == cut.reduced == 4 * 2 * (2 * 24 + 2 * 4 * 4**2)
    # on 2 ranks no head is cut; on 8 q, k and v are: once for the sums, then they, their gradients and moments there and back
    assert (whole.exchanged, cut.exchanged) == (0, 4 * 2 * 3 * 16 * 16 * 7)


def test_work_adds_up_and_what_is_alone_does_not() -> None:
    a, b = Work(products=1.0, alone_products=5.0), Work(products=2.0, alone_products=3.0, reduced=1.0)
    assert a + b == Work(products=3.0, alone_products=5.0, reduced=1.0)
    assert math.isclose((a + b).flops, 3.0)
