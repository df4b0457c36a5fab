"""Engines: what stands below the wrappers. One adapter is one file."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym

from sb3_trpo_ext.sampling.snapshot.adapters.base import SnapshotAdapter
from sb3_trpo_ext.sampling.snapshot.adapters.own_methods import OwnMethodsAdapter, has_own_methods

AdapterFactory = Callable[[gym.Env], SnapshotAdapter]

_BY_CLASS: dict[type[gym.Env], AdapterFactory] = {}


def register_snapshot_adapter(env_class: type[gym.Env], make_adapter: AdapterFactory) -> None:
    """Say how environments of a class, and of classes derived from it, are saved and restored.

    Worker processes know of it if the module that registers is imported there: register next to the class.

    :param env_class: the class of the unwrapped environment
    :param make_adapter: called with each such environment; gives its :class:`SnapshotAdapter`
    :raises TypeError: if ``env_class`` is not a class of environments
    """
    if not (isinstance(env_class, type) and issubclass(env_class, gym.Env)):
        raise TypeError(f"env_class must be a subclass of gymnasium.Env, got {env_class!r}")
    _BY_CLASS[env_class] = make_adapter


def adapter_for(env: gym.Env) -> SnapshotAdapter:
    """The adapter of an unwrapped environment: its own methods, the nearest registered, or its engine's.

    :raises SnapshotError: naming the environment and what to do, if its engine cannot be restored
    """
    return adapter_factory(env)(env)


def adapter_factory(env: gym.Env) -> AdapterFactory:
    """What makes it: adapters by replay change their environment when they are made."""
    if has_own_methods(env):
        return OwnMethodsAdapter
    registered = (_BY_CLASS[cls] for cls in type(env).__mro__ if cls in _BY_CLASS)
    return next(registered, None) or _by_engine(env)


def _by_engine(env: gym.Env) -> AdapterFactory:
    # imported when met: each needs its engine
    engines = {type(value).__module__.split(".")[0].lstrip("_") for value in vars(env).values()}
    if "mujoco" in engines:
        from sb3_trpo_ext.sampling.snapshot.adapters.mujoco import MujocoAdapter

        return MujocoAdapter
    if "ale_py" in engines:
        from sb3_trpo_ext.sampling.snapshot.adapters.ale import ALEAdapter

        return ALEAdapter
    if "Box2D" in engines:
        from sb3_trpo_ext.sampling.snapshot.adapters.box2d import Box2DAdapter

        return Box2DAdapter
    return SnapshotAdapter
