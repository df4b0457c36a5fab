"""How many states go through a policy's networks at once, so that memory stays within bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_trpo_ext.numerics.differentiation import numbers_saved
from sb3_trpo_ext.observations import choices, entries_per_state, length, numbers_seen, tree_map
from sb3_trpo_ext.standard_policies import is_dense, units

_FEWEST_STATES = 256
_COPIES_OF_PARAMETERS = 10

Question = Callable[[Any], Any]


def states_per_pass(
    policy: ActorCriticPolicy,
    questions: Sequence[Question],
    observations: Any,
    measured: dict[str, int],
    *,
    by_hand: bool = False,
) -> int:
    """As many states as fit into about 64 MB of observations as the networks see them, as much of the distributions'
    parameters with what a KL makes of them, and 256 MB of what a linearisation keeps of the layers.

    :param questions: what a batch of observations is put to: distribution and values
    :param measured: where what had to be measured is kept
    :param by_hand: whether Jacobian products of all that is learned are written out, which keep no graph of a graph
    """
    seen = max(entries_per_state(observations), numbers_seen(policy.observation_space))
    # three numbers a unit, of either the actor or the critic
    kept = 3 * units(policy) // 2
    if not (by_hand or is_dense(policy)):
        if "kept" not in measured:
            measured["kept"] = _kept_of_layers(policy, questions, observations)
        kept = max(kept, 3 * max(measured["kept"] - seen, 0) + seen)
    at_once = 2**24 // max(seen, _COPIES_OF_PARAMETERS * _parameters_of_distribution(policy.action_space))
    return max(_FEWEST_STATES, min(at_once, 2**26 // max(kept, 1)))


def _kept_of_layers(policy: ActorCriticPolicy, questions: Sequence[Question], observations: Any) -> int:
    """Numbers that autograd keeps for each state, of a policy of any kind: found by asking it about a state or two."""

    def first(n: int) -> Any:
        # copies, because what is kept of a view is counted as the whole
        return tree_map(lambda leaf: th.as_tensor(leaf[:n], device=policy.device).clone(), observations)

    def kept_by(ask: Question, n: int) -> int:
        return numbers_saved(lambda: ask(first(n)), policy)

    has_two = length(observations) > 1
    with unnoticed(policy):
        # what does not grow with the states is no matter
        return max(kept_by(ask, 2) - kept_by(ask, 1) if has_two else kept_by(ask, 1) for ask in questions)


@contextmanager
def unnoticed(policy: ActorCriticPolicy) -> Iterator[None]:
    """Context in which a policy can be asked, in evaluation mode, without a trace in global random numbers."""
    was_training = policy.training
    policy.set_training_mode(False)
    try:
        with th.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
            yield
    finally:
        if was_training:
            policy.set_training_mode(True)


def _parameters_of_distribution(space: spaces.Space) -> int:
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return choices(space)
    return max(1, int(np.prod(space.shape or ())))
