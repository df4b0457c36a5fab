"""How actions come from the outputs of a network and noise that does not depend on the policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from torch.distributions import Bernoulli, Categorical, Normal

from sb3_trpo_ext.distributions import ParametricFamily, family_of
from sb3_trpo_ext.masks import MaskedCategorical
from sb3_trpo_ext.originals import differs_from_sb3

_DRAWING = ("get_actions", "sample")


class Head(ABC):
    """One distribution's way from noise to actions.

    :param width: numbers in an output
    """

    kinds: ClassVar[tuple[type, ...]]
    """What one of SB3's distributions wraps, or a list of them."""

    def __init__(self, width: int) -> None:
        self.width = width

    @abstractmethod
    def noise(self, shape: tuple[int, ...], generator: th.Generator | None = None) -> np.ndarray:
        """Noise that does not depend on the policy, from torch's global generator or the one given."""

    @abstractmethod
    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions (E, ·) from outputs and noise, both (E, width)."""

    def draws(self, distribution: Distribution) -> bool:
        """Whether this is the way of a distribution of the class that the head was made for, whatever was put into it."""
        wrapped: Any = distribution.distribution
        parts = wrapped if isinstance(wrapped, list) else [wrapped]
        return all(type(part) in self.kinds for part in parts) and vars(distribution).keys().isdisjoint(_DRAWING)

    def act_from(self, distribution: Distribution, noise: np.ndarray) -> np.ndarray:
        """The same, the outputs being those behind a distribution."""
        family = family_of(distribution)
        assert isinstance(family, ParametricFamily)
        return self.act(family.parameters(distribution)[0].cpu().numpy(), noise)


class GaussianHead(Head):
    """mean + σ ε; :meth:`act` takes the noise scaled by σ."""

    kinds = (Normal,)

    def noise(self, shape: tuple[int, ...], generator: th.Generator | None = None) -> np.ndarray:
        return th.randn(shape, generator=generator, device="cpu").numpy()

    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return outputs + noise

    def act_from(self, distribution: Any, noise: np.ndarray) -> np.ndarray:
        return super().act_from(distribution, noise * distribution.distribution.scale.cpu().numpy())


class CategoricalHead(Head):
    """argmax(logits + Gumbel noise) is a draw from softmax(logits); one for each block of logits."""

    kinds = (Categorical, MaskedCategorical)

    def __init__(self, sizes: list[int], flat: bool) -> None:
        super().__init__(sum(sizes))
        stops = np.cumsum(sizes).tolist()
        self._blocks = [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
        self._flat = flat

    def noise(self, shape: tuple[int, ...], generator: th.Generator | None = None) -> np.ndarray:
        tiny = th.finfo(th.float32).tiny
        return th.empty(shape, device="cpu").exponential_(generator=generator).clamp_(min=tiny).log_().neg_().numpy()

    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        perturbed = outputs + noise
        if self._flat:
            return perturbed.argmax(axis=1)
        return np.stack([perturbed[:, block].argmax(axis=1) for block in self._blocks], axis=1)


class BernoulliHead(Head):
    """logit + logistic noise > 0 is a draw from Bernoulli(sigmoid(logit))."""

    kinds = (Bernoulli,)

    def noise(self, shape: tuple[int, ...], generator: th.Generator | None = None) -> np.ndarray:
        return th.logit(th.rand(shape, generator=generator, device="cpu"), eps=th.finfo(th.float32).eps).numpy()

    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return (outputs + noise > 0.0).astype(np.float32)


def head_of(distribution: Distribution) -> Head | None:
    """The head for one of SB3's own distributions on independent noise, or None."""
    if differs_from_sb3(distribution, _DRAWING):
        return None
    if type(distribution) is DiagGaussianDistribution:
        return GaussianHead(distribution.action_dim)
    if type(distribution) is CategoricalDistribution:
        return CategoricalHead([distribution.action_dim], flat=True)
    if type(distribution) is MultiCategoricalDistribution:
        return CategoricalHead([int(size) for size in distribution.action_dims], flat=False)
    if type(distribution) is BernoulliDistribution:
        return BernoulliHead(distribution.action_dims)
    return None
