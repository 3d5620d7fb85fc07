"""MNIST's and Fashion-MNIST's four IDX files, plain or gzipped."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from teleport_fast.experiments.datasets.images import Images, Split

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
BYTES = 0x08


def read_idx_pairs(name: str, folder: Path) -> Images:
    """Both splits of a folder with the four files; ValueError that names what is missing or damaged."""
    missing = [file for pair in FILES.values() for file in pair if _path(folder, file) is None]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)} (or each with .gz) in {folder}; put them there")
    splits = {}
    for title, (images, labels) in FILES.items():
        pixels, classes = read_idx(folder, images, 3), read_idx(folder, labels, 1)
        if len(pixels) != len(classes):
            raise ValueError(f"{folder}: {images} holds {len(pixels)} images and {labels} {len(classes)} labels; take both from one set")
        splits[title] = Split(pixels.flatten(1), classes.long())
    return Images(name, splits["train"], splits["test"], where=str(folder))


def read_idx(folder: Path, file: str, dims: int) -> Tensor:
    """The uint8 tensor of an IDX file: 0, 0, type, dimensions, then each size as big-endian uint32, then the bytes."""
    path = _path(folder, file)
    assert path is not None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch it again") from None
    begin = 4 + 4 * dims
    if content[:4] != bytes((0, 0, BYTES, dims)) or len(content) < begin:
        raise ValueError(f"{path} must be an IDX file of {dims} dimensions of bytes, but begins with {content[:4].hex(' ')!r}; fetch it again")
    sizes = struct.unpack(f">{dims}I", content[4:begin])
    wanted = 1
    for size in sizes:
        wanted *= size
    if len(content) - begin != wanted:
        raise ValueError(f"{path} must hold {wanted} bytes of {' x '.join(map(str, sizes))}, got {len(content) - begin}; fetch it again")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[begin:].view(sizes)


def _path(folder: Path, file: str) -> Path | None:
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)
