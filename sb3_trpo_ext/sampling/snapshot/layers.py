"""What of a wrapper or an environment is state: its plain attributes and its random generators."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import RecordVideo
from stable_baselines3.common.monitor import Monitor

from sb3_trpo_ext.sampling.snapshot.adapters.base import SnapshotAdapter
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError
from sb3_trpo_ext.sampling.snapshot.generators import GENERATORS
from sb3_trpo_ext.sampling.snapshot.plain import CODE


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# what an object was made from; not part of where a simulation stands
_NEVER_STATE = _names("env spec _cached_spec metadata _metadata render_mode _saved_kwargs _ezpickle_args _ezpickle_kwargs")
_NEVER_STATE |= _names("mujoco_renderer")
_DRAWN_WITH = _names("pygame OpenGL glfw pyglet matplotlib moviepy")

# attributes that belong to the instance of a layer, not to the state of the simulation: files and records of
# episodes, which `records` below looks after; tables that never change
_OF_THE_INSTANCE: dict[type, frozenset[str]] = {
    Monitor: _names("results_writer episode_returns episode_lengths episode_times total_steps t_start"),
}
_TABLES = {"gymnasium.envs.toy_text": _names("P")}

_PLAIN = (bool, int, float, str, bytes, type(None), np.generic)


def _is_drawn_with(value: Any) -> bool:
    return type(value).__module__.split(".")[0] in _DRAWN_WITH


def is_constant(value: Any) -> bool:
    """Code, descriptions and windows, which are the same whatever the state."""
    if isinstance(value, (*CODE, spaces.Space, EnvSpec)) or _is_drawn_with(value):
        return True
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    return len(value) > 0 and all(is_constant(item) for item in value)


class Layer:
    """One layer of a wrapper chain.

    :param adapter: the engine's, which looks after the attributes in ``handles`` and after its own memory
    """

    def __init__(self, layer: gym.Env, adapter: SnapshotAdapter) -> None:
        self.env, self._adapter = layer, adapter
        handles = (adapter.handles or frozenset()) if layer is layer.unwrapped else frozenset()
        self.name = type(layer).__qualname__
        if any(vars(cls).get("__slots__") for cls in type(layer).__mro__):
            raise SnapshotError(f"layer {self.name} keeps attributes in __slots__, which snapshots cannot carry")
        if isinstance(layer, RecordVideo):
            raise SnapshotError("layer RecordVideo would film branches: wrap the evaluation environment with it instead")
        self.excluded = _NEVER_STATE | handles | frozenset(getattr(layer, "snapshot_constants", ()))
        self._tables: frozenset[str] = frozenset()
        for cls in type(layer).__mro__:
            self.excluded |= _OF_THE_INSTANCE.get(cls, frozenset())
            for module, names in _TABLES.items():
                self._tables |= names if cls.__module__.startswith(module) else frozenset()
        self.excluded |= self._tables

    def tables(self) -> str:
        """What tells environments with other tables apart: FrozenLake may draw a map of its own."""
        held = [repr(vars(self.env)[name]) for name in sorted(self._tables & vars(self.env).keys())]
        return f", tables {zlib.crc32(repr(held).encode()):08x}" if held else ""

    def split(self) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Its plain attributes, its generators, and the names of all others, which stay as they are."""
        attributes, generators, others = {}, {}, []
        for name, value in vars(self.env).items():
            if name in self.excluded:
                continue
            if isinstance(value, GENERATORS):
                generators[name] = value
            elif self._is_state(value):
                attributes[name] = value
            else:
                others.append(name)
        return attributes, generators, others

    def _is_state(self, value: Any) -> bool:
        if isinstance(value, np.ndarray):
            return value.base is None or not self._adapter.owns_memory_of(value)
        return isinstance(value, _PLAIN) or not is_constant(value)

    def put(self, attributes: dict[str, Any], others: Iterable[str]) -> None:
        """Set the attributes, and remove those that came later than the snapshot.

        :param others: names that are kept: generators, and what was no plain data
        """
        own = vars(self.env)
        for name in own.keys() - attributes.keys() - self.excluded - set(others):
            del own[name]
        for name, value in attributes.items():
            if value is not None or not _is_drawn_with(own.get(name)):  # a window that was not open then stays open
                own[name] = value

    def spaces(self) -> Iterator[tuple[Hashable, spaces.Space]]:
        """The spaces it holds, and those inside them: environments may sample from them."""
        of_the_class = {name: getattr(self.env, name, None) for name in ("action_space", "observation_space")}
        for name, value in (of_the_class | vars(self.env)).items():
            if isinstance(value, spaces.Space):
                yield from _with_inner(name, value)


def _with_inner(key: Hashable, space: spaces.Space) -> Iterator[tuple[Hashable, spaces.Space]]:
    yield key, space
    inner = getattr(space, "spaces", None)
    for name, child in inner.items() if isinstance(inner, dict) else enumerate(inner or ()):
        yield from _with_inner((key, name), child)


class MonitorRecords:
    """Makes a ``Monitor`` forget what it saw since now, and keep quiet meanwhile."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._writer, self._total_steps = monitor.results_writer, monitor.total_steps
        self._episodes = len(monitor.episode_returns)
        monitor.results_writer = None

    def undo(self) -> None:
        monitor = self._monitor
        monitor.results_writer, monitor.total_steps = self._writer, self._total_steps
        for record in (monitor.episode_returns, monitor.episode_lengths, monitor.episode_times):
            del record[self._episodes :]
