"""gymnasium's Box2D environments, by replay.

A ``b2World`` remembers the bodies it had, in the order of its contacts and in its caches, so each episode gets a
world of its own; LunarLander makes one itself.
"""

from __future__ import annotations

import gymnasium as gym

from sb3_trpo_ext.sampling.snapshot.adapters.replay import ReplayAdapter
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError


class Box2DAdapter(ReplayAdapter):
    """:raises SnapshotError: for Box2D environments of others, which need to say how they are reset"""

    signature = "Box2D, replay of actions"

    def __init__(self, env: gym.Env) -> None:
        if not any(cls.__module__.startswith("gymnasium.envs.box2d.") for cls in type(env).__mro__):
            raise SnapshotError(
                f"the bodies of {type(env).__qualname__}'s Box2D world cannot be restored exactly: if reset() makes a new "
                "b2World, use register_snapshot_adapter(TheClass, ReplayAdapter); otherwise give the environment "
                "snapshot_state() and restore_state(state)"
            )
        super().__init__(env)

    def prepare_reset(self) -> None:
        self.env._destroy()
        self.env.world = type(self.env.world)(gravity=self.env.world.gravity)
