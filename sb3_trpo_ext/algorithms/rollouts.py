"""The shell's side of a rollout: SB3's callbacks, counters and last observations, for whoever samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, EventCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.algorithms.masking import AskForMasks
from sb3_trpo_ext.checks import warn_user
from sb3_trpo_ext.recurrence import Memory
from sb3_trpo_ext.sampling.actor import Actor, BranchActor, Observation
from sb3_trpo_ext.sampling.agent import Agent
from sb3_trpo_ext.sampling.agreement import disagreement
from sb3_trpo_ext.sampling.context import Context
from sb3_trpo_ext.sampling.noise import branch_generator
from sb3_trpo_ext.sampling.recurrent_actor import Remembering
from sb3_trpo_ext.sampling.single_path import collect_single_path
from sb3_trpo_ext.sampling.vine import collect_vine
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer


class Collector(Protocol):
    """What is needed of an SB3 algorithm to fill its rollout buffer."""

    num_timesteps: int
    device: th.device
    seed: int | None
    _n_updates: int
    _has_told_of_disagreement: bool
    _last_obs: Any
    _last_episode_starts: Any
    _last_lstm_states: Any
    _memory_at_start: Any

    @property
    def agent(self) -> Agent: ...

    def _mask_reader(self, env: VecEnv) -> AskForMasks | None: ...

    @property
    def logger(self) -> Logger: ...

    def _make_actor(self, rollout_buffer: RolloutBuffer, rollout: Remembering | None = None) -> Actor: ...

    def _make_branch_actor(self) -> BranchActor: ...

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None: ...

    def _timed(self, part: str) -> AbstractContextManager[None]: ...


def collect(algorithm: Collector, env: VecEnv, callback: BaseCallback, buffer: RolloutBuffer, n_rollout_steps: int) -> bool:
    """Fill a rollout buffer, with a single path or a vine; False if a callback ended it early."""
    agent, rollout = algorithm.agent, CallbackRollout(algorithm, env, callback, buffer, n_rollout_steps)

    def make_actor() -> Actor:
        return algorithm._make_actor(buffer, rollout)

    if isinstance(buffer, VineRolloutBuffer):
        rng = branch_generator(algorithm.seed, algorithm._n_updates, algorithm.num_timesteps)
        make_branch_actor = algorithm._make_branch_actor
        is_full = collect_vine(agent, env, rollout, buffer, n_rollout_steps, make_actor, make_branch_actor, rng)
    else:
        is_full = collect_single_path(agent, env, rollout, buffer, n_rollout_steps, make_actor)
    if is_full and not algorithm._has_told_of_disagreement:
        message = disagreement(agent, buffer, type(algorithm).__name__)
        if message is not None:
            algorithm._has_told_of_disagreement = True
            warn_user(message)
    return is_full


class CallbackRollout:
    """A rollout, of vines too, that SB3's callbacks hear of as from SB3's own loop."""

    def __init__(
        self, algorithm: Collector, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> None:
        self._algorithm, self._n_envs, self._callback = algorithm, env.num_envs, callback
        self._read_masks = algorithm._mask_reader(env)
        # without a callback, nobody reads the locals
        self._is_watched = not (isinstance(callback, ConvertCallback) and callback.callback is None)
        self._locals: dict[str, Any] = {
            "self": algorithm,
            "env": env,
            "callback": callback,
            "rollout_buffer": rollout_buffer,
            "n_rollout_steps": n_rollout_steps,
        }

    @property
    def observations(self) -> Observation:
        return self._algorithm._last_obs

    @property
    def episode_starts(self) -> np.ndarray:
        return self._algorithm._last_episode_starts

    def context(self, observations: Observation, idle: Callable[[], np.ndarray] | None = None) -> Context | None:
        if self._read_masks is None:
            return None
        return Context(action_masks=self._read_masks(observations, None if idle is None else idle()))

    @property
    def memory(self) -> Memory:
        return Memory(*self._algorithm._last_lstm_states)  # a checkpoint gives it back as a plain tuple

    @memory.setter
    def memory(self, memory: Memory) -> None:
        self._algorithm._last_lstm_states = memory

    def begins(self) -> None:
        self._algorithm._memory_at_start = None if self._algorithm._last_lstm_states is None else self.memory
        self._callback.on_rollout_start()

    def stepped(self, found: dict[str, Any]) -> bool:
        self._algorithm.num_timesteps += self._n_envs
        self._locals.update(found)
        if self._is_watched and found["obs_tensor"] is None:
            self._locals["obs_tensor"] = obs_as_tensor(self.observations, self._algorithm.device)
        self._callback.update_locals(self._locals)
        return self._callback.on_step()

    def goes_on(self, new_obs: Observation, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        algorithm = self._algorithm
        algorithm._update_info_buffer(infos, dones)
        algorithm._last_obs, algorithm._last_episode_starts = new_obs, dones

    def ends(self, found: dict[str, Any]) -> None:
        self._locals.update(found)
        self._callback.update_locals(self._locals)
        self._callback.on_rollout_end()

    def branches(self) -> AbstractContextManager[None]:
        return self._algorithm._timed("branches")

    def branched(self, n_steps: int, statistics: dict[str, float]) -> None:
        """Branch steps count as timesteps, without ``on_step``."""
        self._algorithm.num_timesteps += n_steps
        for bar in _progress_bars(self._callback):
            bar.pbar.update(n_steps)
        for name, value in statistics.items():
            self._algorithm.logger.record(name, value)


def _progress_bars(callback: BaseCallback | None) -> Iterator[ProgressBarCallback]:
    """The progress bars among callbacks of callbacks."""
    if isinstance(callback, ProgressBarCallback):
        yield callback
    elif isinstance(callback, CallbackList):
        for child in callback.callbacks:
            yield from _progress_bars(child)
    elif isinstance(callback, EventCallback):
        yield from _progress_bars(callback.callback)
