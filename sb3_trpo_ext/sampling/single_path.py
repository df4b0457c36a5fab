"""Single-path sampling: follow π_old in E environments for T steps and fill the rollout buffer.

The contract is that of SB3's ``OnPolicyAlgorithm.collect_rollouts``: the same callbacks with the same
locals, the same early stop, the same buffer contents. What differs is when values and
log-probabilities are computed: at the end, in one batch, unless the actor knew them at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.numerics.averages import chunks_of
from sb3_trpo_ext.observations import concatenate, take, tree_map
from sb3_trpo_ext.recurrence import Memory
from sb3_trpo_ext.sampling.actor import Acted, Actor, Observation, usable
from sb3_trpo_ext.sampling.agent import Agent
from sb3_trpo_ext.sampling.buffers import compute_returns, fields_of, make_room
from sb3_trpo_ext.sampling.context import Context, keep_context, kept_context
from sb3_trpo_ext.sampling.sequences import complete_sequences
from sb3_trpo_ext.sampling.stepping import step


class Rollout(Protocol):
    """A rollout in the making, as whoever owns it keeps it: where it stands, and who hears of its steps."""

    memory: Memory
    """What a policy with memory remembers of each environment, up to the last step that is complete."""

    @property
    def observations(self) -> Observation:
        """s_t of each environment, (E, ·)."""
        ...

    @property
    def episode_starts(self) -> np.ndarray:
        """Whether s_t begins an episode, (E,)."""
        ...

    def context(self, observations: Observation, idle: Callable[[], np.ndarray] | None = None) -> Context | None:
        """What else the policy is asked with where the environments stand now, None for nothing.

        :param observations: of that, (E, ·)
        :param idle: says in which environments nobody acts, (E,)
        """
        ...

    def begins(self) -> None:
        """Before the first step; the policy may still be changed."""
        ...

    def stepped(self, found: dict[str, Any]) -> bool:
        """The environments were stepped.

        :param found: what this step made known, by the names that SB3's callbacks know it by
        :return: False to end the rollout here
        """
        ...

    def goes_on(self, new_obs: Observation, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """From s_t to s_t+1."""
        ...

    def ends(self, found: dict[str, Any]) -> None:
        """After the last step of a whole rollout, the buffer being complete."""
        ...


def collect_single_path(
    agent: Agent,
    env: VecEnv,
    rollout: Rollout,
    buffer: RolloutBuffer,
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
    :return: False if the rollout was ended early
    """
    to_env = agent.action_transform(env.num_envs)
    buffer.reset()
    fields_of(buffer).clear()
    agent.explore_anew(env.num_envs)
    rollout.begins()
    actor = make_actor()
    actor.prepare(n_rollout_steps)
    recorder: Recorder = (ImmediateRecorder if actor.knows_values else DeferredRecorder)(agent, buffer, rollout)
    for t in range(n_rollout_steps):
        if agent.sde_sample_freq is not None:
            agent.explore_anew(env.num_envs, t)
        if visit is not None:
            visit(t)
        observations = rollout.observations
        context = rollout.context(observations)
        further = () if context is None else (context,)
        acted = actor.act(observations, t, *further)
        if context is not None:
            keep_context(buffer, context)
        clipped_actions = to_env(acted.actions)
        new_obs, rewards, dones, infos = step(env, clipped_actions)
        found = {
            "n_steps": t,
            "obs_tensor": acted.states,
            "actions": acted.actions,
            "values": acted.values,
            "log_probs": acted.log_probs,
            "clipped_actions": clipped_actions,
            "new_obs": new_obs,
            "rewards": rewards,
            "dones": dones,
            "infos": infos,
        }
        if not rollout.stepped(found):
            recorder.complete()
            return False
        recorder.add(Transition(rollout.observations, rewards, rollout.episode_starts, dones, infos), acted)
        rollout.goes_on(new_obs, dones, infos)
    rollout.ends({"n_steps": n_rollout_steps, "values": recorder.finish(new_obs, dones)})
    return True


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

    def __init__(self, agent: Agent, buffer: RolloutBuffer, rollout: Rollout) -> None:
        self._agent = agent
        self._buffer = buffer
        self._rollout = rollout

    def add(self, step: Transition, acted: Acted) -> None:
        agent, rewards = self._agent, step.rewards
        assert acted.values is not None and acted.log_probs is not None
        if rewards.dtype.kind != "f":
            rewards = rewards.astype(np.float32)  # integers would cut off what is added to them
        for index, terminal in step.truncated():
            with th.no_grad():
                state = agent.policy.obs_to_tensor(usable(terminal))[0]
                value = agent.values(state, *_remembered(agent, acted.memory, index))[0]
            rewards[index] += agent.gamma * float(value)
        actions, values = acted.actions, acted.values
        if isinstance(agent.action_space, spaces.Discrete):
            actions = actions.reshape(-1, 1)
        if not agent.has_critic:
            values = th.zeros_like(values)
        make_room(self._buffer, step.observations, actions)
        self._buffer.add(step.observations, actions, rewards, step.episode_starts, values, acted.log_probs)  # type: ignore[arg-type]
        if acted.memory is not None:
            self._rollout.memory = acted.memory

    def complete(self) -> None:
        pass

    def finish(self, new_obs: Any, dones: np.ndarray) -> th.Tensor:
        return _finish_returns(self._agent, self._buffer, self._rollout, new_obs, dones)


