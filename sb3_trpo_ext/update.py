"""One update on one batch: the policy step, then the critic fit, or neither if either met something not finite.

Nothing here knows the algorithm: it is made of an :class:`~sb3_trpo_ext.sampling.agent.Agent`, samples, and a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from sb3_trpo_ext.checks import warn_user
from sb3_trpo_ext.critic import CriticProblem, CriticReport, FitOutcome
from sb3_trpo_ext.distributions import family_of, require_kl
from sb3_trpo_ext.numerics.averages import Rows, Units
from sb3_trpo_ext.numerics.checkpoint import Checkpoint
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.objectives import EntropyBonus, Objective, SinglePathSurrogate, normalize_advantages
from sb3_trpo_ext.observations import take
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.sampling.agent import Agent
from sb3_trpo_ext.sampling.budget import unnoticed
from sb3_trpo_ext.sampling.sequences import distribution_at
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer, vine_surrogate
from sb3_trpo_ext.sequence_problems import actor_linearization, recurrent_critic_problem
from sb3_trpo_ext.standard_policies import fixed_features, mlp_actor, mlp_critic
from sb3_trpo_ext.steps import StepOutcome, StepReport

FAULTY_QUANTITY = {
    StepOutcome.NON_FINITE_GRADIENT: "gradient",
    StepOutcome.NON_FINITE_CURVATURE: "curvature",
    StepOutcome.NON_FINITE_STEP: "step",
}


_SOME_STATES = 64
_ROUNDING = 1e-5
"""A KL, in nats, that single precision may make of two passes over the same states."""


@dataclass(frozen=True)
class UpdateReport:
    """What one update did.

    :param step: the policy step
    :param entropy: of π_old, the mean over the batch
    :param fit: the critic fit, None where there was none
    :param fault: the quantity whose fault undid both, if there was one
    """

    step: StepReport
    entropy: float
    fit: CriticReport | None = None
    fault: str | None = None

    def with_fit(self, fit: CriticReport) -> UpdateReport:
        """The same once V has been fitted: a fit that met something not finite undoes the step too."""
        if fit.outcome is FitOutcome.NON_FINITE:
            return replace(self, step=self.step.undone(), fit=fit, fault="value loss")
        return replace(self, fit=fit)

    def require_something_to_move(self) -> None:
        """:raises ValueError: if neither the policy nor V has parameters to move"""
        has_fit = self.fit is not None and self.fit.outcome is not FitOutcome.NO_PARAMETERS
        if self.step.outcome is StepOutcome.NO_PARAMETERS and not has_fit:
            raise ValueError("nothing is trainable: the action distribution depends on no parameter that is not frozen, nor V")

    def outcomes(self) -> Iterator[str]:
        """What to count: the step's outcome, and the fit's unless it is the usual one, or counted as a fault."""
        if self.fit is not None and self.fit.outcome not in (FitOutcome.FITTED, FitOutcome.NON_FINITE):
            yield f"critic_{self.fit.outcome.value}"
        yield self.step.outcome.value


def update(
    policy: ActorCriticPolicy,
    *,
    problem_of: Callable[[], PolicyProblem],
    refresh_statistics: Callable[[PolicyProblem], None],
    policy_step: Callable[[PolicyProblem], StepReport],
    fit_critic: Callable[[FlatParameters], CriticReport] | None,
    timed: Callable[[str], AbstractContextManager[None]],
) -> UpdateReport:
    """Policy step and critic fit, or neither: a fault leaves parameters, optimizer and buffers as they were.

    So does an exception, an interrupt included.

    :param policy: with its optimizer
    :param problem_of: L, KL and F of the present policy
    :param refresh_statistics: takes running statistics from the batch
    :param policy_step: improves the policy, or leaves it bit for bit
    :param fit_critic: policy parameters ↦ a fit of V that moves none of them; None: there is no V to fit
    :param timed: around each part, by name
    :raises ValueError: if there is nothing that either could move
    """
    # dropout and batch statistics would make π_old a moving target
    policy.set_training_mode(False)
    with Checkpoint(FlatParameters(policy.parameters()), policy.optimizer, policy.buffers) as start:
        with timed("policy"):
            problem = problem_of()
            refresh_statistics(problem)
            step = policy_step(problem)
        report = UpdateReport(step, problem.entropy, fault=FAULTY_QUANTITY.get(step.outcome))
        if report.fault is None and fit_critic is not None:
            with timed("critic"):
                report = report.with_fit(fit_critic(problem.parameters))
        report.require_something_to_move()
        if report.fault is not None:
            start.restore()
    return report


def policy_problem_of(
    agent: Agent, samples: RolloutBufferSamples, objectives: list[Objective], units: Units, **curvature: Any
) -> PolicyProblem:
    """L(θ), KL and F of the present policy on these transitions.

    :param units: what the samples consist of
    :param curvature: how F is made: keywords of :class:`PolicyProblem`
    """
    observations, chunk_size = samples.observations, agent.states_per_pass(samples.observations)
    actor = None if agent.own_distribution else mlp_actor(agent.policy)
    mlp = None
    if actor is not None:
        extractor = agent.policy.pi_features_extractor
        mlp = actor, fixed_features(agent.policy, observations, extractor, chunk_size)

    def distribution_of(rows: Rows) -> Distribution:
        return distribution_at(agent, samples, rows, units)

    problem = PolicyProblem(
        distribution_of,
        units,
        objectives,
        agent.as_taken(samples.actions),
        agent.policy,
        chunk_size=chunk_size,
        mlp=mlp,
        linearize=actor_linearization(agent, samples, units),
        masks=getattr(samples, "action_masks", None) if agent.masked else None,
        **curvature,
    )
    if mlp is None and agent.recurrence is None:
        warn_of_randomness(lambda: distribution_of(units.chunks(_SOME_STATES)[0]))
    return problem


def warn_of_unheld(parameters: FlatParameters, optimizer: th.optim.Optimizer, whose: str) -> None:
    """A warning where an optimizer does not hold all that it is to move: layers may have been put in after it was made."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    n_unheld = sum(id(parameter) not in held for parameter in parameters.tensors)
    if n_unheld > 0:
        warn_user(
            f"policy.optimizer does not hold {n_unheld} of the {len(parameters.tensors)} parameter tensors of {whose}, "
            "which stay as they are; make it anew after layers have been replaced"
        )


