"""The trust-region step: solve (F + λI)x = g, scale to the bound, search back until the checks pass.

The natural gradient step is the same without the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch as th

from sb3_trpo_ext.numerics.conjugate_gradient import CGStatus, conjugate_gradient
from sb3_trpo_ext.numerics.curvature import damped
from sb3_trpo_ext.numerics.line_search import backtracking_line_search
from sb3_trpo_ext.numerics.parameters import FlatParameters, restored_on_error
from sb3_trpo_ext.steps import Evaluation, StepOutcome, StepReport, obstacle

# below this, more steps change the direction by less than single precision resolves
_CG_RTOL = 1e-5

# where the KL is an order of magnitude above the radius, its second derivative no longer says what it is
_FAR_OFF = 10.0


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


@dataclass(frozen=True, kw_only=True)
class TrustRegionReport(StepReport):
    """What one trust-region or natural gradient step did.

    :param target_kl: δ, the bound; None if there is none
    :param predicted_kl: ½ sᵀFs of the full step s, undamped; NaN for the L2 ball
    :param candidate_kl: KL at the last candidate tried, accepted or not
    :param fraction: of the full step that was taken
    :param backtracks: candidates refused; None without a search
    :param cg_status: how the solve ended
    :param cg_iterations: of the solve that the step came from, each one Fisher product: fewer than the first solve's
        where its KL was far beyond the bound, see :func:`trust_region_step`
    :param cg_residual: ‖g − (F + λI)x‖ / ‖g‖
    """

    target_kl: float | None
    predicted_kl: float = math.nan
    candidate_kl: float = math.nan
    fraction: float = 0.0
    backtracks: int | None = None
    cg_status: CGStatus | None = None
    cg_iterations: int = 0
    cg_residual: float = math.nan

    def undone(self) -> TrustRegionReport:
        report = super().undone()
        return report if report is self else replace(report, fraction=0.0)


@dataclass(frozen=True)
class TrustRegionSettings:
    """δ, λ and the limits of the solve and the search; names as in :class:`TRPOExt` and :class:`NPGExt`."""

    target_kl: float
    """math.inf where another radius or ``step_size`` takes its place."""
    step_radius: float | None = None
    """½ sᵀ(F + λI)s of the full step, where F is not the KL's Hessian; None: ``target_kl``."""
    step_size: float | None = None
    """α of the full step s = αx; None: whatever reaches the radius."""
    cg_damping: float = 0.1
    cg_max_steps: int = 15
    line_search_shrinking_factor: float = 0.8
    line_search_max_iter: int = 10
    line_search_accept_ratio: float = 0.1

    @property
    def radius(self) -> float:
        return self.target_kl if self.step_radius is None else self.step_radius

    def is_far_off(self, kl: float) -> bool:
        """Whether the KL of a full step is far beyond the δ that it was scaled to by its quadratic model. Never where
        another radius or a step size takes δ's place."""
        is_of_kl = self.step_size is None and self.step_radius is None
        return is_of_kl and not kl <= _FAR_OFF * self.target_kl


def trust_region_step(problem: TrustRegionProblem, settings: TrustRegionSettings) -> TrustRegionReport:
    """Move the parameters by one trust-region step, or leave them bit for bit (TRPO paper, appendix C).

    The step is s = βx with (F + λI)x ≈ g and β = sqrt(2δ / xᵀ(F + λI)x), or another radius in δ's place
    where F is not the KL's Hessian. It is shortened until KL ≤ δ and the improvement of L is positive and
    at least ``line_search_accept_ratio`` of the expected gᵀs. Where no fraction will do and the full step's KL
    is far beyond δ, see :func:`_along_earlier_iterates`.

    :param problem: at θ_old
    :return: what happened; numerical failure is an outcome, never an exception
    """
    return _along_earlier_iterates(_searched_step, problem, settings)


def natural_gradient_step(problem: TrustRegionProblem, settings: TrustRegionSettings) -> TrustRegionReport:
    """Move the parameters by the full natural gradient step (Kakade 2001), or leave them bit for bit.

    θ ← θ + αx with (F + λI)x ≈ g. Nothing is searched for, and the KL is reported, not tested, as long as the
    quadratic model means anything: a step whose KL is far beyond the δ that it was scaled to is not taken, see
    :func:`_along_earlier_iterates`, nor is one that leads to an L or a KL that is not finite.

    :param problem: at θ_old
    :return: what happened; numerical failure is an outcome, never an exception
    """
    return _along_earlier_iterates(_full_step, problem, settings)


