"""Checks of arguments: an error names the argument, what was expected and what came."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

Constructor = TypeVar("Constructor", bound=Callable[..., None])


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


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Around imports that an extra of this package brings.

    :raises ImportError: saying which, where one of them is missing
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what} more packages ({error}); install them with: pip install 'sb3_trpo_ext[{extra}]'") from error


def positive_interval(name: str, value: Any) -> tuple[float, float]:
    """A pair of numbers, 0 < least <= greatest.

    :raises ValueError: for anything else
    """
    is_pair = np.ndim(value) == 1 and len(value) == 2
    require(name, value, is_pair, "two numbers, 0 < least <= greatest")
    for i in range(2):
        require_real(f"{name}[{i}]", value[i], 0.0, open_below=True)
    require(name, value, value[0] <= value[1], "two numbers, 0 < least <= greatest")
    return float(value[0]), float(value[1])


def constant_of(value: Any) -> Any:
    """The number behind a constant schedule of SB3's, or the value itself."""
    while isinstance(value, FloatSchedule):
        value = value.value_schedule
    return value.val if isinstance(value, ConstantSchedule) else value


def schedule_of(name: str, value: Any) -> float | Schedule:
    """A number or an SB3 schedule, given as itself or as ``"lin_x"``: from x at the start to 0 at the end.

    :raises ValueError: for anything else
    """
    if isinstance(value, str):
        prefix, _, start = value.partition("_")
        try:
            require(name, value, prefix == "lin" and "_" not in start and math.isfinite(float(start)), "")
            return LinearSchedule(float(start), 0.0, 1.0)
        except ValueError:
            pass
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    require(name, value, is_number or callable(value), 'a number, a schedule or "lin_x" with a number x')
    return value


def scheduled(name: str, value: float | str | Schedule, progress_remaining: float) -> float:
    """The value of a schedule at a remaining progress from 1 to 0; of a number, the number.

    :raises ValueError: for neither, and where a schedule gives a negative number, or none
    """
    value = schedule_of(name, value)
    if not callable(value):
        return value
    # the last rollout may go beyond the end, where a schedule of a user's might turn negative
    progress = min(max(progress_remaining, 0.0), 1.0)
    now = value(progress)
    require_real(f"{name} at a remaining progress of {progress:g}", now, 0.0)
    return float(now)


def with_keywords_of(base: type, without: Collection[str] = ()) -> Callable[[Constructor], Constructor]:
    """Decorator of a constructor whose last argument passes keywords on to ``base``: its signature names them.

    Any other keyword is refused in the name of the class that is constructed, with what its ``no_keywords`` says of it.

    :param without: keywords of ``base`` that are not passed on
    """

    def decorate(constructor: Constructor) -> Constructor:
        own = inspect.signature(constructor)
        named = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        passed_on = [
            parameter.replace(kind=parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(base.__init__).parameters.items()  # type: ignore[misc]
            if name not in own.parameters and name not in without
        ]
        signature = own.replace(parameters=[*named, *passed_on])

        @functools.wraps(constructor)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in kwargs.keys() - signature.parameters.keys():
                reason = getattr(type(self), "no_keywords", {}).get(name)
                message = f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}"
                raise TypeError(f"{message}: {reason}" if reason else message)
            constructor(self, *args, **kwargs)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate


def with_defaults(base: type, defaults: Mapping[str, Any]) -> Callable[[Constructor], Constructor]:
    """Decorator of a constructor that takes what the one of ``base`` takes: these keywords have other defaults.

    :param defaults: by keyword, which callers give by name alone
    """

    def decorate(constructor: Constructor) -> Constructor:
        inherited = inspect.signature(base.__init__)  # type: ignore[misc]
        parameters = [
            parameter.replace(default=defaults[name]) if name in defaults else parameter
            for name, parameter in inherited.parameters.items()
        ]

        @functools.wraps(constructor)
        def with_these(self: Any, *args: Any, **kwargs: Any) -> None:
            constructor(self, *args, **{**defaults, **kwargs})

        with_these.__signature__ = inherited.replace(parameters=parameters)  # type: ignore[attr-defined]
        return with_these  # type: ignore[return-value]

    return decorate


def warn_user(message: str) -> None:
    """A warning that points at the nearest caller outside of this package."""
    package, frame, level = __name__.partition(".")[0], sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def default_of(cls: type, name: str) -> Any:
    """The default of a constructor's keyword, in the nearest class that gives it one."""
    for base in cls.__mro__:
        parameter = inspect.signature(base.__init__).parameters.get(name)  # type: ignore[misc]
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
    raise TypeError(f"{cls.__name__} has no keyword {name!r} with a default")
