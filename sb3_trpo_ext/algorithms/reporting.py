"""What is logged of an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import explained_variance

from sb3_trpo_ext.checks import warn_user
from sb3_trpo_ext.distributions import family_of
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.steps import StepOutcome, StepReport
from sb3_trpo_ext.trust_region import TrustRegionReport

_ROUNDING = 1e-5
"""A KL, in nats, that single precision may make of two passes over the same states."""

_LOGGED_ELSEWHERE = frozenset(("outcome", "objective", "kl", "cg_status"))


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


def record_policy_step(logger: Logger, report: StepReport) -> None:
    """The keys of sb3_contrib.TRPO, with their meaning, and what lets a person judge this kind of step.

    What a step does not have is not logged: None, and the success of a search where nothing is searched for.
    """
    logger.record("train/policy_objective", report.objective)
    logger.record("train/kl_divergence_loss", report.kl)
    if isinstance(report, TrustRegionReport) and report.backtracks is not None:
        logger.record("train/is_line_search_success", float(report.outcome is StepOutcome.ACCEPTED))
    for field in fields(report):
        value = getattr(report, field.name)
        if value is not None and field.name not in _LOGGED_ELSEWHERE:
            logger.record(f"trust_region/{field.name}", value)


def record_explained_variance(logger: Logger, buffer: RolloutBuffer) -> None:
    # in double precision, as the squares of usable returns may overflow
    values, returns = (array.flatten().astype(np.float64) for array in (buffer.values, buffer.returns))
    logger.record("train/explained_variance", explained_variance(values, returns))
