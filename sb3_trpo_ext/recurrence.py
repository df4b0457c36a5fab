"""Policies with memory: sb3_contrib's recurrent policies as functions of whole sequences.

A policy counts as one if it is of sb3_contrib's class, which is not imported for that. Where the policy is exactly
what sb3_contrib wrote, its parts are called here, on all pieces of all sequences at once; else the policy itself is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from torch import nn

from sb3_trpo_ext.numerics.curvature import Linearization
from sb3_trpo_ext.numerics.dense import DenseNetwork, has_hooks
from sb3_trpo_ext.numerics.lstm import (
    RecurrentLinearization,
    Segments,
    State,
    differentiable_twice,
    is_plain_lstm,
    run_lstm,
    run_to_ends,
)
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.originals import differs_from_contrib, differs_from_sb3
from sb3_trpo_ext.standard_policies import MlpActor, extracts_like_sb3, has_parameters, with_outputs_of

_MODULE = "sb3_contrib.common.recurrent.policies"

_CALLED = (
    "forward",
    "get_distribution",
    "predict_values",
    "evaluate_actions",
    "extract_features",
    "_process_sequence",
    "_get_action_dist_from_latent",
    "obs_to_tensor",
)


class Memory(NamedTuple):
    """Recurrent states of actor and critic for n sequences: tensors (n, layers, H)."""

    pi: State
    vf: State

    def map(self, function: Callable[[th.Tensor], th.Tensor]) -> Memory:
        return Memory(*((function(part[0]), function(part[1])) for part in self))

    def with_row(self, row: int, other: Memory) -> Memory:
        """The same with what another one says of its only sequence."""

        def put(part: th.Tensor, new: th.Tensor) -> th.Tensor:
            return th.cat([part[:row], new, part[row + 1 :]])

        return Memory(*((put(own[0], new[0]), put(own[1], new[1])) for own, new in zip(self, other, strict=True)))

    @classmethod
    def concatenate(cls, memories: Sequence[Memory]) -> Memory:
        """That of the sequences of all."""
        return cls(*((th.cat([m[i][0] for m in memories]), th.cat([m[i][1] for m in memories])) for i in range(2)))


def has_memory(policy: Any) -> bool:
    """Whether a policy, or a class of policies, is one of sb3_contrib's recurrent ones."""
    module = sys.modules.get(_MODULE)
    cls = policy if isinstance(policy, type) else type(policy)
    return module is not None and issubclass(cls, module.RecurrentActorCriticPolicy)


def _as_contrib(state: State) -> State:
    """(n, layers, H) ↔ (layers, n, H)."""
    return state[0].transpose(0, 1).contiguous(), state[1].transpose(0, 1).contiguous()


def _is_standard(policy: Any) -> bool:
    mlp, lstms = policy.mlp_extractor, [lstm for lstm in (policy.lstm_actor, policy.lstm_critic) if lstm is not None]
    extractors = policy.pi_features_extractor, policy.vf_features_extractor
    return (
        not differs_from_contrib(policy, _CALLED)
        and extracts_like_sb3(policy)
        and type(mlp) is MlpExtractor
        and not differs_from_sb3(mlp, ("forward", "forward_actor", "forward_critic"))
        and all(is_plain_lstm(lstm) for lstm in lstms)
        and not any(has_hooks(module) for module in (policy, mlp, *extractors, *lstms))
    )


