"""BERT's nesting: the output projection of attention and MLP sits in a sibling module with its norm."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from teleport_fast.discovery.roles import (
    KEY,
    QUERY,
    VALUE,
    Attention,
    Mlp,
    Unusable,
    builder,
    find,
    join,
    separate_attention,
)


@builder
def nested_attention(name: str, module: nn.Module) -> Iterator[Attention | Unusable]:
    """A child with query, key and value (`self`, `attention`) beside a child `output` with a `dense` layer."""
    outer = getattr(module, "output", None)
    output = find(join(name, "output"), outer, ("dense",)) if isinstance(outer, nn.Module) else None
    if output is None:
        return
    for child in ("self", "attention"):
        inner = getattr(module, child, None)
        if isinstance(inner, nn.Module):
            query, key, value = (find(join(name, child), inner, names) for names in (QUERY, KEY, VALUE))
            if query is not None and key is not None and value is not None:
                yield separate_attention(name, inner, query, key, value, output)
                return


@builder
def nested_mlp(name: str, module: nn.Module) -> Iterator[Mlp]:
    """A child `intermediate` with a `dense` layer beside a child `output` with another."""
    inner, outer = getattr(module, "intermediate", None), getattr(module, "output", None)
    if not isinstance(inner, nn.Module) or not isinstance(outer, nn.Module):
        return
    up, down = find(join(name, "intermediate"), inner, ("dense",)), find(join(name, "output"), outer, ("dense",))
    if up is not None and down is not None and down.in_features == up.size:
        yield Mlp(name, up, down)
