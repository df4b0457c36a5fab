"""Snapshots: simulators that return to a state exactly, and branches that leave no trace."""

from sb3_trpo_ext.sampling.snapshot.adapters import SnapshotAdapter, register_snapshot_adapter
from sb3_trpo_ext.sampling.snapshot.adapters.replay import ReplayAdapter
from sb3_trpo_ext.sampling.snapshot.conformance import check_returns, check_snapshot
from sb3_trpo_ext.sampling.snapshot.errors import BranchError, ReplayError, SnapshotError, WorkerDiedError
from sb3_trpo_ext.sampling.snapshot.restorable import make_restorable, mark_as_own
from sb3_trpo_ext.sampling.snapshot.vec_env import VecSimulator, VecSnapshot
from sb3_trpo_ext.sampling.snapshot.wrapper import SnapshotWrapper

__all__ = [
    "BranchError",
    "ReplayAdapter",
    "ReplayError",
    "SnapshotAdapter",
    "SnapshotError",
    "SnapshotWrapper",
    "VecSimulator",
    "VecSnapshot",
    "WorkerDiedError",
    "check_returns",
    "check_snapshot",
    "make_restorable",
    "mark_as_own",
    "register_snapshot_adapter",
]
