"""Sides: what proven symmetries, names and shapes say about a matrix, and what the table and the memory then show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.optim import Rotated
from teleport_fast.optim.names import is_table, layer, role, site


def rows_of(optimizer: Rotated) -> dict[str, list[str]]:
    """The table's cells by parameter."""
    lines = optimizer.table().splitlines()
    starts = [lines[0].index(title) for title in ("parameter", "shape", "rows", "columns", "why not")]
    cut = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return {line[cut[0]].strip(): [line[part].strip() for part in cut[1:]] for line in lines[2:-1]}


def meta(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]


LLAMA = {
    "model.embed_tokens.weight": (50, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (20, 8),
    "model.layers.0.mlp.up_proj.weight": (20, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 20),
    "model.layers.0.input_layernorm.weight": (8,),
    "lm_head.weight": (50, 8),
}


def llama(**changes: Any) -> Rotated:
    parameters = meta(*LLAMA.values())
    return Rotated(list(zip(LLAMA, parameters, strict=True)), **changes)


def test_names_decide_a_square_matrix_and_tables() -> None:
    rows = rows_of(llama(hidden=False))
    assert rows["model.layers.0.self_attn.q_proj.weight"] == ["8 x 8", "all heads 8", "stream 8", ""]
    assert rows["model.layers.0.self_attn.k_proj.weight"] == ["4 x 8", "all heads 4", "stream 8", ""]
    assert rows["model.layers.0.self_attn.o_proj.weight"] == ["8 x 8", "stream 8", "all heads 8", ""]
    assert rows["model.layers.0.mlp.gate_proj.weight"] == ["20 x 8", "-", "stream 8", "rows: hidden=False"]
    assert rows["model.layers.0.mlp.down_proj.weight"] == ["8 x 20", "stream 8", "-", "columns: hidden=False"]
    assert rows["model.embed_tokens.weight"] == ["50 x 8", "adamw", "", "embedding or head"]
    assert rows["lm_head.weight"] == ["50 x 8", "adamw", "", "embedding or head"]
    assert rows["model.layers.0.input_layernorm.weight"] == ["8", "adamw", "", "no matrix"]


def test_options_and_patterns_change_sides() -> None:
    rows = rows_of(llama(hidden=True, heads=False, max_side=10, sides={"*.k_proj.weight": ("heads:2", "none")}))
    assert rows["model.layers.0.mlp.up_proj.weight"][1:] == ["-", "stream 8", "rows: 20 is above max_side=10"]
    assert rows["model.layers.0.self_attn.q_proj.weight"][1:] == ["-", "stream 8", "rows: heads=False"]
    assert rows["model.layers.0.self_attn.k_proj.weight"][1:] == ["heads 2 x 2", "-", "columns: left as it is"]
    none = rows_of(llama(max_side=2, stream="none"))
    reason = "rows: 8 is above max_side=2; columns: stream='none'"
    assert none["model.layers.0.self_attn.q_proj.weight"] == ["8 x 8", "adamw", "", reason]


def test_what_has_nothing_to_turn_is_left_and_says_so() -> None:
    shapes = {"empty.up_proj.weight": (0, 8), "layers.0.mlp.up_proj.weight": (20, 1), "layers.0.mlp.down_proj.weight": (1, 20)}
    rows = rows_of(Rotated(list(zip(shapes, meta(*shapes.values()), strict=True)), hidden=5))
    assert rows["empty.up_proj.weight"] == ["0 x 8", "adamw", "", "no entries"]
    assert rows["layers.0.mlp.up_proj.weight"][1:] == ["hidden 4 x 5", "-", "columns: one entry has nothing to turn"]


def test_a_hidden_side_without_a_fitting_block_is_left_and_says_so() -> None:
    rows = rows_of(llama(hidden=6, max_side=10))
    assert rows["model.layers.0.mlp.up_proj.weight"][1:3] == ["hidden 4 x 5", "stream 8"]
    assert rows["model.layers.0.mlp.down_proj.weight"][1:3] == ["stream 8", "hidden 4 x 5"]
    rows = rows_of(llama(hidden=3))
    assert rows["model.layers.0.mlp.up_proj.weight"][1:] == ["hidden 10 x 2", "stream 8", ""]
    prime = Rotated([("up.weight", meta((23, 8))[0]), ("q.weight", meta((8, 8))[0])], hidden=8)
    assert rows_of(prime)["up.weight"][3] == "rows: 23 has no divisor near hidden=8"


def test_symmetries_tell_heads_and_also_where_parameters_have_no_names() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=13, context=6, d_model=8, layers=1, heads=2, hidden=12))
    found = tf.find_symmetries(model)
    named, plain = Rotated(model.named_parameters(), symmetries=found), Rotated(model.parameters(), symmetries=found)
    assert rows_of(named)["blocks.0.attention.o.weight"] == ["8 x 8", "stream 8", "heads 2 x 4", ""]
    assert plain.table() == named.table()
    shapes_alone = rows_of(Rotated(model.parameters()))
    assert shapes_alone["group 0, parameter 2"] == ["8 x 8", "stream 8", "stream 8", ""]
    assert shapes_alone["group 0, parameter 0"] == ["13 x 8", "-", "stream 8", "rows: left as it is"]
    every = rows_of(Rotated(model.parameters(), hidden=True))
    assert every["group 0, parameter 0"] == ["13 x 8", "hidden 13", "stream 8", ""]