@dataclass(frozen=True)
class Recurrence:
    """A recurrent policy on sequences: states as rows, sequence after sequence.

    The number of sequences is that of the memory.
    """

    policy: Any
    is_standard: bool = False
    """Whether the policy is put together as sb3_contrib wrote it, of LSTMs as torch has them."""

    @classmethod
    def of(cls, policy: Any) -> Recurrence | None:
        """The recurrence of a policy, or None if it has no memory."""
        return cls(policy, _is_standard(policy)) if has_memory(policy) else None

    def none(self, n: int) -> Memory:
        """The memory of n sequences that begin."""
        layers, _, width = self.policy.lstm_hidden_state_shape
        weight = next(self.policy.lstm_actor.parameters())
        zeros = weight.new_zeros(n, layers, width, requires_grad=False)
        return Memory((zeros, zeros), (zeros, zeros))

    def step(self, observations: Any, starts: th.Tensor, memory: Memory) -> tuple[th.Tensor, th.Tensor, th.Tensor, Memory]:
        """One state of each sequence, as sb3_contrib's loop has it: actions, values, log-probabilities, memory after it."""
        states = Memory(*map(_as_contrib, memory))
        actions, values, log_probs, after = self.policy(observations, states, starts.float())
        return actions, values, log_probs, Memory(*map(_as_contrib, after))

    def distribution(self, observations: Any, context: Any) -> Distribution:
        """π(·|s) of all states.

        :param context: has ``episode_starts`` of the states and the ``memory`` of the sequences before them; and, if only
            some of the states are asked about, which of a standard policy's: ``picked``
        """
        policy, starts, memory = self.policy, context.episode_starts, context.memory
        if not self.is_standard:
            with differentiable_twice():
                return policy.get_distribution(observations, _as_contrib(memory.pi), starts.float())[0]
        latent = self._run(policy.lstm_actor, self._features(observations, policy.pi_features_extractor), starts, memory.pi)
        if getattr(context, "picked", None) is not None:
            latent = latent[context.picked]
        return policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent))

    def values(self, observations: Any, context: Any) -> th.Tensor:
        """V(s) of all states, (B, 1)."""
        policy, starts, memory = self.policy, context.episode_starts, context.memory
        if not self.is_standard:
            with differentiable_twice():
                return policy.predict_values(observations, _as_contrib(memory.vf), starts.float())
        latent = self._before_critic(observations, context)
        if policy.critic is not None:
            latent = policy.critic(latent)
        return policy.value_net(policy.mlp_extractor.forward_critic(latent))

    def _features(self, observations: Any, extractor: BaseFeaturesExtractor) -> th.Tensor:
        return BasePolicy.extract_features(self.policy, observations, extractor)

    def _run(self, lstm: nn.LSTM, features: th.Tensor, starts: th.Tensor, state: State) -> th.Tensor:
        return run_lstm(lstm, features, Segments.of(starts, len(state[0])), state)

    def _before_critic(self, observations: Any, context: Any) -> th.Tensor:
        """What the critic's dense layers see, (B, ·)."""
        policy, starts, memory = self.policy, context.episode_starts, context.memory
        features = self._features(observations, policy.vf_features_extractor)
        if policy.lstm_critic is not None:
            return self._run(policy.lstm_critic, features, starts, memory.vf)
        if policy.shared_lstm:
            return self._run(policy.lstm_actor, features, starts, memory.vf).detach()
        return features

    @th.no_grad()
    def after(self, observations: Any, context: Any) -> tuple[Memory, th.Tensor]:
        """Memory after each piece of the sequences, and the row that each ends with; of a standard policy."""
        policy, memory = self.policy, context.memory
        segments = Segments.of(context.episode_starts, len(memory.pi[0]))
        features = self._features(observations, policy.pi_features_extractor)
        pi = vf = run_to_ends(policy.lstm_actor, features, segments, memory.pi)[1]
        if policy.lstm_critic is not None:
            features = self._features(observations, policy.vf_features_extractor)
            vf = run_to_ends(policy.lstm_critic, features, segments, memory.vf)[1]
        return Memory(pi, vf), segments.last

    # -- the Jacobians by hand -------------------------------------------------------------------------

    @property
    def is_by_hand(self) -> bool:
        """Whether all that is learned is in LSTMs and dense layers."""
        extractors = self.policy.pi_features_extractor, self.policy.vf_features_extractor
        return self.actor is not None and not any(map(has_parameters, extractors))

    @property
    def actor(self) -> MlpActor | None:
        """The dense layers on top of the actor's LSTM, or None if they are not that or the policy is not standard."""
        if not self.is_standard:
            return None
        network = DenseNetwork.read([self.policy.mlp_extractor.policy_net, self.policy.action_net])
        return None if network is None else with_outputs_of(self.policy, network)

    def dense_critic(self, observations: Any, context: Any, fixed: FlatParameters) -> tuple[DenseNetwork, th.Tensor] | None:
        """A critic without an LSTM of its own as a dense network on fixed inputs (B, in), or None if it is anything else.

        :param fixed: parameters that a fit does not move
        """
        policy, layers = self.policy, [self.policy.mlp_extractor.value_net, self.policy.value_net]
        if not self.is_standard or policy.lstm_critic is not None:
            return None
        if not policy.shared_lstm:
            layers.insert(0, policy.critic)
        network = DenseNetwork.read(layers)
        if network is None or not all(p in fixed for p in policy.vf_features_extractor.parameters()):
            return None
        with th.no_grad():
            return network, self._before_critic(observations, context)

    @property
    def lstm_critic(self) -> DenseNetwork | None:
        """The dense layers on top of the critic's own LSTM, or None if they are not that, or it has none."""
        if not self.is_standard or self.policy.lstm_critic is None:
            return None
        return DenseNetwork.read([self.policy.mlp_extractor.value_net, self.policy.value_net])

    def linearize_actor(self, actor: MlpActor, observations: Any, context: Any, parameters: FlatParameters) -> Linearization:
        """The Jacobian of the distribution's parameters in θ."""
        policy = self.policy
        return self._linearize(
            policy.lstm_actor, actor.network, policy.pi_features_extractor, observations, context, 0, parameters, actor.log_std
        )

    def linearize_critic(
        self, network: DenseNetwork, observations: Any, context: Any, parameters: FlatParameters
    ) -> Linearization:
        """The Jacobian of V in φ, where the critic has an LSTM of its own."""
        policy = self.policy
        return self._linearize(
            policy.lstm_critic, network, policy.vf_features_extractor, observations, context, 1, parameters, None
        )

    def _linearize(
        self,
        lstm: nn.LSTM,
        network: DenseNetwork,
        extractor: BaseFeaturesExtractor,
        observations: Any,
        context: Any,
        part: int,
        parameters: FlatParameters,
        free: nn.Parameter | None,
    ) -> Linearization:
        state: State = context.memory[part]
        learned = any(p in parameters for p in extractor.parameters())
        with th.set_grad_enabled(learned):
            inputs = self._features(observations, extractor)
        segments = Segments.of(context.episode_starts, len(state[0]))
        return RecurrentLinearization(lstm, network, inputs, segments, state, parameters, free)
