"""The SB3 shell that the algorithms share: collect, update the policy, fit the critic, log."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import GymEnv, RolloutBufferSamples, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.algorithms import arguments as rules
from sb3_trpo_ext.algorithms.agents import WithAgent
from sb3_trpo_ext.algorithms.archives import WithArchives
from sb3_trpo_ext.algorithms.arguments import CRITIC_FOLLOWS, CriticChoice, PolicyOfObservations
from sb3_trpo_ext.algorithms.environments import WithRestorableEnvironments
from sb3_trpo_ext.algorithms.faults import Fault, require_trainable
from sb3_trpo_ext.algorithms.learning import WithLearn
from sb3_trpo_ext.algorithms.masking import MASKABLE, UseMasking, check_use_masking
from sb3_trpo_ext.algorithms.reporting import WithRecords, record_explained_variance, record_update
from sb3_trpo_ext.algorithms.rollouts import collect
from sb3_trpo_ext.batch_statistics import refresh_running_statistics
from sb3_trpo_ext.checks import with_keywords_of
from sb3_trpo_ext.critic import AdamSettings, CriticProblem, CriticReport, GaussNewtonSettings, fit_critic
from sb3_trpo_ext.numerics.parameters import FlatParameters, frozen
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.sampling.sequences import units_of
from sb3_trpo_ext.sampling.vine import effective_sample_size_now
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer
from sb3_trpo_ext.steps import StepReport
from sb3_trpo_ext.update import (
    critic_problem_of,
    objectives_of,
    policy_problem_of,
    require_known_kl,
    update,
    warn_of_unheld,
)


class OnPolicyExt(WithLearn, WithAgent, WithArchives, WithRecords, WithRestorableEnvironments):
    """Collect transitions, improve the policy, fit the critic, report. Siblings define the second.

    Constructor arguments are documented at :class:`~sb3_trpo_ext.TRPOExt`. SB3's ``load()`` overwrites
    ``__dict__`` and calls ``_setup_model()``, so whatever is derived from arguments is made there.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
        "auto": PolicyOfObservations,
    }

    _has_told_of_disagreement = False

    @with_keywords_of(
        OnPolicyAlgorithm, without=("vf_coef", "monitor_wrapper", "_init_setup_model", "supported_action_spaces")
    )
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
        critic: CriticChoice = "auto",
        critic_steps: int = 3,
        critic_cg_steps: int = 10,
        max_grad_norm: float = 0.0,
        values_at_each_step: bool = False,
        chunk_size: int | None = None,
        initial_std: float | None = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_masking: UseMasking = "auto",
        **arguments: Any,
    ) -> None:
        check_use_masking(use_masking, policy)
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
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            _init_setup_model=False,
            supported_action_spaces=MASKABLE if use_masking is True else (spaces.Box, *MASKABLE),
            **arguments,
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
        self.initial_std = initial_std
        self.use_masking = use_masking
        self.report: StepReport | None = None

    # -- construction ----------------------------------------------------------------------------

    def _constructed(self, set_up: bool) -> None:
        """The end of every constructor: look at the arguments together, and build what they describe."""
        OnPolicyExt._check_arguments(self)
        self._derive("critic", rules.critic_of_keywords(rules.keywords_given(self, CRITIC_FOLLOWS.keywords)))
        rules.warn_without_effect(self)
        if set_up:
            self._setup_model()
            rules.warn_of_own_start(self)
        rules.check_rollout_size(self)

    def _loaded(self, given: dict[str, Any]) -> None:
        rules.warn_without_effect(self, given)
        rules.check_rollout_size(self)

    def keywords_without_effect(self) -> dict[str, tuple[str, ...]]:
        """Names of constructor keywords that are not used, by the choice that leaves them so."""
        choices = {f"critic={self.critic!r}": rules.KEYWORDS_WITHOUT_EFFECT[self.critic]}
        if self.initial_std is not None and self.env is not None:
            choices |= rules.initial_std_without_effect(self)
        return choices

    def _setup_model(self) -> None:
        self._check_arguments()
        if self.policy_class is PolicyOfObservations:
            self.policy_class = rules.policy_of_observations(self.observation_space)
        self.rollout_buffer_class = rules.class_of(self.rollout_buffer_class)
        super()._setup_model()
        self._begin_without_memory()
        require_known_kl(self.agent)
        rules.set_initial_std(self)
        self._derive("critic", rules.critic_of_features(self))
        if rules.takes_one_critic_step(self):
            self._derive("critic_steps", 1)
        if self.critic == "none":
            # with V = 0 and λ = 1 the advantage is the discounted return itself
            self.rollout_buffer.gae_lambda = 1.0
            if isinstance(self.rollout_buffer, VineRolloutBuffer):
                self.rollout_buffer.without_values()
        if self.verbose >= 1:
            print(self._describe())

    def _check_arguments(self) -> None:
        """Refuse values that cannot work.

        :raises ValueError: naming the argument, what was expected and what came
        """
        rules.check_shared_arguments(self)

    # -- collecting ----------------------------------------------------------------------------------

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the rollout buffer; the contract is SB3's. See :mod:`sb3_trpo_ext.sampling.single_path`."""
        assert self._last_obs is not None, "No previous observation was provided"
        self.policy.set_training_mode(False)
        self._measured = {}
        with self._timed("rollout"):
            return collect(self, env, callback, rollout_buffer, n_rollout_steps)

    # -- updating: what siblings define, then what they share ------------------------------------------

    @abstractmethod
    def _update_policy(self, problem: PolicyProblem) -> StepReport:
        """Improve the policy on one batch, or leave it bit for bit."""

    def _adapt(self, report: StepReport) -> None:
        """Settings that follow what became of a step, the critic fit included."""

    def _largest_kl(self) -> float:
        """The bound on KL(π_old ‖ π_θ) of the coming step."""
        return math.inf

    def _curvature_arguments(self) -> dict[str, Any]:
        """What a subclass's arguments say of F: keywords of :class:`PolicyProblem`."""
        return {}

    @th.enable_grad()
    def train(self) -> None:
        """Update policy and critic from the current rollout buffer, or neither if it cannot be trusted.

        :raises ValueError: if there is nothing that could be trained
        """
        require_trainable(self.policy)
        self._update_learning_rate(self.policy.optimizer)
        samples = self._samples()
        self.report = None
        fault = self._watch.fault_in(self.rollout_buffer, samples)
        if fault is None:
            record_explained_variance(self.logger, self.rollout_buffer)
            fault = self._update(samples)
        if fault is not None:
            self._count("faults")
        self._n_updates += 1
        self._log_update()
        outcome = None if self.report is None else self.report.outcome
        self._watch.note(self._n_updates, outcome, fault, self._current_progress_remaining)

    def _update(self, samples: RolloutBufferSamples) -> Fault | None:
        """Policy step and critic fit; the fault that undid both, if there was one."""
        agent, units = self.agent, units_of(samples)
        done = update(
            self.policy,
            problem_of=lambda: self._policy_problem(samples),
            refresh_statistics=lambda problem: refresh_running_statistics(agent, samples, units, problem, self._largest_kl()),
            policy_step=self._update_policy,
            fit_critic=None if self.critic == "none" else lambda parameters: self._fit_critic(samples, parameters),
            timed=self._timed,
        )
        self.report = done.step
        self._adapt(done.step)
        for outcome in done.outcomes():
            self._count(outcome)
        record_update(self.logger, done)
        if isinstance(self.rollout_buffer, VineRolloutBuffer):
            size = effective_sample_size_now(agent, self.rollout_buffer, samples)
            if size is not None:
                self.logger.record("vine/effective_sample_size_after", size)
        return None if done.fault is None else Fault(done.fault)

    def _policy_problem(self, samples: RolloutBufferSamples) -> PolicyProblem:
        """L(θ), KL and F of the present policy on these transitions."""
        agent, units = self.agent, units_of(samples)
        objectives = objectives_of(
            agent, self.rollout_buffer, samples, units, normalize=self.normalize_advantage, ent_coef=self.ent_coef
        )
        return policy_problem_of(agent, samples, objectives, units, **self._curvature_arguments())

    def _critic_problem(self, samples: RolloutBufferSamples, policy_parameters: FlatParameters) -> CriticProblem:
        """The error of V on these transitions, in the parameters that are V's alone."""
        return critic_problem_of(self.agent, samples, units_of(samples), policy_parameters)

    def _fit_critic(self, samples: RolloutBufferSamples, policy_parameters: FlatParameters) -> CriticReport:
        """Fit V to the returns, moving only parameters that the policy does not depend on."""
        settings: AdamSettings | GaussNewtonSettings = GaussNewtonSettings(self.critic_steps, self.critic_cg_steps)
        if self.critic == "adam":
            settings = AdamSettings(self.n_critic_updates, self.batch_size, self.max_grad_norm)
        with frozen(policy_parameters):
            problem = self._critic_problem(samples, policy_parameters)
            if self.critic == "adam":
                warn_of_unheld(problem.parameters, self.policy.optimizer, "the critic")
            report, self.critic_damping = fit_critic(problem, settings, self.policy.optimizer, self.critic_damping)
        return report

    def _describe(self) -> str:
        """One line on how this model is going to train, printed with ``verbose=1``."""
        return f"Critic: {self.critic}; acting: {self.actor_path}"
