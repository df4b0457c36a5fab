"""Vine sampling: a trunk under π_old, and branches of the simulator from a rollout set of its states.

TRPO paper, section 5.2. The trunk is a single path, and goes on after the branches as if there had been none:
they draw from generators of their own, and the simulator returns to where it stood.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.numerics.averages import chunks_of
from sb3_trpo_ext.objectives import log_probs_of_branches
from sb3_trpo_ext.observations import take, tree_map
from sb3_trpo_ext.recurrence import Memory
from sb3_trpo_ext.sampling.actor import Actor, BranchActor, usable
from sb3_trpo_ext.sampling.agent import Agent
from sb3_trpo_ext.sampling.context import Context, kept_context
from sb3_trpo_ext.sampling.lanes import SEEDS, Lanes
from sb3_trpo_ext.sampling.noise import global_generators_kept
from sb3_trpo_ext.sampling.proposals import FirstActions, all_actions, policy_actions, uniform_actions
from sb3_trpo_ext.sampling.sequences import distribution_at, units_of
from sb3_trpo_ext.sampling.single_path import Rollout, collect_single_path
from sb3_trpo_ext.sampling.snapshot import BranchError, SnapshotError, VecSimulator, VecSnapshot
from sb3_trpo_ext.sampling.vine_buffer import Branches, VineRolloutBuffer, VineSamples, taken_in_branches

_TRUNK_KEPT = "the rollout buffer holds the whole trunk, from which train() learns as from a single path"


class VineRollout(Rollout, Protocol):
    """A rollout that branches, too, are told of."""

    def branches(self) -> AbstractContextManager[None]:
        """Around the branches of a whole trunk."""
        ...

    def branched(self, n_steps: int, statistics: dict[str, float]) -> None:
        """So many steps were taken in branches, also where they failed.

        :param statistics: of the branches, by the names of the log; empty where they failed
        """
        ...


def collect_vine(
    agent: Agent,
    env: VecEnv,
    rollout: VineRollout,
    buffer: VineRolloutBuffer,
    n_rollout_steps: int,
    make_actor: Callable[[], Actor],
    make_branch_actor: Callable[[], BranchActor],
    rng: np.random.Generator,
) -> bool:
    """Fill the buffer with a trunk, then with branches from N of its states.

    The rollout set is drawn uniformly from the states of the trunk, that is from the undiscounted visitation, as
    every implementation of TRPO has it. Branch steps are reported at the end, not one by one.

    :param rng: of which all that is drawn for the branches comes
    :return: False if the trunk was ended early; there are no branches then
    :raises BranchError: if a simulator failed in a branch; the buffer then holds the whole trunk and no branches
    :raises SnapshotError: likewise, at the end of the trunk, if one of its states could not be saved
    """
    states = np.sort(rng.choice(n_rollout_steps * env.num_envs, buffer.n_rollout_states, replace=False))
    simulator = VecSimulator(env)
    visits = _Visits(simulator, states, n_rollout_steps, None if agent.recurrence is None else rollout)
    if not collect_single_path(agent, env, rollout, buffer, n_rollout_steps, make_actor, visits):
        return False
    snapshots = visits.taken()
    with rollout.branches(), global_generators_kept(agent.device, int(rng.integers(SEEDS))):
        first, log_probs = _first_actions(agent, buffer, states, visits.memories, rng)
        lanes = Lanes(agent, simulator, buffer, make_branch_actor(), snapshots, first, rng, states, visits.memories)
        statistics: dict[str, float] = {}
        try:
            q_values = lanes.run(rollout.observations, rollout.context)
            buffer.branches = Branches(states, first, q_values, log_probs)
            statistics = lanes.statistics()
            if not buffer.is_enumerated:
                statistics["vine/effective_sample_size"] = buffer.branches.effective_sample_size()
        except (BranchError, SnapshotError) as error:
            kind = type(error) if isinstance(error, BranchError) else BranchError
            raise kind(f"{error}; {_TRUNK_KEPT}") from error
        finally:
            rollout.branched(lanes.n_steps, statistics)
    return True


class _Visits:
    """Takes the snapshots of a rollout set as the trunk comes by its states.

    :param states: numbers of the transitions that begin in them, e T + t, (N,)
    :param rollout: where the trunk stands, for what a policy with memory remembers; None without
    """

    def __init__(self, simulator: VecSimulator, states: np.ndarray, n_rollout_steps: int, rollout: Rollout | None) -> None:
        self._simulator = simulator
        self._rollout = rollout
        self._memories: dict[int, Memory] = {}
        self._snapshots: dict[int, VecSnapshot] = {}
        self._failure: SnapshotError | None = None
        self._at_step = defaultdict(list)
        for n, state in enumerate(states.tolist()):
            env, t = divmod(state, n_rollout_steps)
            self._at_step[t].append((n, env))

    def __call__(self, t: int) -> None:
        for n, env in self._at_step.get(t, ()) if self._failure is None else ():
            try:
                self._snapshots[n] = self._simulator.snapshot(env)
                if self._rollout is not None:
                    self._memories[n] = _remembered_in(self._rollout, env)
            except SnapshotError as error:
                self._failure = error  # told when the trunk is whole
                return

    def taken(self) -> dict[int, VecSnapshot]:
        """By the number n of the state.

        :raises SnapshotError: if one of them could not be saved
        """
        if self._failure is not None:
            raise type(self._failure)(f"{self._failure}; {_TRUNK_KEPT}") from self._failure
        return self._snapshots

    @property
    def memories(self) -> Memory | None:
        """What was remembered before each state, N sequences; None without memory."""
        return Memory.concatenate([self._memories[n] for n in sorted(self._memories)]) if self._memories else None


def _remembered_in(rollout: Rollout, env: int) -> Memory:
    """What is remembered where one environment stands: nothing at the start of an episode."""
    keeps = float(not rollout.episode_starts[env])
    return rollout.memory.map(lambda part: part[env : env + 1] * keeps)


@th.no_grad()
def effective_sample_size_now(agent: Agent, buffer: VineRolloutBuffer, samples: RolloutBufferSamples) -> float | None:
    """What a policy step has left of the effective sample size of the branches' weights; None without weights."""
    branches = buffer.branches
    if branches is None or buffer.is_enumerated:
        return None
    states = branches.rows_in(cast(VineSamples, samples))
    actions = taken_in_branches(buffer.to_torch(branches.first.actions), agent.as_taken)
    log_probs, units = [], units_of(samples)
    for rows in chunks_of(len(states), agent.states_per_pass(samples.observations)):
        distribution = distribution_at(agent, samples, states[rows], units)
        log_probs.append(log_probs_of_branches(distribution, actions[rows]).cpu().numpy())
    return branches.effective_sample_size(np.concatenate(log_probs))


