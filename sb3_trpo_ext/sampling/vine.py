"""Vine sampling: a trunk under π_old, and branches of the simulator from a rollout set of its states.

TRPO paper, section 5.2. The trunk is a single path, and goes on after the branches as if there had been none:
they draw from generators of their own, and the simulator returns to where it stood.
"""

from __future__ import annotations

import pickle
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EventCallback, ProgressBarCallback
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_trpo_ext.numerics.averages import chunks_of
from sb3_trpo_ext.objectives import log_probs_of_branches
from sb3_trpo_ext.observations import concatenate, take, take_samples, tree_map
from sb3_trpo_ext.sampling.actor import Actor, BranchActor, usable
from sb3_trpo_ext.sampling.proposals import FirstActions, all_actions, policy_actions, uniform_actions
from sb3_trpo_ext.sampling.single_path import action_transform, collect_single_path, stopped_at
from sb3_trpo_ext.sampling.snapshot import BranchError, SnapshotError, SnapshotWrapper, VecSimulator, VecSnapshot
from sb3_trpo_ext.sampling.vine_buffer import Branches, VineRolloutBuffer, VineSamples, taken_in_branches

if TYPE_CHECKING:
    from sb3_trpo_ext.algorithms.collecting import Collecting

_SEEDS = 2**31 - 1  # what every simulator takes
_NOISE_BLOCK = 128  # steps that a branch has noise for at once
_TRUNK_KEPT = "the rollout buffer holds the whole trunk, from which train() learns as from a single path"


