"""A byte-level GPT in plain torch: the model that the demo trains and that symmetry discovery is tested on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MLPS = ("relu2", "relu", "gelu", "swiglu")
NORMS = ("rms", "layer")
POSITIONS = ("learned", "rotary")
ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and variants of a `GPT`; every field has the demo's value as its default.

    `kv_heads=None` gives every query head its own key and value head; `hidden=None` gives the MLP 4·d_model
    channels (SwiGLU: 8/3·d_model rounded up to a multiple of 8, the same number of parameters).

    Raises ValueError that names the field, its value and the remedy.

    >>> GPTConfig(d_model=32, heads=4).head_dim
    8
    """

    vocab: int = 256
    context: int = 128
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    mlp: str = "relu2"
    norm: str = "rms"
    gains: bool = False
    bias: bool = False
    fused_qkv: bool = False
    positions: str = "learned"
    tied: bool = False
    hidden: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab", "context", "d_model", "layers", "heads", "kv_heads", "hidden")
        for name in sizes:
            value = getattr(self, name)
            optional = name in ("kv_heads", "hidden")
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                remedy = "pass an integer of at least 1" + (" or None for the default" if optional else "")
                raise ValueError(f"{name} must be a positive integer, got {value!r}; {remedy}")
        for name, allowed in (("mlp", MLPS), ("norm", NORMS), ("positions", POSITIONS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}; pass one of these names")
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model must be a multiple of heads, got d_model={self.d_model} and heads={self.heads}; "
                f"pass a multiple of {self.heads}"
            )
        if self.heads % self.groups:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got heads={self.heads} and kv_heads={self.kv_heads}; "
                f"pass a divisor of {self.heads} as kv_heads"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"positions='rotary' needs an even d_model / heads, got {self.head_dim}; "
                f"pass another d_model or heads, or positions='learned'"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.heads

    @property
    def groups(self) -> int:
        """Number of key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def mlp_width(self) -> int:
        """Channels between `up` and `down`."""
        if self.hidden is not None:
            return self.hidden
        return 8 * math.ceil(self.d_model / 3) if self.mlp == "swiglu" else 4 * self.d_model


def _norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, elementwise_affine=config.gains)
    return nn.LayerNorm(config.d_model, elementwise_affine=config.gains, bias=config.gains and config.bias)


class Attention(nn.Module):
    """Causal self-attention, (batch, time, d_model) to the same; `qkv` holds the rows of q, k and v in this order."""

    rotation: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.groups, config.head_dim
        width, kv_width = config.d_model, config.groups * config.head_dim
        if config.fused_qkv:
            self.qkv = nn.Linear(width, width + 2 * kv_width, bias=config.bias)
        else:
            self.q = nn.Linear(width, width, bias=config.bias)
            self.k = nn.Linear(width, kv_width, bias=config.bias)
            self.v = nn.Linear(width, kv_width, bias=config.bias)
        self.o = nn.Linear(width, width, bias=config.bias)
        self.fused, self.rotary = config.fused_qkv, config.positions == "rotary"
        if self.rotary:
            frequency = ROTARY_BASE ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
            angle = torch.arange(config.context, dtype=torch.float64)[:, None] * frequency
            rotation = torch.stack((angle.cos(), angle.sin())).to(torch.get_default_dtype())
            self.register_buffer("rotation", rotation, persistent=False)

    def _rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.rotation[:, : x.shape[-2]].unbind()
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            kv_width = self.kv_heads * self.head_dim
            parts = self.qkv(x).split((self.heads * self.head_dim, kv_width, kv_width), -1)
        else:
            parts = self.q(x), self.k(x), self.v(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if self.rotary:
            q, k = self._rotate(q), self._rotate(k)
        shared = self.kv_heads != self.heads
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """`down(σ(up(x)))`, or `down(silu(gate(x)) · up(x))` for SwiGLU; `activation` names σ."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.mlp
        self.up = nn.Linear(config.d_model, config.mlp_width, bias=config.bias)
        if config.mlp == "swiglu":
            self.gate = nn.Linear(config.d_model, config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.up(x)
        if self.activation == "swiglu":
            z = F.silu(self.gate(x)) * z
        elif self.activation == "gelu":
            z = F.gelu(z)
        else:
            z = F.relu(z)
        out: Tensor = self.down(z.square() if self.activation == "relu2" else z)
        return out


class Block(nn.Module):
    """One pre-norm transformer block, (batch, time, d_model) to the same."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1, self.attention = _norm(config), Attention(config)
        self.norm2, self.mlp = _norm(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GPT(nn.Module):
    """A decoder-only transformer: token ids (batch, time) int64 to logits (batch, time, vocab).

    Raises ValueError when `ids` is not (batch, time) or is longer than the context.

    >>> model = GPT(GPTConfig(d_model=32, layers=1, context=16))
    >>> model(torch.zeros(2, 8, dtype=torch.long)).shape
    torch.Size([2, 8, 256])
    """

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.token = nn.Embedding(config.vocab, config.d_model)
        self.position = nn.Embedding(config.context, config.d_model) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = _norm(config)
        self.head = nn.Linear(config.d_model, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.token.weight
        self._initialise()

    def _initialise(self) -> None:
        """Unit-variance inputs, residual branches shrunk by sqrt(2·layers), and a head that starts at zero."""
        config = self.config
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith((".o", ".down"))
                shrink = math.sqrt(2 * config.layers) if writes else 1.0
                nn.init.normal_(module.weight, std=1 / (math.sqrt(module.in_features) * shrink))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # A tied table is the head as well and cannot start at zero: 1/sqrt(d) keeps its first logits near unit size.
        nn.init.normal_(self.token.weight, std=config.d_model**-0.5 if config.tied else 0.5)
        if self.position is not None:
            nn.init.normal_(self.position.weight, std=0.2 * config.d_model**-0.5 if config.tied else 0.1)
        if not config.tied:
            nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.ndim != 2:
            raise ValueError(f"ids must be (batch, time), got shape {tuple(ids.shape)}; add a batch dimension")
        time = ids.shape[1]
        if time > self.config.context:
            raise ValueError(f"ids must have at most {self.config.context} columns, got {time}; raise context")
        x = self.token(ids)
        if self.position is not None:
            x = x + self.position.weight[:time]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
