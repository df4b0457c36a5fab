"""What users may redefine of a policy, and what sampling and learning see of it."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.type_aliases import PyTorchObs, RolloutBufferSamples

from sb3_trpo_ext.algorithms.arguments import CriticChoice
from sb3_trpo_ext.algorithms.masking import WithMasks
from sb3_trpo_ext.algorithms.memory import WithMemory
from sb3_trpo_ext.observations import length
from sb3_trpo_ext.sampling.actor import Actor, BranchActor
from sb3_trpo_ext.sampling.agent import Agent
from sb3_trpo_ext.sampling.context import Context
from sb3_trpo_ext.sampling.recurrent_actor import Remembering
from sb3_trpo_ext.standard_policies import overrides


class WithAgent(WithMasks, WithMemory):
    """An SB3 algorithm that sees its policy through two methods, which subclasses may override."""

    critic: CriticChoice
    values_at_each_step: bool
    chunk_size: int | None
    _measured: dict[str, int] | None = None
    """Of the policy as it is in this iteration."""

    def action_distribution(
        self, observations: PyTorchObs, samples: RolloutBufferSamples | Context | None = None
    ) -> Distribution:
        """π_θ(·|s) on a batch of observations. Every distribution, acting included, is made here.

        :param observations: (B, ·); sequence after sequence for a policy with memory
        :param samples: the transitions that the observations belong to, with whatever further fields the rollout
            buffer has; when acting a :class:`~sb3_trpo_ext.sampling.context.Context`, None where it would be empty
        """
        recurrence = self._recurrence
        if recurrence is not None:
            return self._allowed_part(recurrence.distribution(observations, samples), observations, samples)
        return self._allowed_part(self.policy.get_distribution(observations), observations, samples)

    def predict_values(self, observations: PyTorchObs, samples: RolloutBufferSamples | Context | None = None) -> th.Tensor:
        """V(s) on a batch of observations, (B, 1); zero without a critic.

        :param samples: as for :meth:`action_distribution`, if the policy has memory
        """
        if self.critic == "none":
            return th.zeros(length(observations), 1, device=self.device)
        recurrence = self._recurrence
        if recurrence is not None:
            return recurrence.values(observations, samples)
        return self.policy.predict_values(observations)

    @property
    def agent(self) -> Agent:
        """The policy as sampling and learning see it."""
        own_distribution = overrides(self, WithAgent, ("action_distribution",))
        self._measured = {} if self._measured is None else self._measured
        return Agent(
            self.policy,
            self._own_distribution_masked if own_distribution else self.action_distribution,
            self.predict_values,
            self.gamma,
            own_distribution=own_distribution,
            own_values=overrides(self, WithAgent, ("predict_values",)),
            has_critic=self.critic != "none",
            values_at_each_step=self.values_at_each_step,
            chunk_size=self.chunk_size,
            masked=self._is_masked,
            recurrence=self._recurrence,
            sde_sample_freq=self.sde_sample_freq if self.use_sde else None,
            measured=self._measured,
        )

    def as_taken(self, actions: th.Tensor) -> th.Tensor:
        """Actions of a rollout buffer, (B, ·), as the distribution's ``log_prob`` takes them."""
        return self.agent.as_taken(actions)

    def states_per_pass(self, observations: Any) -> int:
        """How many states go through the networks at once."""
        return self.agent.states_per_pass(observations)

    @property
    def actor_path(self) -> str:
        """How rollouts ask the policy for actions: ``"numpy"``, ``"torch"`` or ``"sb3"``.

        See :mod:`sb3_trpo_ext.sampling.actor`.
        """
        return self._make_actor(self.rollout_buffer).path

    def _make_actor(self, rollout_buffer: RolloutBuffer, rollout: Remembering | None = None) -> Actor:
        return self.agent.rollout_actor(rollout_buffer, rollout or self._remembered)

    def _make_branch_actor(self) -> BranchActor:
        return self.agent.branch_actor(self.n_envs)