def test_sharing_by_site_needs_names() -> None:
    with pytest.raises(
        ValueError, match=r"stream='site' needs names, got plain parameters; pass model.named_parameters\(\)"
    ):
        Rotated(meta((4, 4)), stream="site")
    assert Rotated(meta((4, 4), (4, 4)), stream="model").memory().bases == 4 * 4 * 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": True},
        {"hidden": 4},
        {"stream": "site"},
        {"stream": "model", "basis_dtype": torch.bfloat16},
    ],
)
def test_memory_is_what_the_state_takes(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=13, context=6, d_model=8, layers=2, heads=2, hidden=12, bias=True))
    optimizer = Rotated(model.named_parameters(), symmetries=tf.find_symmetries(model), **options)
    said = optimizer.memory()
    model(torch.zeros(1, 6, dtype=torch.long)).square().sum().backward()
    optimizer.step()

    def taken(*endings: str) -> int:
        entries = [(k, v) for state in optimizer.state.values() for k, v in state.items() if isinstance(v, Tensor)]
        return sum(v.numel() * v.element_size() for k, v in entries if k.endswith(endings))

    assert (said.moments, said.bases) == (taken("exp_avg", "exp_avg_sq"), taken("_basis"))
    assert said.covariances == taken("_covariance") > 0
    assert said.total == said.moments + said.bases + said.covariances
    assert said.parameters == sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.attn.c_proj.weight", "writer"),
        ("layers.1.attention.in_proj_weight", "attention"),
        ("layers.1.feed_forward.w2.weight", "writer"),
        ("_orig_mod.module.layers.1.fc1.weight", "mlp"),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", "writer"),
        ("net.2.weight", None),
    ],
)
def test_roles_by_name(name: str, expected: str | None) -> None:
    assert role(name) == expected


def test_tables_sites_and_layers_by_name() -> None:
    tables = (
        "wte.weight",
        "transformer.wpe.weight",
        "tok_embeddings.weight",
        "output.weight",
        "module.head.weight",
        "score.weight",
    )
    assert all(map(is_table, tables))
    others = ("attention.output.dense.weight", "heads.0.q.weight", "blocks.0.q.weight", "multihead.out_proj.weight")
    assert not any(map(is_table, others))
    assert site("a.0.mlp.up.weight", "mlp") == site("a.0.mlp.gate.weight", "mlp") != site("a.1.mlp.up.weight", "mlp")
    assert site("a.0.q.weight", "attention") != site("a.0.up.weight", "mlp")
    assert (layer("h.10.q.weight"), layer("q.weight")) == ("h.10", "q.weight")
