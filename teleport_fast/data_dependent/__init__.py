"""The papers' data-dependent symmetry: GL(h) acting on an MLP's hidden layers on a fixed batch."""

from teleport_fast.data_dependent.action import MLPAction
from teleport_fast.data_dependent.activation import Activation, leaky_relu
from teleport_fast.data_dependent.losses import CrossEntropy, SquaredError
from teleport_fast.data_dependent.report import MoveReport, RankWarning, RoundOffWarning, Teleported, TeleportReport
from teleport_fast.data_dependent.state import carry_state_, reset_state_
from teleport_fast.data_dependent.train import teleport_

__all__ = [
    "Activation",
    "CrossEntropy",
    "MLPAction",
    "MoveReport",
    "RankWarning",
    "RoundOffWarning",
    "SquaredError",
    "TeleportReport",
    "Teleported",
    "carry_state_",
    "leaky_relu",
    "reset_state_",
    "teleport_",
]
