"""Trust-region policy optimisation for Stable-Baselines3."""

from sb3_trpo_ext.algorithms.kl_ppo import KLPPOExt
from sb3_trpo_ext.algorithms.npg import NPGExt
from sb3_trpo_ext.algorithms.trpo import TRPOExt
from sb3_trpo_ext.checkpoints import Checkpoints
from sb3_trpo_ext.sampling.snapshot import SnapshotWrapper, check_snapshot, register_snapshot_adapter
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer

__version__ = "0.1.0"

__all__ = [
    "Checkpoints",
    "KLPPOExt",
    "NPGExt",
    "SnapshotWrapper",
    "TRPOExt",
    "VineRolloutBuffer",
    "__version__",
    "check_snapshot",
    "register_snapshot_adapter",
]
