"""Objects that an environment's class or module holds: an attribute that has one has that one, not another like it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import gymnasium as gym

_NOT_THEIRS = ("gymnasium", "stable_baselines3", "sb3_trpo_ext", "abc", "builtins", "typing")
_MOST_ITEMS = 1000  # of one container

Elsewhere = tuple[Any, ...]  # module, class or "", name, and perhaps a key of the container under this name


Holder = tuple[str, str]  # module, class or ""


def holders_of(envs: Iterable[gym.Env]) -> set[Holder]:
    """Modules and classes of the environments."""
    classes = {cls for env in envs for cls in type(env).__mro__ if cls.__module__.split(".")[0] not in _NOT_THEIRS}
    return {(cls.__module__, "") for cls in classes} | {(cls.__module__, cls.__qualname__) for cls in classes}


def held_by(holders: Iterable[Holder]) -> Iterator[tuple[Elsewhere, Any]]:
    """What they hold, one container deep."""
    for module, qualname in sorted(holders):
        for name, value in list(_names_in(module, qualname).items()):
            yield (module, qualname, name), value
            if isinstance(value, (list, tuple, dict)) and len(value) <= _MOST_ITEMS:
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from ((((module, qualname, name, key), item)) for key, item in items)


def at(place: Elsewhere) -> Any:
    """What is there now; ``None`` for nothing."""
    module, qualname, name, *keys = place
    thing = _names_in(module, qualname).get(name)
    try:
        return thing[keys[0]] if keys else thing
    except (LookupError, TypeError):
        return None


def _names_in(module: str, qualname: str) -> Any:
    holder: Any = sys.modules.get(module)
    for part in qualname.split(".") if qualname else ():
        holder = getattr(holder, part, None)
    return getattr(holder, "__dict__", {})
