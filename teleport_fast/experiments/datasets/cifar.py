"""CIFAR-10's binary version: six files of records, one byte of class and 3,072 of red, green and blue each."""

from __future__ import annotations

from pathlib import Path

import torch

from teleport_fast.experiments.datasets.images import Images, Split

TRAIN = tuple(f"data_batch_{index}.bin" for index in range(1, 6))
TEST = ("test_batch.bin",)
RECORD = 1 + 3 * 32 * 32


def read_cifar10(name: str, folder: Path) -> Images:
    """Both splits of a folder with the six files; ValueError that names what is missing or damaged.

    The Python version is refused: its batches are pickles, which can run any code when they are read.
    """
    missing = [file for file in TRAIN + TEST if not (folder / file).is_file()]
    if missing:
        pickled = (folder / "data_batch_1").is_file()
        why = "; data_batch_1 there is of the Python version, a pickle, which can run any code when read, and is not" if pickled else ""
        raise ValueError(f"{name} needs {', '.join(missing)} in {folder}{why}; unpack the binary version (cifar-10-binary.tar.gz) there")
    return Images(name, _split(folder, TRAIN), _split(folder, TEST), where=str(folder))


def _split(folder: Path, files: tuple[str, ...]) -> Split:
    records = []
    for file in files:
        content = bytearray((folder / file).read_bytes())
        if not content or len(content) % RECORD:
            raise ValueError(f"{folder / file} must hold records of {RECORD} bytes, got {len(content)} bytes; fetch it again")
        records.append(torch.frombuffer(content, dtype=torch.uint8).view(-1, RECORD))
    every = torch.cat(records)
    return Split(every[:, 1:].contiguous(), every[:, 0].long())
