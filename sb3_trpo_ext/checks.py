"""Checks of arguments: an error names the argument, what was expected and what came."""

from __future__ import annotations

import inspect
from typing import Any

from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule


def require(name: str, value: Any, holds: bool, expected: str) -> None:
    """:raises ValueError: unless ``holds``"""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """:raises ValueError: unless ``value`` is one of ``choices``"""
    require(name, value, value in choices, "one of " + ", ".join(map(repr, choices)))


def constant_of(value: Any) -> Any:
    """The number behind a constant schedule of SB3's, or the value itself."""
    while isinstance(value, FloatSchedule):
        value = value.value_schedule
    return value.val if isinstance(value, ConstantSchedule) else value


def default_of(cls: type, name: str) -> Any:
    """The default of a constructor's keyword, in the nearest class that gives it one."""
    for base in cls.__mro__:
        parameter = inspect.signature(base.__init__).parameters.get(name)  # type: ignore[misc]
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
    raise TypeError(f"{cls.__name__} has no keyword {name!r} with a default")
