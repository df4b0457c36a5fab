"""Checkpoints: a run that is killed goes on as if nothing had happened."""

from sb3_trpo_ext.checkpoints.callback import Checkpoints
from sb3_trpo_ext.checkpoints.folder import DamagedError

__all__ = ["Checkpoints", "DamagedError"]
