"""What can move: groups, views of parameters, joints, and the symmetries of a model."""

from teleport_fast.symmetry.diagonal_groups import Diagonal, Permutation, PositiveDiagonal, Signs
from teleport_fast.symmetry.groups import DenseGroup, GeneralLinear, Group, Orthogonal, Rotary
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries
from teleport_fast.symmetry.verify import VerifyReport
from teleport_fast.symmetry.view import View

__all__ = [
    "DenseGroup",
    "Diagonal",
    "GeneralLinear",
    "Group",
    "Joint",
    "Orthogonal",
    "Permutation",
    "PositiveDiagonal",
    "Rotary",
    "Signs",
    "Symmetries",
    "VerifyReport",
    "View",
]
