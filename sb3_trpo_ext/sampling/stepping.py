"""Stepping SB3's own vectorised environments with less overhead: the same results, the same state left behind.

Of a rollout step through ``VecNormalize(DummyVecEnv)`` on MuJoCo, about a quarter goes into deep copies of dictionaries
of numbers and into NumPy's general-purpose means and variances of a few rows. Whatever is not exactly one of these two
classes, with the methods that SB3 came with, is stepped by its own.
"""

from __future__ import annotations

from copy import deepcopy
from operator import attrgetter
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_trpo_ext.originals import is_original

Stepped = tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]
"""Observations, rewards (E,), dones (E,), infos."""

_IMMUTABLE = frozenset({float, int, bool, str, type(None), np.float32, np.float64, np.int32, np.int64, np.bool_})
_EXACT = (np.dtype(np.float32), np.dtype(np.float64))


class _Methods:
    """Of a class, those that are done here in their place."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.get = attrgetter(*names)
        self.known: Any = None
        """Those that were found to be SB3's own; to be compared by identity, as this is asked at each step."""

    def are_original(self, cls: type) -> bool:
        """Whether the class has SB3's own."""
        methods = self.get(cls)
        if not all(map(is_original, methods)):
            return False
        self.known = methods
        return True


_STEPPING = ("step", "step_async", "step_wait")
_REPLACED = {
    DummyVecEnv: _Methods(*_STEPPING, "_obs_from_buf"),
    VecNormalize: _Methods(*_STEPPING, "normalize_obs", "_normalize_obs", "_update_reward"),
    RunningMeanStd: _Methods("update", "update_from_moments"),
}


def step(env: VecEnv, actions: np.ndarray) -> Stepped:
    """What ``env.step(actions)`` does, in less time where that is known how to.

    :param actions: (E, ·)
    """
    return _known_step(env, actions) or env.step(actions)


def _known_step(env: VecEnv, actions: np.ndarray) -> Stepped | None:
    if _is_as_it_came(env):
        if isinstance(env, DummyVecEnv):
            return _step_dummy(env, actions)
        if isinstance(env, VecNormalize) and isinstance(env.observation_space, spaces.Box):
            return _step_normalized(env, actions)
    return None


def _is_as_it_came(thing: Any) -> bool:
    """Whether this is exactly one of the classes above, none of the methods patched; asked anew at each step."""
    cls = type(thing)
    methods = _REPLACED.get(cls)
    if methods is None or not vars(thing).keys().isdisjoint(methods.names):
        return False
    return bool(methods.get(cls) == methods.known) or methods.are_original(cls)


def _step_dummy(env: DummyVecEnv, actions: np.ndarray) -> Stepped:
    """``DummyVecEnv.step``, without deep copies of what cannot change."""
    env.step_async(actions)
    for i in range(env.num_envs):
        obs, env.buf_rews[i], terminated, truncated, info = env.envs[i].step(env.actions[i])
        env.buf_dones[i] = terminated or truncated
        env.buf_infos[i] = info
        info["TimeLimit.truncated"] = truncated and not terminated
        if env.buf_dones[i]:
            info["terminal_observation"] = obs
            obs, env.reset_infos[i] = env.envs[i].reset()
        env._save_obs(i, obs)
    # one array needs no ordered dictionary to be copied
    observations = env.buf_obs[None].copy() if env.keys == [None] else env._obs_from_buf()  # type: ignore[index]
    memo: dict[int, Any] = {}
    return observations, env.buf_rews.copy(), env.buf_dones.copy(), [_copy_of(info, memo) for info in env.buf_infos]


def _copy_of(info: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """``deepcopy(info, memo)``."""
    if type(info) is not dict or id(info) in memo:
        return deepcopy(info, memo)
    copied: dict[str, Any] = {}
    memo[id(info)] = copied
    for key, value in info.items():
        copied[key] = value if type(value) in _IMMUTABLE else deepcopy(value, memo)
    return copied


def _step_normalized(env: VecNormalize, actions: np.ndarray) -> Stepped:
    """``VecNormalize.step``: bit for bit, as each figure comes from the same operations in the same order."""
    venv = env.venv
    stepped = _known_step(venv, actions)
    if stepped is None:
        # not its step(), which VecNormalize does not call either
        venv.step_async(actions)
        stepped = venv.step_wait()
    obs: Any
    obs, rewards, dones, infos = stepped
    env.old_obs, env.old_reward = obs, rewards
    if env.training and env.norm_obs:
        _update(env.obs_rms, obs)  # type: ignore[arg-type]
    # old_obs stays the environment's own
    obs = _normalized(obs, env.obs_rms, env.clip_obs, env.epsilon) if env.norm_obs else deepcopy(obs)  # type: ignore[arg-type]
    if env.training:
        env.returns = env.returns * env.gamma + rewards
        _update(env.ret_rms, env.returns)
    rewards = env.normalize_reward(rewards)
    if np.count_nonzero(dones):
        for i in np.flatnonzero(dones):
            if "terminal_observation" in infos[i]:
                infos[i]["terminal_observation"] = env.normalize_obs(infos[i]["terminal_observation"])
        env.returns[dones] = 0
    return obs, rewards, dones, infos


def _normalized(obs: np.ndarray, statistics: RunningMeanStd, clip: float, epsilon: float) -> np.ndarray:
    scaled = (obs - statistics.mean) / np.sqrt(statistics.var + epsilon)
    return np.minimum(np.maximum(scaled, -clip), clip).astype(np.float32)


def _update(statistics: RunningMeanStd, rows: np.ndarray) -> None:
    """``RunningMeanStd.update``: mean and variance as ``np.mean`` and ``np.var`` compute them, without their overhead."""
    if rows.dtype not in _EXACT or not _is_as_it_came(statistics):
        statistics.update(rows)
        return
    n, precision = len(rows), rows.dtype.type
    mean = np.add.reduce(rows, axis=0) / n
    if rows.ndim == 1:
        mean = precision(mean)  # NumPy 1 divides a number in double precision
    deviations = rows - mean
    var = np.add.reduce(deviations * deviations, axis=0) / n
    statistics.update_from_moments(mean, precision(var) if rows.ndim == 1 else var, n)
