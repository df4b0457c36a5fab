"""Collecting transitions: who acts, in which environments, as a single path or as a vine."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, RolloutBufferSamples
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.algorithms.arguments import CriticChoice
from sb3_trpo_ext.checks import warn_user
from sb3_trpo_ext.distributions import require_kl
from sb3_trpo_ext.numerics.differentiation import numbers_saved
from sb3_trpo_ext.observations import choices, entries_per_state, length, numbers_seen, tree_map
from sb3_trpo_ext.originals import differs_from_sb3
from sb3_trpo_ext.sampling.actor import Actor, BranchActor, SB3Actor, TorchActor, numpy_actor
from sb3_trpo_ext.sampling.agreement import disagreement
from sb3_trpo_ext.sampling.buffers import adds_like_sb3
from sb3_trpo_ext.sampling.single_path import collect_single_path
from sb3_trpo_ext.sampling.snapshot import SnapshotWrapper, check_returns
from sb3_trpo_ext.sampling.vine import collect_vine, make_restorable, mark_as_own
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer
from sb3_trpo_ext.standard_policies import (
    acts_by_get_distribution,
    calls_like_sb3,
    evaluates_by_itself,
    has_parameters,
    is_dense,
    overrides,
    units,
)

_FEWEST_STATES = 256
_COPIES_OF_PARAMETERS = 10


class Collecting(OnPolicyAlgorithm):
    """The half of the shell that fills the rollout buffer."""

    critic: CriticChoice
    values_at_each_step: bool
    chunk_size: int | None
    _seconds: dict[str, float]
    _measured: int | None = None
    _has_told_of_disagreement = False

    # -- the policy, seen through two methods that subclasses may override ---------------------------

    def action_distribution(self, observations: PyTorchObs, samples: RolloutBufferSamples | None = None) -> Distribution:
        """π_θ(·|s) on a batch of observations. Every distribution, acting included, is made here.

        :param observations: (B, ·)
        :param samples: the transitions that the observations belong to, with whatever further fields
            the rollout buffer has; None when acting
        """
        return self.policy.get_distribution(observations)

    @th.no_grad()
    def _check_distribution(self) -> None:
        """Refuse a policy whose distribution has no KL that anybody knows, before it has collected anything.

        :raises ValueError: naming it, and what to do
        """
        if type(self.policy.action_dist).__module__ == Distribution.__module__:
            return
        space = copy.deepcopy(self.observation_space)
        space.seed(0)
        with self._unnoticed():
            try:
                distribution = self.action_distribution(self.policy.obs_to_tensor(space.sample())[0])
            except Exception:
                # somebody else's policy may need more than an observation: then its first update says so
                return
        require_kl(distribution)

    def predict_values(self, observations: PyTorchObs) -> th.Tensor:
        """V(s) on a batch of observations, (B, 1); zero without a critic."""
        if self.critic == "none":
            return th.zeros(length(observations), 1, device=self.device)
        return self.policy.predict_values(observations)

    # -- acting --------------------------------------------------------------------------------------

    @property
    def actor_path(self) -> str:
        """How rollouts ask the policy for actions: ``"numpy"``, ``"torch"`` or ``"sb3"``.

        See :mod:`sb3_trpo_ext.sampling.actor`.
        """
        return self._make_actor(self.rollout_buffer).path

    def _make_actor(self, rollout_buffer: RolloutBuffer) -> Actor:
        policy = self.policy
        at_each_step = self.values_at_each_step or not adds_like_sb3(rollout_buffer)
        if overrides(self, Collecting, ("action_distribution",)) or acts_by_get_distribution(policy):
            values_of = self.predict_values if at_each_step else None
            return TorchActor(self.action_distribution, policy, self.n_envs, values_of)
        if at_each_step or calls_like_sb3(policy):
            return self._sb3_actor()
        fast = numpy_actor(policy, self.n_envs)
        if fast is not None:
            return fast
        if policy.share_features_extractor and has_parameters(policy.features_extractor):
            # learned features serve actor and critic: computing them once a step is cheapest
            return self._sb3_actor()
        return TorchActor(self.action_distribution, policy, self.n_envs)

    def _sb3_actor(self) -> SB3Actor:
        """With the V that the critic is fitted for, wherever it is another one than SB3's loop would take."""
        has_own = overrides(self, Collecting, ("predict_values",)) or differs_from_sb3(self.policy, ("predict_values",))
        return SB3Actor(self.policy, self.predict_values if has_own else None)

    def _make_branch_actor(self) -> BranchActor:
        """Acts as :meth:`action_distribution` says, whatever else the policy overrides."""
        fast = None if overrides(self, Collecting, ("action_distribution",)) else numpy_actor(self.policy, self.n_envs)
        return fast or TorchActor(self.action_distribution, self.policy, self.n_envs)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the rollout buffer; the contract is SB3's. See :mod:`sb3_trpo_ext.sampling.single_path`."""
        assert self._last_obs is not None, "No previous observation was provided"
        self.policy.set_training_mode(False)
        self._measured = None

        def make_actor() -> Actor:
            return self._make_actor(rollout_buffer)

        with self._timed("rollout"):
            if isinstance(rollout_buffer, VineRolloutBuffer):
                branch_actor = self._make_branch_actor
                is_full = collect_vine(self, env, callback, rollout_buffer, n_rollout_steps, make_actor, branch_actor)
            else:
                is_full = collect_single_path(self, env, callback, rollout_buffer, n_rollout_steps, make_actor)
            if is_full:
                self._tell_of_disagreement(rollout_buffer)
        return is_full

    def _tell_of_disagreement(self, rollout_buffer: RolloutBuffer) -> None:
        """Warn, once, of a policy that acts otherwise than :meth:`action_distribution` says."""
        may_disagree = evaluates_by_itself(self.policy) and not overrides(self, Collecting, ("action_distribution",))
        if self._has_told_of_disagreement or not may_disagree or not adds_like_sb3(rollout_buffer):
            return
        message = disagreement(self, rollout_buffer)
        if message is not None:
            self._has_told_of_disagreement = True
            warn_user(message)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_has_told_of_disagreement"]

    def as_taken(self, actions: th.Tensor) -> th.Tensor:
        """Actions of a rollout buffer, (B, ·), as the distribution's ``log_prob`` takes them."""
        return actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions

    def states_per_pass(self, observations: Any) -> int:
        """How many states go through the networks at once: ``chunk_size``, or what fits a budget.

        That is about 64 MB of observations as the networks see them, as much of the distributions' parameters with what a
        KL makes of them, and 256 MB of what a linearisation keeps of the layers.
        """
        if self.chunk_size is not None:
            return self.chunk_size
        seen = max(entries_per_state(observations), numbers_seen(self.observation_space))
        # three numbers a unit, of either the actor or the critic
        kept = 3 * units(self.policy) // 2
        if not is_dense(self.policy):
            kept = max(kept, self._kept_of_layers(observations, seen))
        at_once = 2**24 // max(seen, _COPIES_OF_PARAMETERS * _parameters_of_distribution(self.action_space))
        return max(_FEWEST_STATES, min(at_once, 2**26 // max(kept, 1)))

    def _kept_of_layers(self, observations: Any, seen: int) -> int:
        """The same of a policy of any kind, found once a rollout by asking it about a state."""
        if self._measured is None:
            # copies, because what is kept of a view is counted as the whole
            one, two = (
                tree_map(lambda leaf: th.as_tensor(leaf[:n], device=self.device).clone(), observations)  # noqa: B023
                for n in (1, min(2, length(observations)))
            )
            with self._unnoticed():
                actor, critic = (
                    [numbers_saved(lambda: ask(states), self.policy) for states in (one, two)]  # noqa: B023
                    for ask in (self.action_distribution, self.predict_values)
                )
            # what does not grow with the states is no matter
            self._measured = max(more - less if length(two) > 1 else less for less, more in (actor, critic))
        return 3 * max(self._measured - seen, 0) + seen

    @contextmanager
    def _unnoticed(self) -> Iterator[None]:
        """Context in which the policy can be asked, in evaluation mode, without a trace in global random numbers."""
        was_training = self.policy.training
        self.policy.set_training_mode(False)
        try:
            with th.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            if was_training:
                self.policy.set_training_mode(True)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # branches may overshoot by much, and a schedule below 0 would turn the critic's fit around
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    # -- environments that branches can start from -----------------------------------------------------

    @property
    def _branches_out(self) -> bool:
        """Whether rollouts are vines."""
        return self.rollout_buffer_class is not None and issubclass(self.rollout_buffer_class, VineRolloutBuffer)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, SnapshotWrapper) and monitor_wrapper and not is_wrapped(env, Monitor):
            # SB3 would put the Monitor outside, where snapshots do not reach
            env = SnapshotWrapper(Monitor(env.env))
        wrapped = OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        if not isinstance(env, VecEnv):
            mark_as_own(wrapped)
        return wrapped

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Go on with another environment; see SB3. One that vine sampling cannot restore is refused."""
        env = self._wrap_env(env, self.verbose)
        if self._branches_out:
            make_restorable(env)
        super().set_env(env, force_reset)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        prepared = super()._setup_learn(*args, **kwargs)
        if self._branches_out:
            assert self.env is not None
            check_returns(self.env)
        return prepared

    # -- time ----------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[part] = time.perf_counter() - started


def _parameters_of_distribution(space: spaces.Space) -> int:
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return choices(space)
    return max(1, int(np.prod(space.shape or ())))
