"""Acting in a rollout: the policy's actor called as often, and with as little around it, as possible.

Three ways, chosen by what the policy is (``Agent.rollout_actor``):

- ``"numpy"``: SB3's standard MLP actors on vectors, as plain matrix products on copies of the weights;
- ``"torch"``: any policy, asked for its action distribution alone;
- ``"sb3"``: ``policy(obs)`` at each step, as SB3's own loop does, with values and log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor

from sb3_trpo_ext.masks import allowed_outputs, call_masked
from sb3_trpo_ext.sampling.choices import Checks
from sb3_trpo_ext.sampling.context import Context
from sb3_trpo_ext.sampling.heads import head_of
from sb3_trpo_ext.sampling.noise import NoiseInBlocks, noise_ahead
from sb3_trpo_ext.sampling.numpy_activations import NUMPY_ACTIVATIONS, numpy_activation
from sb3_trpo_ext.sampling.vectors import acts_on_vectors, encoder
from sb3_trpo_ext.standard_policies import MlpActor, mlp_actor

LARGEST_USABLE = 1e18
"""Beyond this, squares overflow single precision."""

_LARGEST = {char: min(LARGEST_USABLE, float(np.finfo(char).max)) for char in np.typecodes["Float"]}

Observation = np.ndarray | dict[str, np.ndarray]


class Acted(NamedTuple):
    """Actions (E, ·) for E environments, and what else became known; None where it is left for later."""

    actions: np.ndarray
    values: th.Tensor | None = None
    log_probs: th.Tensor | None = None
    states: PyTorchObs | None = None
    """The observations as the policy saw them."""
    memory: Any = None
    """What a policy with memory remembers afterwards."""


class Actor(Protocol):
    """Draws actions from the policy; :class:`NumpyActor` from the policy as it was when the actor was made."""

    path: str
    knows_values: bool
    """Whether values and log-probabilities come with the actions."""

    def prepare(self, n_steps: int) -> None:
        """Draw the noise of that many steps ahead, or of the first of them, from torch's global generator."""
        ...

    def act(self, observation: Observation, step: int, context: Context | None = None) -> Acted:
        """Actions for observations (E, ·); entries that are not usable count as zero.

        :param context: what else the policy is asked with
        """
        ...


def usable(observation: Any) -> Any:
    """The observation itself, or a copy with zeros for entries that are NaN, infinite or too huge to square."""
    if isinstance(observation, dict):
        return {key: usable(part) for key, part in observation.items()}
    observation = np.asarray(observation)
    if observation.dtype.kind != "f":
        return observation
    good = np.abs(observation) <= _LARGEST[observation.dtype.char]
    # the cheapest way to ask whether all are
    return observation if np.count_nonzero(good) == good.size else np.where(good, observation, 0.0).astype(observation.dtype)


class BranchActor(Protocol):
    """Acts from noise that the caller keeps, so that several branches can share it."""

    def noise(self, shape: tuple[int, ...], generator: th.Generator | None = None) -> np.ndarray:
        """Noise (*shape, ·); empty for a policy that draws its own, from torch's global generator."""
        ...

    def act_from(self, observation: Observation, noise: np.ndarray, context: Context | None = None) -> np.ndarray:
        """Actions for observations (E, ·) from noise (E, ·)."""
        ...


class NumpyActor:
    """SB3's standard MLP actor as NumPy matrix products.

    :param actor: copied now: later changes of its parameters are not seen
    :param observation_space: of vectors: see :func:`acts_on_vectors`
    :param n_envs: E
    """

    path = "numpy"
    knows_values = False

    def __init__(self, actor: MlpActor, observation_space: spaces.Space, action_space: spaces.Space, n_envs: int) -> None:
        head = head_of(actor.distribution)
        assert head is not None, "an MlpActor has one of SB3's own distributions"
        self._head = head
        self._encode = encoder(observation_space)
        self._layers = []
        for layer in actor.network.layers:
            weight = np.array(layer.weight.detach().cpu().numpy().T, order="C")
            out = np.empty((n_envs, weight.shape[1]), dtype=weight.dtype)
            # in the full shape: broadcasting would cost as much as the sum
            bias = np.zeros_like(out)
            if layer.bias is not None:
                bias += layer.bias.detach().cpu().numpy()
            self._layers.append((weight, bias, numpy_activation(layer.activation), out))
        n_inputs = self._layers[0][0].shape[0]
        self._inputs = np.empty((n_envs, n_inputs), dtype=self._layers[0][0].dtype)
        self._std = None if actor.log_std is None else actor.log_std.detach().exp().cpu().numpy()
        self._n_envs = n_envs
        # others have it already
        is_other = isinstance(action_space, spaces.Box) and len(action_space.shape) != 1
        self._action_shape = (n_envs, *action_space.shape) if is_other else None  # type: ignore[misc]
        self._noise: np.ndarray | NoiseInBlocks = np.empty(0)

    def prepare(self, n_steps: int) -> None:
        numbers = self._n_envs * self._head.width
        self._noise = noise_ahead(lambda steps: self.noise((steps, self._n_envs)), n_steps, numbers)

    def noise(self, shape: tuple[int, ...], generator: th.Generator | None = None) -> np.ndarray:
        noise = self._head.noise((*shape, self._head.width), generator)
        if self._std is not None:
            noise *= self._std
        return noise

    def outputs(self, observation: np.ndarray) -> np.ndarray:
        """Means or logits (E, ·); overwritten by the next call."""
        x = self._inputs
        self._encode(usable(observation), x)
        return self._through_layers(x)

    def _through_layers(self, x: np.ndarray) -> np.ndarray:
        for weight, bias, activation, out in self._layers:
            x.dot(weight, out)
            np.add(out, bias, out)
            if activation is not None:
                activation(out)
            x = out
        return x

    def act(self, observation: Observation, step: int, context: Context | None = None) -> Acted:
        return Acted(self.act_from(observation, self._noise[step], context))

    def act_from(self, observation: Observation, noise: np.ndarray, context: Context | None = None) -> np.ndarray:
        outputs = self.outputs(observation)  # type: ignore[arg-type]
        if context is not None and context.action_masks is not None:
            outputs = allowed_outputs(outputs, context.action_masks.numpy(), np.where)
        actions = self._head.act(outputs, noise)
        return actions if self._action_shape is None else actions.reshape(self._action_shape)


