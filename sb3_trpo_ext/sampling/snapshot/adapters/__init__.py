"""Engines: what stands below the wrappers. One adapter is one file.

An adapter saves and restores what of an environment is not plain attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import gymnasium as gym

from sb3_trpo_ext.sampling.snapshot.adapters.own_methods import OwnMethodsAdapter, has_own_methods


class SnapshotAdapter(Protocol):
    """The engine of one environment.

    ``handles`` names the environment's attributes that are the adapter's business, all others than
    these are carried as plain data; ``None`` says that all are. ``signature`` names the engine and its
    version: snapshots are exchanged between environments of equal signature only.
    """

    handles: frozenset[str] | None
    signature: str

    def save(self) -> Any:
        """The engine's state: numbers, strings, bytes, arrays, and containers of these."""
        ...

    def restore(self, state: Any) -> None:
        """Put the engine in a state that :meth:`save` gave, perhaps that of another instance."""
        ...


AdapterFactory = Callable[[gym.Env], SnapshotAdapter]


class PlainAdapter:
    """No engine: the state is the environment's plain attributes."""

    handles: frozenset[str] | None = frozenset()
    signature = f"gymnasium {gym.__version__}"

    def __init__(self, env: gym.Env) -> None:
        pass

    def save(self) -> None:
        return None

    def restore(self, state: None) -> None:
        pass


_BY_CLASS: dict[type, AdapterFactory] = {}


def register_snapshot_adapter(env_class: type[gym.Env], make_adapter: AdapterFactory) -> None:
    """Say how environments of a class, and of classes derived from it, are saved and restored.

    :param env_class: the class of the unwrapped environment
    :param make_adapter: called with each such environment; gives its :class:`SnapshotAdapter`
    :raises TypeError: if ``env_class`` is not a class of environments
    """
    if not (isinstance(env_class, type) and issubclass(env_class, gym.Env)):
        raise TypeError(f"env_class must be a subclass of gymnasium.Env, got {env_class!r}")
    _BY_CLASS[env_class] = make_adapter


def adapter_for(env: gym.Env) -> SnapshotAdapter:
    """The adapter of an unwrapped environment.

    :raises SnapshotError: naming the environment, if it is known that it cannot be restored
    """
    if has_own_methods(env):
        return OwnMethodsAdapter(env)
    for cls in type(env).__mro__:
        if cls in _BY_CLASS:
            return _BY_CLASS[cls](env)
    # imported here: each needs its engine
    roots = {type(value).__module__.split(".")[0].lstrip("_") for value in vars(env).values()}
    if "mujoco" in roots:
        from sb3_trpo_ext.sampling.snapshot.adapters.mujoco import MujocoAdapter

        return MujocoAdapter(env)
    return PlainAdapter(env)
