"""State that lives above the environments: what each ``VecEnv`` and wrapper of SB3's keeps between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError


class VecLayer:
    """One layer of a ``VecEnv``, whose attributes in ``kept`` branches change and the trunk gets back."""

    kept: tuple[str, ...] = ()

    def __init__(self, venv: Any) -> None:
        self.venv = venv
        self._trunk: dict[str, Any] = {}

    def row(self, index: int) -> Any:
        """What is kept here of one environment."""
        return None

    def set_row(self, index: int, row: Any) -> None:
        pass

    def observe(self, index: int, observation: Any) -> Any:
        """A batch of one observation from below, as it leaves this layer after a restore."""
        return observation

    def freeze(self) -> None:
        """Before branches. The trunk's arrays are put aside: its observations may be views of them."""
        self._trunk = {name: vars(self.venv)[name] for name in self.kept if name in vars(self.venv)}
        vars(self.venv).update({name: deepcopy(value) for name, value in self._trunk.items()})

    def thaw(self) -> None:
        """After branches."""
        for name in self.kept:
            vars(self.venv).pop(name, None)
        vars(self.venv).update(self._trunk)


class DummyLayer(VecLayer):
    kept = ("buf_obs", "buf_dones", "buf_rews", "buf_infos", "actions", "_seeds", "_options")

    def observe(self, index: int, observation: Any) -> Any:
        self.venv._save_obs(index, observation)  # casts as a step does
        batch = {key: buffer[index : index + 1].copy() for key, buffer in self.venv.buf_obs.items()}
        return dict_to_obs(self.venv.observation_space, batch)


class SubprocLayer(VecLayer):
    kept = ("_seeds", "_options")

    def observe(self, index: int, observation: Any) -> Any:
        if isinstance(self.venv.observation_space, spaces.Dict):
            return {key: np.stack([observation[key]]) for key in self.venv.observation_space.spaces}
        return np.stack([observation])


class NormalizeLayer(VecLayer):
    kept = ("returns", "old_obs", "old_reward", "training")

    def row(self, index: int) -> float:
        return float(self.venv.returns[index])

    def set_row(self, index: int, row: float) -> None:
        self.venv.returns[index] = row

    def observe(self, index: int, observation: Any) -> Any:
        return self.venv.normalize_obs(observation)

    def freeze(self) -> None:
        super().freeze()
        self.venv.training = False


class MonitorLayer(VecLayer):
    kept = ("episode_returns", "episode_lengths", "episode_count", "results_writer")

    def row(self, index: int) -> tuple[float, int]:
        return self.venv.episode_returns[index].copy(), self.venv.episode_lengths[index].copy()

    def set_row(self, index: int, row: tuple[float, int]) -> None:
        self.venv.episode_returns[index], self.venv.episode_lengths[index] = row

    def freeze(self) -> None:
        writer, self.venv.results_writer = self.venv.results_writer, None
        super().freeze()
        self._trunk["results_writer"] = writer


class FrameStackLayer(VecLayer):
    def _stacks(self, stacked: StackedObservations | None = None) -> Iterator[StackedObservations]:
        stacked = stacked or self.venv.stacked_obs
        inner = getattr(stacked, "sub_stacked_observations", None)
        yield from [stacked] if inner is None else inner.values()

    def row(self, index: int) -> list[np.ndarray]:
        return [stack.stacked_obs[index].copy() for stack in self._stacks()]

    def set_row(self, index: int, row: list[np.ndarray]) -> None:
        for stack, frames in zip(self._stacks(), row, strict=True):
            stack.stacked_obs = stack.stacked_obs.copy()  # the last observations are this very array
            stack.stacked_obs[index] = frames

    def observe(self, index: int, observation: Any) -> Any:
        batches = [stack.stacked_obs[index : index + 1].copy() for stack in self._stacks()]
        return dict(zip(observation, batches, strict=True)) if isinstance(observation, dict) else batches[0]

    def freeze(self) -> None:
        self._trunk = {"stacks": [stack.stacked_obs for stack in self._stacks()]}

    def thaw(self) -> None:
        for stack, stacked_obs in zip(self._stacks(), self._trunk["stacks"], strict=True):
            stack.stacked_obs = stacked_obs


class TransposeLayer(VecLayer):
    def observe(self, index: int, observation: Any) -> Any:
        return self.venv.transpose_observations(observation)


class ExtractLayer(VecLayer):
    def observe(self, index: int, observation: Any) -> Any:
        return observation[self.venv.key]


class CheckNanLayer(VecLayer):
    kept = ("_actions", "_observations", "_user_warned")


_LAYERS: dict[type[VecEnv], Callable[[Any], VecLayer]] = {
    DummyVecEnv: DummyLayer,
    SubprocVecEnv: SubprocLayer,
    VecNormalize: NormalizeLayer,
    VecMonitor: MonitorLayer,
    VecFrameStack: FrameStackLayer,
    VecTransposeImage: TransposeLayer,
    VecExtractDictObs: ExtractLayer,
    VecCheckNan: CheckNanLayer,
}
_ACTS = ("reset", "step_async", "step_wait", "step")


def vec_layers(venv: VecEnv) -> list[VecLayer]:
    """The layers of a vectorized environment, from the environments upward.

    :raises SnapshotError: naming the first layer that is not one of SB3's, or acts in another way
    """
    layers = [_vec_layer(venv)]
    while isinstance(venv, VecEnvWrapper):
        venv = venv.venv
        layers.append(_vec_layer(venv))
    return layers[::-1]


def _vec_layer(venv: VecEnv) -> VecLayer:
    known = next((cls for cls in type(venv).__mro__ if cls in _LAYERS), None)
    if known is None or any(getattr(type(venv), name) is not getattr(known, name) for name in _ACTS):
        raise SnapshotError(
            f"layer {type(venv).__qualname__} above the environments may keep state that branches cannot carry; "
            f"known are {', '.join(cls.__name__ for cls in _LAYERS)}"
        )
    return _LAYERS[known](venv)
