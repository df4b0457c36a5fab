"""Policies with parameters, and their exact policy gradient, Fisher matrix and natural gradient.

A policy is any module that maps state indices (B,) to logits (B, A). The parameters θ are those that the
logits depend on, in the module's order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext.checks import require, require_choice
from sb3_trpo_ext.lab.bounds import divergence, surrogate
from sb3_trpo_ext.lab.mdp import FiniteMDP, PolicyValues, as_distributions, evaluate
from sb3_trpo_ext.numerics.curvature import AutogradLinearization
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.trust_region import Evaluation

Constraint = Literal["mean", "max"]


class TabularSoftmax(nn.Module):
    """π(a|s) ∝ exp(θ_sa): one logit for each state and action, so every positive policy.

    :param logits: θ at the start, (S, A)
    """

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits = nn.Parameter(th.tensor(np.asarray(logits), dtype=th.float64))

    def forward(self, states: th.Tensor) -> th.Tensor:
        return self.logits[states]


class LogLinear(nn.Module):
    """π(a|s) ∝ exp(θᵀφ_sa) (survey, "Greedy Policy Improvement").

    :param features: φ, (S, A, P)
    :param theta: (P,), zero if None
    """

    def __init__(self, features: np.ndarray, theta: np.ndarray | None = None) -> None:
        super().__init__()
        self.register_buffer("features", th.tensor(np.asarray(features), dtype=th.float64))
        start = np.zeros(np.shape(features)[-1]) if theta is None else theta
        self.theta = nn.Parameter(th.tensor(np.asarray(start), dtype=th.float64))

    def forward(self, states: th.Tensor) -> th.Tensor:
        return self.get_buffer("features")[states] @ self.theta


class ActorOf(nn.Module):
    """The logits of an SB3 policy on Discrete states and actions, a trained model's ``model.policy`` say."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, states: th.Tensor) -> th.Tensor:
        distribution: Any = self.policy.get_distribution(states.to(self.policy.device)).distribution
        return distribution.logits


def log_probabilities(policy: nn.Module, n_states: int) -> th.Tensor:
    """log π_θ(a|s) of all states, (S, A), float64, with its graph.

    :raises ValueError: if the policy gives anything but S rows of logits
    """
    try:
        logits = policy(th.arange(n_states))
    except IndexError as error:
        raise ValueError(f"the policy must have logits for {n_states} states, got: {error}") from error
    require("the logits' shape", tuple(logits.shape), logits.ndim == 2 and len(logits) == n_states, f"({n_states}, A)")
    return th.log_softmax(logits.double(), dim=1)


def probabilities(policy: nn.Module, n_states: int) -> np.ndarray:
    """π_θ(a|s), (S, A)."""
    with th.no_grad():
        return log_probabilities(policy, n_states).exp().cpu().numpy()


def parameters_of(policy: nn.Module, n_states: int) -> FlatParameters:
    """θ, (P,)."""
    return FlatParameters.reached_by([log_probabilities(policy, n_states)], policy)


def scores(policy: nn.Module, n_states: int) -> np.ndarray:
    """ψ(s, a) = ∇_θ log π_θ(a|s), (S, A, P) (survey, eq. 16 of Kakade's part)."""
    log_probs = log_probabilities(policy, n_states)
    jacobian = AutogradLinearization([log_probs.reshape(-1)], parameters_of(policy, n_states))
    rows = [jacobian.vjp((row,)) for row in th.eye(log_probs.numel(), dtype=th.float64, device=log_probs.device)]
    return th.stack(rows).reshape(*log_probs.shape, -1).double().cpu().numpy()


def policy_gradient(policy: nn.Module, values: PolicyValues) -> np.ndarray:
    """∇η = Σ_s ρ_π(s) Σ_a ∇π(a|s) Q_π(s, a), (P,), which is ∇L_π too (survey, eqs. 17, 24, 30; notes, eq. pi.6).

    :param values: of this policy, discounted or average, whose ρ is used as it is: unnormalised if discounted
    """
    weights = values.rho[:, None] * values.pi * values.A
    return np.einsum("sa,sap->p", weights, scores(policy, len(values.V)))


def fisher_matrix(policy: nn.Module, state_weights: np.ndarray) -> np.ndarray:
    """F = Σ_s w(s) Σ_a π(a|s) ∇log π ∇log πᵀ, (P, P) (notes, after eq. st.3; survey, eqs. 13 and 14; lecture, NPG).

    With w = ρ_π as the texts write it, unnormalised, F is 1/(1 − γ) times the average over visited states, which
    TRPO's δ bounds and :class:`TRPOExt` estimates: w = ``values.state_weights``. F⁺∇η is the same if both
    have the same ρ.
    """
    n = len(state_weights)
    psi = scores(policy, n)
    return np.einsum("sa,sap,saq->pq", state_weights[:, None] * probabilities(policy, n), psi, psi)


