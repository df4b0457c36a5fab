"""The SB3 shell that the algorithms share: collect, update the policy, fit the critic, log."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, RolloutBufferSamples, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.algorithms.archives import OURS, saved_names
from sb3_trpo_ext.algorithms.arguments import (
    KEYWORDS_WITHOUT_EFFECT,
    CriticChoice,
    check_rollout_size,
    class_of,
    warn_without_effect,
)
from sb3_trpo_ext.algorithms.reporting import (
    FAULTY_QUANTITY,
    record_explained_variance,
    record_policy_step,
    unusable_quantity,
)
from sb3_trpo_ext.checks import require, require_choice, require_count, require_real
from sb3_trpo_ext.critic import (
    AdamSettings,
    CriticProblem,
    CriticReport,
    FitOutcome,
    GaussNewtonSettings,
    fit_adam,
    fit_gauss_newton,
)
from sb3_trpo_ext.numerics.averages import chunks_of
from sb3_trpo_ext.numerics.checkpoint import Checkpoint
from sb3_trpo_ext.numerics.parameters import FlatParameters, frozen
from sb3_trpo_ext.objectives import EntropyBonus, Objective, SinglePathSurrogate, normalize_advantages
from sb3_trpo_ext.observations import entries_per_state, length, take, take_samples
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.sampling.actor import Actor, BranchActor, SB3Actor, TorchActor, numpy_actor
from sb3_trpo_ext.sampling.buffers import adds_like_sb3
from sb3_trpo_ext.sampling.single_path import collect_single_path
from sb3_trpo_ext.sampling.snapshot import SnapshotWrapper
from sb3_trpo_ext.sampling.vine import collect_vine, make_restorable, mark_as_own
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer, vine_surrogate
from sb3_trpo_ext.standard_policies import (
    calls_like_sb3,
    fixed_features,
    has_parameters,
    mlp_actor,
    mlp_critic,
    overrides,
)
from sb3_trpo_ext.steps import StepReport

SelfOnPolicyExt = TypeVar("SelfOnPolicyExt", bound="OnPolicyExt")


class OnPolicyExt(OnPolicyAlgorithm):
    """Collect transitions, improve the policy, fit the critic, report. Siblings define the second.

    Constructor arguments are documented at :class:`~sb3_trpo_ext.TRPOExt`. SB3's ``load()`` overwrites
    ``__dict__`` and calls ``_setup_model()``, so whatever is derived from arguments is made there.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }

    foreign_settings: ClassVar[dict[str, Any]] = {}
    """Attributes that an archive of another library's counterpart gets when it is loaded."""

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        n_critic_updates: int = 10,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        critic: CriticChoice = "adam",
        critic_steps: int = 3,
        critic_cg_steps: int = 10,
        max_grad_norm: float = 0.0,
        values_at_each_step: bool = False,
        chunk_size: int | None = None,
        rollout_buffer_class: type[RolloutBuffer] | str | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=0.0,  # the critic is fitted on its own
            max_grad_norm=max_grad_norm,
            rollout_buffer_class=rollout_buffer_class,  # type: ignore[arg-type]  # resolved in _setup_model
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        self.batch_size = batch_size
        self.n_critic_updates = n_critic_updates
        self.normalize_advantage = normalize_advantage
        self.critic = critic
        self.critic_steps = critic_steps
        self.critic_cg_steps = critic_cg_steps
        self.critic_damping = 0.1
        self.values_at_each_step = values_at_each_step
        self.chunk_size = chunk_size
        self.outcome_counts: dict[str, int] = {}
        self.report: StepReport | None = None
        self._seconds: dict[str, float] = {}

    # -- construction ----------------------------------------------------------------------------

    def _constructed(self, set_up: bool) -> None:
        """The end of every constructor: look at the arguments together, and build what they describe."""
        OnPolicyExt._check_arguments(self)
        check_rollout_size(self)
        warn_without_effect(self)
        if set_up:
            self._setup_model()

    def keywords_without_effect(self) -> dict[str, tuple[str, ...]]:
        """Names of constructor keywords that are not used, by the choice that leaves them so."""
        return {f"critic={self.critic!r}": KEYWORDS_WITHOUT_EFFECT[self.critic]}

    def _setup_model(self) -> None:
        self._check_arguments()
        self.rollout_buffer_class = class_of(self.rollout_buffer_class)
        if self._branches_out:
            require("use_sde", self.use_sde, not self.use_sde, "False with VineRolloutBuffer: branches draw their own noise")
            if self.env is not None:
                make_restorable(self.env)
        super()._setup_model()
        if self.critic == "none":
            # with V = 0 and λ = 1 the advantage is the discounted return itself
            self.rollout_buffer.gae_lambda = 1.0
        if self.verbose >= 1:
            print(self._describe())

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

    def _check_arguments(self) -> None:
        """Refuse values that cannot work.

        :raises ValueError: naming the argument, what was expected and what came
        """
        require_choice("critic", self.critic, tuple(KEYWORDS_WITHOUT_EFFECT))
        for name in ("n_steps", "batch_size", "n_critic_updates", "critic_steps", "critic_cg_steps"):
            require_count(name, getattr(self, name))
        if self.chunk_size is not None:
            require_count("chunk_size", self.chunk_size)
        require_real("gamma", self.gamma, 0.0, 1.0)
        require_real("gae_lambda", self.gae_lambda, 0.0, 1.0)
        require_real("ent_coef", self.ent_coef, 0.0)
        require_real("max_grad_norm", self.max_grad_norm, 0.0)

    def _describe(self) -> str:
        """One line on how this model is going to train, printed with ``verbose=1``."""
        return f"Critic: {self.critic}; acting: {self.actor_path}"

    @classmethod
    def load(cls: type[SelfOnPolicyExt], path: Any, env: GymEnv | None = None, *args: Any, **kwargs: Any) -> SelfOnPolicyExt:
        """Load a model, as SB3 does; see ``BaseAlgorithm.load`` for the arguments.

        An archive that sb3_contrib.TRPO (or SB3's PPO) saved goes on as it was, as far as the algorithms are the
        same: KL on its scale, its critic fit, any improvement accepted. Keyword arguments override that.
        """
        if saved_names(path).isdisjoint(OURS):
            kwargs = {**cls.foreign_settings, **kwargs}
        return super().load(path, env, *args, **kwargs)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "report"]

    # -- what subclasses may override --------------------------------------------------------------

    def action_distribution(self, observations: PyTorchObs, samples: RolloutBufferSamples | None = None) -> Distribution:
        """π_θ(·|s) on a batch of observations. Every distribution, acting included, is made here.

        :param observations: (B, ·)
        :param samples: the transitions that the observations belong to, with whatever further fields
            the rollout buffer has; None when acting
        """
        return self.policy.get_distribution(observations)

    def predict_values(self, observations: PyTorchObs) -> th.Tensor:
        """V(s) on a batch of observations, (B, 1); zero without a critic."""
        if self.critic == "none":
            return th.zeros(length(observations), 1, device=self.device)
        return self.policy.predict_values(observations)

    @abstractmethod
    def _update_policy(self, problem: PolicyProblem) -> StepReport:
        """Improve the policy on one batch, or leave it bit for bit."""

    def _adapt(self, report: StepReport) -> None:
        """Settings that follow what became of a step, the critic fit included."""

    # -- collecting ----------------------------------------------------------------------------------

    @property
    def actor_path(self) -> str:
        """How rollouts ask the policy for actions: ``"numpy"``, ``"torch"`` or ``"sb3"``.

        See :mod:`sb3_trpo_ext.sampling.actor`.
        """
        return self._make_actor(self.rollout_buffer).path

    def _make_actor(self, rollout_buffer: RolloutBuffer) -> Actor:
        policy = self.policy
        at_each_step = self.values_at_each_step or not adds_like_sb3(rollout_buffer)
        if overrides(self, OnPolicyExt, ("action_distribution",)):
            values_of = self.predict_values if at_each_step else None
            return TorchActor(self.action_distribution, policy, self.n_envs, values_of)
        if at_each_step or calls_like_sb3(policy):
            return SB3Actor(policy)
        fast = numpy_actor(policy, self.n_envs)
        if fast is not None:
            return fast
        if policy.share_features_extractor and has_parameters(policy.features_extractor):
            # learned features serve actor and critic: computing them once a step is cheapest
            return SB3Actor(policy)
        return TorchActor(self.action_distribution, policy, self.n_envs)

    def _make_branch_actor(self) -> BranchActor:
        """Acts as :meth:`action_distribution` says, whatever else the policy overrides."""
        fast = None if overrides(self, OnPolicyExt, ("action_distribution",)) else numpy_actor(self.policy, self.n_envs)
        return fast or TorchActor(self.action_distribution, self.policy, self.n_envs)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the rollout buffer; the contract is SB3's. See :mod:`sb3_trpo_ext.sampling.single_path`."""
        assert self._last_obs is not None, "No previous observation was provided"
        self.policy.set_training_mode(False)

        def make_actor() -> Actor:
            return self._make_actor(rollout_buffer)

        with self._timed("rollout"):
            if isinstance(rollout_buffer, VineRolloutBuffer):
                return collect_vine(self, env, callback, rollout_buffer, n_rollout_steps, make_actor, self._make_branch_actor)
            return collect_single_path(self, env, callback, rollout_buffer, n_rollout_steps, make_actor)

    def as_taken(self, actions: th.Tensor) -> th.Tensor:
        """Actions of a rollout buffer, (B, ·), as the distribution's ``log_prob`` takes them."""
        return actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions

    def states_per_pass(self, observations: Any) -> int:
        """How many states go through the networks at once: ``chunk_size``, or about 64 MB of observations."""
        return self.chunk_size or max(256, 2**24 // entries_per_state(observations))

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # branches may overshoot by much, and a schedule below 0 would turn the critic's fit around
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    # -- updating ------------------------------------------------------------------------------------

    def train(self) -> None:
        """Update policy and critic from the current rollout buffer, or neither if it cannot be trusted."""
        self._update_learning_rate(self.policy.optimizer)
        samples = next(iter(self.rollout_buffer.get(batch_size=None)))
        self.report = None
        fault = unusable_quantity(self.rollout_buffer, samples)
        if fault is None:
            record_explained_variance(self.logger, self.rollout_buffer)
            fault = self._update(samples)
        if fault is not None:
            self._count("faults")
            warnings.warn(
                f"update skipped: NaN, infinite or huge {fault}; policy and critic keep their last good parameters",
                stacklevel=2,
            )
        self._n_updates += 1
        self._log_update()

    def _update(self, samples: RolloutBufferSamples) -> str | None:
        """Policy step and critic fit; the quantity whose fault undid both, if there was one."""
        statistics = [buffer.clone() for buffer in self.policy.buffers()]
        self._refresh_running_statistics(samples)
        # dropout and batch statistics would make π_old a moving target
        self.policy.set_training_mode(False)
        with self._timed("policy"):
            problem = self._policy_problem(samples)
            start = Checkpoint(problem.parameters, self.policy.optimizer)
            report = self._update_policy(problem)
        fault = FAULTY_QUANTITY.get(report.outcome)
        if fault is None and self.critic != "none":
            with self._timed("critic"):
                fit = self._fit_critic(samples, problem.parameters)
            self.logger.record("train/value_loss", fit.loss)
            if fit.outcome is FitOutcome.NON_FINITE:
                start.restore()
                report = report.undone()
                fault = "value loss"
        self.report = report
        self._adapt(report)
        self._count(report.outcome.value)
        record_policy_step(self.logger, report)
        self.logger.record("train/entropy", problem.entropy)
        if fault is not None:
            for buffer, kept in zip(self.policy.buffers(), statistics, strict=True):
                buffer.copy_(kept)
        return fault

    def _policy_problem(self, samples: RolloutBufferSamples) -> PolicyProblem:
        """L(θ), KL and F of the present policy on these transitions."""
        observations, actions = samples.observations, self.as_taken(samples.actions)
        actor = None if overrides(self, OnPolicyExt, ("action_distribution",)) else mlp_actor(self.policy)
        inputs = None
        if actor is not None:
            extractor = self.policy.pi_features_extractor
            inputs = fixed_features(self.policy, observations, extractor, self.states_per_pass(observations))
        n_states = length(observations)
        return PolicyProblem(
            lambda rows: self.action_distribution(take(observations, rows), take_samples(samples, rows, n_states)),
            n_states,
            self._objectives(samples),
            actions,
            self.policy,
            chunk_size=self.states_per_pass(observations),
            mlp=None if actor is None or inputs is None else (actor, inputs),
            **self._curvature_arguments(),
        )

    def _objectives(self, samples: RolloutBufferSamples) -> list[Objective]:
        """What the policy step is to increase on these transitions, as a sum."""
        actions = self.as_taken(samples.actions)
        surrogate: Objective | None = None
        if isinstance(self.rollout_buffer, VineRolloutBuffer):
            surrogate = vine_surrogate(self.rollout_buffer, samples, self.as_taken, self.normalize_advantage)
        if surrogate is None:
            advantages = normalize_advantages(samples.advantages) if self.normalize_advantage else samples.advantages
            surrogate = SinglePathSurrogate(actions, advantages)
        return [surrogate, EntropyBonus(actions, self.ent_coef)] if self.ent_coef != 0.0 else [surrogate]

    def _curvature_arguments(self) -> dict[str, Any]:
        """What a subclass's arguments say of F: keywords of :class:`PolicyProblem`."""
        return {}

    def _fit_critic(self, samples: RolloutBufferSamples, policy_parameters: FlatParameters) -> CriticReport:
        """Fit V to the returns, moving only parameters that the policy does not depend on."""
        with frozen(policy_parameters):
            problem = self._critic_problem(samples, policy_parameters)
            if len(problem.parameters) == 0:
                return CriticReport(FitOutcome.NO_PARAMETERS)
            if self.critic == "adam":
                settings = AdamSettings(self.n_critic_updates, self.batch_size, self.max_grad_norm)
                return fit_adam(problem, self.policy.optimizer, settings)
            report, self.critic_damping = fit_gauss_newton(
                problem, self.critic_damping, GaussNewtonSettings(self.critic_steps, self.critic_cg_steps)
            )
            return report

    def _critic_problem(self, samples: RolloutBufferSamples, policy_parameters: FlatParameters) -> CriticProblem:
        """The error of V on these transitions, in the parameters that are V's alone."""
        observations = samples.observations
        chunk_size = self.states_per_pass(observations)
        network = None
        if not overrides(self, OnPolicyExt, ("predict_values",)):
            network = mlp_critic(self.policy, policy_parameters)
        if network is not None:
            own = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
            parameters = FlatParameters(p for p in self.policy.parameters() if id(p) in own)
            extractor = self.policy.vf_features_extractor
            mlp = network, fixed_features(self.policy, observations, extractor, chunk_size)
        else:
            chunks = chunks_of(length(observations), chunk_size)
            outputs = ((self.predict_values(take(observations, rows)),) for rows in chunks)
            parameters, mlp = FlatParameters.reached_by_any(outputs, self.policy), None
        return CriticProblem(
            lambda rows: self.predict_values(take(observations, rows)),
            samples.returns,
            parameters,
            chunk_size=chunk_size,
            mlp=mlp,
        )

    def _refresh_running_statistics(self, samples: RolloutBufferSamples) -> None:
        """One pass in training mode, for layers with running statistics such as BatchNorm.

        Everything after it is done in evaluation mode, so the ratio is 1 and the KL 0 at θ_old.
        """
        if next(self.policy.buffers(), None) is None:
            return
        self.policy.set_training_mode(True)
        observations, actions = samples.observations, self.as_taken(samples.actions)
        with th.no_grad():
            for rows in chunks_of(length(observations), self.states_per_pass(observations)):
                if rows.stop - rows.start > 1:  # one state has no batch statistics
                    self.policy.evaluate_actions(take(observations, rows), actions[rows])

    # -- reporting -----------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[part] = time.perf_counter() - started

    def _count(self, outcome: str) -> None:
        self.outcome_counts[outcome] = self.outcome_counts.get(outcome, 0) + 1

    def _log_update(self) -> None:
        record = self.logger.record
        if hasattr(self.policy, "log_std"):
            record("train/std", th.exp(self.policy.log_std).mean().item())
        for outcome, count in self.outcome_counts.items():
            record(f"outcome/{outcome}", count)
        for part, seconds in self._seconds.items():
            record(f"time/{part}_seconds", seconds)
        self._seconds.clear()
        record("train/n_updates", self._n_updates, exclude="tensorboard")

    def learn(
        self: SelfOnPolicyExt,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOnPolicyExt:
        """Train; see SB3. ``tb_log_name`` is the class's name by default.

        :raises ValueError: with vine sampling, if the environments do not return to a state exactly
        """
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name or type(self).__name__,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
