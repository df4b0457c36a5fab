"""Whether branches can start from states of a ``VecEnv``, and the wrapping of environments that are the algorithm's own."""

from __future__ import annotations

from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_trpo_ext.sampling.snapshot.vec_env import VecSimulator
from sb3_trpo_ext.sampling.snapshot.wrapper import SnapshotWrapper


def mark_as_own(env: VecEnv) -> None:
    """Remember of a ``VecEnv`` that the algorithm made it, so that it may wrap what is in it."""
    env.unwrapped.made_by_algorithm = True  # type: ignore[attr-defined]


def make_restorable(env: VecEnv) -> None:
    """Make sure that branches can start from states of this ``VecEnv``; wrap what the algorithm itself made.

    :raises ValueError: saying what to wrap, or naming the layer that cannot be restored
    """
    venv = env.unwrapped
    if getattr(venv, "made_by_algorithm", False) and not all(env.env_is_wrapped(SnapshotWrapper)):
        assert isinstance(venv, DummyVecEnv)
        venv.envs = [SnapshotWrapper(inner) for inner in venv.envs]
    VecSimulator(env)
