"""Recognising what a policy is: SB3's standard MLP actor and critic, and what a class overrides.

Standard means that the outputs are exactly a :class:`DenseNetwork` of the flattened observation, so
that they may be computed in other ways than by calling the policy. In doubt the answer is no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_trpo_ext.masks import takes_masks
from sb3_trpo_ext.numerics.averages import Rows, chunks_of
from sb3_trpo_ext.numerics.dense import DenseNetwork, has_hooks
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.observations import Indexed, length, numbers_seen, take
from sb3_trpo_ext.originals import differs_from_sb3, is_original

_ACTING = ("forward", "extract_features")
"""Policy methods that SB3's own loop acts by.

The second is called by the first, while ``get_distribution`` and ``predict_values`` go round a replacement.
"""

_EVALUATING = (*_ACTING, "evaluate_actions")
"""Policy methods that give log-probabilities to SB3's own loops."""

_CALLED_BY_SB3 = (*_EVALUATING, "predict_values")
"""Policy methods that SB3's own loops call; whoever replaces one expects to be called."""

_BEHIND_THE_OUTPUTS = ("get_distribution", "_get_action_dist_from_latent", "obs_to_tensor")


@dataclass(frozen=True)
class MlpActor:
    """A standard actor: network outputs (B, ·) are means or logits, ``log_std`` (D,) belongs to a Gaussian."""

    network: DenseNetwork
    log_std: nn.Parameter | None
    distribution: Distribution

    def parameters(self) -> list[th.Tensor]:
        return self.network.parameters() + ([] if self.log_std is None else [self.log_std])


def overrides(instance: object, base: type, names: Iterable[str]) -> bool:
    """Whether the class of ``instance``, or ``instance`` itself, replaces any of these methods of our own ``base``.

    Of SB3's classes, :func:`~sb3_trpo_ext.originals.differs_from_sb3` says it.
    """
    return any(
        name in getattr(instance, "__dict__", {}) or getattr(type(instance), name, None) is not getattr(base, name, None)
        for name in names
    )


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def units(module: nn.Module) -> int:
    """Outputs of all linear layers of a module, and what an LSTM has in their place."""
    layers = list(module.modules())
    dense = sum(layer.out_features for layer in layers if isinstance(layer, nn.Linear))
    return dense + sum(8 * layer.hidden_size * layer.num_layers for layer in layers if isinstance(layer, nn.RNNBase))


def is_dense(policy: ActorCriticPolicy) -> bool:
    """Whether actor and critic are dense networks, and nothing else of the policy is learned."""
    return mlp_actor(policy) is not None and mlp_critic(policy, FlatParameters([])) is not None


def calls_like_sb3(policy: ActorCriticPolicy) -> bool:
    """Whether a policy expects to be called as SB3's own loops would, having replaced what they call."""
    return differs_from_sb3(policy, _CALLED_BY_SB3) or has_hooks(policy)


def evaluates_by_itself(policy: ActorCriticPolicy) -> bool:
    """Whether a policy may act, or evaluate actions, by another distribution than ``get_distribution`` makes."""
    return differs_from_sb3(policy, _EVALUATING) or has_hooks(policy)


def acts_by_get_distribution(policy: ActorCriticPolicy) -> bool:
    """Whether a policy has replaced ``get_distribution``, and has no other way of acting that SB3's loop would ask."""
    return differs_from_sb3(policy, ("get_distribution",)) and not differs_from_sb3(policy, _ACTING) and not has_hooks(policy)


def acts_with_masks(policy: ActorCriticPolicy) -> bool:
    """Whether ``policy(obs)`` may be called with action masks: by an argument of its own, or as SB3's."""
    return takes_masks(policy.forward) or not differs_from_sb3(policy, ("forward",))


def mlp_actor(policy: ActorCriticPolicy) -> MlpActor | None:
    """The actor of an SB3 policy as a dense network on fixed features, or None if it is anything else.

    The features are fixed where the extractor has nothing to learn: flattened vectors, also of a Dict.
    """
    network = _head(policy, "policy_net", "action_net", "forward_actor")
    extractor = policy.pi_features_extractor
    # buffers such as running statistics may move
    if network is None or has_parameters(extractor) or next(extractor.buffers(), None) is not None:
        return None
    return with_outputs_of(policy, network)


def with_outputs_of(policy: ActorCriticPolicy, network: DenseNetwork) -> MlpActor | None:
    """An actor whose network makes means or logits, or None if the policy's distribution is none of SB3's."""
    distribution = policy.action_dist
    if differs_from_sb3(distribution, ("proba_distribution",)):
        return None
    if type(distribution) is DiagGaussianDistribution:
        log_std = policy.log_std
        one_a_dimension = isinstance(log_std, nn.Parameter) and log_std.shape == (distribution.action_dim,)
        return MlpActor(network, log_std, distribution) if one_a_dimension else None
    if type(distribution) in (CategoricalDistribution, MultiCategoricalDistribution, BernoulliDistribution):
        return MlpActor(network, None, distribution)
    return None


def mlp_critic(policy: ActorCriticPolicy, fixed: FlatParameters) -> DenseNetwork | None:
    """The critic of an SB3 policy as a dense network on fixed features, or None if it is anything else.

    :param fixed: parameters that a critic fit does not move: a shared, learned extractor is fixed too
    """
    network = _head(policy, "value_net", "value_net", "forward_critic")
    if network is None or not all(p in fixed for p in policy.vf_features_extractor.parameters()):
        return None
    return network


class _OnDemand:
    """Features of the rows that are asked for, extracted anew each time."""

    def __init__(self, features_of: Callable[[Rows], th.Tensor]) -> None:
        self._features_of = features_of

    def __getitem__(self, rows: Rows, /) -> th.Tensor:
        return self._features_of(rows)


def fixed_features(
    policy: ActorCriticPolicy, observations: PyTorchObs, extractor: BaseFeaturesExtractor, chunk_size: int
) -> Indexed:
    """What the dense network sees of observations (B, ·): features (B, in), without a graph.

    Learned features are computed once. Those that merely unfold the observations, which may take many times
    their memory, are too if they are no larger than what one pass takes, else when they are asked for.
    """

    @th.no_grad()
    def features_of(rows: Rows) -> th.Tensor:
        return BasePolicy.extract_features(policy, take(observations, rows), extractor).flatten(1)

    n_states, largest = length(observations), chunk_size * numbers_seen(policy.observation_space)
    if n_states * extractor.features_dim > largest and not has_parameters(extractor):
        return _OnDemand(features_of)
    return th.cat([features_of(rows) for rows in chunks_of(n_states, chunk_size)])


def extracts_like_sb3(policy: ActorCriticPolicy) -> bool:
    """Whether what ``get_distribution`` and ``predict_values`` call, going round ``extract_features``, is SB3's own."""
    return is_original(getattr(super(ActorCriticPolicy, policy).extract_features, "__func__", None))


def _head(policy: ActorCriticPolicy, hidden: str, last: str, forward: str) -> DenseNetwork | None:
    if calls_like_sb3(policy) or differs_from_sb3(policy, _BEHIND_THE_OUTPUTS) or not extracts_like_sb3(policy):
        return None
    mlp = getattr(policy, "mlp_extractor", None)
    if type(mlp) is not MlpExtractor or differs_from_sb3(mlp, ("forward", forward)):
        return None
    if any(has_hooks(module) for module in (mlp, policy.pi_features_extractor, policy.vf_features_extractor)):
        return None
    return DenseNetwork.read([getattr(mlp, hidden), getattr(policy, last)])
