"""What an adapter is."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class SnapshotAdapter:
    """The engine of one environment: what of its state is not plain attributes. This one has none.

    ``handles`` names the environment's attributes that are the adapter's business, all others are carried
    as plain data; ``None`` says that all are the adapter's. ``signature`` names the engine and its version:
    snapshots are exchanged between environments of equal signature only.
    """

    handles: frozenset[str] | None = frozenset()
    signature: str = f"gymnasium {gym.__version__}"

    def __init__(self, env: gym.Env) -> None:
        self.env: Any = env

    def save(self) -> Any:
        """The engine's state: numbers, strings, bytes, arrays, and containers of these."""

    def restore(self, state: Any) -> None:
        """Put the engine in a state that :meth:`save` gave, perhaps that of another instance."""

    def reseed(self, seed: int) -> None:
        """After a restore: start the engine's own generators afresh. Those of NumPy's are seeded already."""

    def owns_memory_of(self, array: np.ndarray) -> bool:
        """Whether an array is a view of the engine's memory, which :meth:`restore` restores."""
        return False
