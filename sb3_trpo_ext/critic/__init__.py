"""Fits of the value function V to returns: minibatch Adam, or Gauss-Newton with conjugate gradient.

Neither moves the policy: parameters that the policy depends on are held fixed, and a fit that ends
in anything not finite is taken back whole.
"""

from sb3_trpo_ext.critic.fit import fit_critic
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonSettings, fit_gauss_newton
from sb3_trpo_ext.critic.minibatch import AdamSettings, fit_adam
from sb3_trpo_ext.critic.problem import CriticProblem, CriticReport, FitOutcome

__all__ = [
    "AdamSettings",
    "CriticProblem",
    "CriticReport",
    "FitOutcome",
    "GaussNewtonSettings",
    "fit_adam",
    "fit_critic",
    "fit_gauss_newton",
]
