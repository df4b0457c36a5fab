"""Environments that save and restore themselves, by two methods."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

SAVE, RESTORE = "snapshot_state", "restore_state"


def has_own_methods(env: gym.Env) -> bool:
    return callable(getattr(env, SAVE, None)) and callable(getattr(env, RESTORE, None))


class OwnMethodsAdapter:
    """``snapshot_state()`` gives the whole state as plain data, ``restore_state(state)`` returns to it.

    Only ``np_random`` is looked after outside of them.
    """

    handles: frozenset[str] | None = None

    def __init__(self, env: gym.Env) -> None:
        self._env: Any = env
        self.signature = f"{SAVE} of {type(env).__qualname__}"

    def save(self) -> Any:
        return getattr(self._env, SAVE)()

    def restore(self, state: Any) -> None:
        getattr(self._env, RESTORE)(state)
