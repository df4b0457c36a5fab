"""The trust-region step: solve (F + λI)x = g, scale to the KL bound, search back until the checks pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Protocol

import torch as th

from sb3_trpo_ext.numerics.conjugate_gradient import CGStatus, conjugate_gradient
from sb3_trpo_ext.numerics.curvature import damped
from sb3_trpo_ext.numerics.line_search import backtracking_line_search
from sb3_trpo_ext.numerics.parameters import FlatParameters, restored_on_error

# below this, more steps change the direction by less than single precision resolves
_CG_RTOL = 1e-5


class Evaluation(NamedTuple):
    """Surrogate and mean KL at the parameters' present values; NaN where they cannot be computed."""

    objective: float
    kl: float


class TrustRegionProblem(Protocol):
    """Maximise L(θ) subject to mean KL(π_old ‖ π_θ) ≤ δ, from θ_old."""

    parameters: FlatParameters

    def gradient(self) -> tuple[float, th.Tensor]:
        """L(θ_old) and g = ∇L(θ_old), shape (P,)."""
        ...

    def fisher_product(self) -> Callable[[th.Tensor], th.Tensor]:
        """v ↦ Fv at θ_old, undamped."""
        ...

    def evaluate(self) -> Evaluation:
        """L and KL at the parameters' present values."""
        ...


class StepOutcome(str, Enum):
    """What became of a policy step. All but ``ACCEPTED`` leave θ as it was, bit for bit."""

    ACCEPTED = "accepted"
    UNDONE = "undone"
    """Accepted, then taken back with the whole update, because the critic fit met NaN or infinity."""
    NO_IMPROVEMENT = "no_improvement"
    """No fraction of the step improved L enough within the bound."""
    ZERO_GRADIENT = "zero_gradient"
    """Nothing to improve: all advantages are alike."""
    NON_POSITIVE_CURVATURE = "non_positive_curvature"
    """F + λI is not positive definite on this batch; raise ``cg_damping``."""
    NON_FINITE_GRADIENT = "non_finite_gradient"
    NON_FINITE_CURVATURE = "non_finite_curvature"
    NON_FINITE_STEP = "non_finite_step"

    @property
    def is_fault(self) -> bool:
        """Whether NaN or infinity stopped the step, so that the batch is not to be trusted."""
        return self in (self.NON_FINITE_GRADIENT, self.NON_FINITE_CURVATURE, self.NON_FINITE_STEP)


@dataclass(frozen=True)
class TrustRegionReport:
    """What one policy step did.

    :param outcome: by name
    :param objective: L at the parameters that were kept
    :param target_kl: δ, the bound
    :param kl: KL(π_old ‖ π_θ) at the parameters that were kept: 0 for a rejected step
    :param predicted_kl: ½ sᵀFs of the full step s, undamped
    :param candidate_kl: KL at the last candidate tried, accepted or not
    :param expected_improvement: gᵀ(θ_candidate − θ_old) of the last candidate tried
    :param improvement: L(θ_candidate) − L(θ_old) of the last candidate tried
    :param fraction: of the full step that was taken
    :param backtracks: candidates refused
    :param cg_status: how the solve ended
    :param cg_iterations: Fisher products spent
    :param cg_residual: ‖g − (F + λI)x‖ / ‖g‖
    :param gradient_norm: ‖g‖
    :param step_norm: ‖θ_new − θ_old‖
    """

    outcome: StepOutcome
    objective: float
    target_kl: float
    kl: float = 0.0
    predicted_kl: float = math.nan
    candidate_kl: float = math.nan
    expected_improvement: float = math.nan
    improvement: float = math.nan
    fraction: float = 0.0
    backtracks: int = 0
    cg_status: CGStatus | None = None
    cg_iterations: int = 0
    cg_residual: float = math.nan
    gradient_norm: float = math.nan
    step_norm: float = 0.0

    def undone(self) -> TrustRegionReport:
        """What is to be said once an accepted step has been taken back; other reports stay as they are."""
        if self.outcome is not StepOutcome.ACCEPTED:
            return self
        objective = self.objective - self.improvement
        return replace(self, outcome=StepOutcome.UNDONE, objective=objective, kl=0.0, fraction=0.0, step_norm=0.0)


@dataclass(frozen=True)
class TrustRegionSettings:
    """δ, λ and the limits of the solve and the search; names as in :class:`TRPOExt`."""

    target_kl: float
    cg_damping: float = 0.1
    cg_max_steps: int = 15
    line_search_shrinking_factor: float = 0.8
    line_search_max_iter: int = 10
    line_search_accept_ratio: float = 0.1


