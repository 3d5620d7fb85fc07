"""Roles: which submodule of an attention block, an MLP or a chain plays which part, read off names and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

# Names under which published GPTs keep each part; the probe decides, so a name that means something else costs nothing.
_QUERY = ("q", "q_proj", "query", "wq", "c_q", "to_q", "q_lin", "Wq")
_KEY = ("k", "k_proj", "key", "wk", "c_k", "to_k", "k_lin", "Wk")
_VALUE = ("v", "v_proj", "value", "wv", "c_v", "to_v", "v_lin", "Wv")
_OUTPUT = ("o", "o_proj", "out_proj", "output", "out", "wo", "c_proj", "proj", "to_out", "dense", "out_lin", "Wo")
_FUSED = ("qkv", "qkv_proj", "c_attn", "in_proj", "Wqkv", "wqkv", "to_qkv", "query_key_value")
_UP = ("up", "up_proj", "fc1", "c_fc", "w3", "lin1", "linear1", "fc_in", "dense_h_to_4h", "fc", "wi", "w_in")
_DOWN = ("down", "down_proj", "fc2", "c_proj", "w2", "lin2", "linear2", "fc_out", "proj", "wo", "w_out",
         "dense_4h_to_h")
_GATE = ("gate", "gate_proj", "w1", "w_gate")
_HEADS = ("heads", "num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "nh")
_KV_HEADS = ("kv_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_key_value_heads")


@dataclass(frozen=True)
class Slot:
    """A part of a linear layer: its rows `start … start + size` (a fused layer holds several slots)."""

    layer: str
    module: nn.Linear
    start: int
    size: int

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)


@dataclass(frozen=True)
class Attention:
    """Query, key, value and output of one attention module; `problem` says why it cannot be used."""

    name: str
    query: Slot
    key: Slot
    value: Slot
    output: Slot
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.query.size // self.heads

    def reads(self) -> list[Slot]:
        return [self.query, self.key, self.value]


@dataclass(frozen=True)
class Mlp:
    """Up, optional gate, and down of one MLP; `chain` marks two neighbours of a Sequential that read no stream."""

    name: str
    up: Slot
    down: Slot
    gate: Slot | None = None
    chain: bool = False

    def reads(self) -> list[Slot]:
        return [self.up] if self.gate is None else [self.gate, self.up]


@dataclass(frozen=True)
class Unusable:
    """A module that looks like a role but cannot serve, and why."""

    name: str
    reason: str


def roles(model: nn.Module) -> Iterator[Attention | Mlp | Unusable]:
    """Every attention, MLP and chain of linear layers in the order of the model's modules."""
    for name, module in model.named_modules():
        attention = _attention(name, module)
        if attention is not None:
            yield attention
            continue
        mlp = _mlp(name, module)
        if mlp is not None:
            yield mlp
        elif isinstance(module, nn.Sequential):
            yield from _chain(name, module)


def _attention(name: str, module: nn.Module) -> Attention | Unusable | None:
    output = _linear(name, module, _OUTPUT)
    fused = _linear(name, module, _FUSED)
    parts = [_linear(name, module, names) for names in (_QUERY, _KEY, _VALUE)]
    if output is None or (fused is None and any(part is None for part in parts)):
        return None
    heads = _count(module, _HEADS)
    if heads is None:
        return Unusable(name, f"attention without a number of heads (looked for {', '.join(_HEADS)} on it)")
    kv_heads = _count(module, _KV_HEADS) or heads
    if fused is not None:
        head_dim = output.module.in_features // heads
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        if fused.size != sum(sizes):
            return Unusable(name, f"fused layer has {fused.size} rows, {heads} + 2·{kv_heads} heads need {sum(sizes)}")
        starts = [0, sizes[0], sizes[0] + sizes[1]]
        query, key, value = (Slot(fused.layer, fused.module, s, n) for s, n in zip(starts, sizes, strict=True))
    else:
        assert parts[0] and parts[1] and parts[2]
        query, key, value = parts[0], parts[1], parts[2]
        head_dim = query.size // heads
        if head_dim and kv_heads * head_dim != key.size and key.size % head_dim == 0:
            kv_heads = key.size // head_dim
    fits = (
        head_dim > 0
        and query.size == heads * head_dim
        and key.size == value.size == kv_heads * head_dim
        and output.module.in_features == query.size
        and heads % kv_heads == 0
    )
    if not fits:
        sizes_text = f"q {query.size}, k {key.size}, v {value.size}, output reads {output.module.in_features}"
        return Unusable(name, f"sizes do not fit {heads} heads and {kv_heads} key/value heads: {sizes_text}")
    return Attention(name, query, key, value, output, heads, kv_heads)


def _mlp(name: str, module: nn.Module) -> Mlp | None:
    up, down, gate = (_linear(name, module, names) for names in (_UP, _DOWN, _GATE))
    if up is None or down is None or down.module.in_features != up.size:
        return None
    if gate is not None and gate.size != up.size:
        return None
    return Mlp(name, up, down, gate)


def _chain(name: str, module: nn.Sequential) -> Iterator[Mlp]:
    """Linear layers of a Sequential with only parameter-free or slope-only modules between them."""
    previous: Slot | None = None
    for child, layer in module.named_children():
        if isinstance(layer, nn.Linear):
            here = _slot(f"{name}.{child}" if name else child, layer)
            if previous is not None and previous.size == layer.in_features:
                yield Mlp(f"{name}.{child}" if name else child, previous, here, chain=True)
            previous = here
        elif any(True for _ in layer.parameters()) and not isinstance(layer, nn.PReLU):
            previous = None


def _linear(prefix: str, module: nn.Module, names: tuple[str, ...]) -> Slot | None:
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Linear):
            return _slot(f"{prefix}.{name}" if prefix else name, child)
    return None


def _slot(layer: str, module: nn.Linear) -> Slot:
    return Slot(layer, module, 0, module.out_features)


def _count(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def canonical_names(model: nn.Module) -> dict[int, str]:
    """id of each parameter → its first name, so that tied parameters have one name."""
    return {id(parameter): name for name, parameter in model.named_parameters()}
