"""The rungs from sb3_contrib.TRPO to TRPOExt's default arguments, and what sb3_contrib does that our arguments cannot say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch as th
from _settings import Setting
from sb3_contrib.common.utils import conjugate_gradient_solver

from sb3_trpo_ext import trust_region
from sb3_trpo_ext.distributions import GaussianFamily
from sb3_trpo_ext.numerics.conjugate_gradient import CGSolution, CGStatus

THEIRS, OURS = "sb3_contrib_default_norm", "trpo_ext_default_norm"
"""Of ``_settings.ALGORITHMS``: whose constructor a rung calls."""
NORMALIZE = {"norm_obs": True, "norm_reward": False}
LOG_STD = -0.7
"""A standard deviation of 0.497, which is ``initial_std=0.5`` in sb3_contrib's words."""


class Rung(NamedTuple):
    """One way to train.

    :param words: what it adds to the rung below
    :param base: ``THEIRS`` or ``OURS``
    :param arguments: of the constructor
    :param theirs: what of sb3_contrib takes the place of ours: "kl", "cg"
    """

    words: str
    base: str
    arguments: dict[str, Any]
    theirs: tuple[str, ...] = ()

    @property
    def setting(self) -> Setting:
        return Setting({"policy": "MlpPolicy", **self.arguments}, normalize=NORMALIZE)


_IN_THEIR_SETTINGS = {"kl_reduction": "mean", "critic": "adam", "line_search_accept_ratio": 0.0, "initial_std": None}


def _without(*names: str) -> dict[str, Any]:
    """Their settings, but our defaults for these."""
    return {name: value for name, value in _IN_THEIR_SETTINGS.items() if name not in names}


RUNGS = {
    "sb3_contrib": Rung("sb3_contrib.TRPO, default arguments", THEIRS, {}),
    "sb3_contrib_spread": Rung(f"the same, log_std_init={LOG_STD}", THEIRS, {"policy_kwargs": {"log_std_init": LOG_STD}}),
    "as_theirs": Rung("TRPOExt in sb3_contrib's settings", OURS, _without(), ("kl", "cg")),
    "kl": Rung("+ KL(old ‖ new) in the search", OURS, _without(), ("cg",)),
    "acceptance": Rung("+ acceptance ratio 0.1", OURS, _without("line_search_accept_ratio"), ("cg",)),
    # from here on the KL is a sum: the same trust region, as radius and damping are d times theirs
    "cg": Rung("+ relative CG tolerance, zero start", OURS, _without("line_search_accept_ratio", "kl_reduction")),
    "gauss_newton": Rung("+ Gauss-Newton critic", OURS, {"initial_std": None, "critic": "gauss_newton"}),
    "full": Rung("+ initial spread 0.5: all default arguments", OURS, {}),
    "full_adam": Rung("all default arguments but Adam's critic", OURS, {"critic": "adam"}),
}


class Step(NamedTuple):
    """Two rungs to be compared."""

    title: str
    ours: str
    reference: str

    @property
    def rungs(self) -> tuple[str, str]:
        return self.ours, self.reference


CHECK = Step("our code in their settings", "as_theirs", "sb3_contrib")
"""Of the code: nothing is to be seen."""
CHOICES = (
    Step("KL(old ‖ new) in the search", "kl", "as_theirs"),
    Step("acceptance ratio 0.1", "acceptance", "kl"),
    Step("relative CG tolerance, zero start", "cg", "acceptance"),
    Step("Gauss-Newton critic, spread 1", "gauss_newton", "cg"),
    Step("Gauss-Newton critic, spread 0.5", "full", "full_adam"),
    Step("our spread of actions 0.5 instead of 1", "full", "gauss_newton"),
)
"""Of the default arguments, each with what would be the default without it."""
STEPS = (
    Step("their spread of actions 0.5 instead of 1", "sb3_contrib_spread", "sb3_contrib"),
    CHECK,
    *CHOICES,
    Step("all of ours against all of theirs", "full", "sb3_contrib"),
    Step("the same, spread 0.5 on both sides", "full", "sb3_contrib_spread"),
    Step("the same, spread 0.5 and Adam on both sides", "full_adam", "sb3_contrib_spread"),
)


# -- what sb3_contrib does -----------------------------------------------------------------------------------


@contextmanager
def put_in_place(theirs: tuple[str, ...]) -> Iterator[None]:
    """For as long as it is open, these parts of sb3_contrib's update stand in ours, on Gaussian policies."""
    with ExitStack() as stack:
        if "kl" in theirs:
            kl_of = GaussianFamily.kl_of
            # F is a metric of its own: this is the KL that the search tests, and that alone
            stack.enter_context(mock.patch.object(GaussianFamily, "kl_of", lambda self, old, new: kl_of(self, new, old)))
        if "cg" in theirs:
            stack.enter_context(mock.patch.object(trust_region, "conjugate_gradient", solve_as_sb3_contrib))
        yield


def solve_as_sb3_contrib(matvec: Callable[[th.Tensor], th.Tensor], b: th.Tensor, *, max_steps: int, **_: Any) -> CGSolution:
    """A small random start, an absolute tolerance, and a step scaled by xᵀAx, as ``sb3_contrib.TRPO`` has them.

    Ours is scaled by xᵀb, which is xᵀAx only from a zero start: x is scaled such that the step comes out as theirs.
    """
    products = 0

    @functools.wraps(matvec)
    def counted(v: th.Tensor) -> th.Tensor:
        nonlocal products
        products += 1
        return matvec(v)

    x = conjugate_gradient_solver(counted, b, max_iter=max_steps)
    Ax = matvec(x)
    residual = float((b - Ax).norm())
    return CGSolution(float(x @ b) / float(x @ Ax) * x, CGStatus.STEP_LIMIT, products - 1, residual)
