"""The tasks by name. A task module has `variants(quick)`, the tasks that its name runs."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from bench.convergence.interface import Task

NAMES = ("factorisation", "scaled-start", "digits-mlp", "digits-cnn", "digits-vit", "gpt", "lora")


def module_of(name: str) -> str:
    """The dotted name of a task's module.

    >>> module_of("digits-mlp")
    'bench.convergence.tasks.digits_mlp'
    """
    return f"{__name__}.{name.replace('-', '_')}"


def written() -> list[str]:
    """The tasks that have a module."""
    return [name for name in NAMES if find_spec(module_of(name)) is not None]


def variants(name: str, quick: bool = False) -> tuple[Task, ...]:
    """A task's variants; "factorisation-k10" picks those whose name goes on from it. ValueError for an unknown name."""
    family = next((known for known in NAMES if name == known or name.startswith(f"{known}-")), None)
    if family is None or family not in written():
        raise ValueError(f"task must be one of {', '.join(written())}, got {name!r}; pass one of these names")
    every: tuple[Task, ...] = importlib.import_module(module_of(family)).variants(quick)
    chosen = tuple(task for task in every if f"{task.name}-".startswith(f"{name}-"))
    if not chosen:
        raise ValueError(f"task {family} has {', '.join(task.name for task in every)}, got {name!r}; pass one of these names")
    return chosen
