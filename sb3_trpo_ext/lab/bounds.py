"""How far apart two policies are, and what that says of their returns: the theory of TRPO's section 2 and 3.

Policies are arrays π(a|s) of shape (S, A); functions of distributions take any arrays whose last axis is
the probability space, and refuse what are none with a ValueError.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sb3_trpo_ext.checks import require, require_count, require_real
from sb3_trpo_ext.lab.mdp import FiniteMDP, PolicyValues, as_distributions


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """‖p − q‖_TV = ½ Σ_x |p(x) − q(x)| (notes, proposition 1; survey, eq. 34)."""
    p, q = _pair(p, q)
    return 0.5 * np.abs(p - q).sum(axis=-1)


def total_variation_over_events(p: np.ndarray, q: np.ndarray) -> float:
    """‖p − q‖_TV = sup_B |p(B) − q(B)| by trying every event B (notes, the definition); p and q are (n,), n ≤ 20."""
    p, q = _pair(p, q)
    n = len(p)
    require("the number of outcomes", n, n <= 20, "at most 20, as there are 2ⁿ events")
    events = np.arange(2**n)[:, None] >> np.arange(n) & 1
    return float(np.abs(events @ (p - q)).max())


def maximal_coupling(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """A joint distribution (n, n) of (X, Y) with marginals p and q and P(X ≠ Y) = ‖p − q‖_TV (notes, proposition 2).

    X = Y as often as can be, min(p, q) on the diagonal; what is left over is drawn independently.
    """
    p, q = _pair(p, q)
    common = np.minimum(p, q)
    rest = np.outer(p - common, q - common)
    return np.diag(common) + (rest / (p - common).sum() if rest.any() else rest)


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) = Σ_x p(x) log(p(x)/q(x)), in nats (lecture, "KL-divergence"); infinite where q lacks p's support."""
    p, q = _pair(p, q)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        terms = np.where(p > 0.0, p * np.log(p / q), 0.0)
    # of equal distributions nothing but rounding is left, which has either sign
    return np.maximum(terms.sum(axis=-1), 0.0)