def trust_region_step(problem: TrustRegionProblem, settings: TrustRegionSettings) -> TrustRegionReport:
    """Move the parameters by one trust-region step, or leave them bit for bit (TRPO paper, appendix C).

    The step is s = βx with (F + λI)x ≈ g and β = sqrt(2δ / xᵀ(F + λI)x). It is shortened until
    KL ≤ δ and the improvement of L is positive and at least ``line_search_accept_ratio`` of the
    expected gᵀs.

    :param problem: at θ_old
    :return: what happened; numerical failure is an outcome, never an exception
    """
    theta_old = problem.parameters.read()
    objective_old, g = problem.gradient()
    proposal, report = propose_step(problem, objective_old, g, settings)
    if proposal is None:
        return report
    step, gain = proposal

    def evaluate(fraction: float) -> Evaluation:
        problem.parameters.write(theta_old + fraction * step)
        return problem.evaluate()

    def accept(fraction: float, candidate: Evaluation) -> bool:
        improvement = candidate.objective - objective_old
        sufficient = settings.line_search_accept_ratio * fraction * gain
        within = math.isfinite(candidate.kl) and candidate.kl <= settings.target_kl
        return within and math.isfinite(improvement) and improvement > 0.0 and improvement >= sufficient

    with restored_on_error(problem.parameters):
        search = backtracking_line_search(
            evaluate,
            accept,
            shrinking_factor=settings.line_search_shrinking_factor,
            max_iter=settings.line_search_max_iter,
        )
    last_fraction = settings.line_search_shrinking_factor ** (search.backtracks - (not search.accepted))
    report = replace(
        report,
        candidate_kl=search.value.kl,
        expected_improvement=last_fraction * gain,
        improvement=search.value.objective - objective_old,
        backtracks=search.backtracks,
    )
    if not search.accepted:
        problem.parameters.write(theta_old)
        return replace(report, outcome=StepOutcome.NO_IMPROVEMENT)
    return replace(
        report,
        outcome=StepOutcome.ACCEPTED,
        objective=search.value.objective,
        kl=search.value.kl,
        fraction=search.fraction,
        step_norm=float((problem.parameters.read() - theta_old).norm()),
    )


class Proposal(NamedTuple):
    """A full step s, shape (P,), and the improvement gᵀs that it promises."""

    step: th.Tensor
    gain: float


def propose_step(
    problem: TrustRegionProblem, objective_old: float, g: th.Tensor, settings: TrustRegionSettings
) -> tuple[Proposal | None, TrustRegionReport]:
    """The full natural gradient step to the bound, or the reason why there is none.

    From CG's zero start xᵀ(F + λI)x = xᵀg, so that neither β nor ½ sᵀFs takes another product.

    :param g: ∇L(θ_old), shape (P,)
    :return: the proposal if there is one, and the report as far as it is known
    """
    report = TrustRegionReport(
        outcome=StepOutcome.NON_FINITE_GRADIENT,
        objective=objective_old,
        target_kl=settings.target_kl,
        gradient_norm=float(g.double().norm()),
    )
    if not (math.isfinite(objective_old) and math.isfinite(report.gradient_norm)):
        return None, report
    if report.gradient_norm == 0.0:
        return None, replace(report, outcome=StepOutcome.ZERO_GRADIENT)
    solution = conjugate_gradient(
        damped(problem.fisher_product(), settings.cg_damping),
        g,
        max_steps=settings.cg_max_steps,
        rtol=_CG_RTOL,
        # the residual is logged to judge the solve by, which the recursion's is good enough for
        recompute_residual=False,
    )
    report = replace(
        report,
        cg_status=solution.status,
        cg_iterations=solution.iterations,
        cg_residual=solution.residual_norm / report.gradient_norm,
    )
    if solution.status is CGStatus.NON_FINITE:
        return None, replace(report, outcome=StepOutcome.NON_FINITE_CURVATURE)
    # in double precision: small gradients must not underflow
    x, wide_g = solution.x.double(), g.double()
    xg = float(x @ wide_g)
    if solution.status is CGStatus.NON_POSITIVE_CURVATURE or xg <= 0.0:
        return None, replace(report, outcome=StepOutcome.NON_POSITIVE_CURVATURE)
    beta = math.sqrt(2.0 * settings.target_kl / xg)
    step = beta * solution.x
    if not bool(th.isfinite(step).all()):
        return None, replace(report, outcome=StepOutcome.NON_FINITE_STEP)
    undamped = xg - settings.cg_damping * float(x @ x)
    return Proposal(step, beta * xg), replace(report, predicted_kl=0.5 * beta**2 * undamped)