@th.no_grad()
def _first_actions(
    agent: Agent, buffer: VineRolloutBuffer, states: np.ndarray, memories: Memory | None, rng: np.random.Generator
) -> tuple[FirstActions, np.ndarray]:
    """First actions in the states of the rollout set, and their log π_old, (N, K)."""
    envs, steps = np.divmod(states, buffer.buffer_size)
    generator = th.Generator().manual_seed(int(rng.integers(SEEDS)))
    space, n_actions = buffer.action_space, buffer.n_branch_actions
    firsts, log_probs = [], []
    observations = tree_map(lambda store: store[steps, envs], buffer.observations)
    for rows in chunks_of(len(states), agent.states_per_pass(observations)):
        # as the trunk's actor saw them
        context = kept_context(buffer, lambda stored, rows=rows: stored[steps[rows], envs[rows]])  # type: ignore[misc]
        if memories is not None:
            remembered = memories.map(lambda part, rows=rows: part[rows])  # type: ignore[misc]
            starts = th.zeros(rows.stop - rows.start, device=agent.device)
            context = (context or Context())._replace(episode_starts=starts, memory=remembered)
        masks = None if context is None or context.action_masks is None else context.action_masks.cpu().numpy()
        distribution = agent.distribution(tree_map(buffer.to_torch, usable(take(observations, rows))), context)

        def log_prob_of(actions: np.ndarray, distribution: Any = distribution) -> th.Tensor:
            return distribution.log_prob(agent.as_taken(buffer.to_torch(actions)))

        n_states = rows.stop - rows.start
        if n_actions == "all":
            first = all_actions(space, n_states, masks)
        elif buffer.proposal == "uniform":
            first = uniform_actions(space, n_states, n_actions, rng, masks)
        else:
            is_finite = not isinstance(space, spaces.Box)
            first = policy_actions(distribution, n_states, n_actions, generator, log_prob_of, is_finite)
        firsts.append(first)
        taken = taken_in_branches(buffer.to_torch(first.actions), agent.as_taken)
        log_probs.append(log_probs_of_branches(distribution, taken).cpu().numpy())
    return FirstActions.concatenate(firsts), np.concatenate(log_probs)