def _pair(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shape = np.shape(p)
    return as_distributions("p", p, shape), as_distributions("q", q, shape)


class Divergence(NamedTuple):
    """Of a new policy from an old one: the largest over states, and the mean over the old one's visits."""

    max_tv: float
    mean_tv: float
    max_kl: float
    mean_kl: float


def divergence(old: PolicyValues, pi_new: np.ndarray) -> Divergence:
    """max_s and E_{s∼ρ_π} of TV(π, π̃) and KL(π ‖ π̃) (survey, eqs. 35, 38, 44); ρ_π normalised, as for TRPO's δ."""
    pi_new = as_distributions("pi_new", pi_new, old.Q.shape)
    tv, kl = total_variation(old.pi, pi_new), kl_divergence(old.pi, pi_new)
    visited = old.rho > 0.0
    return Divergence(*(float(x) for d in (tv, kl) for x in (d.max(), old.state_weights[visited] @ d[visited])))


def step_kls(mdp: FiniteMDP, pi: np.ndarray, pi_new: np.ndarray, horizon: int) -> np.ndarray:
    """The terms E_{s_h∼π} KL(π(·|s_h) ‖ π̃(·|s_h)), h < H, whose sum is the trajectory KL; shape (H,).

    KL(P_π ‖ P_π̃) over τ = (s₀, a₀, …, s_{H−1}, a_{H−1}): start and dynamics cancel (lecture, "The regularization
    term is"). Weighted by γ^h and summed over all h they are Σ_s ρ_π(s) KL(π ‖ π̃).
    """
    require_count("horizon", horizon)
    pi = as_distributions("pi", pi, mdp.shape)
    kl = kl_divergence(pi, as_distributions("pi_new", pi_new, mdp.shape))
    chain, states, terms = np.einsum("sa,sat->st", pi, mdp.P), mdp.rho0, []
    for _ in range(horizon):
        terms.append(states[states > 0.0] @ kl[states > 0.0])
        states = states @ chain
    return np.array(terms)


def expected_advantage(old: PolicyValues, pi_new: np.ndarray) -> np.ndarray:
    """Ā(s) = E_{a∼π̃}[A_π(s, a)], (S,) (notes, proposition 4)."""
    return (as_distributions("pi_new", pi_new, old.Q.shape) * old.A).sum(axis=1)


def expected_advantage_bound(old: PolicyValues, pi_new: np.ndarray) -> float:
    """|Ā(s)| ≤ 2α max_{s,a} |A_π(s, a)| with α = max_s TV, which the maximal coupling attains (notes, proposition 4)."""
    return 2.0 * divergence(old, pi_new).max_tv * float(np.abs(old.A).max())


def performance_difference(old: PolicyValues, new: PolicyValues) -> float:
    """η(π̃) − η(π) = Σ_s ρ_π̃(s) Σ_a π̃(a|s) A_π(s, a) (notes, lemma 3; survey, eq. 27; lecture, PDL)."""
    return float(new.rho @ expected_advantage(old, new.pi))


def surrogate(old: PolicyValues, pi_new: np.ndarray) -> float:
    """L_π(π̃) = η(π) + Σ_s ρ_π(s) Σ_a π̃(a|s) A_π(s, a) (notes, eq. pi.5; survey, eq. 26)."""
    return old.eta + float(old.rho @ expected_advantage(old, pi_new))


def penalty_coefficient(old: PolicyValues) -> float:
    """C = 4εγ/(1 − γ)², ε = max_{s,a} |A_π(s, a)| (notes, after theorem 5; survey, eq. 36 ff.).

    :raises ValueError: for the values of the average reward
    """
    require("gamma", old.gamma, old.gamma < 1.0, "below 1: the bound is on the discounted return")
    return 4.0 * float(np.abs(old.A).max()) * old.gamma / (1.0 - old.gamma) ** 2


def tv_lower_bound(old: PolicyValues, pi_new: np.ndarray) -> float:
    """η(π̃) ≥ L_π(π̃) − C α², α = max_s TV(π, π̃) (notes, theorem 5; survey, eq. 36; "Practical Algorithm", MIGT,
    whose ≤ is a slip)."""
    return surrogate(old, pi_new) - penalty_coefficient(old) * divergence(old, pi_new).max_tv ** 2


def kl_lower_bound(old: PolicyValues, pi_new: np.ndarray) -> float:
    """η(π̃) ≥ M(π̃) = L_π(π̃) − C max_s KL(π ‖ π̃) (notes, eq. pi.4; survey, eq. 38 ff.), from Pinsker's TV² ≤ ½KL."""
    C = penalty_coefficient(old)
    # without a penalty there is nothing to multiply an infinite KL with
    return surrogate(old, pi_new) - (C * divergence(old, pi_new).max_kl if C > 0.0 else 0.0)


def mixture(pi: np.ndarray, pi_prime: np.ndarray, alpha: float) -> np.ndarray:
    """π_new = (1 − α)π + απ' (survey, eq. 31)."""
    return (1.0 - alpha) * pi + alpha * pi_prime


def mixture_lower_bound(old: PolicyValues, pi_prime: np.ndarray, alpha: float) -> float:
    """η(π_new) ≥ L_π(π_new) − 2εγα² / ((1 − γ(1 − α))(1 − γ)), ε = max_s |E_{a∼π'} A_π(s, a)|, for the mixture of π
    with π' (survey, eq. 32; Kakade & Langford 2002, theorem 4.1)."""
    require_real("alpha", alpha, 0.0, 1.0)
    require("gamma", old.gamma, old.gamma < 1.0, "below 1: the bound is on the discounted return")
    gain, gamma = expected_advantage(old, pi_prime), old.gamma
    penalty = 2.0 * np.abs(gain).max() * gamma * alpha**2 / ((1.0 - gamma * (1.0 - alpha)) * (1.0 - gamma))
    return old.eta + alpha * float(old.rho @ gain) - float(penalty)