def natural_gradient(policy: nn.Module, values: PolicyValues) -> np.ndarray:
    """∇̃η = F⁺∇η, of minimum norm where F is singular, (P,) (survey, eq. 15; notes, eq. np.1; lecture, NPG).

    Tabular softmax's F is always singular, as a constant added to a state's logits changes nothing. Where π is so near
    to deterministic that F has underflowed it is zero.
    """
    F, gradient = fisher_matrix(policy, values.rho), policy_gradient(policy, values)
    size = np.abs(F).max()
    if size < np.finfo(F.dtype).tiny:
        return np.zeros_like(gradient)
    # of F / size, as 1 / F may overflow; eigenvalues below the threshold are rounding's
    return np.linalg.pinv(F / size, rcond=1e-13, hermitian=True) @ (gradient / size)


def compatible_weights(policy: nn.Module, values: PolicyValues) -> np.ndarray:
    """ŵ = argmin_w Σ_s ρ_π(s) Σ_a π(a|s) (wᵀψ(s, a) − A_π(s, a))², of minimum norm, (P,) (survey, eq. 17).

    Kakade's theorem 1: ŵ = ∇̃η. (With Q_π for A_π it is the same: wᵀψ has mean zero under π.)
    """
    weights = np.sqrt(values.rho[:, None] * values.pi)
    psi = (weights[..., None] * scores(policy, len(values.V))).reshape(values.Q.size, -1)
    # NumPy's own threshold is one rounding error, and what should be zero may be above it
    return np.linalg.lstsq(psi, (weights * values.A).reshape(-1), rcond=1e-13)[0]


def compatible_function(policy: nn.Module, weights: np.ndarray, n_states: int) -> np.ndarray:
    """f(s, a; w) = wᵀψ(s, a), (S, A) (survey, eq. 16 of Kakade's part)."""
    return scores(policy, n_states) @ weights


def infinite_step_policy(pi: np.ndarray, f: np.ndarray, tolerance: float = 1e-9) -> np.ndarray:
    """π_∞ = lim_{α→∞} π_{θ + α∇̃η} for π ∝ exp(θᵀφ): π kept on argmax_a f(s, a; ŵ) (survey, theorem 2, eq. 19).

    :param tolerance: values of f this near to the largest are ties
    """
    pi = as_distributions("pi", pi, np.shape(f))
    # no step brings back a probability that has underflowed
    best = pi * (f >= np.where(pi > 0.0, f, -np.inf).max(axis=1, keepdims=True) - tolerance)
    return best / best.sum(axis=1, keepdims=True)


def first_order_policy(pi: np.ndarray, f: np.ndarray, alpha: float) -> np.ndarray:
    """π(a|s)(1 + αf(s, a; ŵ)), which is π_{θ + α∇̃η} up to O(α²) (survey, theorem 3, eq. 20, where the α is lost)."""
    return pi * (1.0 + alpha * f)


class ExactProblem:
    """One TRPO update's problem with nothing sampled: a :class:`TrustRegionProblem` for :func:`trust_region_step`.

    L(θ) = E_{s∼ρ_π}[Σ_a π_θ(a|s) A_π(s, a)], its gradient, F, and the true KL, with ρ_π normalised: what
    :class:`PolicyProblem` estimates from a rollout (notes, eqs. ppo.1 and st.4; survey, eq. 45).

    :param policy: at θ_old
    :param constraint: ``"mean"`` of the KL over ρ_π, or its ``"max"`` over states (survey, eq. 43)
    :raises ValueError: for another constraint
    """

    def __init__(self, mdp: FiniteMDP, policy: nn.Module, constraint: Constraint = "mean") -> None:
        require_choice("constraint", constraint, ("mean", "max"))
        self.policy, self.constraint = policy, constraint
        self.parameters = parameters_of(policy, mdp.shape[0])
        self.old = evaluate(mdp, probabilities(policy, mdp.shape[0]))

    def gradient(self) -> tuple[float, th.Tensor]:
        """L(θ_old) = 0 and ∇L(θ_old)."""
        return 0.0, th.as_tensor(policy_gradient(self.policy, self.old) / self.old.rho.sum())

    def fisher_product(self) -> Callable[[th.Tensor], th.Tensor]:
        """v ↦ Fv at θ_old."""
        F = th.as_tensor(fisher_matrix(self.policy, self.old.state_weights))
        return lambda v: F @ v

    def evaluate(self) -> Evaluation:
        """L and KL(π_old ‖ π_θ) at the parameters' present values, NaN where these are no policy."""
        pi = probabilities(self.policy, len(self.old.V))
        if not np.isfinite(pi).all():
            return Evaluation(np.nan, np.nan)
        apart = divergence(self.old, pi)
        gain = (surrogate(self.old, pi) - self.old.eta) / self.old.rho.sum()
        return Evaluation(gain, apart.max_kl if self.constraint == "max" else apart.mean_kl)
