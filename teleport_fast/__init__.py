"""Teleportation along parameter symmetries for PyTorch: find them, move along them, train faster."""

from teleport_fast import data_dependent, minima, objectives, ops, optim
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
    "FoldedGains",
    "Joint",
    "Once",
    "Schedule",
    "StepInfo",
    "Symmetries",
    "Teleport",
    "TeleportRecord",
    "Teleporter",
    "VerifyReport",
    "View",
    "When",
    "attach",
    "backends",
    "curvature",
    "data_dependent",
    "find_symmetries",
    "fold_norm_gains_",
    "minima",
    "objectives",
    "ops",
    "optim",
    "set_backend",
    "sharpness",
]
