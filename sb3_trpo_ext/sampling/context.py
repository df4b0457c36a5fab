"""What a policy is asked with besides observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_trpo_ext.sampling.buffers import fields_of, keep_fields


class Context(NamedTuple):
    """What a policy is asked with besides observations; None for what it has no use for."""

    action_masks: th.Tensor | None = None
    """Which choices each state allows, (B, Σ choices), as :mod:`sb3_trpo_ext.masks` lays them out."""
    episode_starts: th.Tensor | None = None
    """Whether the states begin an episode, (B,)."""
    memory: Any = None
    """Recurrent state before the first of the states, in the policy's own layout."""


def keep_context(buffer: RolloutBuffer, context: Context) -> None:
    """Write what the next transitions of a buffer must be asked with when learning."""
    if context.action_masks is not None:
        keep_fields(buffer, buffer.pos, action_masks=context.action_masks.numpy())


def kept_context(buffer: RolloutBuffer, pick: Callable[[np.ndarray], np.ndarray]) -> Context | None:
    """What transitions of a buffer were asked with.

    :param pick: (T, E, ·) ↦ the transitions in question, (B, ·)
    """
    masks = fields_of(buffer).get("action_masks")
    return None if masks is None else Context(action_masks=buffer.to_torch(pick(masks)))
