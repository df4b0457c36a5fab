"""The fit that settings stand for."""

from __future__ import annotations

import torch as th

from sb3_trpo_ext.critic.gauss_newton import GaussNewtonSettings, fit_gauss_newton
from sb3_trpo_ext.critic.minibatch import AdamSettings, fit_adam
from sb3_trpo_ext.critic.problem import CriticProblem, CriticReport, FitOutcome


def fit_critic(
    problem: CriticProblem, settings: AdamSettings | GaussNewtonSettings, optimizer: th.optim.Optimizer, damping: float
) -> tuple[CriticReport, float]:
    """Fit V by minibatch descent, or by Gauss-Newton.

    :param optimizer: holds φ among its parameters
    :param damping: λ of Gauss-Newton to start from
    :return: what the fit did, and the λ to go on from
    """
    if len(problem.parameters) == 0:
        return CriticReport(FitOutcome.NO_PARAMETERS), damping
    if isinstance(settings, AdamSettings):
        return fit_adam(problem, optimizer, settings), damping
    return fit_gauss_newton(problem, damping, settings)