class TorchActor:
    """Any policy, asked for its distribution; values and log-probabilities are left for later unless asked for.

    Distributions with a head act from the same noise as :class:`NumpyActor`; others draw their own.

    :param distribution_of: observations (E, ·), and their context if there is any ↦ π(·|s)
    :param policy: for its device and the shape of its actions
    :param n_envs: E
    :param values_of: observations (E, ·) ↦ V(s), (E, 1), if values and log-probabilities are wanted at each step
    """

    path = "torch"

    def __init__(
        self,
        distribution_of: Callable[..., Distribution],
        policy: ActorCriticPolicy,
        n_envs: int,
        values_of: Callable[[Any], th.Tensor] | None = None,
    ) -> None:
        self._distribution_of = distribution_of
        self._values_of = values_of
        self.knows_values = values_of is not None
        self._policy = policy
        self._n_envs = n_envs
        self._head = head_of(policy.action_dist)
        self._check = Checks(policy.observation_space)
        self._noise: np.ndarray | NoiseInBlocks = np.empty(0)

    def prepare(self, n_steps: int) -> None:
        numbers = 0 if self._head is None else self._n_envs * self._head.width
        self._noise = noise_ahead(lambda steps: self.noise((steps, self._n_envs)), n_steps, numbers)

    def noise(self, shape: tuple[int, ...], generator: th.Generator | None = None) -> np.ndarray:
        return np.empty((*shape, 0)) if self._head is None else self._head.noise((*shape, self._head.width), generator)

    @th.no_grad()
    def act_from(self, observation: Observation, noise: np.ndarray, context: Context | None = None) -> np.ndarray:
        return self._shaped(self._draw(self._distribution(self._seen(observation), context), noise))

    def _distribution(self, states: PyTorchObs, context: Context | None) -> Distribution:
        return self._distribution_of(states) if context is None else self._distribution_of(states, context)

    def _seen(self, observation: Observation) -> PyTorchObs:
        observation = usable(observation)
        self._check(observation)
        return obs_as_tensor(observation, self._policy.device)

    def _draw(self, distribution: Distribution, noise: np.ndarray) -> np.ndarray:
        head = self._head if type(distribution) is type(self._policy.action_dist) else None
        if head is not None and head.draws(distribution):
            return head.act_from(distribution, noise)
        return distribution.get_actions().cpu().numpy()

    def _shaped(self, actions: np.ndarray) -> np.ndarray:
        return actions.reshape((-1, *self._policy.action_space.shape))  # type: ignore[misc]

    @th.no_grad()
    def act(self, observation: Observation, step: int, context: Context | None = None) -> Acted:
        states = self._seen(observation)
        distribution = self._distribution(states, context)
        actions = self._draw(distribution, self._noise[step])
        shaped = self._shaped(actions)
        if self._values_of is None:
            return Acted(shaped, states=states)
        log_probs = distribution.log_prob(th.as_tensor(actions, device=self._policy.device))
        return Acted(shaped, self._values_of(states), log_probs, states)


class SB3Actor:
    """``policy(obs)``, as SB3's own loop calls it: values and log-probabilities are known at each step.

    :param values_of: observations (E, ·) ↦ V(s), (E, 1), where that is another V than the one ``policy(obs)`` gives
    """

    path = "sb3"
    knows_values = True

    def __init__(self, policy: ActorCriticPolicy, values_of: Callable[[Any], th.Tensor] | None = None) -> None:
        self._policy = policy
        self._values_of = values_of
        self._check = Checks(policy.observation_space)

    def prepare(self, n_steps: int) -> None:
        pass

    @th.no_grad()
    def act(self, observation: Observation, step: int, context: Context | None = None) -> Acted:
        observation = usable(observation)
        self._check(observation)
        states = obs_as_tensor(observation, self._policy.device)
        masks = None if context is None else context.action_masks
        actions, values, log_probs = call_masked(self._policy, "forward", masks, states)
        if self._values_of is not None:
            values = self._values_of(states)
        return Acted(actions.cpu().numpy(), values, log_probs, states)


def numpy_actor(policy: ActorCriticPolicy, n_envs: int) -> NumpyActor | None:
    """The fast actor for this policy, or None if the policy is not one that it stands for."""
    actor = mlp_actor(policy)
    if actor is None or not acts_in_numpy(policy, actor):
        return None
    return NumpyActor(actor, policy.observation_space, policy.action_space, n_envs)


def acts_in_numpy(policy: ActorCriticPolicy, actor: MlpActor) -> bool:
    """Whether NumPy has all that an actor on vectors is made of."""
    if head_of(actor.distribution) is None or not acts_on_vectors(policy):
        return False
    return all(layer.activation is None or type(layer.activation) in NUMPY_ACTIVATIONS for layer in actor.network.layers)
