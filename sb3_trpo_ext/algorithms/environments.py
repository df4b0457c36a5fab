"""Environments that branches can start from: how an algorithm wraps, changes and checks them."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.checks import require
from sb3_trpo_ext.sampling.snapshot import SnapshotWrapper, check_returns, make_restorable, mark_as_own
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer


class WithRestorableEnvironments(OnPolicyAlgorithm):
    """An SB3 algorithm whose environments return to a state wherever its rollout buffer takes vines."""

    @property
    def _branches_out(self) -> bool:
        """Whether rollouts are vines."""
        return self.rollout_buffer_class is not None and issubclass(self.rollout_buffer_class, VineRolloutBuffer)

    def _setup_model(self) -> None:
        if self._branches_out:
            require("use_sde", self.use_sde, not self.use_sde, "False with VineRolloutBuffer: branches draw their own noise")
            if self.env is not None:
                make_restorable(self.env)
        super()._setup_model()

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

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # branches may overshoot by much, and a schedule below 0 would turn the critic's fit around
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)
