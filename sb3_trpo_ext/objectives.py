"""Surrogate objectives: what a policy step maximises, state by state."""

from __future__ import annotations

from typing import Protocol

import torch as th
from stable_baselines3.common.distributions import Distribution


class Objective(Protocol):
    """Terms whose average over states is the surrogate L(θ)."""

    def set_old(self, old: Distribution, rows: slice) -> None:
        """Take what is needed of π_old on these states; called once for each chunk, without a graph."""
        ...

    def terms(self, distribution: Distribution, rows: slice) -> th.Tensor:
        """The terms of these states under π_θ, shape (rows,), with a graph if autograd is on."""
        ...


class SinglePathSurrogate:
    """L(θ) = E[π_θ(a|s) / π_old(a|s) · A(s, a)] + c · E[H(π_θ(·|s))] (TRPO paper, eq. 14; entropy: A3C).

    :param actions: (B,) for Discrete, else (B, D), as the distribution's ``log_prob`` takes them
    :param advantages: (B,)
    :param ent_coef: c
    """

    def __init__(self, actions: th.Tensor, advantages: th.Tensor, ent_coef: float = 0.0) -> None:
        self.actions = actions
        self.advantages = advantages
        self.ent_coef = ent_coef
        self._old_log_prob = th.zeros_like(advantages)

    def set_old(self, old: Distribution, rows: slice) -> None:
        self._old_log_prob[rows] = old.log_prob(self.actions[rows])

    def terms(self, distribution: Distribution, rows: slice) -> th.Tensor:
        log_prob = distribution.log_prob(self.actions[rows])
        ratio = th.exp(log_prob - self._old_log_prob[rows])
        terms = ratio * self.advantages[rows]
        if self.ent_coef != 0.0:
            entropy = distribution.entropy()
            # no closed form (tanh-squashed): −log π is importance-weighted like the rest
            terms = terms + self.ent_coef * (-ratio * log_prob if entropy is None else entropy)
        return terms


def normalize_advantages(advantages: th.Tensor) -> th.Tensor:
    """(A − mean) / (std + 1e-8) over a batch (B,), as sb3_contrib does, but never NaN.

    Advantages that differ by no more than rounding, a single one included, become zeros: there is
    nothing to prefer.
    """
    # in double precision, so that huge values do not overflow
    wide = advantages.double()
    if len(wide) < 2:
        return th.zeros_like(advantages)
    std = wide.std()
    if std <= th.finfo(advantages.dtype).eps * wide.abs().max():
        return th.zeros_like(advantages)
    return ((wide - wide.mean()) / (std + 1e-8)).to(advantages.dtype)