def collect_vine(
    algorithm: Collecting,
    env: VecEnv,
    callback: BaseCallback,
    buffer: VineRolloutBuffer,
    n_rollout_steps: int,
    make_actor: Callable[[], Actor],
    make_branch_actor: Callable[[], BranchActor],
) -> bool:
    """Fill the buffer with a trunk, then with branches from N of its states.

    The rollout set is drawn uniformly from the states of the trunk, that is from the undiscounted visitation, as
    every implementation of TRPO has it. Branch steps are added to ``num_timesteps`` at the end, without ``on_step``.

    :return: False if a callback ended the trunk early; there are no branches then
    :raises BranchError: if a simulator failed in a branch; the buffer then holds the whole trunk and no branches
    :raises SnapshotError: likewise, at the end of the trunk, if one of its states could not be saved
    """
    rng = _own_generator(algorithm)
    states = np.sort(rng.choice(n_rollout_steps * env.num_envs, buffer.n_rollout_states, replace=False))
    simulator = VecSimulator(env)
    snapshots: dict[int, VecSnapshot] = {}
    at_step = defaultdict(list)
    for n, state in enumerate(states):
        at_step[int(state) % n_rollout_steps].append(n)

    failures: list[SnapshotError] = []

    def take_snapshots(t: int) -> None:
        for n in at_step.get(t, ()) if not failures else ():
            try:
                snapshots[n] = simulator.snapshot(int(states[n]) // n_rollout_steps)
            except SnapshotError as error:
                failures.append(error)  # told when the trunk is whole
                return

    if not collect_single_path(algorithm, env, callback, buffer, n_rollout_steps, make_actor, take_snapshots):
        return False
    for error in failures:
        raise type(error)(f"{error}; {_TRUNK_KEPT}") from error
    with algorithm._timed("branches"), _global_generators_kept(algorithm.device, int(rng.integers(_SEEDS))):
        first, log_probs = _first_actions(algorithm, buffer, states, rng)
        runner = _Lanes(algorithm, simulator, buffer, make_branch_actor(), snapshots, first, rng)
        try:
            q_values = runner.run()
        except (BranchError, SnapshotError) as error:
            kind = type(error) if isinstance(error, BranchError) else BranchError
            raise kind(f"{error}; {_TRUNK_KEPT}") from error
        finally:
            algorithm.num_timesteps += runner.n_steps
            for bar in _progress_bars(callback):
                bar.pbar.update(runner.n_steps)
    buffer.branches = Branches(states, first, q_values, log_probs)
    _record(algorithm, buffer.branches, runner)
    return True


def mark_as_own(env: VecEnv) -> None:
    """Remember of a ``VecEnv`` that the algorithm made it, so that it may wrap what is in it."""
    env.unwrapped.made_by_algorithm = True  # type: ignore[attr-defined]


def make_restorable(env: VecEnv) -> None:
    """Make sure that branches can start from states of this ``VecEnv``; wrap what the algorithm itself made.

    :raises ValueError: saying what to wrap, or naming the layer that cannot be restored
    """
    venv = env.unwrapped
    if getattr(venv, "made_by_algorithm", False) and not all(env.env_is_wrapped(SnapshotWrapper)):
        assert isinstance(venv, DummyVecEnv)
        venv.envs = [SnapshotWrapper(inner) for inner in venv.envs]
    VecSimulator(env)


class _Lanes:
    """Branches in lockstep: each environment runs one, and gets the next as soon as it ends.

    :param snapshots: by the number n of the state; emptied on the way
    """

    def __init__(
        self,
        algorithm: Collecting,
        simulator: VecSimulator,
        buffer: VineRolloutBuffer,
        actor: BranchActor,
        snapshots: dict[int, VecSnapshot],
        first: FirstActions,
        rng: np.random.Generator,
    ) -> None:
        self._algorithm, self._simulator, self._buffer, self._actor = algorithm, simulator, buffer, actor
        self._snapshots, self._first = snapshots, first
        n_states, n_actions = first.multiplicities.shape
        seeds = rng.integers(_SEEDS, size=(2, n_states, n_actions))
        if buffer.common_random_numbers:
            seeds = np.broadcast_to(seeds[:, :, :1], seeds.shape)
        self._noise_seeds, self._env_seeds = seeds.tolist()
        self._queue = deque((n, k) for n, k in np.argwhere(first.multiplicities > 0).tolist())
        self.n_branches, self.n_steps, self.n_cut, self.n_truncated = len(self._queue), 0, 0, 0
        self._q_values = np.zeros((n_states, n_actions))
        n_envs = algorithm.n_envs
        self._branch: list[tuple[int, int] | None] = [None] * n_envs
        self._steps = np.zeros(n_envs, dtype=np.int64)
        self._returns = np.zeros(n_envs)
        self._discounts = np.ones(n_envs)
        self._generators = [th.Generator() for _ in range(n_envs)]
        self._block = min(buffer.branch_length, _NOISE_BLOCK)
        self._noise = np.stack([self._actor.noise((self._block,), generator) for generator in self._generators])
        self._bootstraps: list[tuple[int, int, float, Any]] = []

    def run(self) -> np.ndarray:
        """Q̂(s_n, a_k), (N, K)."""
        observations = tree_map(np.copy, self._algorithm._last_obs)
        to_env, lanes, gamma = action_transform(self._algorithm), np.arange(self._algorithm.n_envs), self._algorithm.gamma
        with self._simulator.branching():
            for lane in lanes.tolist():
                self._start(lane)
            n_running = len(lanes) - self._branch.count(None)
            while n_running:
                row = self._steps % self._block
                if np.count_nonzero(row) < len(lanes):
                    for lane in np.flatnonzero((row == 0) & (self._steps > 0)).tolist():
                        self._draw_noise(lane)
                actions = self._actor.act_from(observations, self._noise[lanes, row])
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
        self._draw_noise(lane)  # its first row is for the first action, which is not drawn from it

    def _draw_noise(self, lane: int) -> None:
        """Noise for the next block of a branch's steps, which few branches may reach the end of."""
        self._noise[lane] = self._actor.noise((self._block,), self._generators[lane])

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
            self._bootstraps.append((*branch, float(self._discounts[lane]), tree_map(np.copy, last)))
            if len(self._bootstraps) >= self._algorithm.states_per_pass(tree_map(lambda leaf: np.asarray(leaf)[None], last)):
                self._add_bootstraps()

    @th.no_grad()
    def _add_bootstraps(self) -> None:
        """Add γᵗV(s) to the returns of branches that could have gone on from s."""
        if not self._bootstraps:
            return
        policy = self._algorithm.policy
        states = concatenate([policy.obs_to_tensor(usable(last))[0] for *_, last in self._bootstraps])
        values = self._algorithm.predict_values(states).flatten().tolist()
        for (n, k, discount, _), value in zip(self._bootstraps, values, strict=True):
            self._q_values[n, k] += discount * value
        self._bootstraps.clear()


@th.no_grad()
def record_weights(algorithm: Collecting, buffer: VineRolloutBuffer, samples: RolloutBufferSamples) -> None:
    """Log what a policy step has left of the effective sample size of the branches' weights."""
    branches = buffer.branches
    if branches is None or buffer.is_enumerated:
        return
    assert isinstance(samples, VineSamples)
    states, actions = branches.rows_in(samples), taken_in_branches(buffer.to_torch(branches.first.actions), algorithm.as_taken)
    log_probs = []
    for rows in chunks_of(len(states), algorithm.states_per_pass(samples.observations)):
        part = take_samples(samples, states[rows], len(samples.actions))
        distribution = algorithm.action_distribution(part.observations, part)
        log_probs.append(log_probs_of_branches(distribution, actions[rows]).cpu().numpy())
    size = branches.effective_sample_size(np.concatenate(log_probs))
    algorithm.logger.record("vine/effective_sample_size_after", size)


@th.no_grad()
def _first_actions(
    algorithm: Collecting, buffer: VineRolloutBuffer, states: np.ndarray, rng: np.random.Generator
) -> tuple[FirstActions, np.ndarray]:
    """First actions in the states of the rollout set, and their log π_old, (N, K)."""
    envs, steps = np.divmod(states, buffer.buffer_size)
    generator = th.Generator().manual_seed(int(rng.integers(_SEEDS)))
    space, n_actions = buffer.action_space, buffer.n_branch_actions
    firsts, log_probs = [], []
    observations = tree_map(lambda store: store[steps, envs], buffer.observations)
    for rows in chunks_of(len(states), algorithm.states_per_pass(observations)):
        # as the trunk's actor saw them
        distribution = algorithm.action_distribution(tree_map(buffer.to_torch, usable(take(observations, rows))))

        def log_prob_of(actions: np.ndarray, distribution: Any = distribution) -> th.Tensor:
            return distribution.log_prob(algorithm.as_taken(buffer.to_torch(actions)))

        n_states = rows.stop - rows.start
        if n_actions == "all":
            first = all_actions(space, n_states)
        elif buffer.proposal == "uniform":
            first = uniform_actions(space, n_states, n_actions, rng)
        else:
            is_finite = not isinstance(space, spaces.Box)
            first = policy_actions(distribution, n_states, n_actions, generator, log_prob_of, is_finite)
        firsts.append(first)
        taken = taken_in_branches(buffer.to_torch(first.actions), algorithm.as_taken)
        log_probs.append(log_probs_of_branches(distribution, taken).cpu().numpy())
    return FirstActions.concatenate(firsts), np.concatenate(log_probs)


def _own_generator(algorithm: Collecting) -> np.random.Generator:
    """The generator of one collection: of the model's seed and of how far it has come, so that it is also saved.

    Without a seed it follows the global generators of torch and NumPy, which are left where they are.
    """
    seed = _global_entropy() if algorithm.seed is None else algorithm.seed
    return np.random.default_rng([seed, algorithm._n_updates, algorithm.num_timesteps])


def _global_entropy() -> int:
    return zlib.crc32(pickle.dumps((th.get_rng_state().numpy(), np.random.get_state(legacy=False))))


@contextmanager
def _global_generators_kept(device: th.device, seed: int) -> Iterator[None]:
    """Context that leaves the global generators of NumPy, torch and the model's own CUDA device as they were.

    Inside, torch's are seeded, for policies that draw their own noise; those of other devices are not touched.
    """
    generators = [th.default_generator]
    if device.type == "cuda":
        generators.append(th.cuda.default_generators[th.cuda.current_device() if device.index is None else device.index])
    states, of_numpy = [generator.get_state() for generator in generators], np.random.get_state()
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        np.random.set_state(of_numpy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _progress_bars(callback: BaseCallback | None) -> Iterator[ProgressBarCallback]:
    """The progress bars among callbacks of callbacks."""
    if isinstance(callback, ProgressBarCallback):
        yield callback
    elif isinstance(callback, CallbackList):
        for child in callback.callbacks:
            yield from _progress_bars(child)
    elif isinstance(callback, EventCallback):
        yield from _progress_bars(callback.callback)


def _record(algorithm: Collecting, branches: Branches, lanes: _Lanes) -> None:
    record = algorithm.logger.record
    record("vine/branches", lanes.n_branches)
    record("vine/branch_steps", lanes.n_steps)
    record("vine/mean_branch_length", lanes.n_steps / lanes.n_branches)
    record("vine/cut_fraction", lanes.n_cut / lanes.n_branches)
    record("vine/time_limit_fraction", lanes.n_truncated / lanes.n_branches)
    if not algorithm.rollout_buffer.is_enumerated:  # type: ignore[attr-defined]
        record("vine/effective_sample_size", branches.effective_sample_size())
