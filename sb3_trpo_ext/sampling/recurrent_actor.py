"""Acting with memory: through NumPy where the policy is sb3_contrib's LSTM on vectors, else as sb3_contrib's loop does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_trpo_ext.recurrence import Memory, Recurrence
from sb3_trpo_ext.sampling.actor import Acted, NumpyActor, Observation, TorchActor, acts_in_numpy, usable
from sb3_trpo_ext.sampling.choices import Checks
from sb3_trpo_ext.sampling.context import Context
from sb3_trpo_ext.standard_policies import MlpActor


class Remembering(Protocol):
    """What a rollout keeps for a policy with memory."""

    @property
    def memory(self) -> Memory: ...

    @property
    def episode_starts(self) -> np.ndarray: ...


class NumpyLSTM:
    """A torch LSTM on one state of each of n sequences, as matrix products on copies of its weights.

    :param state: before the first step, (n, layers, H)
    """

    def __init__(self, lstm: nn.LSTM, state: tuple[th.Tensor, th.Tensor]) -> None:
        h, c = (part.detach().cpu().numpy() for part in state)
        # copies, as they are written to
        self.h, self.c = ([np.array(part[:, i], order="C") for i in range(lstm.num_layers)] for part in (h, c))
        n, width = len(h), lstm.hidden_size
        self._layers = []
        for weights in lstm.all_weights:
            w = th.cat([weight.detach() for weight in weights[:2]], dim=1)
            b = sum((bias.detach() for bias in weights[2:]), start=w.new_zeros(len(w)))
            # tanh gives all gates, as σ(x) = (1 + tanh(x / 2)) / 2; those that σ is for come first: i, f, o, g
            order, scale = [0, 1, 3, 2], w.new_tensor([0.5, 0.5, 0.5, 1.0])[:, None, None]
            matrix = (w.view(4, width, -1)[order] * scale).flatten(0, 1).t().cpu().numpy()
            bias = (b.view(4, width, 1)[order] * scale).flatten().cpu().numpy()
            inputs, gates = (np.empty((n, size), dtype=matrix.dtype) for size in matrix.shape)
            self._layers.append((np.ascontiguousarray(matrix), np.tile(bias, (n, 1)), inputs, gates))

    def forget(self, starts: np.ndarray) -> None:
        """Let sequences begin anew."""
        if np.count_nonzero(starts):
            for part in (*self.h, *self.c):
                part[starts] = 0.0

    def step(self, x: np.ndarray) -> np.ndarray:
        """Outputs (n, H) for inputs (n, ·); overwritten by the next step."""
        for (matrix, bias, inputs, gates), h, c in zip(self._layers, self.h, self.c, strict=True):
            width = h.shape[1]
            inputs[:, :-width] = x
            inputs[:, -width:] = h
            inputs.dot(matrix, gates)
            gates += bias
            np.tanh(gates, gates)
            sigmoids = gates[:, : 3 * width]
            sigmoids *= 0.5
            sigmoids += 0.5
            i, f, o, g = (gates[:, k * width : (k + 1) * width] for k in range(4))
            c *= f
            g *= i
            c += g
            np.tanh(c, h)
            h *= o
            x = h
        return x


class RecurrentNumpyActor(NumpyActor):
    """sb3_contrib's LSTM policy on vectors as NumPy matrix products; values and log-probabilities are left for later.

    :param actor: the dense layers on top of the LSTM
    :param rollout: whose memory it begins with
    """

    def __init__(
        self, lstm: nn.LSTM, actor: MlpActor, observation_space: spaces.Space, action_space: spaces.Space, rollout: Remembering
    ) -> None:
        n_envs = len(rollout.memory.pi[0])
        super().__init__(actor, observation_space, action_space, n_envs)
        self._rollout, self._lstm = rollout, NumpyLSTM(lstm, rollout.memory.pi)
        self._features = np.empty((n_envs, lstm.input_size), dtype=self._inputs.dtype)

    def outputs(self, observation: Any) -> np.ndarray:
        self._lstm.forget(self._rollout.episode_starts)
        self._encode(usable(observation), self._features)
        return self._through_layers(self._lstm.step(self._features))


class StepwiseActor:
    """The policy itself, as sb3_contrib's own loop calls it: values, log-probabilities and memory are known at each step.

    :param distribution_of: observations (E, ·) and context ↦ π(·|s), where it is another one than the policy says
    :param values_of: the same ↦ V(s), (E, 1), where that is another one
    """

    path = "sb3"
    knows_values = True

    def __init__(
        self,
        recurrence: Recurrence,
        rollout: Remembering,
        distribution_of: Callable[..., Distribution] | None = None,
        values_of: Callable[..., th.Tensor] | None = None,
    ) -> None:
        self._recurrence, self._rollout = recurrence, rollout
        self._distribution_of, self._values_of = distribution_of, values_of
        self._policy = recurrence.policy
        self._check = Checks(self._policy.observation_space)

    def prepare(self, n_steps: int) -> None:
        pass

    @th.no_grad()
    def act(self, observation: Observation, step: int, context: Context | None = None) -> Acted:
        observation = usable(observation)
        self._check(observation)
        policy, memory = self._policy, self._rollout.memory
        states = obs_as_tensor(observation, policy.device)
        starts = th.as_tensor(self._rollout.episode_starts, device=policy.device)
        actions, values, log_probs, after = self._recurrence.step(states, starts, memory)
        context = (context or Context())._replace(episode_starts=starts, memory=memory)
        if self._distribution_of is not None:
            distribution = self._distribution_of(states, context)
            actions = distribution.get_actions()
            log_probs = distribution.log_prob(actions)
        if self._values_of is not None:
            values = self._values_of(states, context)
        shaped = actions.cpu().numpy().reshape((-1, *policy.action_space.shape))
        return Acted(shaped, values, log_probs, states, after)


class RecurrentBranchActor(TorchActor):
    """Acts in branches, each of which goes on from what the trunk remembered where it began.

    :param distribution_of: observations (E, ·) and context ↦ π(·|s)
    """

    def __init__(self, recurrence: Recurrence, distribution_of: Callable[..., Distribution], n_envs: int) -> None:
        super().__init__(distribution_of, recurrence.policy, n_envs)
        self._recurrence = recurrence
        self.memory = recurrence.none(n_envs)

    @th.no_grad()
    def act_from(self, observation: Observation, noise: np.ndarray, context: Context | None = None) -> np.ndarray:
        states = self._seen(observation)
        starts = th.zeros(len(noise), device=self._policy.device)
        context = (context or Context())._replace(episode_starts=starts, memory=self.memory)
        actions = self._draw(self._distribution_of(states, context), noise)
        self.memory = self._recurrence.step(states, starts, self.memory)[3]
        return self._shaped(actions)


def recurrent_numpy_actor(recurrence: Recurrence, rollout: Remembering) -> RecurrentNumpyActor | None:
    """The fast actor for this policy, or None if the policy is not one that it stands for."""
    policy, actor = recurrence.policy, recurrence.actor
    if actor is None or not acts_in_numpy(policy, actor):
        return None
    return RecurrentNumpyActor(policy.lstm_actor, actor, policy.observation_space, policy.action_space, rollout)
