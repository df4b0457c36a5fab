"""What a rollout buffer is filled with: transitions as they were, further fields of them, and λ-returns in one sweep."""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_trpo_ext.originals import differs_from_sb3


def generalized_advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_starts: np.ndarray,
    last_values: np.ndarray,
    dones: np.ndarray,
    *,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """Generalised advantage estimates, Â_t = δ_t + γλ(1 − done_t) Â_{t+1} (Schulman et al. 2016, eq. 16).

    :param rewards: (T, E)
    :param values: V(s_t), (T, E)
    :param episode_starts: whether s_t began an episode, (T, E)
    :param last_values: V(s_T), (E,)
    :param dones: whether the last step ended an episode, (E,)
    :return: (T, E), float32
    """
    continues = 1.0 - np.concatenate([episode_starts[1:], dones[None]]).astype(np.float64)
    next_values = np.concatenate([values[1:], last_values[None]])
    deltas = rewards + gamma * next_values * continues - values
    decay = gamma * gae_lambda * continues
    columns = [
        # plain floats: faster than one small array operation a step
        list(accumulate(zip(delta, factor, strict=True), lambda a, pair: pair[0] + pair[1] * a, initial=0.0))[:0:-1]
        for delta, factor in zip(deltas[::-1].T.tolist(), decay[::-1].T.tolist(), strict=True)
    ]
    return np.array(columns, dtype=np.float32).T


def make_room(buffer: RolloutBuffer, observations: Any, actions: np.ndarray) -> None:
    """Let a buffer hold the floats of this step where its spaces say integers, which would cut them off.

    Wrappers such as ``VecNormalize`` make floats of integer observations without a word to the space, and a policy acts
    in a Box of integers with floats. It is these numbers that it acts on and with, so it must learn from them too.
    """
    stored = getattr(buffer, "observations", None)
    if isinstance(stored, dict):
        stored.update((key, _with_room(stored[key], part)) for key, part in observations.items() if key in stored)
    elif stored is not None:
        buffer.observations = _with_room(stored, observations)
    if isinstance(buffer.action_space, spaces.Box) and hasattr(buffer, "actions"):
        buffer.actions = _with_room(buffer.actions, actions)


def _with_room(stored: Any, numbers: np.ndarray) -> Any:
    """``stored``, or a copy of it in single precision, which is what networks compute in.

    What is no array is a buffer's own way of keeping things.
    """
    if not isinstance(stored, np.ndarray) or stored.dtype == numbers.dtype or numbers.dtype.kind != "f":
        return stored
    fits = np.can_cast(numbers.dtype, stored.dtype) or np.can_cast(np.float32, stored.dtype)
    return stored if fits else stored.astype(np.float32)


def adds_like_sb3(buffer: RolloutBuffer) -> bool:
    """Whether ``add`` is SB3's own, so that writing the arrays directly is the same."""
    return not differs_from_sb3(buffer, ("add",))


def compute_returns(buffer: RolloutBuffer, last_values: th.Tensor, dones: np.ndarray) -> None:
    """Advantages and returns of a full buffer; by the buffer's own method if it has one."""
    if differs_from_sb3(buffer, ("compute_returns_and_advantage",)):
        buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)
        return
    buffer.advantages = generalized_advantages(
        buffer.rewards,
        buffer.values,
        buffer.episode_starts,
        last_values.detach().cpu().numpy().flatten(),
        dones,
        gamma=buffer.gamma,
        gae_lambda=buffer.gae_lambda,
    )
    buffer.returns = buffer.advantages + buffer.values


def keep_fields(buffer: RolloutBuffer, step: int, **rows: np.ndarray) -> None:
    """Write further fields of a step's transitions, (E, ·), which the buffer's samples then have too, by these names.

    The buffer may be of any class that makes its samples by ``_get_samples``, as SB3's do.
    """
    if "further_fields" not in vars(buffer):
        _with_fields_again(buffer, {})
    further = fields_of(buffer)
    for name, row in rows.items():
        if name not in further:
            further[name] = np.zeros((buffer.buffer_size, *row.shape), dtype=row.dtype)
        further[name][step] = row


def fields_of(buffer: RolloutBuffer) -> dict[str, np.ndarray]:
    """The further fields that a buffer holds, (T, E, ·)."""
    return getattr(buffer, "further_fields", {})


def with_fields(samples: Any, **fields: Any) -> Any:
    """A rollout buffer's samples with further fields, or others in place of those that they have."""
    values = {**samples._asdict(), **fields}
    return _samples_of(tuple(values))(**values)


@cache
def _samples_of(names: tuple[str, ...]) -> Any:
    return namedtuple("RolloutSamples", names)


@cache
def _with_further_fields(cls: Any) -> Any:
    """What the class of a buffer becomes while it holds further arrays."""

    class WithFurtherFields(cls):
        further_fields: dict[str, np.ndarray]

        def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
            samples = super()._get_samples(batch_inds, env)
            # SB3 numbers transitions environment by environment
            envs, steps = np.divmod(batch_inds, self.buffer_size)
            fields = {name: self.to_torch(array[steps, envs]) for name, array in self.further_fields.items()}
            return with_fields(samples, **fields)

        def __reduce__(self) -> Any:
            # its class has no name to be pickled by
            plain = object.__new__(cls)
            plain.__dict__.update({name: value for name, value in vars(self).items() if name != "further_fields"})
            return _with_fields_again, (plain, self.further_fields)

    WithFurtherFields.__name__, WithFurtherFields.__qualname__ = cls.__name__, cls.__qualname__
    return WithFurtherFields


def _with_fields_again(buffer: Any, fields: dict[str, np.ndarray]) -> Any:
    cls: Any = type(buffer)
    buffer.__class__ = _with_further_fields(cls)
    buffer.further_fields = fields
    return buffer