def _along_earlier_iterates(
    attempt: Callable[..., tuple[TrustRegionReport, bool]], problem: TrustRegionProblem, settings: TrustRegionSettings
) -> TrustRegionReport:
    """A step along CG's solution; where its KL is far beyond the model's, along the iterate at half the steps, and so on.

    Without much damping F is as good as singular and the solution long: it goes far in directions in which the KL is
    flat at θ_old and nowhere else, so that ½ sᵀFs says nothing of it. The more exactly (F + λI)x = g is solved, the less
    the step is then worth: on CartPole with λ = 0 the KL of the full step is δ for the first six iterates of CG and
    8000 δ at the fifteenth. A least curvature, in proportion to the largest, does not tell them apart: on one batch
    the KL was still δ at 4·10⁻⁴ of it, on another 5 δ at 4·10⁻³, and what stops there also stops good steps. Plain CG
    loses its way by rounding, and finds it with more steps. The KL itself tells, so it is asked (as Martens 2010, section
    4.6, asks the loss). An earlier iterate trusts small curvature less; solving again costs nothing unless a step was lost.

    :param attempt: one step with a limit of CG steps: its report, and whether its KL was far off
    """
    gradient = problem.gradient()
    report, far_off = attempt(problem, gradient, settings)
    while far_off and report.cg_iterations > 1:
        settings = replace(settings, cg_max_steps=report.cg_iterations // 2)
        report, far_off = attempt(problem, gradient, settings)
    return report


def _searched_step(
    problem: TrustRegionProblem, gradient: tuple[float, th.Tensor], settings: TrustRegionSettings
) -> tuple[TrustRegionReport, bool]:
    theta_old, (objective_old, g) = problem.parameters.read(), gradient
    proposal, report = propose_step(problem, objective_old, g, settings)
    report = replace(report, backtracks=0)
    if proposal is None:
        return report, False
    step, gain = proposal
    kls = []

    def evaluate(fraction: float) -> Evaluation:
        problem.parameters.write(theta_old + fraction * step)
        candidate = problem.evaluate()
        kls.append(candidate.kl)
        return candidate

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
        return replace(report, outcome=StepOutcome.NO_IMPROVEMENT), settings.is_far_off(kls[0])
    report = replace(
        report,
        outcome=StepOutcome.ACCEPTED,
        objective=search.value.objective,
        kl=search.value.kl,
        fraction=search.fraction,
        step_norm=float((problem.parameters.read() - theta_old).norm()),
    )
    return report, False


def _full_step(
    problem: TrustRegionProblem, gradient: tuple[float, th.Tensor], settings: TrustRegionSettings
) -> tuple[TrustRegionReport, bool]:
    theta_old = problem.parameters.read()
    proposal, report = propose_step(problem, *gradient, settings)
    if proposal is None:
        return report, False
    with restored_on_error(problem.parameters):
        problem.parameters.write(theta_old + proposal.step)
        candidate = problem.evaluate()
    step_norm = float((problem.parameters.read() - theta_old).norm())
    report = replace(report, candidate_kl=candidate.kl, expected_improvement=proposal.gain)
    landed, far_off = report.landed(step_norm, candidate), settings.is_far_off(candidate.kl)
    if landed.outcome is StepOutcome.ACCEPTED and not far_off:
        return replace(landed, fraction=1.0), False
    problem.parameters.write(theta_old)
    if landed.outcome is StepOutcome.ACCEPTED:
        landed = replace(report, outcome=StepOutcome.BEYOND_RADIUS, improvement=landed.improvement)
    return landed, far_off


def adapted_radius(radius: float, report: TrustRegionReport, bounds: tuple[float, float]) -> float:
    """The radius for the next step (Nocedal & Wright 2006, algorithm 4.1).

    With ρ = improvement / gᵀs: halved for ρ < 1/4, a step that found no improvement or one that led far beyond the
    radius or to something not finite, doubled for ρ > 3/4 if the full step was taken. The radius is that of ½ sᵀFs, so
    that the step's length changes by sqrt(2).

    :param report: of the last step; outcomes that say nothing of the radius leave it as it is
    :param bounds: the least and the greatest radius
    """
    accepted, expected = report.outcome is StepOutcome.ACCEPTED, report.expected_improvement
    too_long = report.outcome in (StepOutcome.NO_IMPROVEMENT, StepOutcome.BEYOND_RADIUS, StepOutcome.NON_FINITE_STEP)
    if too_long or (accepted and report.improvement < 0.25 * expected):
        radius = 0.5 * radius
    elif accepted and report.improvement > 0.75 * expected and report.fraction == 1.0:
        radius = 2.0 * radius
    return min(max(radius, bounds[0]), bounds[1])


class Proposal(NamedTuple):
    """A full step s, shape (P,), and the improvement gᵀs that it promises."""

    step: th.Tensor
    gain: float


def propose_step(
    problem: TrustRegionProblem, objective_old: float, g: th.Tensor, settings: TrustRegionSettings
) -> tuple[Proposal | None, TrustRegionReport]:
    """The full natural gradient step, or the reason why there is none.

    From CG's zero start xᵀ(F + λI)x = xᵀg, so that neither β nor ½ sᵀFs takes another product.

    :param g: ∇L(θ_old), shape (P,)
    :return: the proposal if there is one, and the report as far as it is known
    """
    report = TrustRegionReport(
        outcome=StepOutcome.ZERO_RADIUS,
        objective=objective_old,
        target_kl=settings.target_kl if math.isfinite(settings.target_kl) else None,
        gradient_norm=float(g.double().norm()),
    )
    reason = obstacle(len(problem.parameters), objective_old, report.gradient_norm)
    if reason is not None:
        return None, replace(report, outcome=reason)
    if settings.radius == 0.0 and settings.step_size is None:
        return None, report
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
    beta = math.sqrt(2.0 * settings.radius / xg) if settings.step_size is None else settings.step_size
    step = beta * solution.x
    if not bool(th.isfinite(step).all()):
        return None, replace(report, outcome=StepOutcome.NON_FINITE_STEP)
    if settings.step_radius is None:
        undamped = xg - settings.cg_damping * float(x @ x)
        report = replace(report, predicted_kl=0.5 * beta**2 * undamped)
    return Proposal(step, beta * xg), report
