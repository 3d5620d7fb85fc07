"""English prose that a Debian machine has: licences, copyright notices and package descriptions, each paragraph once."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from functools import cache
from pathlib import Path

import torch

from teleport_fast.experiments.text import VALIDATION_SHARE, Text

# Shorter paragraphs are mostly names and years.
SHORTEST, LARGEST_FILE = 200, 400_000
FOLDERS = {
    "/usr/share/common-licenses": ("*",),
    "/usr/share/doc": ("*/copyright", "*/README*", "*/NEWS*"),
    sysconfig.get_paths()["purelib"]: ("*.dist-info/METADATA", "*.dist-info/licenses/**/*", "*.dist-info/LICENSE*"),
}


@cache
def english(seed: int = 0) -> Text:
    """The machine's English as bytes, a twentieth of the files held out; no paragraph is twice in it, so none in both parts.

    Raises ValueError where fewer than two files with prose are found.
    """
    paths = [path for folder, patterns in FOLDERS.items() for pattern in patterns for path in Path(folder).glob(pattern)]
    seen: set[bytes] = set()
    contents: dict[Path, bytes] = {}
    for path in sorted(set(paths)):
        if not path.is_file() or path.suffix == ".gz" or path.stat().st_size > LARGEST_FILE:
            continue
        kept = [part for part in path.read_bytes().split(b"\n\n") if len(part) >= SHORTEST and b"\0" not in part and _new(part, seen)]
        if kept:
            contents[path] = b"\n\n".join(kept)
    if len(contents) < 2:
        where = ", ".join(FOLDERS)
        raise ValueError(f"English text must be in at least two files, got {len(contents)} under {where}; install a package with some")
    files = sorted(contents)
    random.Random(seed).shuffle(files)
    cut = max(1, len(files) // VALIDATION_SHARE)
    held_out, kept = files[:cut], files[cut:]
    train, validation = (bytearray(b"\n\n".join(contents[path] for path in some)) for some in (kept, held_out))
    source = "licences, copyright notices and package descriptions"
    return Text(
        torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(validation, dtype=torch.uint8), tuple(kept), tuple(held_out), source
    )


def _new(paragraph: bytes, seen: set[bytes]) -> bool:
    """Whether its words, whatever the line breaks and comment signs, were not seen before."""
    words = b" ".join(word for word in paragraph.lower().split() if word.isalpha())
    key = hashlib.sha256(words).digest()
    if key in seen:
        return False
    seen.add(key)
    return True