class DeferredRecorder:
    """Writes transitions only, and at the end all values and log-probabilities in batched passes."""

    def __init__(self, agent: Agent, buffer: RolloutBuffer, rollout: Rollout) -> None:
        self._agent = agent
        self._buffer = buffer
        self._rollout = rollout
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
        agent, buffer = self._agent, self._buffer
        if buffer.pos == 0:
            return
        if agent.recurrence is not None:
            self._rollout.memory = complete_sequences(agent, buffer, self._rollout.memory, self._truncations)
            return
        for rows, states, actions, context in transitions_of(agent, buffer):
            buffer.values.reshape(-1)[rows] = agent.values(states).flatten().cpu().numpy()
            log_probs = agent.distribution(states, context).log_prob(actions)
            buffer.log_probs.reshape(-1)[rows] = log_probs.cpu().numpy()
        self._bootstrap_truncations(agent.states_per_pass(_in_a_row(buffer.observations, buffer.pos)))

    def finish(self, new_obs: Any, dones: np.ndarray) -> th.Tensor:
        self.complete()
        return _finish_returns(self._agent, self._buffer, self._rollout, new_obs, dones)

    def _bootstrap_truncations(self, chunk_size: int) -> None:
        """Add γV(s) to the reward of each step that a time limit stopped at s."""
        agent = self._agent
        for start in range(0, len(self._truncations), chunk_size):
            chunk = self._truncations[start : start + chunk_size]
            states = concatenate([agent.policy.obs_to_tensor(usable(terminal))[0] for _, _, terminal in chunk])
            values = agent.values(states).flatten().cpu().numpy()
            for (t, index, _), value in zip(chunk, values, strict=True):
                self._buffer.rewards[t, index] += agent.gamma * value


def transitions_of(agent: Agent, buffer: RolloutBuffer) -> Iterator[tuple[slice, Any, th.Tensor, Context | None]]:
    """The states and actions that a buffer has got so far, in batches that go through the networks at once.

    :return: rows of the buffer, its first two dimensions taken as one; states, as the actor saw them; actions, as the
        distribution's ``log_prob`` takes them; what else the policy was asked with
    """
    observations, actions = (_in_a_row(stored, buffer.pos) for stored in (buffer.observations, buffer.actions))
    actions = actions.astype(np.float32, copy=False)
    for rows in chunks_of(len(actions), agent.states_per_pass(observations)):
        states = tree_map(buffer.to_torch, usable(take(observations, rows)))
        context = kept_context(buffer, lambda stored, rows=rows: _in_a_row(stored, buffer.pos)[rows])  # type: ignore[misc]
        yield rows, states, agent.as_taken(buffer.to_torch(actions[rows])), context


def _in_a_row(stored: Any, n_steps: int) -> Any:
    """The first steps of what is stored as (T, E, ·), as (n_steps E, ·)."""
    return tree_map(lambda array: array[:n_steps].reshape(n_steps * array.shape[1], *array.shape[2:]), stored)


@th.no_grad()
def _finish_returns(agent: Agent, buffer: RolloutBuffer, rollout: Rollout, new_obs: Any, dones: np.ndarray) -> th.Tensor:
    """Returns and advantages from the values of the last observations, which are given back."""
    context = []
    if agent.recurrence is not None:
        context.append(Context(episode_starts=th.as_tensor(dones, device=agent.device), memory=rollout.memory))
    last_values = agent.values(obs_as_tensor(usable(new_obs), agent.device), *context)
    compute_returns(buffer, last_values, dones)
    return last_values


def _remembered(agent: Agent, memory: Memory | None, env: int) -> list[Context]:
    """What V is asked with besides one environment's observation in the midst of an episode; nothing without memory."""
    if memory is None:
        return []
    own = memory.map(lambda part: part[env : env + 1])
    return [Context(episode_starts=th.zeros(1, device=agent.device), memory=own)]
