"""A rollout buffer whose surrogate comes from branches of the simulator (TRPO paper, section 5.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext.checks import require, require_choice, require_count
from sb3_trpo_ext.masks import choices_of
from sb3_trpo_ext.numerics.averages import ALONE, Group
from sb3_trpo_ext.objectives import AllActionsSurrogate, Objective, SelfNormalizedSurrogate, center_q_values
from sb3_trpo_ext.sampling.buffers import with_fields
from sb3_trpo_ext.sampling.proposals import MOST_ENUMERATED, FirstActions, Proposal

_WITH_VALUES, _WITHOUT_VALUES = 10, 100
"""Steps of a branch unless given: with V for what comes after them, and without."""


class VineSamples(Protocol):
    """SB3's samples, and which transitions of the buffer they are."""

    @property
    def observations(self) -> Any: ...

    @property
    def actions(self) -> th.Tensor: ...

    @property
    def transitions(self) -> th.Tensor:
        """Numbers of transitions, environment by environment: e T + t, (B,)."""
        ...


@dataclass(frozen=True)
class Branches:
    """What the branches from N states of the trunk said.

    :param states: numbers of the transitions that began in these states, e T + t, (N,)
    :param first: their first actions
    :param q_values: Q̂, discounted returns of the branches, (N, K); 0 where none was needed
    :param log_probs: log π_old of the first actions, (N, K)
    """

    states: np.ndarray
    first: FirstActions
    q_values: np.ndarray
    log_probs: np.ndarray

    def weights(self, is_enumerated: bool) -> np.ndarray:
        """Weights of the actions at π_old, (N, K), summing to 1 over K: probabilities, or self-normalised."""
        with np.errstate(divide="ignore"):
            log_weights = self.log_probs if is_enumerated else self._log_ratios()
        weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def effective_sample_size(self, log_probs: np.ndarray | None = None) -> float:
        """(Σ w)² / Σ w² over the draws of a state, w = π / q; the mean over states, at most K.

        :param log_probs: log π of the first actions, (N, K); None: π_old
        """
        draws = self.first.multiplicities
        w = np.exp((self.log_probs if log_probs is None else log_probs) - self.first.log_proposal)
        return float(np.mean((draws * w).sum(axis=1) ** 2 / (draws * w**2).sum(axis=1)))

    def rows_in(self, samples: VineSamples) -> th.Tensor:
        """Where the states of the rollout set are among samples of the whole trunk, (N,)."""
        row_of = th.empty_like(samples.transitions)
        row_of[samples.transitions] = th.arange(len(row_of), device=row_of.device)
        return row_of[th.as_tensor(self.states, device=row_of.device)]

    def _log_ratios(self) -> np.ndarray:
        return self.log_probs - self.first.log_proposal + np.log(self.first.multiplicities)


