"""Exact algorithms: each yields its start and then every iterate, for as long as it is asked.

``list(itertools.islice(natural_policy_gradient(mdp, policy, step_size=1.0), 50))`` is a history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, repeat
from typing import NamedTuple

import numpy as np
import torch as th
from torch import nn

from sb3_trpo_ext.checks import require, require_choice, require_real
from sb3_trpo_ext.lab.bounds import (
    divergence,
    expected_advantage,
    kl_lower_bound,
    mixture,
    mixture_lower_bound,
    penalty_coefficient,
)
from sb3_trpo_ext.lab.mdp import FiniteMDP, PolicyValues, evaluate, greedy
from sb3_trpo_ext.lab.policies import Constraint, ExactProblem, natural_gradient, parameters_of, policy_gradient, probabilities
from sb3_trpo_ext.trust_region import TrustRegionSettings, trust_region_step

StepSize = float | Callable[[int], float]


@dataclass(frozen=True)
class Iterate:
    """One point of a history.

    :param values: of the policy reached; ``values.pi`` is the policy, ``values.eta`` its return
    :param lower_bound: what the algorithm's theorem promised for ``values.eta`` (−∞ if nothing; η itself at the start)
    :param max_kl: max_s KL(π_old ‖ π) of the step here
    :param mean_kl: E_{s∼ρ_old} KL(π_old ‖ π) of the step here
    :param step: its size: the mixture's α, a learning rate, or the fraction of a full step
    """

    values: PolicyValues
    lower_bound: float
    max_kl: float = 0.0
    mean_kl: float = 0.0
    step: float = 0.0


def _iterate(mdp: FiniteMDP, pi: np.ndarray, step: Callable[[PolicyValues], Iterate]) -> Iterator[Iterate]:
    values = evaluate(mdp, pi)
    iterate = Iterate(values, values.eta)
    while True:
        yield iterate
        iterate = step(iterate.values)


def _moved(mdp: FiniteMDP, old: PolicyValues, pi: np.ndarray, lower_bound: float = -np.inf, step: float = 1.0) -> Iterate:
    apart = divergence(old, pi)
    return Iterate(evaluate(mdp, pi), lower_bound, apart.max_kl, apart.mean_kl, step)


def conservative_policy_iteration(mdp: FiniteMDP, pi: np.ndarray) -> Iterator[Iterate]:
    """π ← (1 − α)π + απ', π' greedy for A_π, with the α that maximises the bound (survey, eqs. 31-32; Kakade & Langford).

    :param pi: where to start, (S, A)
    """

    def step(old: PolicyValues) -> Iterate:
        better = greedy(old)
        alpha = _best_mixture(old, better)
        return _moved(mdp, old, mixture(old.pi, better, alpha), mixture_lower_bound(old, better, alpha), alpha)

    return _iterate(mdp, pi, step)


def _best_mixture(old: PolicyValues, better: np.ndarray) -> float:
    """The maximum over [0, 1] of αG − 2εγα²/((1 − γ(1 − α))(1 − γ)), concave in α; G = Σ_s ρ(s)Ā(s)."""
    gain = expected_advantage(old, better)
    epsilon = float(np.abs(gain).max())
    if epsilon == 0.0 or old.gamma == 0.0:
        return 1.0
    # the derivative vanishes at 1 − γ(1 − α) = (1 − γ)/sqrt(1 − x), and x is never above 1/2
    x = float(old.rho @ gain) * (1.0 - old.gamma) / (2.0 * epsilon)
    return float(np.clip((1.0 - old.gamma) / old.gamma * (1.0 / np.sqrt(1.0 - x) - 1.0), 0.0, 1.0))


def monotone_policy_iteration(mdp: FiniteMDP, pi: np.ndarray) -> Iterator[Iterate]:
    """π ← argmax_π̃ [L_π(π̃) − C max_s KL(π ‖ π̃)], so that η never falls (TRPO's algorithm 1; notes, after eq. pi.4;
    survey, eqs. 39-42).

    Over all policies. A bound k on every state's KL leaves one problem a state, and the best k is where its price
    Σ_s ρ_π(s) dL_s/dk is C.

    :param pi: where to start, (S, A), every probability positive
    :raises ValueError: if a probability is zero
    """

    def step(old: PolicyValues) -> Iterate:
        C = penalty_coefficient(old)
        if C == 0.0:
            return _moved(mdp, old, greedy(old), kl_lower_bound(old, greedy(old)))
        log_k = _crossing(lambda log_ks: _tilted(old, _at_kl(old, log_ks)).price @ old.rho - C, *_LOG_KL_RANGE)
        new = _tilted(old, _at_kl(old, log_k)).pi[0]
        bound = kl_lower_bound(old, new)
        # what rounding makes worse is not the maximum
        return _moved(mdp, old, new, bound) if bound >= old.eta else Iterate(old, old.eta)

    return _iterate(mdp, _positive(pi), step)


def trust_region_policy_iteration(
    mdp: FiniteMDP, pi: np.ndarray, target_kl: float, constraint: Constraint = "mean"
) -> Iterator[Iterate]:
    """π ← argmax_π̃ L_π(π̃) subject to the true constraint, KL ≤ δ (notes, eq. ppo.1; survey, eqs. 43 and 45).

    Over all policies, to the end of the constraint and not of its quadratic model.

    :param pi: where to start, (S, A), every probability positive
    :param target_kl: δ, above 0
    :param constraint: on E_{s∼ρ_π} KL(π ‖ π̃), ``"mean"``, or on max_s, ``"max"``
    :raises ValueError: if a probability is zero, or for another δ or constraint
    """
    require_real("target_kl", target_kl, 0.0, open_below=True)
    require_choice("constraint", constraint, ("mean", "max"))

    def step(old: PolicyValues) -> Iterate:
        if constraint == "max":
            log_x = _at_kl(old, np.log([target_kl]))
        else:
            # one price for all states, at which the mean KL is δ
            log_x = _at_price(old, _crossing(lambda log_prices: _mean_kls(old, log_prices) - target_kl, *_LOG_RANGE))
        return _moved(mdp, old, _tilted(old, log_x).pi[0])

    return _iterate(mdp, _positive(pi), step)


def gradient_ascent(
    mdp: FiniteMDP,
    policy: nn.Module,
    step_size: StepSize,
    direction: Callable[[nn.Module, PolicyValues], np.ndarray] = policy_gradient,
) -> Iterator[Iterate]:
    """θ ← θ + α∇η(θ), in place, or along another direction (survey, eq. 11; lecture, "Exact PG").

    :param policy: moved at every step
    :param step_size: α, for ρ unnormalised; or α_k as a function of k = 0, 1, …
    :raises ValueError: for a step size that is negative or no number
    """
    if not callable(step_size):
        require_real("step_size", step_size, 0.0)
    n_states = mdp.shape[0]
    parameters = parameters_of(policy, n_states)
    step_sizes = map(step_size, count()) if callable(step_size) else repeat(step_size)

    def step(old: PolicyValues) -> Iterate:
        alpha = next(step_sizes)
        require_real("step_size", alpha, 0.0)
        parameters.write(parameters.read() + th.as_tensor(alpha * direction(policy, old)))
        return _moved(mdp, old, probabilities(policy, n_states), step=alpha)

    return _iterate(mdp, probabilities(policy, n_states), step)


def natural_policy_gradient(mdp: FiniteMDP, policy: nn.Module, step_size: StepSize) -> Iterator[Iterate]:
    """θ ← θ + αF⁺∇η(θ), in place (survey, eq. 15; lecture, NPG's closed form; Kakade 2001).

    Near ties between actions make constant steps slow; geometrically growing ones pass over to policy iteration.
    """
    return gradient_ascent(mdp, policy, step_size, natural_gradient)


def exact_trpo(
    mdp: FiniteMDP, policy: nn.Module, settings: TrustRegionSettings, constraint: Constraint = "mean"
) -> Iterator[Iterate]:
    """θ by :func:`trust_region_step`, :class:`TRPOExt`'s own, on an :class:`ExactProblem`, in place (notes, eq. ls.1)."""

    def step(old: PolicyValues) -> Iterate:
        report = trust_region_step(ExactProblem(mdp, policy, constraint), settings)
        return _moved(mdp, old, probabilities(policy, mdp.shape[0]), step=report.fraction)

    return _iterate(mdp, probabilities(policy, mdp.shape[0]), step)


class _Tilted(NamedTuple):
    """Policies that trade L against KL at their best, K of them: q(a|s) ∝ π(a|s) / (x_s + max A(s, ·) − A(s, a))."""

    pi: np.ndarray  # (K, S, A)
    kl: np.ndarray  # KL(π ‖ q), falling in x, (K, S)
    price: np.ndarray  # d(Σ_a q A)/d KL, the state's Lagrange multiplier, rising in x, (K, S)


def _tilted(old: PolicyValues, log_x: np.ndarray) -> _Tilted:
    p = old.pi
    behind = np.maximum(np.where(p > 0.0, old.A, -np.inf).max(axis=1, keepdims=True) - old.A, 0.0)
    u = behind * np.exp(-log_x)[..., None]
    weights = p / (1.0 + u)
    total = weights.sum(axis=-1)
    kl = (p * np.log1p(u)).sum(axis=-1) + np.log(total)
    price = np.where(behind.max(axis=1) > 0.0, np.exp(log_x) / total, 0.0)
    return _Tilted(weights / total[..., None], kl, price)


def _at_kl(old: PolicyValues, log_kls: np.ndarray) -> np.ndarray:
    """log x_s at which every state has each of the KLs (K,); (K, S)."""
    return _roots(lambda log_x: _tilted(old, log_x).kl - np.exp(log_kls)[:, None], (len(log_kls), len(old.V)))


def _at_price(old: PolicyValues, log_prices: np.ndarray) -> np.ndarray:
    """log x_s at which every state has each of the prices (K,); (K, S)."""
    return _roots(lambda log_x: np.exp(log_prices)[:, None] - _tilted(old, log_x).price, (len(log_prices), len(old.V)))


def _mean_kls(old: PolicyValues, log_prices: np.ndarray) -> np.ndarray:
    return _tilted(old, _at_price(old, log_prices)).kl @ old.state_weights


# of log x and of log price; below the smallest KL there is nothing but rounding
_LOG_RANGE = (-600.0, 100.0)
_LOG_KL_RANGE = (-35.0, 10.0)


def _roots(falling: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Where each entry of a falling function crosses zero, by bisection, from above."""
    low, high = (np.full(shape, end) for end in _LOG_RANGE)
    for _ in range(50):
        middle = 0.5 * (low + high)
        before = falling(middle) > 0.0
        low, high = np.where(before, middle, low), np.where(before, high, middle)
    return high


def _crossing(falling: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> np.ndarray:
    """Where a falling function (K,) → (K,) of one number crosses zero, from above; 32 intervals at a time; (1,)."""
    for _ in range(5):
        points = np.linspace(low, high, 33)
        after = int(np.clip(np.count_nonzero(falling(points) > 0.0), 1, 32))
        low, high = points[after - 1], points[after]
    return np.array([high])


def _positive(pi: np.ndarray) -> np.ndarray:
    """:raises ValueError: naming the first probability that is zero, which no KL bound would let grow"""
    for index in np.argwhere(np.asarray(pi) == 0.0):
        require(f"pi[{', '.join(map(str, index))}]", 0.0, False, "positive")
    return pi
