"""What of a wrapper or an environment is state: its plain attributes and its random generators."""

from __future__ import annotations

import random
import zlib
from collections.abc import Hashable, Iterable, Iterator
from types import BuiltinFunctionType, MethodType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import RecordVideo
from stable_baselines3.common.monitor import Monitor

from sb3_trpo_ext.sampling.snapshot.adapters.base import SnapshotAdapter
from sb3_trpo_ext.sampling.snapshot.code import CODE, describe, is_fixed
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError
from sb3_trpo_ext.sampling.snapshot.generators import GENERATORS


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

_KNOWN_BY_NAME = (*CODE, np.dtype, np.generic)
_PLAIN = frozenset((bool, int, float, str, bytes, type(None)))


def _is_drawn_with(value: Any) -> bool:
    if isinstance(value, (MethodType, BuiltinFunctionType)):
        value = value.__self__
    return type(value).__module__.split(".")[0] in _DRAWN_WITH


def is_constant(value: Any) -> bool:
    """Descriptions and windows, which are the same whatever the state."""
    if isinstance(value, (spaces.Space, EnvSpec)) or _is_drawn_with(value):
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
        self.holds_for_good = handles | frozenset(getattr(layer, "snapshot_constants", ()))
        self.excluded = _NEVER_STATE | self.holds_for_good
        self._tables: frozenset[str] = frozenset()
        for cls in type(layer).__mro__:
            self.excluded |= _OF_THE_INSTANCE.get(cls, frozenset())
            for module, names in _TABLES.items():
                self._tables |= names if cls.__module__.startswith(module) else frozenset()
        self.excluded |= self._tables
        self._fixed = {name: value for name, value in vars(layer).items() if is_fixed(value)}
        self._views: dict[str, dict[str, Any]] = {}

    def kept(self) -> str:
        """What tells environments apart that keep other things: FrozenLake may draw a map of its own."""
        tables = [repr(vars(self.env)[name]) for name in sorted(self._tables & vars(self.env).keys())]
        code = [(name, describe(value)) for name, value in sorted(self._fixed.items())]
        return "".join(
            f", {what} {zlib.crc32(repr(held).encode()):08x}" for what, held in (("tables", tables), ("code", code)) if held
        )

    def staying(self) -> Iterator[tuple[int, str]]:
        """What its attributes hold for good: wherever else it is met, it is the same thing again."""
        own = vars(self.env)
        for name in self.holds_for_good:
            if name in own and not isinstance(own[name], _KNOWN_BY_NAME):
                yield id(own[name]), name

    def split(self) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Its plain attributes, its generators, and the names of all others, which stay as they are."""
        attributes, generators, others = {}, {}, []
        for name, value in vars(self.env).items():
            if name in self.excluded:
                continue
            if type(value) in _PLAIN:
                attributes[name] = value
            elif isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom):
                generators[name] = value
            elif self._is_state(name, value):
                attributes[name] = value
            else:
                others.append(name)
        return attributes, generators, others

    def _is_state(self, name: str, value: Any) -> bool:
        if isinstance(value, np.ndarray):
            return value.base is None or not self._is_view_of_engine(name, value)
        return self._fixed.get(name) is not value and not is_constant(value)

    def _is_view_of_engine(self, name: str, array: np.ndarray) -> bool:
        if not self._adapter.owns_memory_of(array):
            return False
        place = array.__array_interface__
        if self._views.setdefault(name, place) != place:
            raise SnapshotError(
                f"attribute {name!r} of layer {self.name} is a view of the engine's memory, and not always of the same part"
            )
        return True

    def put(self, attributes: dict[str, Any], others: Iterable[str]) -> None:
        """Set the attributes, and remove those that came later than the snapshot.

        :param others: names that are kept: generators, and what was no plain data
        """
        own, others = vars(self.env), set(others)
        for name in own.keys() - attributes.keys() - self.excluded - others:
            del own[name]
        for name in self._fixed:
            if name in others:
                own[name] = self._fixed[name]
        for name, value in attributes.items():
            if value is None and own.get(name) is not None and _is_drawn_with(own[name]):
                continue  # a window that was not open then stays open
            own[name] = value

    def spaces(self) -> Iterator[tuple[Hashable, spaces.Space]]:
        """The spaces it holds, and those inside them: environments may sample from them."""
        of_the_class = {name: getattr(self.env, name, None) for name in ("action_space", "observation_space")}
        for name, value in (of_the_class | vars(self.env)).items():
            if isinstance(value, spaces.Space):
                yield from with_inner_spaces(name, value)


def with_inner_spaces(key: Hashable, space: spaces.Space) -> Iterator[tuple[Hashable, spaces.Space]]:
    """A space and those inside it, each with its key."""
    yield key, space
    inner = getattr(space, "spaces", None)
    for name, child in inner.items() if isinstance(inner, dict) else enumerate(inner or ()):
        yield from with_inner_spaces((key, name), child)


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
