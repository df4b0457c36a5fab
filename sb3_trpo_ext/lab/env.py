"""A finite MDP to act in, and transitions sampled from it, so that estimates stand beside their exact values."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from torch import nn

from sb3_trpo_ext.checks import require, require_count
from sb3_trpo_ext.lab.mdp import FiniteMDP, as_distributions
from sb3_trpo_ext.objectives import SinglePathSurrogate
from sb3_trpo_ext.policy_problem import FisherChoice, PolicyProblem


class FiniteMDPEnv(gym.Env[int, int]):
    """A finite MDP as an environment whose state is two plain attributes, ``state`` and ``np_random``.

    Each step is truncated with probability 1 − γ. So the states of long rollouts are drawn from ρ_π, and the
    expected undiscounted return of an episode is η(π): what SB3 logs as ``ep_rew_mean`` estimates it. Learners
    keep γ as their ``gamma``.

    :param mdp: the MDP
    :param geometric_episodes: False for one endless episode, to be cut by a ``TimeLimit``
    """

    def __init__(self, mdp: FiniteMDP, geometric_episodes: bool = True) -> None:
        self.mdp = mdp
        self.geometric_episodes = geometric_episodes
        self.observation_space = spaces.Discrete(mdp.shape[0])  # type: ignore[assignment]
        self.action_space = spaces.Discrete(mdp.shape[1])  # type: ignore[assignment]
        self.state = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """s₀ ∼ ρ₀, or ``options={"state": s}``.

        :raises ValueError: for a state (in :meth:`step`, an action) that the MDP does not have
        """
        options = options or {}
        if "state" in options:
            state = options["state"]
            require("state", state, self.observation_space.contains(state), f"in {self.observation_space}")
        super().reset(seed=seed)
        start = int(self.np_random.choice(len(self.mdp.rho0), p=self.mdp.rho0))
        self.state = options.get("state", start)
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        require("action", action, self.action_space.contains(action), f"in {self.action_space}")
        reward = float(self.mdp.R[self.state, action])
        self.state = int(self.np_random.choice(len(self.mdp.rho0), p=self.mdp.P[self.state, action]))
        truncated = self.geometric_episodes and bool(self.np_random.random() >= self.mdp.gamma)
        return self.state, reward, False, truncated, {}


class Transitions(NamedTuple):
    """T steps of E walkers; all (T, E) but the last."""

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    episode_starts: np.ndarray
    last_states: np.ndarray  # (E,)


def sample_transitions(
    mdp: FiniteMDP,
    pi: np.ndarray,
    n_steps: int,
    n_walkers: int,
    rng: np.random.Generator,
    *,
    start: np.ndarray | None = None,
    geometric_episodes: bool = True,
) -> Transitions:
    """What E independent copies of :class:`FiniteMDPEnv` would see under π, all at once.

    :param start: s₀ of each walker, (E,); from ρ₀ if None
    :raises ValueError: for no steps or walkers, or naming the first start that the MDP does not have
    """
    require_count("n_steps", n_steps)
    require_count("n_walkers", n_walkers)
    pi = as_distributions("pi", pi, mdp.shape)
    restart = np.ones(n_walkers, dtype=bool)
    states = _draw(np.tile(mdp.rho0, (n_walkers, 1)), rng) if start is None else np.asarray(start)
    require("start's shape", states.shape, states.shape == (n_walkers,), f"({n_walkers},)")
    for e in np.flatnonzero(~np.isin(states, np.arange(len(mdp.rho0)))):
        require(f"start[{e}]", states[e].item(), False, f"a state from 0 to {len(mdp.rho0) - 1}")
    states = states.astype(int)
    steps = []
    for _ in range(n_steps):
        actions = _draw(pi[states], rng)
        steps.append((states, actions, mdp.R[states, actions], restart))
        states = _draw(mdp.P[states, actions], rng)
        restart = (rng.random(n_walkers) >= mdp.gamma) & geometric_episodes
        states = np.where(restart, _draw(np.tile(mdp.rho0, (n_walkers, 1)), rng), states)
    columns = [np.stack(column) for column in zip(*steps, strict=True)]
    return Transitions(columns[0], columns[1], columns[2], columns[3], states)


def _draw(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One outcome from each row of (E, n)."""
    cumulative = probabilities.cumsum(axis=1)
    return (rng.random((len(cumulative), 1)) * cumulative[:, -1:] >= cumulative).sum(axis=1)


def sampled_problem(
    policy: nn.Module, states: np.ndarray, actions: np.ndarray, advantages: np.ndarray, fisher: FisherChoice = "gauss_newton"
) -> PolicyProblem:
    """What :class:`TRPOExt` would make of a batch (B,), in place of an :class:`ExactProblem`.

    :param policy: maps state indices to logits
    """
    all_states, chosen = th.as_tensor(states), th.as_tensor(actions)

    def distribution_of(rows: slice | th.Tensor) -> Distribution:
        logits = policy(all_states[rows])
        return CategoricalDistribution(logits.shape[1]).proba_distribution(logits)

    surrogate = SinglePathSurrogate(chosen, th.as_tensor(advantages))
    return PolicyProblem(distribution_of, len(states), [surrogate], chosen, policy, fisher=fisher)
