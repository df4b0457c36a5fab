"""Checks of arguments: an error names the argument, what was expected and what came."""

from __future__ import annotations

import inspect
import math
import numbers
from typing import Any

from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule


def require(name: str, value: Any, holds: bool, expected: str) -> None:
    """:raises ValueError: unless ``holds``"""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """:raises ValueError: unless ``value`` is one of ``choices``"""
    require(name, value, value in choices, "one of " + ", ".join(map(repr, choices)))


def require_count(name: str, value: Any) -> None:
    """:raises ValueError: unless ``value`` is an integer of at least 1"""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    require(name, value, is_integer and value >= 1, "an integer of at least 1")


def require_real(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_below: bool = False,
    open_above: bool = False,
) -> None:
    """:raises ValueError: unless ``value`` is a finite number in the interval from ``low`` to ``high``"""
    is_number = isinstance(value, numbers.Real) and math.isfinite(value)
    inside = is_number and (low < value if open_below else low <= value) and (value < high if open_above else value <= high)
    bounds = f"{'(' if open_below else '['}{low:g}, {high:g}{')' if open_above or high == math.inf else ']'}"
    require(name, value, inside, f"a number in {bounds}")


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
