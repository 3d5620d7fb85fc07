"""Models as their matrices: what lies on the two sides of each, how many there are, and what share of the tokens each one sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Side:
    """One axis of a matrix, `heads` runs of `width`: the residual "stream", "heads", "whole" heads, "hidden" units, or "none"."""

    kind: str
    width: int
    heads: int = 1

    @property
    def size(self) -> int:
        return self.heads * self.width


@dataclass(frozen=True)
class Matrix:
    """`count` matrices of rows × columns that `layers` layers hold; `site`: those of one site read the same; `share` of the tokens."""

    name: str
    rows: Side
    columns: Side
    count: int
    layers: int = 1
    site: str = ""
    share: float = 1.0
    table: bool = False

    @property
    def entries(self) -> int:
        """Of one of them."""
        return self.rows.size * self.columns.size

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.rows, self.columns


@dataclass(frozen=True)
class View:
    """What a joint moves of one tensor: `entries`, along its "rows" or "columns", of which `rest` columns can be taken in parts;
    `counts`: its gradient is taken up."""

    tensor: str
    axis: str
    entries: int
    rest: int
    counts: bool = True


@dataclass(frozen=True)
class Joint:
    """`count` joints with `heads` heads of `width` each; group: "orthogonal", "linear", "rotary" or "diagonal"."""

    kind: str
    group: str
    width: int
    heads: int
    count: int
    views: tuple[View, ...]

    @property
    def stretches(self) -> bool:
        return self.group != "orthogonal"

    @property
    def turns(self) -> bool:
        return self.group != "diagonal"


@dataclass(frozen=True)
class Shape:
    """A decoder. `tokens`: of a step, all ranks together; `context`: of a sequence; `mixing`: widths of q·k and v, all heads."""

    name: str
    source: str
    width: int
    layers: int
    matrices: tuple[Matrix, ...]
    joints: tuple[Joint, ...]
    mixing: tuple[int, int]
    context: int
    tokens: int
    other: int = field(default=0)

    @property
    def parameters(self) -> int:
        """All of them; `other` are gains, biases and what else is no matrix."""
        return sum(matrix.count * matrix.entries for matrix in self.matrices) + self.other

    @property
    def active(self) -> float:
        """Parameters that a token meets in a product: the table of embeddings is looked up."""
        return sum(m.count * m.entries * m.share for m in self.matrices if not (m.table and m.rows.kind == "tokens"))

    @property
    def flops_per_token(self) -> float:
        """Forward and backward: 6 per active parameter, and of causal attention 6 per (q, k) pair's widths and layer, half of the pairs."""
        return 6 * self.active + 6 * self.layers * sum(self.mixing) * self.context / 2

    def turned(self) -> Iterator[Matrix]:
        return (matrix for matrix in self.matrices if not matrix.table)


