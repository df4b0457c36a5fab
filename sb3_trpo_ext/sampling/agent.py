"""The policy as sampling and learning see it: functions of observations, and the actor that suits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_trpo_ext.masks import choices_of
from sb3_trpo_ext.observations import length
from sb3_trpo_ext.originals import differs_from_sb3
from sb3_trpo_ext.recurrence import Recurrence
from sb3_trpo_ext.sampling.actor import Actor, BranchActor, SB3Actor, TorchActor, numpy_actor
from sb3_trpo_ext.sampling.budget import states_per_pass
from sb3_trpo_ext.sampling.buffers import adds_like_sb3
from sb3_trpo_ext.sampling.context import Context
from sb3_trpo_ext.sampling.recurrent_actor import RecurrentBranchActor, Remembering, StepwiseActor, recurrent_numpy_actor
from sb3_trpo_ext.sampling.vine_buffer import VineRolloutBuffer
from sb3_trpo_ext.standard_policies import acts_by_get_distribution, acts_with_masks, calls_like_sb3, has_parameters


@dataclass(frozen=True)
class Agent:
    """All that rollouts and updates need to know of an algorithm.

    :param policy: for its networks, spaces and device
    :param distribution: observations (B, ·), and the samples that they belong to or the context if there are any ↦ π(·|s)
    :param values: observations (B, ·), and what a policy with memory needs besides them ↦ V(s), (B, 1)
    :param gamma: discount
    :param own_distribution: whether the policy alone does not say what ``distribution`` is
    :param own_values: whether the policy alone does not say what ``values`` is
    :param has_critic: whether V is learned; else it is 0
    :param values_at_each_step: whether values and log-probabilities are wanted at each step of a rollout
    :param chunk_size: states in one pass; None: what fits a budget
    :param masked: whether only some choices are allowed, as each context says
    :param recurrence: of a policy with memory
    :param measured: where what had to be measured is kept, for the next agent of the same policy
    :param sde_sample_freq: steps between two exploration matrices of gSDE, -1 for one a rollout; None without gSDE
    """

    policy: ActorCriticPolicy
    distribution: Callable[..., Distribution]
    values: Callable[..., th.Tensor]
    gamma: float
    own_distribution: bool = False
    own_values: bool = False
    has_critic: bool = True
    values_at_each_step: bool = False
    chunk_size: int | None = None
    masked: bool = False
    recurrence: Recurrence | None = None
    sde_sample_freq: int | None = None
    measured: dict[str, int] = field(default_factory=dict)

    @property
    def device(self) -> th.device:
        return self.policy.device

    @property
    def action_space(self) -> spaces.Space:
        return self.policy.action_space

    def as_taken(self, actions: th.Tensor) -> th.Tensor:
        """Actions of a rollout buffer, (B, ·), as the distribution's ``log_prob`` takes them."""
        return actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions

    def action_transform(self, n_envs: int) -> Callable[[np.ndarray], np.ndarray]:
        """Actions as the policy gave them, (E, ·) ↦ actions as the environments take them."""
        space = self.action_space
        if not isinstance(space, spaces.Box):
            return lambda actions: actions
        if self.policy.squash_output:
            return self.policy.unscale_action
        # np.clip without its overhead, and without that of broadcasting
        low, high = (np.repeat(bound[None], n_envs, axis=0) for bound in (space.low, space.high))
        return lambda actions: np.minimum(np.maximum(actions, low), high)

    def explore_anew(self, n_envs: int, step: int | None = None) -> None:
        """Draw gSDE's exploration matrices: at the start of a rollout, and before those steps that are due."""
        due = self.sde_sample_freq is not None and (
            step is None or (self.sde_sample_freq > 0 and step % self.sde_sample_freq == 0)
        )
        if due:
            self.policy.reset_noise(n_envs)

    def states_per_pass(self, observations: Any) -> int:
        """How many states go through the networks at once: ``chunk_size``, or what fits a budget."""
        if self.chunk_size is not None:
            return self.chunk_size
        questions: tuple[Callable[..., Any], ...] = self.distribution, self.values
        by_hand = False
        if self.recurrence is not None:
            n_choices = sum(choices_of(self.action_space)) if self.masked else None
            questions = tuple(_of_first_states(question, self.recurrence, n_choices) for question in questions)
            by_hand = self.recurrence.is_by_hand and not (self.own_distribution or self.own_values)
        return states_per_pass(self.policy, questions, observations, self.measured, by_hand=by_hand)

    def rollout_actor(self, buffer: RolloutBuffer, rollout: Remembering) -> Actor:
        """The leanest way of acting that fills this buffer with what SB3's own loop would.

        :param rollout: what it keeps for a policy with memory
        """
        policy, n_envs = self.policy, buffer.n_envs
        at_each_step = self.values_at_each_step or not adds_like_sb3(buffer)
        if self.recurrence is not None:
            at_each_step = at_each_step or isinstance(buffer, VineRolloutBuffer)  # branches go on from what is remembered
            lean = None if at_each_step or self.own_distribution else recurrent_numpy_actor(self.recurrence, rollout)
            return lean or self._stepwise_actor(self.recurrence, rollout)
        if self.own_distribution or acts_by_get_distribution(policy) or (self.masked and not acts_with_masks(policy)):
            return TorchActor(self.distribution, policy, n_envs, self.values if at_each_step else None)
        if at_each_step or calls_like_sb3(policy):
            return self._sb3_actor()
        fast = numpy_actor(policy, n_envs)
        if fast is not None:
            return fast
        if policy.share_features_extractor and has_parameters(policy.features_extractor):
            # learned features serve actor and critic: computing them once a step is cheapest
            return self._sb3_actor()
        return TorchActor(self.distribution, policy, n_envs)

    def _stepwise_actor(self, recurrence: Recurrence, rollout: Remembering) -> StepwiseActor:
        own_distribution = self.distribution if self.own_distribution or self.masked else None
        return StepwiseActor(recurrence, rollout, own_distribution, self.values if self.own_values else None)

    def _sb3_actor(self) -> SB3Actor:
        """With the V that the critic is fitted for, wherever it is another one than SB3's loop would take."""
        has_own = self.own_values or differs_from_sb3(self.policy, ("predict_values",))
        return SB3Actor(self.policy, self.values if has_own else None)

    def branch_actor(self, n_envs: int) -> BranchActor:
        """Acts as ``distribution`` says, whatever else the policy overrides."""
        if self.recurrence is not None:
            return RecurrentBranchActor(self.recurrence, self.distribution, n_envs)
        fast = None if self.own_distribution else numpy_actor(self.policy, n_envs)
        return fast or TorchActor(self.distribution, self.policy, n_envs)


def _of_first_states(question: Callable[..., Any], recurrence: Recurrence, n_choices: int | None) -> Callable[[Any], Any]:
    """A question to a policy with memory as one about states that begin episodes, and allow every choice.

    :param n_choices: in a mask, None without masks
    """
    device = recurrence.policy.device

    def ask(observations: Any) -> Any:
        n = length(observations)
        masks = None if n_choices is None else th.ones(n, n_choices, dtype=th.bool, device=device)
        return question(observations, Context(masks, th.ones(n, device=device), recurrence.none(n)))

    return ask
