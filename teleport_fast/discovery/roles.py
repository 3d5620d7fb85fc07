"""Roles: which submodule of an attention block, an MLP or a chain plays which part, read off names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from teleport_fast.discovery.slots import Slot, slot_of

# Names under which published models keep each part; the probe decides, so a name that means something else costs nothing.
QUERY = ("q", "q_proj", "query", "wq", "c_q", "to_q", "q_lin", "Wq")
KEY = ("k", "k_proj", "key", "wk", "c_k", "to_k", "k_lin", "Wk")
VALUE = ("v", "v_proj", "value", "wv", "c_v", "to_v", "v_lin", "Wv")
OUTPUT = ("o", "o_proj", "out_proj", "output", "out", "wo", "c_proj", "proj", "to_out", "dense", "out_lin", "Wo")
FUSED = ("qkv", "qkv_proj", "c_attn", "in_proj", "Wqkv", "wqkv", "to_qkv", "query_key_value")
UP = ("up", "up_proj", "fc1", "c_fc", "w3", "lin1", "linear1", "fc_in", "dense_h_to_4h", "fc", "wi", "wi_1", "w_in")
DOWN = ("down", "down_proj", "fc2", "c_proj", "w2", "lin2", "linear2", "fc_out", "proj", "wo", "w_out",
        "dense_4h_to_h")
GATE = ("gate", "gate_proj", "w1", "w_gate", "wi_0")
GATE_UP = ("gate_up_proj", "gate_up", "w12")
QUERY_NORM = ("q_norm", "query_norm", "q_layernorm", "norm_q")
KEY_NORM = ("k_norm", "key_norm", "k_layernorm", "norm_k")
HEADS = ("heads", "num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "nh")
ROTATED = ("rotary_ndims", "rotary_dim", "rotary_emb_dim")
ROTATED_PART = ("partial_rotary_factor", "rotary_pct")
KV_HEADS = ("kv_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_key_value_heads")


class Role:
    """A group of layers with a known part in the model; subclasses say which layers read their input and write on."""

    name: str

    def reads(self) -> list[Slot]:
        """The slots that read what comes into the role, likeliest a norm's output."""
        raise NotImplementedError

    def writes(self) -> list[Slot]:
        """The slots that write what goes out."""
        raise NotImplementedError

    def inner(self) -> list[Slot]:
        """The slots that write or read a normalised space within the role (latent attention)."""
        return []


