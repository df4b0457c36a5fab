"""Policies of every action space in double precision, and the exact Fisher matrix derived from scores.

The oracle knows nothing of KL, Jacobians or metrics: it enumerates actions (or, for Gaussians, the
nodes of a Gauss-Hermite rule that is exact for the fourth moments a Fisher matrix needs) and averages
outer products of ∇ log π.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

OBSERVATIONS = spaces.Box(-2.0, 2.0, (3,))

ACTION_SPACES = {
    "box": spaces.Box(-1.0, 1.0, (2,)),
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary(3),
}


class DoubleExtractor(FlattenExtractor):
    """SB3 casts observations to single precision: cast them back."""

    def forward(self, observations):
        return super().forward(observations).double()


class LearnedExtractor(BaseFeaturesExtractor):
    """Shared features with parameters, one of which has "value" in its name."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.value_something = nn.Linear(int(np.prod(observation_space.shape)), 4)

    def forward(self, observations):
        return th.tanh(self.value_something(observations.flatten(1).to(self.value_something.weight.dtype)))


@dataclass(frozen=True)
class Case:
    """A kind of policy."""

    name: str
    space: str
    use_sde: bool = False
    squash: bool = False
    learned_extractor: bool = False
    share: bool = True

    def policy(self, seed=0, activation=nn.Tanh, dtype=th.float64):
        th.manual_seed(seed)
        double = FlattenExtractor if dtype is th.float32 else DoubleExtractor
        policy = ActorCriticPolicy(
            OBSERVATIONS,
            ACTION_SPACES[self.space],
            lambda _: 1e-3,
            net_arch=dict(pi=[4, 3], vf=[4]),
            activation_fn=activation,
            use_sde=self.use_sde,
            squash_output=self.squash,
            log_std_init=-0.5,
            features_extractor_class=LearnedExtractor if self.learned_extractor else double,
            share_features_extractor=self.share,
        ).to(dtype)
        for parameter in policy.parameters():  # away from the symmetric start
            parameter.data += 0.3 * th.randn_like(parameter)
        if self.use_sde:
            policy.reset_noise()  # in the new precision
        policy.set_training_mode(False)
        return policy


CASES = [
    Case("gaussian", "box"),
    Case("categorical", "discrete"),
    Case("multi_categorical", "multi_discrete"),
    Case("bernoulli", "multi_binary"),
    Case("gsde", "box", use_sde=True),
    Case("gsde_squashed", "box", use_sde=True, squash=True),
    Case("gaussian_learned_features", "box", learned_extractor=True),
    Case("categorical_separate_features", "discrete", learned_extractor=True, share=False),
]
STANDARD = [case for case in CASES if not case.use_sde and not case.learned_extractor]


def observations(n, seed=1):
    return th.rand(n, 3, generator=th.Generator().manual_seed(seed)) * 4 - 2


def sample_actions(policy, obs):
    th.manual_seed(2)
    with th.no_grad():
        return policy.get_distribution(obs).get_actions()


def enumerate_actions(policy, distribution):
    """Actions of one state and their probabilities (or quadrature weights)."""
    space = policy.action_space
    if isinstance(space, spaces.Box):
        nodes, weights = np.polynomial.hermite.hermgauss(3)
        normal = distribution.distribution
        for index in itertools.product(range(3), repeat=space.shape[0]):
            chosen = th.as_tensor(nodes[list(index)])
            action = normal.mean.detach() + 2**0.5 * normal.stddev.detach() * chosen
            squashed = th.tanh(action) if policy.squash_output else action
            yield squashed, float(np.prod(weights[list(index)]) / np.pi ** (space.shape[0] / 2))
        return
    if isinstance(space, spaces.Discrete):
        choices = [th.tensor([a]) for a in range(space.n)]
    elif isinstance(space, spaces.MultiDiscrete):
        choices = [th.tensor([a]) for a in itertools.product(*(range(n) for n in space.nvec))]
    else:
        choices = [th.tensor([a], dtype=th.float64) for a in itertools.product([0.0, 1.0], repeat=space.n)]
    for action in choices:
        yield action, float(distribution.log_prob(action).detach().exp())


def dense_fisher(policy, obs, parameters):
    """(1/B) Σ_s Σ_a π(a|s) ∇log π(a|s) ∇log π(a|s)ᵀ."""
    fisher = th.zeros(len(parameters), len(parameters), dtype=th.float64)
    for state in obs.split(1):
        for action, probability in enumerate_actions(policy, policy.get_distribution(state)):
            score = parameters.gradient(policy.get_distribution(state).log_prob(action).sum())
            fisher += probability * th.outer(score, score)
    return fisher / len(obs)


def dense(matvec, n):
    """The matrix of a product, column by column."""
    return th.stack([matvec(column) for column in th.eye(n, dtype=th.float64)], dim=1)
