"""The KL-penalised step: maximise L(θ) − β KL(π_old ‖ π_θ) by minibatch descent, and adapt β."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch as th

from sb3_trpo_ext.numerics.averages import Group
from sb3_trpo_ext.numerics.checkpoint import Checkpoint
from sb3_trpo_ext.numerics.gradient_step import gradient_step
from sb3_trpo_ext.policy_problem import Minibatch, MinibatchMeans
from sb3_trpo_ext.steps import StepOutcome, StepReport, obstacle
from sb3_trpo_ext.trust_region import TrustRegionProblem

KLEstimator = Literal["analytic", "sample"]

# a β that is 0 or infinite would not come back
_BETA_BOUNDS = (1e-6, 1e6)


class KLPenaltyProblem(TrustRegionProblem, Protocol):
    """L, KL and θ of a policy on a batch of states, also some of the states at a time."""

    @property
    def group(self) -> Group:
        """Who else has states of the batch: losses of minibatches are shares of a sum."""
        ...

    def minibatches(self, batch_size: int) -> list[Minibatch]:
        """A random partition of the states; to be asked for at θ_old."""
        ...


@dataclass(frozen=True, kw_only=True)
class KLPenaltyReport(StepReport):
    """What one KL-penalised step did.

    :param beta: β
    :param target_kl: what β is adapted towards, None if it is fixed
    :param epochs: passes over the batch that were completed
    """

    beta: float
    target_kl: float | None = None
    epochs: int = 0


@dataclass(frozen=True)
class KLPenaltySettings:
    """β and the limits of the descent; names as in :class:`KLPPOExt`."""

    beta: float
    target_kl: float | None = None
    n_epochs: int = 10
    batch_size: int = 64
    max_grad_norm: float = 0.5
    max_kl: float | None = None
    kl_estimator: KLEstimator = "analytic"


def kl_penalty_step(problem: KLPenaltyProblem, optimizer: th.optim.Optimizer, settings: KLPenaltySettings) -> KLPenaltyReport:
    """Move the parameters to a larger L − β KL (PPO paper, eq. 8), or leave them, and the optimizer, bit for bit.

    :param problem: at θ_old
    :param optimizer: holds θ among its parameters; the others are not touched
    :return: what happened; numerical failure is an outcome, never an exception
    """
    objective_old, g = problem.gradient()
    report = KLPenaltyReport(
        outcome=StepOutcome.NON_FINITE_STEP,
        objective=objective_old,
        beta=settings.beta,
        target_kl=settings.target_kl,
        gradient_norm=float(g.double().norm()),
    )
    reason = obstacle(len(problem.parameters), objective_old, report.gradient_norm)
    if reason is not None:
        # Adam would move on from its momentum even where there is nothing to improve
        return replace(report, outcome=reason)
    with Checkpoint(problem.parameters, optimizer) as start:
        epochs = _descend(problem, optimizer, settings)
        candidate = problem.evaluate()
        step = problem.parameters.read() - start.theta
        report = replace(report, epochs=epochs or 0, expected_improvement=float(g.double() @ step.double()))
        if epochs is not None:
            report = report.landed(float(step.norm()), candidate)
    if report.outcome is not StepOutcome.ACCEPTED:
        start.restore()
    return report


def _descend(problem: KLPenaltyProblem, optimizer: th.optim.Optimizer, settings: KLPenaltySettings) -> int | None:
    """Epochs of minibatch steps; how many were completed, or None if one met something not finite.

    The minibatches are drawn once, and visited in a new order each epoch, so that π_old is asked about each state
    once. The KL of a minibatch is looked at before its step, as SB3's PPO does.
    """
    minibatches = problem.minibatches(settings.batch_size)
    for epoch in range(settings.n_epochs):
        for i in th.randperm(len(minibatches), device="cpu").tolist():
            means = minibatches[i]()
            loss = None if means is None else _loss(means, settings)
            # whoever has no policy any more still takes part in the sum
            none = problem.parameters.tensors[0].new_full((2,), math.nan)
            found = none if means is None or loss is None else th.stack([loss, means.kl]).detach()
            total, kl = problem.group.sum(found).tolist()
            if loss is None or not math.isfinite(total):
                return None
            if settings.max_kl is not None and kl > settings.max_kl:
                return epoch
            gradient_step(loss, problem.parameters, optimizer, settings.max_grad_norm, problem.group)
    return settings.n_epochs


def _loss(means: MinibatchMeans, settings: KLPenaltySettings) -> th.Tensor:
    """−(L − β KL) of a minibatch.

    The estimate from samples is E[−ln π_θ(a|s)], the KL up to a constant in θ.
    """
    penalty = means.kl if settings.kl_estimator == "analytic" else -means.log_prob
    return settings.beta * penalty - means.objective


def adapted_beta(beta: float, kl: float, target_kl: float) -> float:
    """β for the next step (Schulman et al. 2017, section 4): doubled for KL > 1.5 δ, halved for KL < δ / 1.5.

    Within 1e-6 to 1e6; a β outside, which a user may start from, is only moved towards this range.
    """
    least, greatest = _BETA_BOUNDS
    if kl > 1.5 * target_kl:
        return max(beta, min(2.0 * beta, greatest))
    if kl < target_kl / 1.5:
        return min(beta, max(0.5 * beta, least))
    return beta