@dataclass(frozen=True)
class Attention(Role):
    """Query, key, value and output of one attention module.

    `others` holds (query, key, value) of a fused layer under its other possible layouts; `norms` are the modules that
    queries and keys pass through.
    """

    name: str
    query: Slot
    key: Slot
    value: Slot
    output: Slot
    heads: int
    kv_heads: int
    others: tuple[tuple[Slot, Slot, Slot], ...] = ()
    norms: tuple[tuple[str, nn.Module], ...] = ()
    rotary: tuple[int, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.query.size // self.heads

    def layouts(self) -> list[tuple[Slot, Slot, Slot]]:
        return [(self.query, self.key, self.value), *self.others]

    def reads(self) -> list[Slot]:
        return [self.query, self.key, self.value]

    def writes(self) -> list[Slot]:
        return [self.output]


@dataclass(frozen=True)
class Mlp(Role):
    """Up, optional gate, and down of one MLP; `chain` marks two neighbours of a Sequential that read no stream.

    `swapped`: a fused gate and up whose order is not known, so that the probe tries both.
    """

    name: str
    up: Slot
    down: Slot
    gate: Slot | None = None
    chain: bool = False
    swapped: bool = False

    def reads(self) -> list[Slot]:
        return [self.up] if self.gate is None else [self.gate, self.up]

    def writes(self) -> list[Slot]:
        return [self.down]


@dataclass(frozen=True)
class Unusable:
    """A module that looks like a role but cannot serve, and why."""

    name: str
    reason: str


Builder = Callable[[str, nn.Module], Iterable["Role | Unusable"]]
_BUILDERS: list[Builder] = []


def builder(function: Builder) -> Builder:
    """Register a role builder: (module's name, module) → roles, none for a module that is not its kind.

    The builder registered last is asked first, so that a family's exception precedes the general rule; the first that
    yields a role has the module. Submodules are still visited.
    """
    _BUILDERS.insert(0, function)
    return function


def roles(model: nn.Module) -> Iterator[Role | Unusable]:
    """Every attention, MLP and chain of linear layers in the order of the model's modules."""
    import teleport_fast.discovery.families  # noqa: F401  (registers the exceptions)

    seen: set[tuple[type, frozenset[int]]] = set()
    for name, module in model.named_modules():
        for build in _BUILDERS:
            found = list(build(name, module))
            if found:
                for role in found:
                    if isinstance(role, Role):
                        layers = (type(role), frozenset(id(s.weight) for s in (*role.reads(), *role.writes())))
                        if layers[1] and layers in seen:  # an outer module has told the same layers apart already
                            continue
                        seen.add(layers)
                    yield role
                break


@builder
def chain(name: str, module: nn.Module) -> Iterator[Mlp]:
    """Linear layers of a Sequential with only parameter-free or slope-only modules between them."""
    if not isinstance(module, nn.Sequential):
        return
    previous: Slot | None = None
    for child, layer in module.named_children():
        here = slot_of(join(name, child), layer)
        if here is not None:
            if previous is not None and previous.size == here.in_features:
                yield Mlp(here.layer, previous, here, chain=True)
            previous = here
        elif any(True for _ in layer.parameters()) and not isinstance(layer, nn.PReLU):
            previous = None


@builder
def mlp(name: str, module: nn.Module) -> Iterator[Mlp]:
    down = find(name, module, DOWN)
    if down is None:
        return
    fused = find(name, module, GATE_UP)
    if fused is not None and fused.size == 2 * down.in_features:
        half = down.in_features
        gate, up = (Slot(fused.layer, fused.module, start, half) for start in (0, half))
        yield Mlp(name, up, down, gate, swapped=True)
        return
    lone, own_gate = find(name, module, UP), find(name, module, GATE)
    if lone is None or lone.layer == down.layer or down.in_features != lone.size:
        return
    if own_gate is None or own_gate.size == lone.size:
        yield Mlp(name, lone, down, own_gate)


@builder
def attention(name: str, module: nn.Module) -> Iterator[Attention | Unusable]:
    output = find(name, module, OUTPUT)
    fused = find(name, module, FUSED)
    query, key, value = (find(name, module, names) for names in (QUERY, KEY, VALUE))
    if output is None:
        return
    if fused is not None:
        yield fused_attention(name, module, fused, output)
    elif query is not None and key is not None and value is not None:
        yield separate_attention(name, module, query, key, value, output)


def separate_attention(
    name: str, module: nn.Module, query: Slot, key: Slot, value: Slot, output: Slot
) -> Attention | Unusable:
    """Attention of four layers of their own."""
    heads = count(module, HEADS)
    if heads is None:
        return _no_heads(name)
    kv_heads = count(module, KV_HEADS) or heads
    head_dim = query.size // heads
    if head_dim and kv_heads * head_dim != key.size and key.size % head_dim == 0:
        kv_heads = key.size // head_dim
    fits = (
        head_dim > 0
        and query.size == heads * head_dim
        and key.size == value.size == kv_heads * head_dim
        and output.in_features == query.size
        and heads % kv_heads == 0
    )
    if not fits:
        sizes_text = f"q {query.size}, k {key.size}, v {value.size}, output reads {output.in_features}"
        return Unusable(name, f"sizes do not fit {heads} heads and {kv_heads} key/value heads: {sizes_text}")
    return Attention(name, query, key, value, output, heads, kv_heads, (), norms(name, module), rotated(module, head_dim))


def fused_attention(name: str, module: nn.Module, fused: Slot, output: Slot) -> Attention | Unusable:
    """Attention whose query, key and value are rows of one layer: [q|k|v], or per key head [its queries, k, v]."""
    heads = count(module, HEADS)
    if heads is None:
        return _no_heads(name)
    kv_heads = count(module, KV_HEADS) or heads
    head_dim = output.in_features // heads
    group = heads // kv_heads
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    if fused.size != sum(sizes) or heads % kv_heads:
        return Unusable(name, f"fused layer has {fused.size} rows, {heads} + 2·{kv_heads} heads need {sum(sizes)}")
    adjacent = [0, sizes[0], sizes[0] + sizes[1]]
    within = [0, group * head_dim, (group + 1) * head_dim]
    stride = (group + 2) * head_dim
    query, key, value = (Slot(fused.layer, fused.module, s, n) for s, n in zip(adjacent, sizes, strict=True))
    q, k, v = (Slot(fused.layer, fused.module, s, n, stride) for s, n in zip(within, sizes, strict=True))
    others = ((q, k, v),) if kv_heads > 1 else ()
    return Attention(name, query, key, value, output, heads, kv_heads, others, norms(name, module), rotated(module, head_dim))


def _no_heads(name: str) -> Unusable:
    return Unusable(name, f"attention without a number of heads (looked for {', '.join(HEADS)} on it)")


def norms(name: str, module: nn.Module) -> tuple[tuple[str, nn.Module], ...]:
    """The norms of queries and keys, by name."""
    found = []
    for names in (QUERY_NORM, KEY_NORM):
        for child in names:
            norm = getattr(module, child, None)
            if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
                found.append((join(name, child), norm))
                break
    return tuple(found)


def rotated(module: nn.Module, width: int) -> tuple[int, ...]:
    """Even numbers of rotated dimensions below the head's width that the module or its config speaks of."""
    config = getattr(module, "config", None)
    owners = (module, config, getattr(config, "rope_parameters", None))
    values = [o.get(n) if isinstance(o, dict) else getattr(o, n, None) for o in owners for n in (*ROTATED, *ROTATED_PART)]
    numbers = [v if isinstance(v, int) else int(v * width) for v in values if isinstance(v, (int, float)) and v > 0]
    even = {n + odd for n in numbers for odd in ((0,) if n % 2 == 0 else (-1, 1))}
    return tuple(sorted(n for n in even if 0 < n < width))


def find(prefix: str, module: nn.Module, names: tuple[str, ...]) -> Slot | None:
    """The first child layer of those names, whole."""
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            slot = slot_of(join(prefix, name), child)
            if slot is not None:
                return slot
    return None


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def count(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first positive integer under those names on the module or its config."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def canonical_names(model: nn.Module) -> dict[int, str]:
    """id of each parameter, then of each buffer → its first name, so that tied parameters have one name."""
    names: dict[int, str] = {}
    tensors: Iterable[tuple[str, Tensor]] = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in tensors:
        names.setdefault(id(tensor), name)
    return names
