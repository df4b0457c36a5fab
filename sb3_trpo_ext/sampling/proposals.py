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

from sb3_trpo_ext.masks import choices_of
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


def all_actions(space: spaces.Space, n_states: int, masks: np.ndarray | None = None) -> FirstActions:
    """Every action of a finite space, in each of N states; q is 1 for all.

    :param masks: (N, Σ choices); an action that is not allowed has no multiplicity
    """
    sizes = choices_of(space)
    actions = np.array(list(itertools.product(*map(range, sizes))), dtype=np.float32)
    shape = (n_states, len(actions))
    possible = np.ones(shape)
    if masks is not None:
        columns = actions.astype(np.int64) + (np.cumsum(sizes) - sizes)
        possible[~masks[:, columns].all(axis=2)] = 0.0
    return FirstActions(np.broadcast_to(actions, (n_states, *actions.shape)), np.zeros(shape), possible)


def uniform_actions(
    space: spaces.Space, n_states: int, n_actions: int, rng: np.random.Generator, masks: np.ndarray | None = None
) -> FirstActions:
    """K independent draws in each of N states, uniform in each dimension of a finite space.

    :param masks: (N, Σ choices), to draw among the choices that are allowed
    """
    choices = choices_of(space)
    shape = (n_states, n_actions, len(choices))
    if masks is None:
        actions = rng.integers(0, choices, size=shape).astype(np.float32)
        return _listed_once(actions, np.full(shape[:2], -math.fsum(map(math.log, choices))))
    blocks = np.split(masks, np.cumsum(choices)[:-1], axis=1)
    counts = np.stack([block.sum(axis=1) for block in blocks], axis=1)
    drawn = rng.integers(0, counts[:, None], size=shape)
    # those allowed come first, in their order
    ordered = [np.argsort(~block, axis=1, kind="stable") for block in blocks]
    actions = np.stack([np.take_along_axis(order, drawn[:, :, d], axis=1) for d, order in enumerate(ordered)], axis=2)
    log_proposal = np.broadcast_to(-np.log(counts).sum(axis=1)[:, None], shape[:2])
    return _listed_once(actions.astype(np.float32), log_proposal)


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
