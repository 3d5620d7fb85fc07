"""inspect's table counts every parameter once, and its picture draws equal blocks once."""

from __future__ import annotations

from pathlib import Path

import pytest

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.inspection.picture import draw, layout
from teleport_fast.inspection.table import COLUMNS, inspection

CONFIG = GPTConfig(context=8, d_model=16, layers=3, heads=2, tied=True)


def test_the_table_counts_touched_numbers_and_shares() -> None:
    model = GPT(CONFIG)
    symmetries = tf.find_symmetries(model)
    table = inspection(model, symmetries)
    assert table.parameters == sum(p.numel() for p in model.parameters())
    assert table.dim == symmetries.dim == sum(row.dim for row in table.joints)
    assert table.share == pytest.approx(table.dim / table.parameters)
    first = next(row for row in table.joints if row.kind == "value-output")
    assert first.touched == 2 * 16 * 16
    assert first.deviation is not None and first.deviation < 1e-10
    assert all(len(row.cells()) == len(COLUMNS) for row in table.joints)


def test_blocks_that_differ_in_their_index_alone_are_drawn_once() -> None:
    model = GPT(CONFIG)
    symmetries = tf.find_symmetries(model)
    rows, columns = layout(model, symmetries)
    assert sum(row.count for row in rows) == len(list(model.parameters()))
    assert sum(column.count for column in columns) == len(symmetries)
    values = next(row for row in rows if row.template == "blocks.*.attention.v.weight")
    assert (values.count, values.shape) == (3, (16, 16))
    value_output = next(column for column in columns if column.kind == "value-output")
    assert value_output.count == 3
    assert values in value_output.plus
    assert values not in value_output.minus


def test_a_block_with_another_shape_has_rows_of_its_own() -> None:
    model = GPT(CONFIG)
    model.blocks[1].mlp.up = type(model.blocks[1].mlp.up)(16, 24, bias=False)
    model.blocks[1].mlp.down = type(model.blocks[1].mlp.down)(24, 16, bias=False)
    rows, _ = layout(model, tf.find_symmetries(model))
    found = {(row.template, row.count) for row in rows if "mlp.up" in row.template}
    assert found == {("blocks.*.mlp.up.weight", 2), ("blocks.1.mlp.up.weight", 1)}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_a_file_of_its_kind(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install matplotlib")
    model = GPT(CONFIG)
    path = tmp_path / "new folder" / f"joints{suffix}"
    draw(model, tf.find_symmetries(model), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    with pytest.raises(ValueError, match=r"picture must end in .png, .svg, .pdf, got 'joints.jpg'"):
        draw(model, tf.find_symmetries(model), tmp_path / "joints.jpg")
