"""The papers' experiments, one module a study: `python -m teleport_fast reproduce NAME`."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

NAMES = (
    "rosenbrock",
    "booth",
    "mlp",
    "convergence",
    "sharpness",
    "curvature",
    "correlation",
    "learned",
    "level-set",
    "theory",
)


def written() -> list[str]:
    """The names of the studies that have a module.

    >>> "booth" in written()
    True
    """
    return [name for name in NAMES if find_spec(_module(name)) is not None]


def study_named(name: str) -> ModuleType:
    """The module of a study; ValueError for an unknown name or one that is not written yet."""
    if name not in NAMES:
        raise ValueError(f"study must be one of {', '.join([*NAMES, 'all'])}, got {name!r}; pass one of these names")
    if name not in written():
        raise ValueError(f"study {name} is not written yet; there are {', '.join(written())}")
    return importlib.import_module(_module(name))


def _module(name: str) -> str:
    return f"{__name__}.{name.replace('-', '_')}"
