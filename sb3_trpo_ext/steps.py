"""What became of a policy step: its outcome by name, its report, and the checks that every step passes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, TypeVar

Report = TypeVar("Report", bound="StepReport")


class Evaluation(NamedTuple):
    """Surrogate and mean KL at the parameters' present values; NaN where they cannot be computed."""

    objective: float
    kl: float


class StepOutcome(str, Enum):
    """What became of a policy step. All but ``ACCEPTED`` leave θ as it was, bit for bit."""

    ACCEPTED = "accepted"
    UNDONE = "undone"
    """Accepted, then taken back with the whole update, because the critic fit met NaN or infinity."""
    NO_IMPROVEMENT = "no_improvement"
    """No fraction of the step improved L enough within the bound."""
    BEYOND_RADIUS = "beyond_radius"
    """The KL of the natural gradient's full step was more than ten times δ, however few steps CG took; raise
    ``cg_damping`` or lower ``target_kl``."""
    ZERO_GRADIENT = "zero_gradient"
    """Nothing to improve: all advantages are alike."""
    NO_PARAMETERS = "no_parameters"
    """Nothing to move: the action distribution depends on no parameter that is not frozen."""
    ZERO_RADIUS = "zero_radius"
    """The schedule of the radius has come to 0."""
    NON_POSITIVE_CURVATURE = "non_positive_curvature"
    """F + λI is not positive definite on this batch; raise ``cg_damping``."""
    NON_FINITE_GRADIENT = "non_finite_gradient"
    NON_FINITE_CURVATURE = "non_finite_curvature"
    NON_FINITE_STEP = "non_finite_step"

    @property
    def is_fault(self) -> bool:
        """Whether NaN or infinity stopped the step, so that the batch is not to be trusted."""
        return self in (self.NON_FINITE_GRADIENT, self.NON_FINITE_CURVATURE, self.NON_FINITE_STEP)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one policy step did, whatever its kind.

    :param outcome: by name
    :param objective: L at the parameters that were kept
    :param kl: KL(π_old ‖ π_θ) at the parameters that were kept: 0 for a rejected step
    :param expected_improvement: gᵀ(θ_candidate − θ_old) of the last candidate tried
    :param improvement: L(θ_candidate) − L(θ_old) of the last candidate tried
    :param gradient_norm: ‖g‖
    :param step_norm: ‖θ_new − θ_old‖
    """

    outcome: StepOutcome
    objective: float
    kl: float = 0.0
    expected_improvement: float = math.nan
    improvement: float = math.nan
    gradient_norm: float = math.nan
    step_norm: float = 0.0

    def landed(self: Report, step_norm: float, candidate: Evaluation) -> Report:
        """The report of a step that is kept without a search, if L and KL are finite where it leads.

        ``NON_FINITE_STEP`` leaves it to the caller to restore θ.
        """
        report = replace(self, improvement=candidate.objective - self.objective)
        finite = all(map(math.isfinite, (*candidate, step_norm)))
        if not finite:
            return replace(report, outcome=StepOutcome.NON_FINITE_STEP)
        return replace(
            report, outcome=StepOutcome.ACCEPTED, objective=candidate.objective, kl=candidate.kl, step_norm=step_norm
        )

    def undone(self: Report) -> Report:
        """What is to be said once an accepted step has been taken back; other reports stay as they are."""
        if self.outcome is not StepOutcome.ACCEPTED:
            return self
        return replace(self, outcome=StepOutcome.UNDONE, objective=self.objective - self.improvement, kl=0.0, step_norm=0.0)


def obstacle(n_parameters: int, objective: float, gradient_norm: float) -> StepOutcome | None:
    """Why there is no step to be made from P, L(θ_old) and ‖g‖, if so."""
    if n_parameters == 0:
        return StepOutcome.NO_PARAMETERS
    if not (math.isfinite(objective) and math.isfinite(gradient_norm)):
        return StepOutcome.NON_FINITE_GRADIENT
    return StepOutcome.ZERO_GRADIENT if gradient_norm == 0.0 else None
