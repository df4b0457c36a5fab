"""One update: the policy step, the critic fit, and what is reported of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from sb3_trpo_ext.algorithms.collecting import Collecting
from sb3_trpo_ext.algorithms.faults import FAULTY_QUANTITY, Fault, Watch, require_trainable
from sb3_trpo_ext.algorithms.reporting import (
    record_explained_variance,
    record_policy_step,
    warn_of_randomness,
    warn_of_unheld,
)
from sb3_trpo_ext.algorithms.statistics import refresh_running_statistics
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
from sb3_trpo_ext.observations import Rows, length, take, take_samples
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.sampling.vine import record_weights
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer, vine_surrogate
from sb3_trpo_ext.standard_policies import (
    fixed_features,
    mlp_actor,
    mlp_critic,
    overrides,
)
from sb3_trpo_ext.steps import StepOutcome, StepReport

_SOME_STATES = 64


class Updating(Collecting):
    """The half of the shell that learns from a full rollout buffer. Siblings define :meth:`_update_policy`."""

    batch_size: int
    n_critic_updates: int
    normalize_advantage: bool
    critic_steps: int
    critic_cg_steps: int
    critic_damping: float
    outcome_counts: dict[str, int]
    report: StepReport | None

    # -- what siblings define ------------------------------------------------------------------------

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

    # -- what is watched -----------------------------------------------------------------------------

    def _setup_model(self) -> None:
        super()._setup_model()
        self._watch = Watch()

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        require_trainable(self.policy)
        self._watch.updates_before = self._n_updates
        return super()._setup_learn(*args, **kwargs)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_watch"]

    # -- the update ----------------------------------------------------------------------------------

    @th.enable_grad()
    def train(self) -> None:
        """Update policy and critic from the current rollout buffer, or neither if it cannot be trusted."""
        self._update_learning_rate(self.policy.optimizer)
        samples = next(iter(self.rollout_buffer.get(batch_size=None)))
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
        """Policy step and critic fit; the fault that undid both, if there was one.

        An exception, an interrupt included, leaves the policy as it was too: parameters, their optimizer and buffers.
        """
        # dropout and batch statistics would make π_old a moving target
        self.policy.set_training_mode(False)
        everything = FlatParameters(self.policy.parameters())
        with Checkpoint(everything, self.policy.optimizer, self.policy.buffers) as start:
            with self._timed("policy"):
                problem = self._policy_problem(samples)
                refresh_running_statistics(self, samples, problem, self._largest_kl())
                report = self._update_policy(problem)
            if isinstance(self.rollout_buffer, VineRolloutBuffer):
                record_weights(self, self.rollout_buffer, samples)
            fault = Fault(FAULTY_QUANTITY[report.outcome]) if report.outcome in FAULTY_QUANTITY else None
            fit = CriticReport(FitOutcome.NO_PARAMETERS)
            if fault is None and self.critic != "none":
                with self._timed("critic"):
                    fit = self._fit_critic(samples, problem.parameters)
                self.logger.record("train/value_loss", fit.loss)
                if fit.outcome is FitOutcome.NON_FINITE:
                    report = report.undone()
                    fault = Fault("value loss")
                elif fit.outcome is not FitOutcome.FITTED:
                    self._count(f"critic_{fit.outcome.value}")
            if fault is not None:
                start.restore()
        if report.outcome is StepOutcome.NO_PARAMETERS and fit.outcome is FitOutcome.NO_PARAMETERS:
            raise ValueError("nothing is trainable: the action distribution depends on no parameter that is not frozen, nor V")
        self.report = report
        self._adapt(report)
        self._count(report.outcome.value)
        record_policy_step(self.logger, report)
        self.logger.record("train/entropy", problem.entropy)
        return fault

    def _policy_problem(self, samples: RolloutBufferSamples) -> PolicyProblem:
        """L(θ), KL and F of the present policy on these transitions."""
        observations, actions = samples.observations, self.as_taken(samples.actions)
        actor = None if overrides(self, Collecting, ("action_distribution",)) else mlp_actor(self.policy)
        inputs = None
        if actor is not None:
            extractor = self.policy.pi_features_extractor
            inputs = fixed_features(self.policy, observations, extractor, self.states_per_pass(observations))
        n_states = length(observations)

        def distribution_of(rows: Rows) -> Distribution:
            return self.action_distribution(take(observations, rows), take_samples(samples, rows, n_states))

        problem = PolicyProblem(
            distribution_of,
            n_states,
            self._objectives(samples),
            actions,
            self.policy,
            chunk_size=self.states_per_pass(observations),
            mlp=None if actor is None or inputs is None else (actor, inputs),
            **self._curvature_arguments(),
        )
        if actor is None:
            warn_of_randomness(lambda: distribution_of(slice(0, min(_SOME_STATES, n_states))))
        return problem

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

    def _fit_critic(self, samples: RolloutBufferSamples, policy_parameters: FlatParameters) -> CriticReport:
        """Fit V to the returns, moving only parameters that the policy does not depend on."""
        with frozen(policy_parameters):
            problem = self._critic_problem(samples, policy_parameters)
            if len(problem.parameters) == 0:
                return CriticReport(FitOutcome.NO_PARAMETERS)
            if self.critic == "adam":
                warn_of_unheld(problem.parameters, self.policy.optimizer, "the critic")
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
        if not overrides(self, Collecting, ("predict_values",)):
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
            head=getattr(self.policy, "value_net", None),
        )

    # -- reporting -----------------------------------------------------------------------------------

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
