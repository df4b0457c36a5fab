"""Observations that SB3's preprocessing makes plain vectors of, and how."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gymnasium import spaces
from stable_baselines3.common import policies
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_trpo_ext.originals import differs_from_sb3, is_original
from sb3_trpo_ext.sampling.choices import Choices


def acts_on_vectors(policy: ActorCriticPolicy) -> bool:
    """Whether SB3's preprocessing of this observation space is a cast or a one-hot encoding, then flattened."""
    space, extractor = policy.observation_space, policy.pi_features_extractor
    if type(extractor) is not FlattenExtractor or differs_from_sb3(extractor, ("forward",)):
        return False
    if not is_original(policies.preprocess_obs):
        return False
    if isinstance(space, spaces.Box):
        return not (policy.normalize_images and is_image_space(space))
    return isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))


def encoder(space: spaces.Space) -> Callable[[np.ndarray, np.ndarray], None]:
    """Writes observations (E, ·) as network inputs (E, in): SB3's preprocessing, flattened."""
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        choices = Choices(space)
        offsets = np.cumsum(choices.sizes) - choices.sizes

        def one_hot(observation: np.ndarray, inputs: np.ndarray) -> None:
            inputs.fill(0.0)
            np.put_along_axis(inputs, choices.rows(observation) + offsets, 1.0, axis=1)

        return one_hot

    def cast(observation: np.ndarray, inputs: np.ndarray) -> None:
        inputs[...] = observation.reshape(inputs.shape)

    return cast
