"""Action masks: which choices of a finite action space a state allows, and distributions that keep to them.

A mask has one entry for each choice of each dimension in a row, as in sb3_contrib: n for Discrete, Σ n_i for
MultiDiscrete; for MultiBinary two for each dimension, whether it may be 0 and whether it may be 1.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, MultiCategoricalDistribution
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from torch.distributions import Bernoulli, Categorical

METHOD = "action_masks"
"""What environments answer by, as sb3_contrib has it."""

CERTAIN = 1e4
"""A logit whose sigmoid is exactly 1, and that of its negative exactly 0, in every precision."""


class NoActionAllowed(ValueError):
    """A mask that leaves a dimension of the action space without any choice."""


def choices_of(space: spaces.Space) -> list[int]:
    """The number of choices in each dimension of a finite action space.

    :raises ValueError: for a continuous one
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.reshape(-1)]
    if isinstance(space, spaces.MultiBinary):
        return [2] * math.prod(space.shape)
    raise ValueError(f"expected a Discrete, MultiDiscrete or MultiBinary action space, got {space}")


def has_masks(env: VecEnv) -> bool:
    """Whether environments answer by ``action_masks()``."""
    try:
        return env.has_attr(METHOD)
    except NotImplementedError:
        # environments of other makers, which cannot be asked
        return False


class MaskReader:
    """Reads masks as environments or users give them, and checks them.

    :param space: a finite action space
    :param whose: what row number i stands for, as in "environment i", for errors
    """

    def __init__(self, space: spaces.Space, whose: str) -> None:
        self._space, self._whose = space, whose
        self._sizes = choices_of(space)
        self._starts = np.cumsum([0, *self._sizes[:-1]])
        self._width = sum(self._sizes)

    def __call__(self, masks: Sequence[Any], idle: np.ndarray | None = None) -> np.ndarray:
        """Masks (B, Σ choices).

        :param masks: B of them, of anything that is true or false
        :param idle: rows that nobody acts in, (B,), and that need not allow anything
        :raises ValueError: for a mask of another length, by row
        :raises NoActionAllowed: by row and dimension
        """
        read = self._rows(masks)
        if idle is not None:
            read[idle] = True
        if len(self._sizes) == 1:
            possible = read.any(axis=1, keepdims=True)
        else:
            possible = np.logical_or.reduceat(read, self._starts, axis=1)
        if np.count_nonzero(possible) < possible.size:
            row, dimension = np.argwhere(~possible)[0]
            where = "" if len(self._sizes) == 1 else f" in dimension {dimension}"
            count = f"none of the {self._sizes[dimension]} choices{where}"
            raise NoActionAllowed(f"the action mask of {self._whose} {row} allows {count} of {self._space}")
        return read

    def _rows(self, masks: Sequence[Any]) -> np.ndarray:
        try:
            read = np.array(masks, dtype=bool).reshape(len(masks), -1)
            if read.shape[1] == self._width:
                return read
        except ValueError:
            pass  # of different lengths
        lengths = [np.size(mask) for mask in masks]
        row = next(i for i, length in enumerate(lengths) if length != self._width)
        expected = f"the action mask of {self._whose} {row} must have {self._width} entries for {self._space}"
        raise ValueError(f"{expected}, got {lengths[row]}")


def allowed_action(space: spaces.Space, action: Any, mask: Any) -> Any:
    """An action, or the next one that is allowed: in each dimension the next choice, counted round; of a Box, any."""
    if isinstance(space, spaces.Box):
        return action
    sizes, choices = choices_of(space), np.array(action)
    (mask,) = MaskReader(space, "environment")([mask])
    flat = choices.reshape(-1)
    for d, block in enumerate(np.split(mask, np.cumsum(sizes)[:-1])):
        flat[d] = (flat[d] + int(np.argmax(np.roll(block, -int(flat[d]))))) % sizes[d]
    return choices[()]


