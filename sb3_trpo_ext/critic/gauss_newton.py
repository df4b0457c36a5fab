"""Second-order fits of V on the whole batch: Levenberg-Marquardt steps, solved by conjugate gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch as th

from sb3_trpo_ext.critic.problem import CriticProblem, CriticReport, FitOutcome
from sb3_trpo_ext.numerics.conjugate_gradient import CGStatus, conjugate_gradient
from sb3_trpo_ext.numerics.curvature import damped
from sb3_trpo_ext.numerics.line_search import backtracking_line_search
from sb3_trpo_ext.numerics.parameters import restored_on_error


@dataclass(frozen=True)
class GaussNewtonSettings:
    """Second-order fits on the whole batch."""

    steps: int = 3
    cg_max_steps: int = 10
    prior: float = 30.0
    """λ is at least prior / B: the fewer the states, the more the old φ weighs."""
    max_candidates: int = 5
    max_damping: float = 1e12
    restart_damping: float = 0.1
    """λ of a fit that starts from a constant V, at most: one that was found for another V says nothing of it."""
    largest_ratio: float = 1000.0
    """Of the returns' size to V's: beyond this V is no start for a fit."""
    largest_error: float = 10.0
    """Of V, in units of the returns' size: beyond this V is no start for a fit. Far smaller than ``largest_ratio``, as
    returns that V itself bootstraps are never far smaller than V; where V of a new policy does no harm it is near 1."""


def fit_gauss_newton(problem: CriticProblem, damping: float, settings: GaussNewtonSettings) -> tuple[CriticReport, float]:
    """Fit V by Levenberg-Marquardt steps: (JᵀJ/B + λI) d = Jᵀ(R − V)/B, solved by conjugate gradient.

    A step is halved until the loss falls; λ shrinks where the quadratic model predicted the
    decrease well and grows where it did not (Nocedal & Wright 2006, ch. 4 and 10; Martens 2010).

    λ is a pure number, as JᵀJ is taken in units in which its diagonal is 1 on average. What does depend on the unit of the
    returns is a V of another size: hidden layers would have to move far beyond where V is linear in them to make up for
    an output layer that is orders of magnitude too small, so that no step lowers the loss, or they saturate. So where
    V is no start for a fit, the fit starts from the constant V that is best. There J is 0 but for the output layer, in
    which V is linear: the first step gives that layer its size, in whatever unit, and the next ones move all layers.

    :param damping: λ to start from
    :return: what the fit did, and the λ to go on from
    """
    phi, loss_start = problem.parameters.read(), problem.loss()
    loss, adapted = loss_start, damping
    with restored_on_error(problem.parameters):
        restart = not _is_start(problem, loss_start, settings) and problem.make_constant(2.0 * loss_start)
        if not restart:
            loss, adapted = _steps(problem, loss_start, damping, settings)
            stands_still = loss == loss_start > 0.0 and _outweighs_phi(problem, settings)
            restart = stands_still and problem.make_constant(2.0 * loss_start)
        if restart:
            loss, restarted = _steps(problem, problem.loss(), min(damping, settings.restart_damping), settings)
            adapted = restarted if loss < loss_start else adapted
    if not (math.isfinite(loss) and bool(th.isfinite(problem.parameters.read()).all())):
        problem.parameters.write(phi)
        return CriticReport(FitOutcome.NON_FINITE, loss_start), damping
    if not loss < loss_start:
        problem.parameters.write(phi)
        return CriticReport(FitOutcome.UNCHANGED, loss_start), adapted
    return CriticReport(FitOutcome.FITTED, loss), adapted


def _is_start(problem: CriticProblem, loss: float, settings: GaussNewtonSettings) -> bool:
    """Whether V is of the returns' size. One that is too large may be right elsewhere, unless the batch is large."""
    values, returns = problem.sizes()
    is_too_small = settings.largest_ratio * values < returns
    is_too_large = settings.largest_error * returns < math.sqrt(loss) and _outweighs_phi(problem, settings)
    return not (is_too_small or is_too_large)


def _outweighs_phi(problem: CriticProblem, settings: GaussNewtonSettings) -> bool:
    """Whether what the states say of φ outweighs what the old φ did, by an order of magnitude."""
    return problem.units.total >= 10.0 * settings.prior


def _steps(problem: CriticProblem, loss: float, damping: float, settings: GaussNewtonSettings) -> tuple[float, float]:
    for _ in range(settings.steps):
        loss, damping = _levenberg_marquardt_step(problem, loss, damping, settings)
    return loss, damping


def _levenberg_marquardt_step(
    problem: CriticProblem, loss: float, damping: float, settings: GaussNewtonSettings
) -> tuple[float, float]:
    """One step from a given loss; the loss and the λ that it leaves, the loss NaN if the solve was not finite."""
    min_damping = settings.prior / problem.units.total
    damping = max(damping, min_damping)
    phi = problem.parameters.read()
    descent, curvature, scales = problem.linearize()
    # in units in which every tensor moves V alike (Marquardt's scaling): the last layer's and the hidden
    # layers' columns of J differ by as much as the returns are large
    descent = descent / scales
    solution = conjugate_gradient(
        damped(lambda v: curvature(v / scales) / scales, damping),
        descent,
        max_steps=settings.cg_max_steps,
        recompute_residual=False,
    )
    if solution.status is CGStatus.NON_FINITE:
        return math.nan, damping
    step = solution.x

    def evaluate(fraction: float) -> float:
        problem.parameters.write(phi + fraction * step / scales)
        return problem.loss()

    def accept(fraction: float, candidate: float) -> bool:
        return candidate < loss

    search = backtracking_line_search(evaluate, accept, shrinking_factor=0.5, max_iter=settings.max_candidates)
    if not search.accepted:
        problem.parameters.write(phi)
        return loss, min(2.0 * damping, settings.max_damping)
    # the model's decrease for the full step: dᵀ(JᵀJ/B + λI)d is dᵀ Jᵀ(R − V)/B, as CG started from zero
    predicted = float(step.double() @ descent.double()) + damping * float(step.double() @ step.double())
    quality = (loss - search.value) / predicted if search.backtracks == 0 and predicted > 0.0 else 0.0
    if quality > 0.75:
        damping = max(0.5 * damping, min_damping)
    elif quality < 0.25:
        damping = min(2.0 * damping, settings.max_damping)
    return search.value, damping
