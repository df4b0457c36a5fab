"""The settings of learning runs: who is run where, for how long, with which arguments, and when two settings are the same."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import rl_zoo3
import yaml
from sb3_contrib import TRPO
from stable_baselines3 import PPO

from sb3_trpo_ext import KLPPOExt, NPGExt, TRPOExt
from sb3_trpo_ext.zoo import config_path

MUJOCO = {name: 1_000_000 for name in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5")}
"""Timesteps of training, here and below the Zoo's."""
CLASSIC = {
    "CartPole-v1": 100_000,
    "Acrobot-v1": 100_000,
    "Pendulum-v1": 100_000,
    "MountainCarContinuous-v0": 50_000,
    "LunarLander-v3": 200_000,
}
BUDGETS = {**MUJOCO, **CLASSIC}

RANDOM = "random"
ALGORITHMS = {
    "trpo_ext_zoo": TRPOExt,
    "npg_ext_zoo": NPGExt,
    "kl_ppo_ext_zoo": KLPPOExt,
    "sb3_contrib_zoo": TRPO,
    "sb3_ppo_zoo": PPO,
    "trpo_ext_default": TRPOExt,
    "sb3_contrib_default": TRPO,
    "trpo_ext_default_norm": TRPOExt,
    "sb3_contrib_default_norm": TRPO,
    "trpo_ext_std_1": TRPOExt,
    "trpo_ext_std_1_norm": TRPOExt,
    "kl_ppo_ext_4x256": KLPPOExt,
    "sb3_ppo_4x256": PPO,
}
"""By name: the Zoo file's settings; the default arguments; the same but for ``initial_std``, whose actions then start
with SB3's 1; each of the latter two also with normalised observations; the default arguments but for rollouts of 256 steps
of each of four environments."""

_OF_RL_ZOO3 = Path(rl_zoo3.__file__).parent / "hyperparams"
ZOO_FILES = {
    **{f"{name}_zoo": config_path(name) for name in ("trpo_ext", "npg_ext", "kl_ppo_ext")},
    "sb3_contrib_zoo": _OF_RL_ZOO3 / "trpo.yml",
    "sb3_ppo_zoo": _OF_RL_ZOO3 / "ppo.yml",
}


class Setting(NamedTuple):
    """What a run is made of.

    :param arguments: of the algorithm's constructor
    :param n_envs: of training
    :param normalize: arguments of ``VecNormalize``, None for none
    """

    arguments: dict[str, Any]
    n_envs: int = 1
    normalize: dict[str, Any] | None = None


def setting_of(algorithm: str, env_id: str, zoo_file: Path | None = None) -> Setting:
    """The setting of an algorithm's name on an environment.

    :param zoo_file: in place of ``zoo_configs/trpo_ext.yml``
    """
    if algorithm in ZOO_FILES:
        own = zoo_file if algorithm == "trpo_ext_zoo" else None
        return zoo_setting(own or ZOO_FILES[algorithm], env_id)
    if algorithm.endswith("_4x256"):
        return Setting({"policy": "MlpPolicy", "n_steps": 256}, 4)
    normalize = {"norm_obs": True, "norm_reward": False} if algorithm.endswith("_norm") else None
    initial_std = {"initial_std": None} if "_std_1" in algorithm else {}
    return Setting({"policy": "MlpPolicy", **initial_std}, normalize=normalize)


def zoo_setting(path: Path, env_id: str) -> Setting:
    """An environment's entry of a Zoo file, read as rl_zoo3 reads it as far as our runs need; v4 entries serve v5.

    :raises KeyError: where there is neither
    :raises ValueError: for Python in words, which rl_zoo3 evaluates: its result could not be kept in a run's first line
    """
    entries = yaml.safe_load(path.read_text())
    entry = entries[env_id if env_id in entries else env_id.replace("-v5", "-v4")]
    in_words = {key: entry[key] for key in ("normalize", "policy_kwargs") if isinstance(entry.get(key), str)}
    if in_words:
        raise ValueError(f"{path}, {env_id}: expected dictionaries, got {in_words}")
    entry.pop("n_timesteps", None)
    n_envs, normalize = entry.pop("n_envs", 1), entry.pop("normalize", False)
    if not normalize:
        return Setting(entry, n_envs)
    given = normalize if isinstance(normalize, dict) else {}
    gamma = {"gamma": entry["gamma"]} if "gamma" in entry else {}
    return Setting(entry, n_envs, {**given, **gamma})


_NOT_OF_LEARNING = (
    "self",
    "env",
    "seed",
    "device",
    "verbose",
    "tensorboard_log",
    "stats_window_size",
    "_init_setup_model",
    "use_masking",
)


_BEFORE_THE_KEYWORD = {"initial_std": None}
"""Constructor keywords that are newer than runs that are kept, and the value that stands for what those did."""


def resolved(algorithm: str, setting: Setting) -> dict[str, Any]:
    """A setting's arguments with the constructor's defaults for the rest, as a run's first line holds them.

    Without them a changed default would put runs of two settings together unseen.
    """
    parameters = inspect.signature(ALGORITHMS[algorithm].__init__).parameters
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty and name not in _NOT_OF_LEARNING
    }
    found: dict[str, Any] = json.loads(json.dumps({**defaults, **setting.arguments}, default=str))
    return found


def with_later_keywords(algorithm: str, whole: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a kept run, with what it did where the constructor has a keyword today that it had not then."""
    known = inspect.signature(ALGORITHMS[algorithm].__init__).parameters
    return {**{name: value for name, value in _BEFORE_THE_KEYWORD.items() if name in known}, **whole}


@functools.cache
def _has_continuous_actions(env_id: str) -> bool:
    env = gym.make(env_id)
    env.close()
    return isinstance(env.action_space, gym.spaces.Box)


def comparable(about: dict[str, Any]) -> Any:
    """A run's setting without what cannot matter: how its arguments were given, and keywords without effect."""
    setting, whole = about.get("setting"), about.get("resolved")
    if setting is None or whole is None:
        return setting
    kept = dict(whole)
    if "initial_std" in kept and (kept.get("use_sde") or not _has_continuous_actions(about["env"])):
        del kept["initial_std"]
    return {**setting, "arguments": kept}
