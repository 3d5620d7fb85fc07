"""Who finds the symmetries: builders propose joints for the modules they know, a numeric probe decides."""

from teleport_fast.discovery.find import find_symmetries
from teleport_fast.discovery.fold import FoldedGains, fold_norm_gains_

__all__ = ["FoldedGains", "find_symmetries", "fold_norm_gains_"]
