"""Branches in lockstep: the simulator runs one in each environment, until all of them have their returns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

from sb3_trpo_ext.observations import concatenate, leaves, take, tree_map
from sb3_trpo_ext.recurrence import Memory
from sb3_trpo_ext.sampling.actor import BranchActor, Observation, usable
from sb3_trpo_ext.sampling.agent import Agent
from sb3_trpo_ext.sampling.context import Context
from sb3_trpo_ext.sampling.proposals import FirstActions
from sb3_trpo_ext.sampling.recurrent_actor import RecurrentBranchActor
from sb3_trpo_ext.sampling.single_path import stopped_at
from sb3_trpo_ext.sampling.snapshot import VecSimulator, VecSnapshot
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer

SEEDS = 2**31 - 1  # what every simulator takes
_NOISE_BLOCK = 128  # steps that a branch has noise for at once


class Lanes:
    """Branches in lockstep: each environment runs one, and gets the next as soon as it ends.

    :param snapshots: by the number n of the state; emptied on the way
    :param states: numbers of the transitions that begin in the states, e T + t, (N,)
    :param memories: what a policy with memory remembers before each state, N sequences
    """

    def __init__(
        self,
        agent: Agent,
        simulator: VecSimulator,
        buffer: VineRolloutBuffer,
        actor: BranchActor,
        snapshots: dict[int, VecSnapshot],
        first: FirstActions,
        rng: np.random.Generator,
        states: np.ndarray,
        memories: Memory | None,
    ) -> None:
        self._agent, self._simulator, self._buffer, self._actor = agent, simulator, buffer, actor
        self._snapshots, self._first = snapshots, first
        self._states, self._memories = states, memories
        n_states, n_actions = first.multiplicities.shape
        seeds = rng.integers(SEEDS, size=(2, n_states, n_actions))
        if buffer.common_random_numbers:
            seeds = np.broadcast_to(seeds[:, :, :1], seeds.shape)
        self._noise_seeds, self._env_seeds = seeds.tolist()
        self._queue = deque((n, k) for n, k in np.argwhere(first.multiplicities > 0).tolist())
        self.n_branches, self.n_steps, self.n_cut, self.n_truncated = len(self._queue), 0, 0, 0
        self._q_values = np.zeros((n_states, n_actions))
        n_envs = buffer.n_envs
        self._branch: list[tuple[int, int] | None] = [None] * n_envs
        self._steps = np.zeros(n_envs, dtype=np.int64)
        self._returns = np.zeros(n_envs)
        self._discounts = np.ones(n_envs)
        self._generators = [th.Generator() for _ in range(n_envs)]
        self._block = min(buffer.branch_length, _NOISE_BLOCK)
        self._noise = np.stack([self._actor.noise((self._block,), generator) for generator in self._generators])
        self._bootstraps: list[tuple[int, int, float, Any, Any]] = []

    def run(self, observations: Observation, context_of: Callable[..., Context | None]) -> np.ndarray:
        """Q̂(s_n, a_k), (N, K).

        :param observations: any of each environment, for those that have no branch
        :param context_of: ``Rollout.context``
        """
        observations = tree_map(np.copy, observations)
        lanes, gamma = np.arange(self._buffer.n_envs), self._agent.gamma
        to_env = self._agent.action_transform(len(lanes))
        with self._simulator.branching():
            for lane in lanes.tolist():
                self._start(lane)
            n_running = len(lanes) - self._branch.count(None)
            while n_running:
                row = self._steps % self._block
                if np.count_nonzero(row) < len(lanes):
                    for lane in np.flatnonzero((row == 0) & (self._steps > 0)).tolist():
                        self._draw_noise(lane)
                if self._memories is not None and np.count_nonzero(self._steps) < len(lanes):
                    observations = self._with_first_states(observations)
                context = context_of(observations, self._idle)
                further = () if context is None else (context,)
                actions = self._actor.act_from(observations, self._noise[lanes, row], *further)
                if np.count_nonzero(self._steps) < len(lanes):
                    self._take_first_actions(actions)
                observations, rewards, dones, infos = self._simulator.step(to_env(actions))
                self._returns += self._discounts * rewards
                self._discounts *= gamma
                self._steps += 1
                self.n_steps += n_running
                ended = dones | (self._steps >= self._buffer.branch_length)
                if np.count_nonzero(ended):
                    for lane in np.flatnonzero(ended).tolist():
                        self._end(lane, bool(dones[lane]), infos[lane], observations)
                        self._start(lane)
                    n_running = len(lanes) - self._branch.count(None)
        self._add_bootstraps()
        return self._q_values

    def _start(self, lane: int) -> None:
        """Give an environment its next branch, if there is one."""
        self._steps[lane], self._returns[lane], self._discounts[lane] = 0, 0.0, 1.0
        if not self._queue:
            if self._branch[lane] is not None:
                self._simulator.park(lane)
            self._branch[lane] = None
            return
        n, k = self._branch[lane] = self._queue.popleft()
        is_last = not self._queue or self._queue[0][0] != n
        snapshot = self._snapshots.pop(n) if is_last else self._snapshots[n]
        self._simulator.restore(lane, snapshot, seed=self._env_seeds[n][k])
        self._generators[lane].manual_seed(self._noise_seeds[n][k])
        if self._memories is not None:
            assert isinstance(self._actor, RecurrentBranchActor)
            before = self._memories.map(lambda part: part[n : n + 1])
            self._actor.memory = self._actor.memory.with_row(lane, before)
        self._draw_noise(lane)  # its first row is for the first action, which is not drawn from it

    def _draw_noise(self, lane: int) -> None:
        """Noise for the next block of a branch's steps, which few branches may reach the end of."""
        self._noise[lane] = self._actor.noise((self._block,), self._generators[lane])

    def _idle(self) -> np.ndarray:
        """Environments whose action the policy is not asked for: without a branch, or at the first step of one."""
        return (self._steps == 0) | np.array([branch is None for branch in self._branch])

    def _with_first_states(self, observations: Any) -> Any:
        """With the states that branches begin in, which a policy with memory has to see."""
        observations = tree_map(np.copy, observations)
        for lane in np.flatnonzero(self._steps == 0).tolist():
            branch = self._branch[lane]
            if branch is not None:
                env, t = divmod(int(self._states[branch[0]]), self._buffer.buffer_size)
                for own, stored in zip(leaves(observations), leaves(self._buffer.observations), strict=True):
                    own[lane] = stored[t, env].reshape(own[lane].shape)
        return observations

    def _take_first_actions(self, actions: np.ndarray) -> None:
        for lane in np.flatnonzero(self._steps == 0).tolist():
            branch = self._branch[lane]
            if branch is not None:
                actions[lane] = self._first.actions[branch].reshape(actions[lane].shape)

    def _end(self, lane: int, done: bool, info: dict[str, Any], observations: Any) -> None:
        """Keep the return of a branch that is over, and where V is to be added."""
        branch = self._branch[lane]
        if branch is None:
            return
        self._q_values[branch] = self._returns[lane]
        last = None
        if done:
            last = stopped_at(info)
            self.n_truncated += last is not None
        else:
            self.n_cut += 1
            if self._buffer.branch_bootstrap:
                last = take(observations, lane)
        if last is not None:
            # a copy, because simulators may hand out one array again and again
            memory = None
            if isinstance(self._actor, RecurrentBranchActor):
                memory = self._actor.memory.map(lambda part: part[lane : lane + 1])
            self._bootstraps.append((*branch, float(self._discounts[lane]), memory, tree_map(np.copy, last)))
            if len(self._bootstraps) >= self._agent.states_per_pass(tree_map(lambda leaf: np.asarray(leaf)[None], last)):
                self._add_bootstraps()

    @th.no_grad()
    def _add_bootstraps(self) -> None:
        """Add γᵗV(s) to the returns of branches that could have gone on from s."""
        if not self._bootstraps:
            return
        policy = self._agent.policy
        states = concatenate([policy.obs_to_tensor(usable(last))[0] for *_, last in self._bootstraps])
        further = []
        if self._memories is not None:
            starts = th.zeros(len(self._bootstraps), device=self._agent.device)
            memory = Memory.concatenate([memory for *_, memory, _ in self._bootstraps])
            further.append(Context(episode_starts=starts, memory=memory))
        values = self._agent.values(states, *further).flatten().tolist()
        for (n, k, discount, *_), value in zip(self._bootstraps, values, strict=True):
            self._q_values[n, k] += discount * value
        self._bootstraps.clear()

    def statistics(self) -> dict[str, float]:
        """What there is to log of the branches, by the names of the log."""
        return {
            "vine/branches": self.n_branches,
            "vine/branch_steps": self.n_steps,
            "vine/mean_branch_length": self.n_steps / self.n_branches,
            "vine/cut_fraction": self.n_cut / self.n_branches,
            "vine/time_limit_fraction": self.n_truncated / self.n_branches,
        }
