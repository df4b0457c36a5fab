"""Atari: ALE's own state, its generator included. What it shows is stale after a restore until the next step."""

from __future__ import annotations

import ale_py
import gymnasium as gym

from sb3_trpo_ext.sampling.snapshot.adapters.base import SnapshotAdapter
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError


class ALEAdapter(SnapshotAdapter):
    """``ale_py.env.AtariEnv`` without ALE's sticky actions.

    :raises SnapshotError: with sticky actions; the last accepted action is not in ALE's state
    """

    handles = frozenset({"ale", "_action_set"})

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        sticky = self.env.ale.getFloat("repeat_action_probability")
        if sticky > 0:
            raise SnapshotError(
                f"layer {type(env).__qualname__} repeats actions with probability {sticky:g} inside ALE, which does not save "
                "the action it repeats: make it with repeat_action_probability=0 and, for sticky actions, use "
                "stable_baselines3.common.atari_wrappers.StickyActionEnv (AtariWrapper's action_repeat_probability)"
            )
        self.signature = f"ale_py {ale_py.__version__}"

    def save(self) -> bytes:
        return self.env.ale.cloneState(include_rng=True).__getstate__()

    def restore(self, state: bytes) -> None:
        restored = ale_py.ALEState.__new__(ale_py.ALEState)
        restored.__setstate__(state)  # type: ignore[arg-type]  # bytes, whatever its stub says
        self.env.ale.restoreState(restored)
