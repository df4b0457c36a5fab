"""Single-path sampling: follow π_old in E environments for T steps and fill the rollout buffer.

The contract is that of SB3's ``OnPolicyAlgorithm.collect_rollouts``: the same callbacks with the same
locals, the same early stop, the same buffer contents. What differs is when values and
log-probabilities are computed: at the end, in one batch, unless the actor knew them at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.numerics.averages import chunks_of
from sb3_trpo_ext.observations import concatenate, take, tree_map
from sb3_trpo_ext.sampling.actor import Acted, Actor, Observation, usable
from sb3_trpo_ext.sampling.buffers import compute_returns, make_room
from sb3_trpo_ext.sampling.stepping import step

if TYPE_CHECKING:
    from sb3_trpo_ext.algorithms.collecting import Collecting


def collect_single_path(
    algorithm: Collecting,
    env: VecEnv,
    callback: BaseCallback,
    rollout_buffer: RolloutBuffer,
    n_rollout_steps: int,
    make_actor: Callable[[], Actor],
    visit: Callable[[int], None] | None = None,
) -> bool:
    """Fill the buffer with ``n_rollout_steps`` steps of each environment.

    :param make_actor: called once callbacks have had their say at the start of the rollout. What they
        change of the policy later counts for values and log-probabilities that are left for the end, of
        earlier steps too; for actions, with :class:`~sb3_trpo_ext.sampling.actor.NumpyActor`, from the
        next rollout on, with the others at once
    :param visit: called with t when the environments are in s_t, before they are stepped
    :return: False if a callback ended the rollout early
    """
    to_env = action_transform(algorithm)
    rollout_buffer.reset()
    if algorithm.use_sde:
        algorithm.policy.reset_noise(env.num_envs)
    callback.on_rollout_start()
    actor = make_actor()
    actor.prepare(n_rollout_steps)
    recorder: Recorder = (ImmediateRecorder if actor.knows_values else DeferredRecorder)(algorithm, rollout_buffer)
    # without a callback, nobody reads the locals
    is_watched = not (isinstance(callback, ConvertCallback) and callback.callback is None)
    scope: dict[str, Any] = {
        "self": algorithm,
        "env": env,
        "callback": callback,
        "rollout_buffer": rollout_buffer,
        "n_rollout_steps": n_rollout_steps,
    }
    for n_steps in range(n_rollout_steps):
        if algorithm.use_sde and algorithm.sde_sample_freq > 0 and n_steps % algorithm.sde_sample_freq == 0:
            algorithm.policy.reset_noise(env.num_envs)
        if visit is not None:
            visit(n_steps)
        acted = actor.act(algorithm._last_obs, n_steps)  # type: ignore[arg-type]
        states = acted.states
        if states is None and is_watched:
            states = obs_as_tensor(algorithm._last_obs, algorithm.device)  # type: ignore[arg-type]
        clipped_actions = to_env(acted.actions)
        new_obs, rewards, dones, infos = step(env, clipped_actions)
        algorithm.num_timesteps += env.num_envs
        scope.update(
            n_steps=n_steps,
            obs_tensor=states,
            actions=acted.actions,
            values=acted.values,
            log_probs=acted.log_probs,
            clipped_actions=clipped_actions,
            new_obs=new_obs,
            rewards=rewards,
            dones=dones,
            infos=infos,
        )
        callback.update_locals(scope)
        if not callback.on_step():
            recorder.complete()
            return False
        algorithm._update_info_buffer(infos, dones)
        recorder.add(Transition(algorithm._last_obs, rewards, algorithm._last_episode_starts, dones, infos), acted)  # type: ignore[arg-type]
        algorithm._last_obs = new_obs
        algorithm._last_episode_starts = dones
    scope.update(n_steps=n_rollout_steps, values=recorder.finish(new_obs, dones))
    callback.update_locals(scope)
    callback.on_rollout_end()
    return True


def action_transform(algorithm: Collecting) -> Callable[[np.ndarray], np.ndarray]:
    """Actions as the policy gave them ↦ actions as the environment takes them."""
    space = algorithm.action_space
    if not isinstance(space, spaces.Box):
        return lambda actions: actions
    if algorithm.policy.squash_output:
        return algorithm.policy.unscale_action
    # np.clip without its overhead, and without that of broadcasting
    low, high = (np.repeat(bound[None], algorithm.n_envs, axis=0) for bound in (space.low, space.high))
    return lambda actions: np.minimum(np.maximum(actions, low), high)


class Transition(NamedTuple):
    """One step of E environments, before any bootstrapping."""

    observations: Observation
    rewards: np.ndarray
    episode_starts: np.ndarray
    dones: np.ndarray
    infos: list[dict[str, Any]]

    def truncated(self) -> Iterator[tuple[int, Any]]:
        """Environments that a time limit stopped, with the observation they stopped at."""
        for index in np.flatnonzero(self.dones):
            terminal = stopped_at(self.infos[index])
            if terminal is not None:
                yield int(index), terminal


def stopped_at(info: dict[str, Any]) -> Any:
    """The observation at which a time limit stopped an episode, None where it was something else."""
    return info.get("terminal_observation") if info.get("TimeLimit.truncated", False) else None


class Recorder(Protocol):
    """Fills a rollout buffer."""

    def add(self, step: Transition, acted: Acted) -> None: ...

    def complete(self) -> None:
        """Fill in what was left for later of the steps that were added."""
        ...

    def finish(self, new_obs: Any, dones: np.ndarray) -> th.Tensor:
        """Complete a full buffer, returns and advantages included; the values of the last observations."""
        ...


class ImmediateRecorder:
    """Adds each step as SB3 does: values and log-probabilities known, truncations bootstrapped at once."""

    def __init__(self, algorithm: Collecting, buffer: RolloutBuffer) -> None:
        self._algorithm = algorithm
        self._buffer = buffer

    def add(self, step: Transition, acted: Acted) -> None:
        algorithm, rewards = self._algorithm, step.rewards
        assert acted.values is not None and acted.log_probs is not None
        if rewards.dtype.kind != "f":
            rewards = rewards.astype(np.float32)  # integers would cut off what is added to them
        for index, terminal in step.truncated():
            with th.no_grad():
                value = algorithm.predict_values(algorithm.policy.obs_to_tensor(usable(terminal))[0])[0]
            rewards[index] += algorithm.gamma * float(value)
        actions, values = acted.actions, acted.values
        if isinstance(algorithm.action_space, spaces.Discrete):
            actions = actions.reshape(-1, 1)
        if algorithm.critic == "none":
            values = th.zeros_like(values)
        make_room(self._buffer, step.observations, actions)
        self._buffer.add(step.observations, actions, rewards, step.episode_starts, values, acted.log_probs)  # type: ignore[arg-type]

    def complete(self) -> None:
        pass

    def finish(self, new_obs: Any, dones: np.ndarray) -> th.Tensor:
        return _finish_returns(self._algorithm, self._buffer, new_obs, dones)


class DeferredRecorder:
    """Writes transitions only, and at the end all values and log-probabilities in batched passes."""

    def __init__(self, algorithm: Collecting, buffer: RolloutBuffer) -> None:
        self._algorithm = algorithm
        self._buffer = buffer
        self._truncations: list[tuple[int, int, Any]] = []

    def add(self, step: Transition, acted: Acted) -> None:
        buffer = self._buffer
        t = buffer.pos
        make_room(buffer, step.observations, acted.actions)
        if isinstance(buffer.observations, dict):
            for key, store in buffer.observations.items():
                store[t] = step.observations[key].reshape(store[t].shape)
        else:
            row = buffer.observations[t]
            row[...] = step.observations.reshape(row.shape)  # type: ignore[union-attr]
        buffer.actions[t] = acted.actions.reshape(buffer.n_envs, buffer.action_dim)
        buffer.rewards[t] = step.rewards
        buffer.episode_starts[t] = step.episode_starts
        buffer.pos = t + 1
        buffer.full = buffer.pos == buffer.buffer_size
        if np.count_nonzero(step.dones):
            # copies, because simulators may hand out one array again and again
            self._truncations += [(t, index, tree_map(np.copy, terminal)) for index, terminal in step.truncated()]

    @th.no_grad()
    def complete(self) -> None:
        algorithm, buffer = self._algorithm, self._buffer
        if buffer.pos == 0:
            return
        for rows, states, actions in transitions_of(algorithm, buffer):
            buffer.values.reshape(-1)[rows] = algorithm.predict_values(states).flatten().cpu().numpy()
            log_probs = algorithm.action_distribution(states).log_prob(actions)
            buffer.log_probs.reshape(-1)[rows] = log_probs.cpu().numpy()
        self._bootstrap_truncations(algorithm.states_per_pass(_in_a_row(buffer.observations, buffer.pos)))

    def finish(self, new_obs: Any, dones: np.ndarray) -> th.Tensor:
        self.complete()
        return _finish_returns(self._algorithm, self._buffer, new_obs, dones)

    def _bootstrap_truncations(self, chunk_size: int) -> None:
        """Add γV(s) to the reward of each step that a time limit stopped at s."""
        policy, predict_values = self._algorithm.policy, self._algorithm.predict_values
        for start in range(0, len(self._truncations), chunk_size):
            chunk = self._truncations[start : start + chunk_size]
            states = concatenate([policy.obs_to_tensor(usable(terminal))[0] for _, _, terminal in chunk])
            values = predict_values(states).flatten().cpu().numpy()
            for (t, index, _), value in zip(chunk, values, strict=True):
                self._buffer.rewards[t, index] += self._algorithm.gamma * value


def transitions_of(algorithm: Collecting, buffer: RolloutBuffer) -> Iterator[tuple[slice, Any, th.Tensor]]:
    """The states and actions that a buffer has got so far, in batches that go through the networks at once.

    :return: rows of the buffer, its first two dimensions taken as one; states, as the actor saw them; actions, as the
        distribution's ``log_prob`` takes them
    """
    observations, actions = (_in_a_row(stored, buffer.pos) for stored in (buffer.observations, buffer.actions))
    actions = actions.astype(np.float32, copy=False)
    for rows in chunks_of(len(actions), algorithm.states_per_pass(observations)):
        states = tree_map(buffer.to_torch, usable(take(observations, rows)))
        yield rows, states, algorithm.as_taken(buffer.to_torch(actions[rows]))


def _in_a_row(stored: Any, n_steps: int) -> Any:
    """The first steps of what is stored as (T, E, ·), as (n_steps E, ·)."""
    return tree_map(lambda array: array[:n_steps].reshape(n_steps * array.shape[1], *array.shape[2:]), stored)


@th.no_grad()
def _finish_returns(algorithm: Collecting, buffer: RolloutBuffer, new_obs: Any, dones: np.ndarray) -> th.Tensor:
    """Returns and advantages from the values of the last observations, which are given back."""
    last_values = algorithm.predict_values(obs_as_tensor(usable(new_obs), algorithm.device))
    compute_returns(buffer, last_values, dones)
    return last_values
