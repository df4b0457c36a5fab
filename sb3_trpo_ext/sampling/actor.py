"""Acting in a rollout: the policy's actor called as often, and with as little around it, as possible.

Three ways, chosen by what the policy is (:func:`make_actor`):

- ``"numpy"``: SB3's standard MLP actors on vectors, as plain matrix products on copies of the weights;
- ``"torch"``: any policy, asked for its action distribution alone;
- ``"sb3"``: ``policy(obs)`` at each step, as SB3's own loop does, with values and log-probabilities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_trpo_ext.distributions import ParametricFamily, family_of
from sb3_trpo_ext.standard_policies import MlpActor, mlp_actor

Observation = np.ndarray | dict[str, np.ndarray]


class Acted(NamedTuple):
    """Actions (E, ·) for E environments, and what else became known; None where it is left for later."""

    actions: np.ndarray
    values: th.Tensor | None = None
    log_probs: th.Tensor | None = None


class Actor(Protocol):
    """Draws actions from the policy as it was when the actor was made."""

    path: str

    def prepare(self, n_steps: int) -> None:
        """Draw the noise of that many steps ahead, from torch's global generator."""
        ...

    def act(self, observation: Observation, step: int) -> Acted:
        """Actions for observations (E, ·); entries that are not finite count as zero."""
        ...


def finite(observation: Observation) -> Observation:
    """The observation itself if all of it is finite, else a copy with zeros for the entries that are not."""
    if isinstance(observation, dict):
        return {key: finite(part) for key, part in observation.items()}  # type: ignore[misc]
    if observation.dtype.kind != "f" or np.isfinite(observation).all():
        return observation
    return np.nan_to_num(observation, nan=0.0, posinf=0.0, neginf=0.0)


class NumpyActor:
    """SB3's standard MLP actor as NumPy matrix products.

    :param actor: copied now: later changes of its parameters are not seen
    :param observation_space: of vectors: see :func:`acts_on_vectors`
    :param n_envs: E
    """

    path = "numpy"

    def __init__(self, actor: MlpActor, observation_space: spaces.Space, action_space: spaces.Space, n_envs: int) -> None:
        head = head_of(actor.distribution)
        assert head is not None, "an MlpActor has one of SB3's own distributions"
        self._head = head
        self._encode = _encoder(observation_space)
        self._layers = []
        for layer in actor.network.layers:
            weight = np.ascontiguousarray(layer.weight.detach().cpu().numpy().T)
            bias = 0.0 if layer.bias is None else layer.bias.detach().cpu().numpy().copy()
            out = np.empty((n_envs, weight.shape[1]), dtype=weight.dtype)
            self._layers.append((weight, bias, _numpy_activation(layer.activation), out))
        n_inputs = self._layers[0][0].shape[0]
        self._inputs = np.empty((n_envs, n_inputs), dtype=self._layers[0][0].dtype)
        self._is_finite = np.empty(self._inputs.shape, dtype=bool)
        self._std = None if actor.log_std is None else actor.log_std.detach().exp().cpu().numpy()
        self._n_envs = n_envs
        shape = action_space.shape or ()
        self._action_shape = (n_envs, *shape) if len(shape) > 1 else None
        self._noise = np.empty(0)

    def prepare(self, n_steps: int) -> None:
        self._noise = self._head.noise((n_steps, self._n_envs, self._head.width))
        if self._std is not None:
            self._noise *= self._std

    def outputs(self, observation: np.ndarray) -> np.ndarray:
        """Means or logits (E, ·); overwritten by the next call."""
        x = self._inputs
        self._encode(observation, x)
        np.isfinite(x, out=self._is_finite)
        if np.count_nonzero(self._is_finite) != x.size:
            np.nan_to_num(x, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        for weight, bias, activation, out in self._layers:
            np.dot(x, weight, out=out)
            np.add(out, bias, out=out)
            if activation is not None:
                activation(out)
            x = out
        return x

    def act(self, observation: Observation, step: int) -> Acted:
        actions = self._head.act(self.outputs(observation), self._noise[step])  # type: ignore[arg-type]
        return Acted(actions if self._action_shape is None else actions.reshape(self._action_shape))


class TorchActor:
    """Any policy, asked for its distribution alone; values and log-probabilities are left for later.

    Distributions with a head act from the same noise as :class:`NumpyActor`; others draw their own.

    :param distribution_of: observations (E, ·) ↦ π(·|s)
    :param policy: for its device and the shape of its actions
    :param n_envs: E
    """

    path = "torch"

    def __init__(self, distribution_of: Callable[[Any], Distribution], policy: ActorCriticPolicy, n_envs: int) -> None:
        self._distribution_of = distribution_of
        self._policy = policy
        self._n_envs = n_envs
        self._head = head_of(policy.action_dist)
        self._noise = np.empty(0)

    def prepare(self, n_steps: int) -> None:
        if self._head is not None:
            self._noise = self._head.noise((n_steps, self._n_envs, self._head.width))

    @th.no_grad()
    def act(self, observation: Observation, step: int) -> Acted:
        distribution = self._distribution_of(obs_as_tensor(finite(observation), self._policy.device))
        if self._head is not None and type(distribution) is type(self._policy.action_dist):
            actions = self._head.act_from(distribution, self._noise[step])
        else:
            actions = distribution.get_actions().cpu().numpy()
        return Acted(actions.reshape((-1, *self._policy.action_space.shape)))  # type: ignore[misc]


class SB3Actor:
    """``policy(obs)``, as SB3's own loop calls it: values and log-probabilities are known at each step."""

    path = "sb3"

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._policy = policy

    def prepare(self, n_steps: int) -> None:
        pass

    @th.no_grad()
    def act(self, observation: Observation, step: int) -> Acted:
        actions, values, log_probs = self._policy(obs_as_tensor(finite(observation), self._policy.device))
        return Acted(actions.cpu().numpy(), values, log_probs)


def acts_on_vectors(policy: ActorCriticPolicy) -> bool:
    """Whether SB3's preprocessing of this observation space is a cast or a one-hot encoding, then flattened."""
    space = policy.observation_space
    if type(policy.pi_features_extractor) is not FlattenExtractor:
        return False
    if isinstance(space, spaces.Box):
        return not (policy.normalize_images and is_image_space(space))
    return isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))


