"""SB3's ``evaluate_policy``, with masks where the environment has them; recurrent states are passed on as SB3 does."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium as gym
from stable_baselines3.common import evaluation
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_trpo_ext.algorithms.base import OnPolicyExt
from sb3_trpo_ext.masks import METHOD, has_masks


class _Masked:
    """A model that asks an environment for masks before it predicts."""

    def __init__(self, model: OnPolicyExt, env: VecEnv) -> None:
        self._model, self._env = model, env

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["action_masks"] = self._env.env_method(METHOD)
        return self._model.predict(*args, **kwargs)


def evaluate_policy(
    model: OnPolicyExt, env: gym.Env | VecEnv, *args: Any, use_masking: Literal["auto"] | bool = "auto", **kwargs: Any
) -> Any:
    """Mean and standard deviation of the return; further arguments and results are those of SB3's ``evaluate_policy``.

    :param use_masking: whether to allow only what the environment's ``action_masks()`` says; ``"auto"``: if it has them
    :raises ValueError: for True, if it has none
    """
    venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    masked = use_masking is not False and has_masks(venv)
    if use_masking is True and not masked:
        raise ValueError("use_masking=True needs an environment with action_masks(), its own or by sb3_contrib's ActionMasker")
    return evaluation.evaluate_policy(_Masked(model, venv) if masked else model, venv, *args, **kwargs)
