"""T5's relative position bias: one table for all layers of a stack, so that their heads keep a common order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from teleport_fast.discovery.candidates import Candidate, Views, maker
from teleport_fast.discovery.roles import (
    KEY,
    OUTPUT,
    QUERY,
    VALUE,
    Attention,
    Role,
    builder,
    find,
    join,
    separate_attention,
)
from teleport_fast.discovery.slots import Slot
from teleport_fast.symmetry.diagonal_groups import Permutation
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View


@dataclass(frozen=True)
class BiasedStack(Role):
    """Self-attentions whose scores all add one bias per head, out of `table` (buckets, heads)."""

    name: str
    layers: tuple[Attention, ...]
    table: nn.Embedding

    def reads(self) -> list[Slot]:
        return []

    def writes(self) -> list[Slot]:
        return []


@builder
def biased_stack(name: str, module: nn.Module) -> Iterator[BiasedStack]:
    """A stack of blocks, the first of which holds the table as `relative_attention_bias`."""
    blocks = getattr(module, "block", None)
    if not isinstance(blocks, nn.ModuleList):
        return
    tables = [m for n, m in blocks.named_modules() if n.endswith("relative_attention_bias")]
    layers = []
    for child, inner in blocks.named_modules():
        parts = [find(join(f"{name}.block" if name else "block", child), inner, n) for n in (QUERY, KEY, VALUE, OUTPUT)]
        query, key, value, output = parts
        if query is None or key is None or value is None or output is None or "EncDec" in child:
            continue
        role = separate_attention(child, inner, query, key, value, output)
        if isinstance(role, Attention):
            layers.append(role)
    if len(tables) != 1 or not isinstance(tables[0], nn.Embedding) or not layers:
        return
    if all(role.heads == tables[0].embedding_dim for role in layers):
        yield BiasedStack(name, tuple(layers), tables[0])


@maker(BiasedStack)
def stack_candidates(role: Role, views: Views) -> Iterator[Candidate]:
    assert isinstance(role, BiasedStack)
    heads = role.layers[0].heads
    plus = [views.axis(role.table.weight, 1, heads)]
    minus: list[View] = []
    for layer in role.layers:
        for slot in (layer.query, layer.key, layer.value):
            plus += views.heads(slot, 1, heads, layer.head_dim)
        minus += views.head_columns(layer.output, 1, heads, layer.head_dim)
    name = join(role.name, "heads")
    joint = Joint(name, "heads", Permutation(heads), 1, heads, tuple(plus), tuple(minus))
    yield Candidate(name, "heads", (joint,), "heads are told apart by more than the shared position bias")
