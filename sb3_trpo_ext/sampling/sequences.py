"""A rollout of a policy with memory, as sequences: one of each environment, states in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution

from sb3_trpo_ext.numerics.averages import Rows, Units, chunks_of
from sb3_trpo_ext.observations import concatenate, length, take_samples, tree_map
from sb3_trpo_ext.recurrence import Memory
from sb3_trpo_ext.sampling.actor import usable
from sb3_trpo_ext.sampling.agent import Agent
from sb3_trpo_ext.sampling.buffers import with_fields
from sb3_trpo_ext.sampling.context import Context, kept_context

Truncation = tuple[int, int, Any]
"""t, environment and the observation at which a time limit stopped it."""


def samples_in_sequences(buffer: RolloutBuffer, memory: Memory) -> Any:
    """All samples of a full buffer, environment after environment in the order of time, with their context.

    :param memory: of each environment before the first step
    """
    # makes rows of the arrays, once
    next(iter(buffer.get(batch_size=None)))
    samples = buffer._get_samples(np.arange(buffer.buffer_size * buffer.n_envs))
    starts = buffer.to_torch(buffer.episode_starts.swapaxes(0, 1).reshape(-1))
    return with_fields(samples, episode_starts=starts, memory=memory)


def units_of(samples: Any) -> Units:
    """States that count 1 each, all of a rollout; sequences of them, one of each environment, for a policy with memory."""
    n_states, memory = length(samples.observations), getattr(samples, "memory", None)
    if memory is None:
        return Units(n_states)
    n_sequences = len(memory.pi[0])
    return Units(n_sequences, n_states // n_sequences)


def distribution_at(agent: Agent, samples: Any, rows: Rows, units: Units) -> Distribution:
    """π(·|s) of any states of a batch; what comes before them in their sequences is looked at with them.

    :param units: what the batch consists of
    """
    if isinstance(rows, slice) or units.length == 1 or _are_whole(rows, units):
        part = take_samples(samples, rows, units)
        return agent.distribution(part.observations, part)
    sequences, place = th.unique(rows // units.length, return_inverse=True)
    part = take_samples(samples, units.rows_of(sequences), units)
    picked = place * units.length + rows % units.length
    further = {name: getattr(part, name)[picked] for name in ("action_masks",) if hasattr(part, name)}
    return agent.distribution(part.observations, with_fields(part, picked=picked, **further))


def _are_whole(rows: th.Tensor, units: Units) -> bool:
    firsts = rows[:: units.length]
    return len(firsts) * units.length == len(rows) and th.equal(rows, units.rows_of(firsts // units.length))


@th.no_grad()
def complete_sequences(agent: Agent, buffer: RolloutBuffer, memory: Memory, truncations: Sequence[Truncation]) -> Memory:
    """Fill in values, log-probabilities and what time limits add to rewards, of the steps that a buffer has got so far.

    :param memory: of each environment before the first step
    :return: after the last one
    """
    n_steps = buffer.pos
    per_pass = max(1, agent.states_per_pass(tree_map(lambda array: array[0], buffer.observations)) // n_steps)
    found = []
    for envs in chunks_of(buffer.n_envs, per_pass):
        own = [(t, env - envs.start, terminal) for t, env, terminal in truncations if envs.start <= env < envs.stop]
        found.append(_complete(agent, buffer, envs, memory.map(lambda part, envs=envs: part[envs]), own))  # type: ignore[misc]
    return Memory.concatenate(found)


def _complete(agent: Agent, buffer: RolloutBuffer, envs: slice, memory: Memory, truncations: Sequence[Truncation]) -> Memory:
    """The same for some of the environments, numbered from 0 among themselves."""
    recurrence, n_steps = agent.recurrence, buffer.pos
    assert recurrence is not None

    def in_a_row(stored: np.ndarray) -> np.ndarray:
        part = stored[:n_steps, envs].swapaxes(0, 1)
        return part.reshape(-1, *part.shape[2:])

    states = tree_map(buffer.to_torch, usable(tree_map(in_a_row, buffer.observations)))
    actions = agent.as_taken(buffer.to_torch(in_a_row(buffer.actions).astype(np.float32, copy=False)))
    starts = buffer.to_torch(in_a_row(buffer.episode_starts))
    context = (kept_context(buffer, in_a_row) or Context())._replace(episode_starts=starts, memory=memory)
    for name, numbers in (
        ("values", agent.values(states, context).flatten()),
        ("log_probs", agent.distribution(states, context).log_prob(actions)),
    ):
        getattr(buffer, name)[:n_steps, envs] = numbers.view(-1, n_steps).t().cpu().numpy()
    after, ends = recurrence.after(states, context)
    piece_of = {row: piece for piece, row in enumerate(ends.tolist())}
    if truncations:
        _bootstrap(agent, buffer, envs, truncations, _take(after, [piece_of[env * n_steps + t] for t, env, _ in truncations]))
    return _take(after, [piece_of[(env + 1) * n_steps - 1] for env in range(envs.stop - envs.start)])


def _take(memory: Memory, pieces: list[int]) -> Memory:
    return memory.map(lambda part: part[pieces])


def _bootstrap(agent: Agent, buffer: RolloutBuffer, envs: slice, truncations: Sequence[Truncation], memory: Memory) -> None:
    """Add γV(s) to the reward of each step that a time limit stopped at s, given what was remembered then."""
    states = concatenate([agent.policy.obs_to_tensor(usable(terminal))[0] for *_, terminal in truncations])
    context = Context(episode_starts=th.zeros(len(truncations), device=agent.device), memory=memory)
    values = agent.values(states, context).flatten().cpu().numpy()
    for (t, env, _), value in zip(truncations, values, strict=True):
        buffer.rewards[t, envs.start + env] += agent.gamma * value
