"""Real text without a download: the interpreter's own library sources, or a folder, as bytes split by file."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_SHARE = 20
REMEDY = "pass a folder that holds at least two text files, or leave it out for the standard library's sources"


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, (n,) uint8 each; no file is in both."""

    train: Tensor
    validation: Tensor
    train_files: tuple[Path, ...]
    validation_files: tuple[Path, ...]
    source: str

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of both parts: equal digests, equal text."""
        whole = hashlib.sha256()
        for part in (self.train, self.validation):
            whole.update(part.numpy().tobytes())
        return whole.hexdigest()[:16]


def read_text(folder: str | Path | None = None, seed: int = 0) -> Text:
    """The text under `folder` (None: the running interpreter's standard library), a twentieth of its files held out.

    Files are sorted, shuffled with `seed` and cut, so that the same folder gives the same split everywhere. Hidden
    files and files with a zero byte are left out. Raises ValueError where the folder is missing or holds fewer than
    two text files.

    >>> text = read_text()
    >>> set(text.train_files).isdisjoint(text.validation_files)
    True
    """
    if folder is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        source = "standard library sources"
        # Tests are the largest part and mostly tables of data; site-packages is not the interpreter's.
        found = [p for p in root.rglob("*.py") if not {"site-packages", "dist-packages", "test", "tests"} & {*p.parts}]
    else:
        root = Path(folder)
        source = str(folder)
        if not root.is_dir():
            state = "which is not a folder" if root.exists() else "which does not exist"
            raise ValueError(f"folder must name a folder of text files, got {source!r}, {state}; {REMEDY}")
        found = [p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    contents = {path: path.read_bytes() for path in sorted(found) if path.is_file()}
    files = [path for path, content in contents.items() if content and b"\0" not in content]
    if len(files) < 2:
        raise ValueError(f"folder must hold at least two text files, got {len(files)} in {str(root)!r}; {REMEDY}")
    random.Random(seed).shuffle(files)
    cut = max(1, len(files) // VALIDATION_SHARE)
    held_out, kept = files[:cut], files[cut:]
    return Text(
        _join([contents[path] for path in kept]),
        _join([contents[path] for path in held_out]),
        tuple(kept),
        tuple(held_out),
        source,
    )


def _join(parts: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)


def sample(data: Tensor, generator: torch.Generator, size: int, context: int) -> tuple[Tensor, Tensor]:
    """`size` windows at random places of `data` (n,) uint8: inputs and next bytes, both (size, context) int64.

    The generator alone decides the places, so that two arms with equal generators see the same batches. Raises
    ValueError where the text is shorter than one window.

    >>> ids, targets = sample(torch.arange(40).byte(), torch.Generator().manual_seed(0), size=2, context=8)
    >>> bool((targets == ids + 1).all())
    True
    """
    places = len(data) - context
    if places < 1:
        raise ValueError(
            f"context must be shorter than the text, got context={context} and {len(data)} bytes; "
            f"pass a smaller context or a folder with more text"
        )
    starts = torch.randint(places, (size,), generator=generator)
    windows = data[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]
