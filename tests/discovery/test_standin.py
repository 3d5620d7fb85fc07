"""One block of each kind stands for all: the same joints as on the whole model, on meta too, and little memory."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport_fast import Symmetries, find_symmetries
from teleport_fast.discovery.standin import ROWS, stand_in
from teleport_fast.experiments.gpt import GPT, GPTConfig


def table(symmetries: Symmetries) -> dict[str, tuple[Any, ...]]:
    return {j.name: (j.group, j.heads, frozenset(j.plus), frozenset(j.minus)) for j in symmetries}


FAMILIES = ("gpt2", "gemma3", "t5", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_of_each_kind_tells_the_joints_of_all(family: str, zoo: ModuleType) -> None:
    pytest.importorskip("transformers")
    model, inputs = zoo.build(family)
    on_meta, _ = zoo.build(family, device="meta")
    whole = table(find_symmetries(model, inputs))
    assert table(find_symmetries(model, inputs, verify="blocks")) == whole
    found = find_symmetries(on_meta)
    assert table(found) == whole
    assert all(finding.deviation <= 1e-10 for finding in found.findings if finding.status == "found")
    tensors = {**dict(on_meta.named_buffers()), **dict(on_meta.named_parameters())}
    for joint in found:
        joint.check_shapes(tensors)
    assert all(parameter.is_meta for parameter in on_meta.parameters())


def test_what_holds_for_the_last_block_alone_is_not_said_of_all(zoo: ModuleType) -> None:
    """BERT's last norm is read by the head alone, the others also go on along the stream."""
    pytest.importorskip("transformers")
    model, inputs = zoo.build("bert")
    whole, blocks = (table(find_symmetries(model, inputs, verify=verify)) for verify in (True, "blocks"))
    assert set(whole) - set(blocks) == {"bert.encoder.layer.1.output.LayerNorm.readers"}
    assert all(whole[name] == row for name, row in blocks.items())
    why = [f.reason for f in find_symmetries(model, inputs, verify="blocks").findings if "single block" in f.reason]
    assert set(why) == {"holds for a single block, not for a chain of them"}


def gpt(**changes: Any) -> GPT:
    sizes = {"vocab": 200, "context": 8, "d_model": 16, "layers": 5, "heads": 4, "hidden": 12}
    return GPT(GPTConfig(**{**sizes, **changes}))


def test_the_stand_in_holds_one_block_and_a_part_of_the_vocabulary() -> None:
    model = gpt(tied=True)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    small = stand_in(model)
    assert small.blocks == {"blocks.0.": [f"blocks.{i}." for i in range(5)]}
    assert len(small.model.blocks) == 1
    assert small.model.token.weight.shape == (ROWS, 16)
    assert torch.equal(small.model.token.weight, model.token.weight[:ROWS].double())
    assert small.model.head.weight is small.model.token.weight
    assert len(model.blocks) == 5
    for name, parameter in model.named_parameters():
        identity, value = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, value)


def test_blocks_of_another_kind_are_kept() -> None:
    model = gpt()
    model.blocks[2].mlp = copy.deepcopy(gpt(hidden=20).blocks[0].mlp)
    model.blocks[4].attention.o.weight.requires_grad_(False)
    small = stand_in(model)
    assert list(small.blocks.values()) == [["blocks.0.", "blocks.1.", "blocks.3."], ["blocks.2."], ["blocks.4."]]
    whole, blocks = find_symmetries(model), find_symmetries(model, verify="blocks")
    assert table(blocks) == table(whole)
    assert "blocks.4.attention.value-output" not in blocks
    assert "as in blocks.0" in blocks.explain()


class Reversed(nn.Module):
    """Not the block that it looks like: a plain attribute tells it apart."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign, self.up, self.down = sign, nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)) if self.sign > 0 else torch.tanh(self.up(x)))


def test_a_plain_attribute_makes_another_kind() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.blocks = nn.ModuleList([nn.Sequential(Reversed(sign)) for sign in (1.0, -1.0, 1.0)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block(x)
            return x

    found = find_symmetries(Model(), verify="blocks")
    assert [joint.name for joint in found if joint.kind == "up-down"] == ["blocks.0.0.up-down", "blocks.2.0.up-down"]


def test_ids_are_kept_within_the_rows_that_are_left() -> None:
    model = gpt()
    ids = torch.randint(100, 200, (2, 8))
    assert table(find_symmetries(model, ids, verify="blocks")) == table(find_symmetries(model, ids))


def test_another_word_for_verify_is_refused() -> None:
    with pytest.raises(ValueError, match='verify must be True, False or "blocks", got \'all\''):
        find_symmetries(gpt(), verify="all")


def test_most_of_a_billion_parameters_on_meta_cost_one_block() -> None:
    """Time and memory of a search at this size: bench/discovery/meta.py."""
    with torch.device("meta"):
        model = gpt(vocab=50_000, d_model=2048, hidden=4096, layers=24)
    assert sum(p.numel() for p in model.parameters()) > 7e8
    small = stand_in(model)
    block, outside = 4 * 2048**2 + 2 * 2048 * 4096, 3 * ROWS * 2048
    assert sum(p.numel() for p in small.model.parameters()) < block + outside


class Masked(nn.Module):
    """A causal sum over two layers, with a mask, a padding row beyond the rows that a stand-in keeps, and a flag."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS + 9, 6, padding_idx=ROWS + 2, device=device)
        self.alpha, self.omega = nn.Linear(6, 8, device=device), nn.Linear(8, 3, device=device)
        self.register_buffer("causal", torch.ones(5, 5, dtype=torch.bool, device=device).tril())
        self.register_buffer("position_ids", torch.arange(5, device=device).expand(1, -1))
        self.register_buffer("offset", torch.zeros(1, dtype=torch.int64, device=device))

    def forward(self, ids: Tensor, bent: bool) -> Tensor:
        y = self.table(ids + self.offset) + 0.1 * self.position_ids[..., None]
        y = self.alpha(torch.matmul(self.causal.to(y.dtype), y))
        return self.omega(y.tanh() if bent else y.relu())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_masks_positions_padding_and_flags_are_taken_over(device: str) -> None:
    model, ids = Masked(device), torch.arange(10).reshape(2, 5) + ROWS - 4
    small = stand_in(model)
    assert small.model.table.padding_idx is None and small.model.table.weight.shape[0] == ROWS
    assert torch.equal(small.model.causal, torch.ones(5, 5, dtype=torch.bool).tril())
    assert small.model.position_ids.tolist() == [[0, 1, 2, 3, 4]] and small.model.offset.tolist() == [0]
    for bent, expected in ((False, {"omega.up-down", "omega.neurons"}), (True, {"omega.neurons"})):
        found = find_symmetries(model, {"ids": ids, "bent": bent}, verify="blocks")
        assert {joint.name for joint in found if joint.width == 8} == expected
