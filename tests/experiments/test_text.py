"""The text: files are on one side of the split only, batches are decided by the generator, folders are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teleport_fast.experiments.text import read_text, sample


def folder_of(root: Path, files: int) -> Path:
    for index in range(files):
        (root / f"{index:02}.txt").write_text(f"<{index:02}>" * 10)
    return root


def test_the_standard_library_is_split_by_file() -> None:
    text = read_text()
    assert set(text.train_files).isdisjoint(text.validation_files)
    assert len(text.validation_files) == (len(text.train_files) + len(text.validation_files)) // 20
    assert b"def " in text.train[:20_000].numpy().tobytes()
    assert not any({"site-packages", "test"} & set(path.parts) for path in text.train_files)


def test_no_byte_of_a_held_out_file_is_trained_on(tmp_path: Path) -> None:
    text = read_text(folder_of(tmp_path, 40))
    train, held_out = (part.numpy().tobytes().decode() for part in (text.train, text.validation))
    assert len(text.validation_files) == 2
    for path in text.validation_files:
        assert path.read_text() in held_out
        assert path.read_text()[:4] not in train
    for path in text.train_files:
        assert path.read_text() in train


def test_the_same_seed_gives_the_same_split_and_another_seed_another(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 40)
    assert read_text(folder).digest == read_text(folder).digest
    assert read_text(folder, seed=1).digest != read_text(folder).digest


def test_hidden_and_binary_files_are_left_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 3)
    (folder / ".hidden").write_text("secret")
    (folder / "image.bin").write_bytes(b"\x89PNG\0\0")
    text = read_text(folder)
    assert {path.name for path in text.train_files + text.validation_files} == {"00.txt", "01.txt", "02.txt"}


def test_a_missing_folder_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"folder must name a folder of text files, got '.*nowhere', which does not exist"
    ):
        read_text(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("text")
    with pytest.raises(ValueError, match=r"got '.*file.txt', which is not a folder; pass a folder"):
        read_text(path)


@pytest.mark.parametrize("files", [0, 1])
def test_a_folder_that_cannot_be_split_is_refused_with_a_remedy(tmp_path: Path, files: int) -> None:
    with pytest.raises(ValueError, match=rf"at least two text files, got {files} in .*; pass a folder"):
        read_text(folder_of(tmp_path, files))


def test_equal_generators_give_equal_batches_and_others_do_not() -> None:
    data = torch.arange(200).byte()
    first, again, other = (sample(data, torch.Generator().manual_seed(seed), 4, 8)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_targets_are_the_next_bytes_up_to_the_last_one() -> None:
    data = torch.arange(10).byte()
    ids, targets = sample(data, torch.Generator().manual_seed(0), 200, 8)
    assert torch.equal(targets, ids + 1)
    assert (ids.min(), targets.max()) == (0, 9)


def test_a_text_shorter_than_a_window_is_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match="got context=8 and 8 bytes; pass a smaller context"):
        sample(torch.arange(8).byte(), torch.Generator(), 1, 8)
