"""What can go wrong with snapshots."""

import pickle


class SnapshotError(ValueError):
    """A simulator, or a layer above it, whose state cannot be carried; or a snapshot of another one."""


class NotPlainError(pickle.PicklingError):
    """Something that is not plain data."""


class ReplayError(SnapshotError):
    """A simulator that went another way after it was restored."""


class BranchError(RuntimeError):
    """A simulator that failed while it ran a branch."""


class WorkerDiedError(BranchError):
    """A worker process of a ``SubprocVecEnv`` that is gone, and its environment with it."""