def decoder(
    name: str,
    source: str,
    *,
    width: int,
    layers: int,
    heads: int,
    inner: int,
    vocab: int,
    tokens: int,
    context: int,
    kv_heads: int | None = None,
    head: int | None = None,
    gated: bool = True,
    rotary: bool = True,
    positions: int = 0,
    gains: bool = True,
) -> Shape:
    """Llama's layout (gated, rotary, RMSNorm), or the demo's: an MLP without gate, learned positions, norms without gains."""
    kv_heads, head = kv_heads or heads, head or width // heads
    stream = Side("stream", width)
    q, kv, hidden = Side("heads", head, heads), Side("heads", head, kv_heads), Side("hidden", inner)
    attention = [
        Matrix("q", q, stream, layers, layers, "attention"),
        Matrix("k", kv, stream, layers, layers, "attention"),
        Matrix("v", kv, stream, layers, layers, "attention"),
        Matrix("o", stream, q, layers, layers),
    ]
    mlp = [Matrix("gate", hidden, stream, layers, layers, "mlp")] if gated else []
    mlp += [Matrix("up", hidden, stream, layers, layers, "mlp"), Matrix("down", stream, hidden, layers, layers)]
    tables = [Matrix("embed", Side("tokens", vocab), stream, 1, table=True), Matrix("head", Side("none", vocab), stream, 1, table=True)]
    if positions:
        tables.append(Matrix("position", Side("tokens", positions), stream, 1, table=True))
    matrices = (*attention, *mlp, *tables)
    wide, narrow, grouped = q.size * width, kv.size * width, max(heads // kv_heads, width)
    form = "rotary" if rotary else "linear"
    joints = [
        stream_joint(width, matrices),
        Joint("value-output", "linear", head, kv_heads, layers, (View("v", "rows", narrow, width), View("o", "columns", wide, grouped))),
        Joint("query-key", form, head, kv_heads, layers, (View("q", "rows", wide, grouped), View("k", "rows", narrow, width))),
        neurons("", inner, width, layers),
    ]
    if gains:
        joints += [
            readers("attention", width, layers, q.size + 2 * kv.size),
            readers("mlp", width, layers, (2 if gated else 1) * inner),
            readers("head", width, 1, vocab),
        ]
    other = (2 * layers + 1) * width if gains else 0
    return Shape(name, source, width, layers, matrices, tuple(joints), (q.size, q.size), context, tokens, other)


def mixture(
    name: str,
    source: str,
    *,
    width: int,
    layers: int,
    dense_layers: int,
    heads: int,
    q_rank: int,
    kv_rank: int,
    nope: int,
    rope: int,
    value: int,
    inner: int,
    expert: int,
    experts: int,
    active: int,
    shared: int,
    vocab: int,
    tokens: int,
    context: int,
) -> Shape:
    """DeepSeek-V3's layout: latent attention in every layer, a dense MLP in the first ones, routed and shared experts in the others."""
    stream, sparse = Side("stream", width), layers - dense_layers
    q_latent, kv_latent = Side("whole", q_rank), Side("whole", kv_rank)
    hidden, small = Side("hidden", inner), Side("hidden", expert)
    routed = sparse * experts
    matrices = (
        Matrix("q_a", q_latent, stream, layers, layers, "attention"),
        Matrix("q_b", Side("heads", nope + rope, heads), q_latent, layers, layers),
        Matrix("kv_a", Side("whole", kv_rank + rope), stream, layers, layers, "attention"),
        Matrix("kv_b", Side("heads", nope + value, heads), kv_latent, layers, layers),
        Matrix("o", stream, Side("heads", value, heads), layers, layers),
        *(Matrix(n, hidden, stream, dense_layers, dense_layers, "mlp") for n in ("gate", "up")),
        Matrix("down", stream, hidden, dense_layers, dense_layers),
        Matrix("router", Side("none", experts), stream, sparse, sparse),
        *(Matrix(f"expert {n}", small, stream, routed, sparse, "expert", active / experts) for n in ("gate", "up")),
        Matrix("expert down", stream, small, routed, sparse, "", active / experts),
        *(Matrix(f"shared {n}", Side("hidden", shared * expert), stream, sparse, sparse, "shared") for n in ("gate", "up")),
        Matrix("shared down", stream, Side("hidden", shared * expert), sparse, sparse),
        Matrix("embed", Side("tokens", vocab), stream, 1, table=True),
        Matrix("head", Side("none", vocab), stream, 1, table=True),
    )
    keys = View("kv_b", "rows", heads * nope * kv_rank, kv_rank)
    values = View("kv_b", "rows", heads * value * kv_rank, kv_rank), View("o", "columns", heads * value * width, width)
    phases = View("q_b", "rows", heads * rope * q_rank, max(heads, q_rank)), View("kv_a", "rows", rope * width, width)
    joints = (
        stream_joint(width, matrices),
        Joint("value-output", "linear", value, heads, layers, values),
        Joint("query-key", "linear", nope, heads, layers, (View("q_b", "rows", heads * nope * q_rank, q_rank), keys)),
        Joint("query-key-rotary", "rotary", rope, 1, layers, phases),
        neurons("", inner, width, dense_layers),
        neurons("expert ", expert, width, routed),
        neurons("shared ", shared * expert, width, sparse),
        readers("attention", width, layers, q_rank + kv_rank + rope),
        readers("mlp", width, dense_layers, 2 * inner),
        readers("experts", width, sparse, experts + 2 * expert * (experts + shared)),
        readers("head", width, 1, vocab),
        readers("q latent", q_rank, layers, heads * (nope + rope)),
        readers("kv latent", kv_rank, layers, heads * (nope + value)),
    )
    other = (2 * layers + 1) * width + layers * (q_rank + kv_rank) + sparse * experts
    mixing = (heads * (nope + rope), heads * value)
    return Shape(name, source, width, layers, matrices, joints, mixing, context, tokens, other)


def stream_joint(width: int, matrices: tuple[Matrix, ...]) -> Joint:
    """One rotation of everything that reads or writes the residual stream; tables turn along and are not taken up."""
    views = tuple(
        View(m.name, axis, m.count * m.entries, other.size, not m.table)
        for m in matrices
        for axis, side, other in (("rows", m.rows, m.columns), ("columns", m.columns, m.rows))
        if side.kind == "stream"
    )
    return Joint("residual", "orthogonal", width, 1, 1, views)


def neurons(prefix: str, inner: int, width: int, count: int) -> Joint:
    views = View(f"{prefix}up", "rows", inner * width, width), View(f"{prefix}down", "columns", inner * width, width)
    return Joint("up-down", "diagonal", inner, 1, count, views)


def readers(name: str, width: int, count: int, rows: int) -> Joint:
    """The gain of a norm against the `rows` rows that read it."""
    return Joint("norm-readers", "diagonal", width, 1, count, (View("gain", "rows", width, 1), View(name, "columns", rows * width, rows)))


LLAMA_7B = decoder(
    "7B", "Llama-2-7B, arXiv 2307.09288, table 1; a batch of 4M tokens, section 2.2",
    width=4096, layers=32, heads=32, inner=11008, vocab=32000, tokens=4 * 2**20, context=4096,
)  # fmt: skip
LLAMA_70B = decoder(
    "70B", "Llama-3-70B, arXiv 2407.21783, table 3; a batch of 8M tokens, section 3.4.1",
    width=8192, layers=80, heads=64, kv_heads=8, inner=28672, vocab=128256, tokens=8 * 2**20, context=8192,
)  # fmt: skip
DEEPSEEK_V3 = mixture(
    "600B mixture", "DeepSeek-V3, arXiv 2412.19437, section 4.2; a batch of 15,360 sequences of 4,096 tokens",
    width=7168, layers=61, dense_layers=3, heads=128, q_rank=1536, kv_rank=512, nope=128, rope=64, value=128, inner=18432,
    expert=2048, experts=256, active=8, shared=1, vocab=129280, tokens=15360 * 4096, context=4096,
)  # fmt: skip
MODELS = (LLAMA_7B, LLAMA_70B, DEEPSEEK_V3)
