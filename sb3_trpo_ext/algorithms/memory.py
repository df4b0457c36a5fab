"""What the shell keeps for a policy with memory, and the names of sb3_contrib's recurrent policies."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from sb3_trpo_ext.checks import require
from sb3_trpo_ext.recurrence import Memory, Recurrence
from sb3_trpo_ext.sampling.sequences import samples_in_sequences
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer

_MODULE = "sb3_contrib.common.recurrent.policies"
RECURRENT_POLICIES = {
    "MlpLstmPolicy": "RecurrentActorCriticPolicy",
    "CnnLstmPolicy": "RecurrentActorCriticCnnPolicy",
    "MultiInputLstmPolicy": "RecurrentMultiInputActorCriticPolicy",
}
"""sb3_contrib's classes by the names that its RecurrentPPO takes."""


class Remembered(NamedTuple):
    """What an actor is made with, outside a rollout."""

    memory: Any
    episode_starts: np.ndarray


class WithMemory(OnPolicyAlgorithm):
    """An SB3 algorithm whose policy may remember."""

    _last_lstm_states: Memory | None = None
    """What the policy remembers of each environment; by the name that RecurrentPPO has for it."""
    _memory_at_start: Memory | None = None
    """The same, before the first step of the rollout in the buffer."""

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in RECURRENT_POLICIES:
            return super()._get_policy_from_name(policy_name)
        try:
            policies = import_module(_MODULE)
        except ImportError as error:
            raise ImportError(f"{policy_name} is a policy of sb3_contrib: pip install sb3-contrib") from error
        return getattr(policies, RECURRENT_POLICIES[policy_name])

    @property
    def _recurrence(self) -> Recurrence | None:
        return Recurrence.of(self.policy)

    @property
    def _remembered(self) -> Remembered:
        # a checkpoint gives it back as a plain tuple
        memory = None if self._last_lstm_states is None else Memory(*self._last_lstm_states)
        return Remembered(memory, np.ones(self.n_envs, dtype=bool))

    def _begin_without_memory(self) -> None:
        recurrence = self._recurrence
        self._check_memory_of_branches()
        self._last_lstm_states = self._memory_at_start = None if recurrence is None else recurrence.none(self.n_envs)

    def _check_memory_of_branches(self) -> None:
        """:raises ValueError: for branches of a recurrent policy that is not as sb3_contrib wrote it"""
        recurrence = self._recurrence
        if recurrence is not None and not recurrence.is_standard:
            expected = (
                "another buffer than VineRolloutBuffer: branches need a recurrent policy that computes what sb3_contrib's "
                f"does, and {type(self.policy).__name__} overrides some of that"
            )
            is_vine = isinstance(self.rollout_buffer, VineRolloutBuffer)
            require("rollout_buffer_class", type(self.rollout_buffer), not is_vine, expected)

    def _samples(self) -> RolloutBufferSamples:
        """The whole rollout: transitions in any order, or sequences of them where the policy has memory."""
        if self._memory_at_start is None:
            return next(iter(self.rollout_buffer.get(batch_size=None)))
        return samples_in_sequences(self.rollout_buffer, self._memory_at_start)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_lstm_states", "_memory_at_start"]