def numpy_actor(policy: ActorCriticPolicy, n_envs: int) -> NumpyActor | None:
    """The fast actor for this policy, or None if the policy is not one that it stands for."""
    actor = mlp_actor(policy)
    if actor is None or not acts_on_vectors(policy):
        return None
    if any(layer.activation is not None and type(layer.activation) not in _ACTIVATIONS for layer in actor.network.layers):
        return None
    return NumpyActor(actor, policy.observation_space, policy.action_space, n_envs)


class Head(ABC):
    """How actions come from the outputs of a network and standard noise.

    :param width: numbers in an output
    """

    def __init__(self, width: int) -> None:
        self.width = width

    @abstractmethod
    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Noise that does not depend on the policy, from torch's global generator."""

    @abstractmethod
    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions (E, ·) from outputs and noise, both (E, width)."""

    def act_from(self, distribution: Distribution, noise: np.ndarray) -> np.ndarray:
        """The same, the outputs being those behind a distribution."""
        family = family_of(distribution)
        assert isinstance(family, ParametricFamily)
        return self.act(family.parameters(distribution)[0].cpu().numpy(), noise)


class GaussianHead(Head):
    """mean + σ ε; :meth:`act` takes the noise scaled by σ."""

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        return th.randn(shape).numpy()

    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return outputs + noise

    def act_from(self, distribution: Any, noise: np.ndarray) -> np.ndarray:
        return super().act_from(distribution, noise * distribution.distribution.scale.cpu().numpy())


class CategoricalHead(Head):
    """argmax(logits + Gumbel noise) is a draw from softmax(logits); one for each block of logits."""

    def __init__(self, sizes: list[int], flat: bool) -> None:
        super().__init__(sum(sizes))
        stops = np.cumsum(sizes).tolist()
        self._blocks = [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
        self._flat = flat

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        tiny = th.finfo(th.float32).tiny
        return -th.empty(shape).exponential_().clamp_(min=tiny).log_().numpy()

    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        perturbed = outputs + noise
        if self._flat:
            return perturbed.argmax(axis=1)
        return np.stack([perturbed[:, block].argmax(axis=1) for block in self._blocks], axis=1)


class BernoulliHead(Head):
    """logit + logistic noise > 0 is a draw from Bernoulli(sigmoid(logit))."""

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        return th.logit(th.rand(shape), eps=th.finfo(th.float32).eps).numpy()

    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return (outputs + noise > 0.0).astype(np.float32)


def head_of(distribution: Distribution) -> Head | None:
    """The head for one of SB3's own distributions on independent noise, or None."""
    if type(distribution) is DiagGaussianDistribution:
        return GaussianHead(distribution.action_dim)
    if type(distribution) is CategoricalDistribution:
        return CategoricalHead([distribution.action_dim], flat=True)
    if type(distribution) is MultiCategoricalDistribution:
        return CategoricalHead([int(size) for size in distribution.action_dims], flat=False)
    if type(distribution) is BernoulliDistribution:
        return BernoulliHead(distribution.action_dims)
    return None


def _encoder(space: spaces.Space) -> Callable[[np.ndarray, np.ndarray], None]:
    """Writes observations (E, ·) as network inputs (E, in): SB3's preprocessing, flattened."""
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        sizes = [space.n] if isinstance(space, spaces.Discrete) else space.nvec.reshape(-1)
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)

        def one_hot(observation: np.ndarray, inputs: np.ndarray) -> None:
            inputs.fill(0.0)
            np.put_along_axis(inputs, observation.reshape(len(inputs), -1) + offsets, 1.0, axis=1)

        return one_hot

    def cast(observation: np.ndarray, inputs: np.ndarray) -> None:
        inputs[...] = observation.reshape(inputs.shape)

    return cast


def _numpy_activation(module: nn.Module | None) -> Callable[[np.ndarray], None] | None:
    return None if module is None else _ACTIVATIONS[type(module)](module)


def _leaky(slope: float) -> Callable[[np.ndarray], None]:
    def leaky(x: np.ndarray) -> None:
        np.copyto(x, slope * x, where=x < 0.0)

    return leaky


def _elu(alpha: float) -> Callable[[np.ndarray], None]:
    def elu(x: np.ndarray) -> None:
        np.copyto(x, alpha * np.expm1(np.minimum(x, 0.0)), where=x < 0.0)

    return elu


def _tanh(x: np.ndarray) -> None:
    np.tanh(x, out=x)


def _relu(x: np.ndarray) -> None:
    np.maximum(x, 0.0, out=x)


def _sigmoid(x: np.ndarray) -> None:
    # by tanh, which does not overflow
    np.multiply(np.tanh(0.5 * x) + 1.0, 0.5, out=x)


def _silu(x: np.ndarray) -> None:
    x *= 0.5 * (np.tanh(0.5 * x) + 1.0)


_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Callable[[np.ndarray], None]]] = {
    nn.Tanh: lambda _: _tanh,
    nn.ReLU: lambda _: _relu,
    nn.LeakyReLU: lambda module: _leaky(module.negative_slope),
    nn.ELU: lambda module: _elu(module.alpha),
    nn.Sigmoid: lambda _: _sigmoid,
    nn.SiLU: lambda _: _silu,
}
