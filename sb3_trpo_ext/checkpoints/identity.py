"""Whether a checkpoint is of this run: the same algorithm, arguments, spaces and package."""

from __future__ import annotations

import inspect
import platform
import re
import sys
from importlib import metadata
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from sb3_trpo_ext.checks import constant_of

_WITHOUT_EFFECT = frozenset(("self", "policy", "env", "verbose", "tensorboard_log", "device", "_init_setup_model"))
_PROGRESS = (1.0, 0.75, 0.5, 0.25, 0.0)
_SURROUNDINGS = ("torch", "numpy", "gymnasium", "stable_baselines3")


def identity(model: BaseAlgorithm) -> dict[str, str]:
    """What must be the same for a run to go on, in words."""

    arguments = inspect.signature(type(model)).parameters.keys() - _WITHOUT_EFFECT
    return {
        "version of sb3_trpo_ext": sys.modules[__name__.partition(".")[0]].__version__,
        "algorithm": _name(type(model)),
        "policy": _name(model.policy_class),
        "observation space": _shown(model.observation_space),
        "action space": _shown(model.action_space),
        "number of environments": str(model.n_envs),
        "environment": _environment(model),
        **{name: _shown(vars(model)[name]) for name in sorted(arguments) if name in vars(model)},
    }


def surroundings(model: BaseAlgorithm) -> dict[str, str]:
    """What may change the last bits."""
    versions = {f"version of {name}": metadata.version(name) for name in _SURROUNDINGS}
    machine = {"kind of processor": platform.machine(), "number of torch's threads": str(th.get_num_threads())}
    return {**versions, **machine, "kind of device": model.device.type}


def differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Naming both sides."""
    names = [*then, *(name for name in now if name not in then)]
    return [
        f"{name} was {then.get(name, 'not there')} and is {now.get(name, 'not there')}"
        for name in names
        if then.get(name) != now.get(name)
    ]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _environment(model: BaseAlgorithm) -> str:
    """Names of the layers above the environments and, where it can be seen from here, of the environments."""
    layer: Any = model.env
    layers = [type(layer).__name__]
    while isinstance(layer, VecEnvWrapper):
        layer = layer.venv
        layers.append(type(layer).__name__)
    specs = [env.spec for env in layer.envs] if isinstance(layer, DummyVecEnv) else []
    return " > ".join([*layers, *dict.fromkeys(spec.id for spec in specs if spec is not None)])


def _shown(value: Any) -> str:
    """The same in every process."""
    value = constant_of(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if inspect.isclass(value) or (inspect.isroutine(value) and not inspect.isfunction(value)):
        return _name(value)  # type: ignore[arg-type]
    if callable(value):
        return _schedule(value)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _schedule(value: Any) -> str:
    """By what it gives, as one lambda looks like another."""
    try:
        return "a schedule of " + ", ".join(f"{float(value(progress)):g}" for progress in _PROGRESS)
    except Exception:  # a function of something else
        return getattr(value, "__qualname__", type(value).__qualname__)