@th.no_grad()
def warn_of_randomness(ask: Callable[[], Distribution]) -> None:
    """A warning where π(·|s) is another one each time that it is asked for, so that L and KL of a step are noise.

    :param ask: for π on the same states
    """
    first = ask()
    family = family_of(first)
    if family.kl(family.freeze(first), ask()).max() > _ROUNDING:
        warn_user(
            "asked again about the same states, the policy gives another distribution, so that steps are judged at random: "
            "noise in its layers (dropout that is always on, noisy weights) has to stop in evaluation mode"
        )


def objectives_of(
    agent: Agent, buffer: RolloutBuffer, samples: RolloutBufferSamples, units: Units, *, normalize: bool, ent_coef: float
) -> list[Objective]:
    """What the policy step is to increase on these transitions, as a sum.

    :param normalize: whether advantages are normalised over the batch
    """
    actions = agent.as_taken(samples.actions)
    surrogate: Objective | None = None
    if isinstance(buffer, VineRolloutBuffer):
        surrogate = vine_surrogate(buffer, samples, agent.as_taken, normalize, units.group)
    if surrogate is None:
        advantages = normalize_advantages(samples.advantages, units) if normalize else samples.advantages
        surrogate = SinglePathSurrogate(actions, advantages)
    return [surrogate, EntropyBonus(actions, ent_coef)] if ent_coef != 0.0 else [surrogate]


def critic_problem_of(
    agent: Agent, samples: RolloutBufferSamples, units: Units, policy_parameters: FlatParameters
) -> CriticProblem:
    """The error of V on these transitions, in the parameters that are V's alone.

    :param policy_parameters: which a fit does not move
    """
    policy, observations = agent.policy, samples.observations
    chunk_size = agent.states_per_pass(observations)
    if agent.recurrence is not None:
        return recurrent_critic_problem(agent, agent.recurrence, samples, units, policy_parameters, chunk_size)
    network = None if agent.own_values else mlp_critic(policy, policy_parameters)

    def values_of(rows: Any) -> th.Tensor:
        return agent.values(take(observations, rows))

    if network is not None:
        parameters = network.parameters_in(policy)
        mlp = network, fixed_features(policy, observations, policy.vf_features_extractor, chunk_size)
    else:
        values = ((values_of(rows),) for rows in units.chunks(chunk_size))
        parameters = FlatParameters.reached_by_any(values, policy, units.group)
        mlp = None
    head = getattr(policy, "value_net", None)
    return CriticProblem(values_of, samples.returns, parameters, chunk_size=chunk_size, mlp=mlp, head=head, units=units)


@th.no_grad()
def require_known_kl(agent: Agent) -> None:
    """Refuse a policy whose distribution has no KL that anybody knows, before it has collected anything.

    :raises ValueError: naming it, and what to do
    """
    policy = agent.policy
    if type(policy.action_dist).__module__ == Distribution.__module__:
        return
    space = copy.deepcopy(policy.observation_space)
    space.seed(0)
    with unnoticed(policy):
        try:
            distribution = agent.distribution(policy.obs_to_tensor(space.sample())[0])
        except Exception:
            # somebody else's policy may need more than an observation: then its first update says so
            return
    require_kl(distribution)
