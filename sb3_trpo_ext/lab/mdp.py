"""Finite Markov decision processes and the exact values of policies, by linear algebra in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sb3_trpo_ext.checks import require, require_real

# rows that sum to one in single precision pass, and are then made exact
_ROUNDING = 1e-6


def as_distributions(name: str, array: object, shape: tuple[int, ...]) -> np.ndarray:
    """Probabilities along the last axis as float64, rescaled so that they sum to one exactly.

    :raises ValueError: for another shape, or naming the first entry that is no probability or the first
        row that does not sum to one
    """
    p = np.array(array, dtype=np.float64)
    require(f"{name}'s shape", p.shape, p.shape == shape, f"{shape}")
    for index in np.argwhere(~(np.isfinite(p) & (p >= 0.0))):
        require(_entry(name, index), p[tuple(index)].item(), False, "a probability")
    totals = p.sum(axis=-1)
    for index in np.argwhere(np.abs(totals - 1.0) > _ROUNDING):
        require(f"the sum of {_entry(name, index)}", totals[tuple(index)].item(), False, "1")
    return p / totals[..., None]


def _entry(name: str, index: np.ndarray) -> str:
    return f"{name}[{', '.join(map(str, index))}]" if len(index) else name


@dataclass(frozen=True)
class FiniteMDP:
    """(S, A, P, R, ρ₀, γ), the tuple that all four texts begin with; arrays become read-only float64.

    :param P: P(s'|s, a), shape (S, A, S)
    :param R: expected reward r(s, a), shape (S, A)
    :param rho0: distribution of s₀, shape (S,)
    :param gamma: γ, in [0, 1)
    :raises ValueError: naming the first entry that offends, or the shape that does not fit
    """

    P: np.ndarray
    R: np.ndarray
    rho0: np.ndarray
    gamma: float

    def __post_init__(self) -> None:
        shape = np.shape(self.P)
        fits = len(shape) == 3 and shape[0] == shape[2] and 0 not in shape
        require("P's shape", shape, fits, "(S, A, S)")
        S, A, _ = shape
        rewards = np.array(self.R, dtype=np.float64)
        require("R's shape", rewards.shape, rewards.shape == (S, A), f"{(S, A)}, as P says")
        for index in np.argwhere(~np.isfinite(rewards)):
            require(_entry("R", index), rewards[tuple(index)].item(), False, "finite")
        require_real("gamma", self.gamma, 0.0, 1.0, open_above=True)
        checked = {"P": as_distributions("P", self.P, shape), "R": rewards, "rho0": as_distributions("rho0", self.rho0, (S,))}
        for name, array in checked.items():
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def shape(self) -> tuple[int, int]:
        """(S, A), the shape of a policy."""
        return self.R.shape[0], self.R.shape[1]


def random_mdp(n_states: int, n_actions: int, *, gamma: float = 0.9, seed: int = 0, concentration: float = 1.0) -> FiniteMDP:
    """An MDP with Dirichlet(concentration) transitions and start, and standard normal rewards; P is positive."""
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(n_states, concentration), size=(n_states, n_actions)) + 1e-9
    rho0 = rng.dirichlet(np.full(n_states, concentration))
    return FiniteMDP(P / P.sum(axis=-1, keepdims=True), rng.normal(size=(n_states, n_actions)), rho0, gamma)


@dataclass(frozen=True)
class PolicyValues:
    """What is known of a policy π, discounted or (γ = 1) on average.

    :param pi: π(a|s), (S, A)
    :param eta: η(π)
    :param V: (S,)
    :param Q: (S, A)
    :param rho: ρ_π(s), (S,): unnormalised discounted visitation frequencies, which sum to 1/(1 − γ); or the
        stationary distribution
    :param gamma: γ
    """

    pi: np.ndarray
    eta: float
    V: np.ndarray
    Q: np.ndarray
    rho: np.ndarray
    gamma: float

    @property
    def A(self) -> np.ndarray:
        """A_π(s, a) = Q_π(s, a) − V_π(s), (S, A)."""
        return self.Q - self.V[:, None]

    @property
    def state_weights(self) -> np.ndarray:
        """ρ_π scaled to sum to one, (S,): what the states of a long rollout are drawn from."""
        return self.rho / self.rho.sum()


def evaluate(mdp: FiniteMDP, pi: np.ndarray) -> PolicyValues:
    """η, V, Q, A and ρ_π of a policy (notes, "Preliminaries" and "Policy improvement"; survey, eqs. 2-9).

    V = (I − γP_π)⁻¹ r_π, Q = R + γPV, ρ_π = (I − γP_πᵀ)⁻¹ ρ₀ = ρ₀ + γP(s₁ = ·) + γ²P(s₂ = ·) + …, η = ρ₀ᵀV.

    :param pi: π(a|s), (S, A)
    :raises ValueError: if π is no policy on this MDP
    """
    pi = as_distributions("pi", pi, mdp.shape)
    to_go = np.eye(len(pi)) - mdp.gamma * np.einsum("sa,sat->st", pi, mdp.P)
    V = np.linalg.solve(to_go, (pi * mdp.R).sum(axis=1))
    return PolicyValues(
        pi, float(mdp.rho0 @ V), V, mdp.R + mdp.gamma * mdp.P @ V, np.linalg.solve(to_go.T, mdp.rho0), mdp.gamma
    )


def evaluate_average(mdp: FiniteMDP, pi: np.ndarray) -> PolicyValues:
    """The same for the average reward (survey, eqs. 12 and 13; Kakade's setting): γ and ρ₀ play no part.

    η = Σ_s ρ(s) Σ_a π(a|s) R(s, a) with ρ stationary; Q(s, a) = Σ_t E[R_t − η | s, a] and V its mean over
    actions, the differential values, for which Σ_s ρ(s)V(s) = 0.

    :raises ValueError: if the chain under π has several recurrent classes, so that η depends on the start
    """
    pi = as_distributions("pi", pi, mdp.shape)
    chain, identity = np.einsum("sa,sat->st", pi, mdp.P), np.eye(len(pi))
    if np.linalg.matrix_rank(identity - chain) < len(pi) - 1:
        raise ValueError("the chain under pi must have one recurrent class, got several: the average depends on the start")
    balance = np.concatenate([identity - chain.T, np.ones((1, len(pi)))])
    rho = np.linalg.lstsq(balance, np.append(np.zeros(len(pi)), 1.0), rcond=None)[0]
    rewards = (pi * mdp.R).sum(axis=1)
    eta = float(rho @ rewards)
    V = np.linalg.solve(identity - chain + rho, rewards - eta)
    return PolicyValues(pi, eta, V, mdp.R - eta + mdp.P @ V, rho, 1.0)


def greedy(values: PolicyValues) -> np.ndarray:
    """π'(s) = argmax_a A_π(s, a) (notes, after Lemma 3; survey, eq. 25), as (S, A)."""
    return np.eye(values.Q.shape[1])[values.Q.argmax(axis=1)]


def optimal_values(mdp: FiniteMDP) -> PolicyValues:
    """The values of an optimal policy, by policy iteration: :func:`greedy` until no advantage is positive."""
    values = evaluate(mdp, np.full(mdp.shape, 1.0 / mdp.shape[1]))
    while True:
        better = evaluate(mdp, greedy(values))
        if (better.V - values.V).max() <= 1e-12 * (1.0 + np.abs(values.V).max()):
            return better
        values = better
