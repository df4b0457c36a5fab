"""Environments that save and restore themselves, by methods of their own."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from sb3_trpo_ext.sampling.snapshot.adapters.base import SnapshotAdapter

SAVE, RESTORE, SEED = "snapshot_state", "restore_state", "seed_state"


def has_own_methods(env: gym.Env) -> bool:
    return callable(getattr(env, SAVE, None)) and callable(getattr(env, RESTORE, None))


class OwnMethodsAdapter(SnapshotAdapter):
    """``snapshot_state()`` gives the whole state as plain data, ``restore_state(state)`` returns to it.

    ``np_random`` is looked after outside of them. An engine with a generator of its own may have it seeded
    afresh for branches by a third method, ``seed_state(seed)``.
    """

    handles = None

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.signature = f"{SAVE} of {type(env).__qualname__}"

    def save(self) -> Any:
        return getattr(self.env, SAVE)()

    def restore(self, state: Any) -> None:
        getattr(self.env, RESTORE)(state)

    def reseed(self, seed: int) -> None:
        if callable(getattr(self.env, SEED, None)):
            getattr(self.env, SEED)(seed)
