"""First actions of the branches: all there are, or draws from a proposal q."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution

from sb3_trpo_ext.sampling.heads import head_of

Proposal = Literal["auto", "policy", "uniform"]

MOST_ENUMERATED = 1000
"""An action set beyond this is not a small one."""


@dataclass(frozen=True)
class FirstActions:
    """K first actions in each of N states.

    :param actions: (N, K, D)
    :param log_proposal: log q(a_k|s_n), (N, K)
    :param multiplicities: how often each was drawn, (N, K); an action drawn twice is listed once, and the places
        that this leaves at the end of a row have 0
    """

    actions: np.ndarray
    log_proposal: np.ndarray
    multiplicities: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence[FirstActions]) -> FirstActions:
        """Those of the states of all parts."""
        names = (field.name for field in fields(cls))
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def choices_of(space: spaces.Space) -> list[int]:
    """The number of choices in each dimension of a finite action space.

    :raises ValueError: for a continuous one
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.reshape(-1)]
    if isinstance(space, spaces.MultiBinary):
        return [2] * math.prod(space.shape)
    raise ValueError(f"expected a Discrete, MultiDiscrete or MultiBinary action space, got {space}")


def all_actions(space: spaces.Space, n_states: int) -> FirstActions:
    """Every action of a finite space, in each of N states; q is 1 for all."""
    actions = np.array(list(itertools.product(*map(range, choices_of(space)))), dtype=np.float32)
    shape = (n_states, len(actions))
    return FirstActions(np.broadcast_to(actions, (n_states, *actions.shape)), np.zeros(shape), np.ones(shape))


def uniform_actions(space: spaces.Space, n_states: int, n_actions: int, rng: np.random.Generator) -> FirstActions:
    """K independent draws in each of N states, uniform in each dimension of a finite space."""
    choices = choices_of(space)
    actions = rng.integers(0, choices, size=(n_states, n_actions, len(choices))).astype(np.float32)
    return _listed_once(actions, np.full(actions.shape[:2], -math.fsum(map(math.log, choices))))


@th.no_grad()
def policy_actions(
    distribution: Distribution,
    n_states: int,
    n_actions: int,
    generator: th.Generator,
    log_prob_of: Callable[[np.ndarray], th.Tensor],
    is_finite: bool,
) -> FirstActions:
    """K independent draws from π_old in each of N states.

    :param distribution: π_old(·|s_n), N states; one without a head draws from torch's global generator
    :param log_prob_of: actions (N, D) ↦ log π_old
    :param is_finite: whether an action can be drawn twice
    """
    head = head_of(distribution)
    if head is not None and not head.draws(distribution):
        head = None
    drawn = []
    for _ in range(n_actions):
        if head is None:
            actions = distribution.get_actions().cpu().numpy()
        else:
            actions = head.act_from(distribution, head.noise((n_states, head.width), generator))
        drawn.append(actions.reshape(n_states, -1).astype(np.float32))
    log_probs = np.stack([log_prob_of(actions).cpu().numpy() for actions in drawn], axis=1)
    actions = np.stack(drawn, axis=1)
    return _listed_once(actions, log_probs) if is_finite else FirstActions(actions, log_probs, np.ones(log_probs.shape))


def _listed_once(actions: np.ndarray, log_proposal: np.ndarray) -> FirstActions:
    """Draws with those of the same action in one state put together."""
    listed, log_listed = actions.copy(), log_proposal.copy()
    multiplicities = np.zeros(log_proposal.shape)
    for n, row in enumerate(actions.tolist()):
        for k, (action, count) in enumerate(Counter(map(tuple, row)).items()):
            listed[n, k] = action
            log_listed[n, k] = log_proposal[n, row.index(list(action))]
            multiplicities[n, k] = count
    return FirstActions(listed, log_listed, multiplicities)
