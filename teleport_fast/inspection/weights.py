"""Weights on disk: safetensors with a note of what was done to them; never a pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

NOTE = "teleport_fast"
NEEDED = "reading and writing weights needs safetensors; pip install safetensors"
# What a transformers folder holds beside its weights: copied to where the moved weights go.
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")


def save(model: nn.Module, path: Path, note: dict[str, Any]) -> None:
    """Write the model's state (tied tensors once) to `path` (.safetensors), with `note` as JSON in its metadata.

    The file appears whole or not at all. Errors: ValueError for another suffix, ModuleNotFoundError without safetensors.
    """
    save_model = _safetensors("save_model")
    _check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        usual = part.stat().st_mode
        save_model(model, str(part), metadata={"format": "pt", NOTE: json.dumps(note)})
        part.chmod(usual)  # safetensors writes for its owner alone, where colleagues may read everything else
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_(model: nn.Module, path: Path) -> dict[str, Any] | None:
    """Read weights that `save` or transformers wrote into the model, in place; returns the note, None if there is none.

    Errors: ValueError for a missing file, another suffix, or weights that do not fit the model.
    """
    load_model = _safetensors("load_model")
    _check(path)
    if not path.is_file():
        raise ValueError(f"weights must name a file, got {str(path)!r}, which does not exist; check the path")
    try:
        load_model(model, str(path))
    except Exception as error:
        raise ValueError(f"weights of {str(path)!r} do not fit the model: {error}") from error
    return note_of(path)


def note_of(path: Path) -> dict[str, Any] | None:
    """What `save` noted in a safetensors file, None where nothing is noted."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata[NOTE]) if NOTE in metadata else None


def copy_beside(source: Path, target: Path) -> list[str]:
    """Copy a transformers folder's config and tokenizer files to `target`; returns their names. Weights stay behind.

    Links are followed within the folder, and in a hub cache within the model's part of it. Errors: ValueError for one that leads
    elsewhere.
    """
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    root = (source.resolve().parents[1] if source.resolve().parent.name == "snapshots" else source).resolve()
    for file in sorted({file for pattern in _BESIDE for file in source.glob(pattern)}):
        if file.is_file() and not file.name.endswith(".index.json"):
            if not file.resolve().is_relative_to(root):
                raise ValueError(
                    f"{str(file)!r} is a link to {str(file.resolve())!r}, outside of the folder, and is not copied; remove it"
                )
            shutil.copyfile(file, target / file.name)
            copied.append(file.name)
    return copied


def _safetensors(name: str) -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NEEDED) from error
    return getattr(safetensors.torch, name)


def _check(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"weights must be a .safetensors file, got {path.name!r}; other formats can run code on loading")
