"""The plain attributes of an object: what it has come to, as against what it was made with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from pathlib import PurePath
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.checkpoints.plain_data import NotPlainError, dumps
from sb3_trpo_ext.sampling.snapshot.layers import is_constant

_LOOKED_AFTER_ELSEWHERE = (BaseAlgorithm, BaseCallback, Logger, VecEnv)
_NEVER_CHANGES = (PurePath, re.Pattern, th.device, th.dtype)


class Attributes:
    """Of one object, made before its training starts.

    What the constructor was given belongs to the script, and is carried only once it has changed: a script may log to
    another folder, and an algorithm may adapt its β.

    :param owner: the object
    :param excluded: names that are looked after elsewhere
    """

    def __init__(self, owner: Any, excluded: Collection[str]) -> None:
        self.owner, self._excluded = owner, frozenset(excluded)
        given = _parameters(type(owner)) & vars(owner).keys() - self._excluded
        self._given = {name: _encoded(vars(owner)[name]) for name in given}

    def state(self) -> dict[str, Any]:
        """By name."""
        return {name: value for name, value in self._candidates() if self._is_state(name, value)}

    def put(self, state: dict[str, Any]) -> None:
        vars(self.owner).update(state)

    def not_carried(self) -> list[str]:
        """Names of what may be state, and is not plain data."""
        return [name for name, value in self._candidates() if name not in self._given and not _is_known(value)]

    def _candidates(self) -> list[tuple[str, Any]]:
        return [(name, _plain(value)) for name, value in vars(self.owner).items() if name not in self._excluded]

    def _is_state(self, name: str, value: Any) -> bool:
        encoded = _encoded(value)
        return encoded is not None and self._given.get(name, b"") != encoded


def _plain(value: Any) -> Any:
    """A named tuple as a tuple, as whose owner has to take it back."""
    return tuple(value) if isinstance(value, tuple) and hasattr(value, "_fields") else value


def _encoded(value: Any) -> bytes | None:
    try:
        return dumps(value)
    except NotPlainError:
        return None


def _is_known(value: Any) -> bool:
    """Whether it is plain data, or what does not change, or is looked after elsewhere."""
    inside: Collection[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, (*_LOOKED_AFTER_ELSEWHERE, *_NEVER_CHANGES)) or callable(value) or is_constant(value):
        return True
    return _encoded(value) is not None or (len(inside) > 0 and all(map(_is_known, inside)))


def _parameters(cls: type) -> set[str]:
    """Names of what constructors of a class and of its bases take."""
    constructors: list[Callable[..., Any]] = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
    return {name for constructor in constructors[:-1] for name in inspect.signature(constructor).parameters}