class VineRolloutBuffer(RolloutBuffer):
    """The trunk as any rollout buffer holds it, and branches from a rollout set of its states.

    From each of N trunk states, drawn uniformly, K branches take one first action each and then follow π_old; their
    returns Q̂(s_n, a_k) make the surrogate (TRPO paper, section 5.2), in place of the advantages of the trunk. Dict
    observations are held too: making one for a Dict space gives the class that does.

    :param n_rollout_states: N, at most ``buffer_size * n_envs``; None: a quarter of these states
    :param n_branch_actions: K; ``"all"`` takes every action of a small, finite space
    :param branch_length: the most steps of a branch; None: 10, or 100 where nothing goes on with V after them
    :param proposal: q, from which K first actions are drawn: ``"policy"`` is π_old, ``"uniform"`` is uniform in each
        dimension of a finite space; ``"auto"`` is π_old for Box and uniform otherwise, as in the paper. Nothing is drawn,
        and nothing else taken, with ``n_branch_actions="all"``
    :param common_random_numbers: whether the branches of a state share the policy's noise from their second step
        on, and the environment's seed
    :param branch_bootstrap: whether a branch that ``branch_length`` cuts goes on with V
    :raises ValueError: for a value that cannot work, by name
    """

    # without arguments from copy and pickle, which have the class already
    def __new__(
        cls, buffer_size: int | None = None, observation_space: spaces.Space | None = None, *args: Any, **kwargs: Any
    ) -> VineRolloutBuffer:
        if isinstance(observation_space, spaces.Dict) and not issubclass(cls, DictRolloutBuffer):
            # the class of a model's buffer is one argument, whatever the observations are
            cls = _dict_twin(cls)
        return super().__new__(cls)

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
        *,
        n_rollout_states: int | None = None,
        n_branch_actions: int | Literal["all"] = 4,
        branch_length: int | None = None,
        proposal: Proposal = "auto",
        common_random_numbers: bool = True,
        branch_bootstrap: bool = True,
    ) -> None:
        self.branches: Branches | None = None
        self.n_rollout_states = max(1, buffer_size * n_envs // 4) if n_rollout_states is None else n_rollout_states
        self.n_branch_actions = n_branch_actions
        self._length_is_given = branch_length is not None
        if branch_length is None:
            branch_length = _WITH_VALUES if branch_bootstrap else _WITHOUT_VALUES
        self.branch_length = branch_length
        self.proposal = proposal
        self.common_random_numbers = common_random_numbers
        self.branch_bootstrap = branch_bootstrap
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device=device,
            gae_lambda=gae_lambda,
            gamma=gamma,
            n_envs=n_envs,
        )
        self._check_arguments()
        if proposal == "auto":
            self.proposal = "policy" if isinstance(action_space, spaces.Box) else "uniform"

    def _check_arguments(self) -> None:
        space, size = self.action_space, self.buffer_size * self.n_envs
        require_count("n_rollout_states", self.n_rollout_states)
        expected = f"at most n_steps * n_envs = {size}, as the rollout set is drawn from these states"
        require("n_rollout_states", self.n_rollout_states, self.n_rollout_states <= size, expected)
        require_count("branch_length", self.branch_length)
        require_choice("proposal", self.proposal, ("auto", "policy", "uniform"))
        for name in ("common_random_numbers", "branch_bootstrap"):
            require_choice(name, getattr(self, name), (True, False))
        is_finite = not isinstance(space, spaces.Box)
        if self.is_enumerated:
            few = is_finite and math.prod(choices_of(space)) <= MOST_ENUMERATED
            expected = f"an integer for {space}: 'all' needs a finite action space of at most {MOST_ENUMERATED} actions"
            require("n_branch_actions", self.n_branch_actions, few, expected)
            expected = "'auto' with n_branch_actions='all', where no action is drawn"
            require("proposal", self.proposal, self.proposal == "auto", expected)
            return
        require_count("n_branch_actions", self.n_branch_actions)
        expected = "'all' or at least 2: one action's self-normalised weight is always 1"
        require("n_branch_actions", self.n_branch_actions, self.n_branch_actions >= 2, expected)  # type: ignore[operator]
        expected = f"'auto' or 'policy' for {space}, where a uniform density would leave out actions that the policy takes"
        require("proposal", self.proposal, is_finite or self.proposal != "uniform", expected)

    def without_values(self) -> None:
        """Let branches be as if they did not go on with V, which is 0."""
        if not self._length_is_given:
            self.branch_length = _WITHOUT_VALUES

    @property
    def is_enumerated(self) -> bool:
        """Whether every action is taken in each state of the rollout set."""
        return self.n_branch_actions == "all"

    def reset(self) -> None:
        super().reset()
        self.branches = None

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> Any:
        samples = super()._get_samples(batch_inds, env)
        return with_fields(samples, transitions=th.as_tensor(batch_inds, device=self.device))


class VineDictRolloutBuffer(VineRolloutBuffer, DictRolloutBuffer):
    """The same for Dict observations."""


@cache
def _dict_twin(cls: type[VineRolloutBuffer]) -> type[VineRolloutBuffer]:
    """The class that does for Dict observations what ``cls`` does; pickled as the twin of ``cls``, having no name."""
    if cls is VineRolloutBuffer:
        return VineDictRolloutBuffer
    reduce = {"__reduce__": lambda buffer: (_empty_twin, (cls,), buffer.__dict__)}
    return type(cls.__name__, (cls, DictRolloutBuffer), reduce)


def _empty_twin(cls: type[VineRolloutBuffer]) -> VineRolloutBuffer:
    twin = _dict_twin(cls)
    return twin.__new__(twin)


def taken_in_branches(actions: th.Tensor, as_taken: Callable[[th.Tensor], th.Tensor]) -> th.Tensor:
    """First actions (N, K, D) as the distribution's ``log_prob`` takes them, (N, K) or (N, K, D)."""
    return th.stack([as_taken(actions[:, k]) for k in range(actions.shape[1])], dim=1)


def vine_surrogate(
    buffer: VineRolloutBuffer,
    samples: RolloutBufferSamples,
    as_taken: Callable[[th.Tensor], th.Tensor],
    normalize: bool,
    group: Group = ALONE,
) -> Objective | None:
    """The surrogate of the branches, or None where the buffer has none.

    :param samples: the whole trunk, in any order
    :param as_taken: actions (N, D) as the distribution's ``log_prob`` takes them
    :param normalize: divide Q̂ by its standard deviation: see :func:`~sb3_trpo_ext.objectives.center_q_values`
    :param group: who else has branches
    """
    branches = buffer.branches
    if branches is None:
        return None
    states, first = branches.rows_in(cast(VineSamples, samples)), branches.first
    scaled = center_q_values(branches.q_values, branches.weights(buffer.is_enumerated), normalize, group)
    actions, q_values, log_proposal, multiplicities = (
        th.as_tensor(np.ascontiguousarray(array), dtype=th.float32, device=buffer.device)
        for array in (first.actions, scaled, first.log_proposal, first.multiplicities)
    )
    taken = taken_in_branches(actions, as_taken)
    if buffer.is_enumerated:
        return AllActionsSurrogate(states, taken, q_values)
    return SelfNormalizedSurrogate(states, taken, q_values, log_proposal, multiplicities)
