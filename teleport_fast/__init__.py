"""Teleportation along parameter symmetries for PyTorch: find them, move along them, train faster."""

import importlib
import typing

from teleport_fast import objectives, ops
from teleport_fast.canonical import CanonicalReport, canonicalize
from teleport_fast.conditions import First, OffEigenvector, Plateau, WorthItsTime
from teleport_fast.discovery import FoldedGains, find_symmetries, fold_norm_gains_
from teleport_fast.history import History
from teleport_fast.ops.backend import backends, set_backend
from teleport_fast.optimizer import Teleport, attach
from teleport_fast.record import TeleportRecord
from teleport_fast.schedule import At, Every, Once, Schedule, StepInfo, When
from teleport_fast.symmetry import Joint, Symmetries, VerifyReport, View
from teleport_fast.teleporter import Teleporter

if typing.TYPE_CHECKING:
    from teleport_fast import data_dependent, integrations, minima, optim, peers
    from teleport_fast.minima import curvature, sharpness

__version__ = "0.1.0"

__all__ = [
    "At",
    "CanonicalReport",
    "Every",
    "First",
    "FoldedGains",
    "History",
    "Joint",
    "OffEigenvector",
    "Once",
    "Plateau",
    "Schedule",
    "StepInfo",
    "Symmetries",
    "Teleport",
    "TeleportRecord",
    "Teleporter",
    "VerifyReport",
    "View",
    "When",
    "WorthItsTime",
    "attach",
    "backends",
    "canonicalize",
    "curvature",
    "data_dependent",
    "find_symmetries",
    "fold_norm_gains_",
    "integrations",
    "minima",
    "objectives",
    "ops",
    "optim",
    "peers",
    "set_backend",
    "sharpness",
]

# The papers' part is a third of the import's time and most scripts never touch it, so it is loaded at its first use.
_LAZY: dict[str, str | None] = {
    **dict.fromkeys(("data_dependent", "integrations", "minima", "optim", "peers")),
    **dict.fromkeys(("curvature", "sharpness"), "minima"),
}


# Hidden from type checkers, to which every name would exist otherwise.
if not typing.TYPE_CHECKING:

    def __getattr__(name: str) -> typing.Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        room = _LAZY[name]
        value = importlib.import_module(f"{__name__}.{room or name}")
        if room is not None:
            value = getattr(value, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names only: an editor's completion shows no module of the engine."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
