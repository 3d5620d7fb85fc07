"""What a parameter's name says about it: an embedding or head, a reader of the residual stream, or a writer to it."""

from __future__ import annotations

import re

TABLE = re.compile(
    r"(^|\.)(\w*embed\w*|wte|wpe|token|position|lm_head|head|classifier|score)(\.|$)|^(module\.|_orig_mod\.)*output\.weight$"
)
ATTENTION = ("q", "k", "v", "qkv", "wq", "wk", "wv", "query", "key", "value", "query_key_value", "c_attn", "w_pack")
MLP = ("up", "gate", "gate_up", "w1", "w3", "fc1", "c_fc", "fc_in", "lin1", "wi", "wi_0", "wi_1", "dense_h_to_4h")
WRITERS = ("o", "out", "wo", "c_proj", "down", "w2", "fc2", "fc_out", "lin2", "dense", "dense_4h_to_h")
ATTENTION_WRITERS = ("o", "out")
LEAVES = (".weight", "_weight")


def plain(name: str) -> str:
    """The name without what wrappers put in front of it.

    >>> plain("_orig_mod.module.blocks.0.q.weight")
    'blocks.0.q.weight'
    """
    return re.sub(r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.)+", "", name)


def is_table(name: str) -> bool:
    """Whether the name is that of an embedding or a head.

    >>> is_table("model.embed_tokens.weight"), is_table("lm_head.weight"), is_table("blocks.0.attention.q.weight")
    (True, True, False)
    """
    return TABLE.search(plain(name)) is not None


def role(name: str) -> str | None:
    """ "attention" or "mlp" for a reader of the stream, "attention-writer" or "writer" for a writer, None if unknown.

    >>> [role(name) for name in ("h.0.self_attn.q_proj.weight", "h.0.mlp.down_proj.weight", "layers.3.weight")]
    ['attention', 'writer', None]
    """
    parts = plain(name).removesuffix(".weight").removesuffix("_weight").split(".")
    last = parts[-1].lower()
    for word in (last, last.removesuffix("_proj"), last.removeprefix("in_proj_")):
        if word == "in_proj" or word in ATTENTION:
            return "attention"
        if word in MLP:
            return "mlp"
        if word in WRITERS:
            return "attention-writer" if word in ATTENTION_WRITERS else "writer"
    return None


def site(name: str, kind: str | None) -> str:
    """Matrices with one input: those of a module that read for attention, or for the MLP; anything else is alone.

    >>> site("blocks.0.attention.q.weight", "attention"), site("blocks.0.attention.o.weight", "attention-writer")
    ('blocks.0.attention reads for attention', 'blocks.0.attention.o.weight')
    """
    if kind not in ("attention", "mlp"):
        return name
    parts = name.split(".")
    return f"{'.'.join(parts[: -2 if parts[-1] == 'weight' else -1])} reads for {kind}"


def layer(name: str) -> str:
    """The name up to its first number; a name without one is a layer of its own.

    >>> layer("model.layers.3.mlp.up_proj.weight"), layer("up.weight")
    ('model.layers.3', 'up.weight')
    """
    found = re.match(r"(.*?\.)?\d+(?=\.)", name)
    return found.group(0) if found else name
