"""Teleportation along parameter symmetries for PyTorch: find them, move along them, train faster."""

from teleport_fast import data_dependent, minima, objectives, ops
from teleport_fast.conditions import First, OffEigenvector, Plateau, WorthItsTime
from teleport_fast.discovery import FoldedGains, find_symmetries, fold_norm_gains_
from teleport_fast.minima import curvature, sharpness
from teleport_fast.ops.backend import backends, set_backend
from teleport_fast.optimizer import Teleport, attach
from teleport_fast.schedule import At, Every, Once, Schedule, StepInfo, When
from teleport_fast.symmetry import Joint, Symmetries, VerifyReport, View
from teleport_fast.teleporter import Teleporter, TeleportRecord

__version__ = "0.1.0"

__all__ = [
    "At",
    "Every",
    "First",
    "FoldedGains",
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
    "curvature",
    "data_dependent",
    "find_symmetries",
    "fold_norm_gains_",
    "minima",
    "objectives",
    "ops",
    "set_backend",
    "sharpness",
]
