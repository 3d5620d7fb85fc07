"""What others teleport with, to compare against: any model, no symmetry asked (level set), or the null space of a layer's inputs."""

from teleport_fast.peers.level_set import LevelSetResult, level_set_teleport
from teleport_fast.peers.null_space import NullSpaceResult, null_space_teleport
from teleport_fast.peers.oracle import PeerResult

__all__ = ["LevelSetResult", "NullSpaceResult", "PeerResult", "level_set_teleport", "null_space_teleport"]
