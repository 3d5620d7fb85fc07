"""Latent attention (DeepSeek-V2, V3): queries, keys and values come out of low-rank spaces, each with a norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from teleport_fast.discovery.candidates import Candidate, Views, maker
from teleport_fast.discovery.roles import HEADS, OUTPUT, Role, builder, count, find, join
from teleport_fast.discovery.slots import Slot
from teleport_fast.symmetry.diagonal_groups import Permutation
from teleport_fast.symmetry.groups import GeneralLinear, Group, Rotary
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View


@dataclass(frozen=True)
class LatentAttention(Role):
    """The layers of latent attention; head rows are [plain | rotary] in `query`, [plain key | value] in `key_value`."""

    name: str
    query: Slot
    key_value: Slot
    down: Slot
    output: Slot
    query_down: Slot | None
    heads: int
    plain: int
    rotary: int
    value: int

    def reads(self) -> list[Slot]:
        return [self.query_down or self.query, self.down]

    def writes(self) -> list[Slot]:
        return [self.output]

    def inner(self) -> list[Slot]:
        rank = self.down.size - self.rotary
        latents = [self.key_value, replace(self.down, size=rank)]
        return latents if self.query_down is None else [*latents, self.query, self.query_down]


@builder
def latent_attention(name: str, module: nn.Module) -> Iterator[LatentAttention]:
    """`kv_a_proj_with_mqa` and `kv_b_proj`, queries direct or through `q_a_proj` and `q_b_proj`."""
    down, up = find(name, module, ("kv_a_proj_with_mqa",)), find(name, module, ("kv_b_proj",))
    query, query_down = find(name, module, ("q_b_proj", "q_proj")), find(name, module, ("q_a_proj",))
    output, heads = find(name, module, OUTPUT), count(module, HEADS)
    sizes = [count(module, (size,)) for size in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    plain, rotary, value = (size or 0 for size in sizes)
    if down is None or up is None or query is None or output is None or heads is None or not all(sizes):
        return
    if query.size == heads * (plain + rotary) and up.size == heads * (plain + value):
        yield LatentAttention(name, query, up, down, output, query_down, heads, plain, rotary, value)


@maker(LatentAttention)
def latent_candidates(role: Role, views: Views) -> Iterator[Candidate]:
    """V–O, Q–K of the plain part, Q–K of the rotary part that all heads' keys share, and the order of heads."""
    assert isinstance(role, LatentAttention)
    heads, plain, rotary, value = role.heads, role.plain, role.rotary, role.value
    q, kv = plain + rotary, plain + value

    def joint(part: str, group: Group, count: int, plus: tuple[View, ...], minus: tuple[View, ...]) -> Joint:
        return Joint(join(role.name, part), part, group, count, group.width, plus, minus)

    values = views.rows(replace(role.key_value, start=plain, head_stride=kv), heads, value)
    vo = joint("value-output", GeneralLinear(value), heads, values, views.columns(role.output, heads, value))
    yield Candidate(vo.name, vo.kind, (vo,), "something acts between value and output")
    queries = views.rows(replace(role.query, head_stride=q), heads, plain)
    keys = views.rows(replace(role.key_value, head_stride=kv), heads, plain)
    qk = joint("query-key", GeneralLinear(plain), heads, queries, keys)
    yield Candidate(qk.name, qk.kind, (qk,), "something acts between queries and keys")
    if rotary % 2 == 0:
        turned = tuple(
            replace(view, repeats=heads, repeat_stride=q)
            for view in views.rows(replace(role.query, start=plain), 1, rotary)
        )
        shared = views.rows(replace(role.down, start=role.down.size - rotary), 1, rotary)
        groups = [GeneralLinear(rotary), *(Rotary(rotary, rotary, layout) for layout in ("interleaved", "half"))]
        joints = tuple(joint("query-key-rotary", group, 1, turned, shared) for group in groups)
        yield Candidate(joints[0].name, "query-key-rotary", joints, "an unknown position encoding")
    if heads > 1:
        plus = views.heads(role.query, 1, heads, q) + views.heads(role.key_value, 1, heads, kv)
        order = joint("heads", Permutation(heads), 1, plus, views.head_columns(role.output, 1, heads, value))
        yield Candidate(order.name, order.kind, (order,), "heads are told apart by something else")