def allowed_outputs(outputs: Any, masks: Any, where: Callable[..., Any]) -> Any:
    """Logits (B, ·) of categoricals or of Bernoullis, those of choices that are not allowed being what rules them out.

    :param masks: (B, Σ choices): two for each Bernoulli
    :param where: ``np.where`` or ``th.where``, after the kind of the other two
    """
    if masks.shape[1] == 2 * outputs.shape[1]:
        on = where(masks[:, 0::2], outputs, CERTAIN)
        return where(masks[:, 1::2], on, -CERTAIN)
    return where(masks, outputs, -math.inf)


class MaskedCategorical(Categorical):
    """A categorical some of whose logits are −∞, with an entropy whose gradient is finite."""

    def entropy(self) -> th.Tensor:
        log_probs = self.logits.masked_fill(th.isneginf(self.logits), 0.0)
        return -(log_probs * self.probs).sum(dim=-1)


def masked(distribution: Distribution, masks: th.Tensor | None) -> Distribution:
    """The same distribution given that the choice is among those allowed.

    :param masks: (B, Σ choices); None: everything is allowed
    :raises ValueError: if it is a distribution that cannot be masked
    """
    distribution = _as_sb3_has_it(distribution)
    if masks is None:
        return distribution
    result, wrapped = copy.copy(distribution), distribution.distribution
    parts: list[Any] = wrapped if isinstance(wrapped, list) else [wrapped]
    if all(isinstance(part, Categorical) for part in parts):
        pairs = zip(parts, _on(parts, masks).split([part.logits.shape[1] for part in parts], dim=1), strict=True)
        kept: Any = [MaskedCategorical(logits=allowed_outputs(part.logits, mask, th.where)) for part, mask in pairs]
        result.distribution = kept if isinstance(wrapped, list) else kept[0]
    elif isinstance(wrapped, Bernoulli):
        result.distribution = Bernoulli(logits=allowed_outputs(parts[0].logits, _on(parts, masks), th.where))
    else:
        raise ValueError(f"{type(distribution).__name__} cannot be masked; use_masking=False goes without masks")
    return result


def _on(parts: list[Any], masks: th.Tensor) -> th.Tensor:
    return masks.to(parts[0].logits.device)


def _as_sb3_has_it(distribution: Distribution) -> Distribution:
    """sb3_contrib's several categoricals are SB3's under another name."""
    parts = getattr(distribution, "distributions", None)
    if not parts:
        return distribution
    several = MultiCategoricalDistribution([part.logits.shape[1] for part in parts])
    several.distribution = parts
    return several


def takes_masks(method: Callable[..., Any]) -> bool:
    """Whether a policy's method has an argument for masks, as those of sb3_contrib's maskable policies."""
    return "action_masks" in inspect.signature(method).parameters


def call_masked(policy: BasePolicy, name: str, masks: th.Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """A method of a policy, called with masks whether or not it has an argument for them.

    :param masks: (B, Σ choices); None: everything is allowed
    :raises ValueError: if the method neither takes masks nor makes its distribution where SB3's policies do
    """
    # not policy.forward(...), which goes round hooks
    method = policy if name == "forward" else getattr(policy, name)
    if masks is None:
        return method(*args, **kwargs)
    if takes_masks(getattr(policy, name)):
        return method(*args, **kwargs, action_masks=masks)
    with _distributions_masked(policy, masks) as made:
        result = method(*args, **kwargs)
    if not made:
        advice = "let it take action_masks, or make its distribution by _get_action_dist_from_latent()"
        raise ValueError(f"{type(policy).__name__}.{name}() cannot be masked: {advice}")
    return result


@contextmanager
def _distributions_masked(policy: Any, masks: th.Tensor) -> Iterator[list[Distribution]]:
    """Context in which an SB3 policy's distributions keep to masks; with a list of those that were made in it."""
    name = "_get_action_dist_from_latent"
    make, own = getattr(policy, name), vars(policy).get(name)
    made: list[Distribution] = []

    def make_masked(*args: Any, **kwargs: Any) -> Distribution:
        made.append(masked(make(*args, **kwargs), masks))
        return made[-1]

    setattr(policy, name, make_masked)
    try:
        yield made
    finally:
        delattr(policy, name)
        if own is not None:
            setattr(policy, name, own)
