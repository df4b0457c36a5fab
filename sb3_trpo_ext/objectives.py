"""Surrogate objectives: what a policy step maximises, state by state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch as th
from stable_baselines3.common.distributions import Distribution

from sb3_trpo_ext.numerics.averages import ALONE, Group, Rows, StateAverage, Units


class Objective(Protocol):
    """Terms whose average over states is the surrogate L(θ), or one of its summands."""

    states: th.Tensor | None
    """The states to average over, as rows of the batch, (N,); None: the whole batch, as the KL does.

    ``rows`` below counts these states.
    """

    def set_old(self, old: Distribution, rows: slice) -> None:
        """Take what is needed of π_old on these states; called once for each chunk, without a graph."""
        ...

    def terms(self, distribution: Distribution, rows: Rows) -> th.Tensor:
        """The terms of these states under π_θ, shape (rows,), with a graph if autograd is on."""
        ...


@dataclass(frozen=True)
class ObjectivePart:
    """Objectives that average over the same states.

    :param states: as rows of the batch; None: the whole batch, which the KL is averaged over too
    """

    objectives: list[Objective]
    average: StateAverage
    zero: th.Tensor
    states: th.Tensor | None = None

    def in_batch(self, rows: Rows) -> Rows:
        return rows if self.states is None else self.states[rows]

    def terms(self, distribution: Distribution, rows: Rows) -> th.Tensor:
        """The sum of the objectives' terms, (rows,); a zero where there is no objective."""
        return sum((objective.terms(distribution, rows) for objective in self.objectives), start=self.zero)

    def weighted(self, distribution: Distribution, rows: slice) -> th.Tensor:
        """The same, each times what its state counts."""
        return self.average.units.weigh(self.terms(distribution, rows), rows) if self.objectives else self.zero

    def mean(self, distribution: Distribution, rows: th.Tensor, total: float) -> th.Tensor:
        """Their weighted mean over a minibatch."""
        return self.average.units.mean(self.terms(distribution, rows), rows, total) if self.objectives else self.zero


class EntropyBonus:
    """c · E[H(π_θ(·|s))] (A3C).

    :param actions: (B,) for Discrete, else (B, D), as the distribution's ``log_prob`` takes them: where H has no
        closed form (tanh-squashed), −log π at these is importance-weighted
    :param ent_coef: c
    """

    states: th.Tensor | None = None

    def __init__(self, actions: th.Tensor, ent_coef: float) -> None:
        self.actions = actions
        self.ent_coef = ent_coef
        self._old_log_prob = th.zeros(0)

    def set_old(self, old: Distribution, rows: slice) -> None:
        if old.entropy() is None:
            log_prob = old.log_prob(self.actions[rows])
            if rows.start == 0:
                self._old_log_prob = log_prob.new_zeros(len(self.actions))
            self._old_log_prob[rows] = log_prob

    def terms(self, distribution: Distribution, rows: Rows) -> th.Tensor:
        entropy = distribution.entropy()
        if entropy is None:
            log_prob = distribution.log_prob(self.actions[rows])
            entropy = -th.exp(log_prob - self._old_log_prob[rows]) * log_prob
        return self.ent_coef * entropy


class SinglePathSurrogate:
    """L(θ) = E[π_θ(a|s) / π_old(a|s) · A(s, a)] (TRPO paper, eq. 14).

    :param actions: (B,) for Discrete, else (B, D), as the distribution's ``log_prob`` takes them
    :param advantages: (B,)
    """

    states: th.Tensor | None = None

    def __init__(self, actions: th.Tensor, advantages: th.Tensor) -> None:
        self.actions = actions
        self.advantages = advantages
        self._old_log_prob = th.zeros_like(advantages)

    def set_old(self, old: Distribution, rows: slice) -> None:
        self._old_log_prob[rows] = old.log_prob(self.actions[rows])

    def terms(self, distribution: Distribution, rows: Rows) -> th.Tensor:
        log_prob = distribution.log_prob(self.actions[rows])
        return th.exp(log_prob - self._old_log_prob[rows]) * self.advantages[rows]


class AllActionsSurrogate:
    """L_n(θ) = Σ_k π_θ(a_k|s_n) Q̂(s_n, a_k), every action enumerated (TRPO paper, eq. 15, vine).

    :param states: the rollout set as rows of the batch, (N,)
    :param actions: (N, K) for Discrete, else (N, K, D)
    :param q_values: Q̂, (N, K)
    """

    def __init__(self, states: th.Tensor, actions: th.Tensor, q_values: th.Tensor) -> None:
        self.states: th.Tensor | None = states
        self.actions = actions
        self.q_values = q_values

    def set_old(self, old: Distribution, rows: slice) -> None:
        pass

    def terms(self, distribution: Distribution, rows: Rows) -> th.Tensor:
        probabilities = log_probs_of_branches(distribution, self.actions[rows]).exp()
        return (probabilities * self.q_values[rows]).sum(dim=1)


class SelfNormalizedSurrogate:
    """L_n(θ) = Σ_k w_k Q̂(s_n, a_k) / Σ_k w_k, w_k = m_k π_θ(a_k|s_n) / q(a_k|s_n) (TRPO paper, eq. 16, vine).

    Self-normalised importance sampling: a constant added to Q̂ of a state changes nothing, so it needs no
    baseline. Its mean gradient for K draws from q = π_old is (K − 1)/K of the exact one.

    :param states: the rollout set as rows of the batch, (N,)
    :param actions: (N, K) for Discrete, else (N, K, D)
    :param q_values: Q̂, (N, K)
    :param log_proposal: log q, (N, K)
    :param multiplicities: m, how often each action was drawn, (N, K); 0 for places that are not used
    """

    def __init__(
        self,
        states: th.Tensor,
        actions: th.Tensor,
        q_values: th.Tensor,
        log_proposal: th.Tensor,
        multiplicities: th.Tensor,
    ) -> None:
        self.states: th.Tensor | None = states
        self.actions = actions
        self.q_values = q_values
        self._log_offset = multiplicities.log() - log_proposal

    def set_old(self, old: Distribution, rows: slice) -> None:
        pass

    def terms(self, distribution: Distribution, rows: Rows) -> th.Tensor:
        log_weights = log_probs_of_branches(distribution, self.actions[rows]) + self._log_offset[rows]
        return (th.softmax(log_weights, dim=1) * self.q_values[rows]).sum(dim=1)


def log_probs_of_branches(distribution: Distribution, actions: th.Tensor) -> th.Tensor:
    """log π(a_k|s_n), (N, K), of K actions in each of N states, (N, K) or (N, K, D)."""
    return th.stack([distribution.log_prob(actions[:, k]) for k in range(actions.shape[1])], dim=1)


def center_q_values(q_values: np.ndarray, weights: np.ndarray, normalize: bool, group: Group = ALONE) -> np.ndarray:
    """Q̂ of each state less its mean under the weights, and over their common standard deviation if asked.

    Neither changes the direction of a trust-region step: the surrogates of the vine move by a constant when
    Q̂ of a state does, and the step is scaled to the KL bound. The first saves single precision from large
    returns, the second makes ``ent_coef`` mean what it means with normalised advantages.

    :param q_values: (N, K)
    :param weights: of the actions at π_old, (N, K), summing to 1 over K
    :param group: who else has states, over which the standard deviation is taken too
    :return: (N, K); zeros where all differ by no more than rounding
    """
    centered = q_values - (weights * q_values).sum(axis=1, keepdims=True)
    if not normalize:
        return centered
    sums = [(weights * values**2).sum() for values in (centered, q_values)]
    variance, square, n_states = group.sum(th.tensor([*sums, len(q_values)], dtype=th.float64, device="cpu")).tolist()
    std = math.sqrt(variance / n_states)
    if std <= np.finfo(np.float32).eps * math.sqrt(square / n_states):
        return np.zeros_like(q_values)
    return centered / (std + 1e-8)


def normalize_advantages(advantages: th.Tensor, states: Units | None = None) -> th.Tensor:
    """(A − mean) / (std + 1e-8) over a batch (B,), as sb3_contrib does, but never NaN.

    Advantages that differ by no more than rounding, a single one included, become zeros: there is
    nothing to prefer.

    :param states: what the batch consists of, where that is not states that count 1 each
    """
    units = states or Units(len(advantages))
    # in double precision, so that huge values do not overflow
    wide = advantages.double()
    if units.total < 2:
        return th.zeros_like(advantages)
    mean, std, rms = units.moments(wide)
    if std <= th.finfo(advantages.dtype).eps * rms:
        return th.zeros_like(advantages)
    return ((wide - mean) / (std + 1e-8)).to(advantages.dtype)
