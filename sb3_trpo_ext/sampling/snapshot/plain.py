"""Plain data to bytes and back: numbers, strings, arrays, containers and simple objects of these.

The bytes are a pickle, of data only: whatever has its own idea of how to be pickled is refused, because
that idea is often wrong (an ``EzPickle`` environment comes back freshly constructed).
"""

from __future__ import annotations

import enum
import io
import pickle
import types
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_trpo_ext.sampling.snapshot.generators import GENERATORS, state_of

CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, np.ufunc)

_TRUSTED = (np.ndarray, np.generic, np.dtype, enum.Enum, *CODE)
_TRUSTED_MODULES = ("collections", "datetime", "decimal", "fractions", "functools", "operator", "torch")
_HOOKS = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


class NotPlainError(pickle.PicklingError):
    """Something that is not plain data."""


def _is_simple(kind: type) -> bool:
    """Whether instances are their attributes (and, for a subclass of a container, its items)."""
    if kind.__module__.split(".")[0] in _TRUSTED_MODULES:
        return True
    builtin = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    hooks = [hook for hook in _HOOKS if getattr(kind, hook, None) is not getattr(builtin, hook, None)]
    return all(getattr(getattr(kind, hook), "__module__", "") == "dataclasses" for hook in hooks)  # with slots


class Encoder(pickle.Pickler):
    """Encodes once; ``generators`` are those it met, or was told of, by number."""

    def __init__(self, buffer: io.BytesIO, layers: dict[int, int]) -> None:
        super().__init__(buffer, protocol=5)
        self.generators: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._layers = layers

    def number(self, generator: Any) -> int:
        """Its number; a generator that is met twice has one."""
        number = self._numbers.setdefault(id(generator), len(self.generators))
        if number == len(self.generators):
            self.generators.append(generator)
        return number

    def states(self) -> list[tuple[str, Any]]:
        return [state_of(generator) for generator in self.generators]

    def reducer_override(self, value: Any) -> Any:
        # called for all but the built-in types
        if isinstance(value, _TRUSTED):
            return NotImplemented
        if isinstance(value, GENERATORS):
            return _generator, (self.number(value),)
        if isinstance(value, gym.Env) and id(value) in self._layers:
            return _layer, (self._layers[id(value)],)
        if isinstance(value, (gym.Env, gym.Space)) or not _is_simple(type(value)):
            raise NotPlainError(f"{type(value).__module__}.{type(value).__qualname__} is not plain data")
        return NotImplemented


def _generator(number: int) -> Any:
    raise AssertionError("stands for a generator: Decoder puts it in")


def _layer(number: int) -> Any:
    raise AssertionError("stands for a layer: Decoder puts it in")


class Decoder(pickle.Unpickler):
    """What an :class:`Encoder` wrote, with the given generators and layers in their places."""

    def __init__(self, buffer: io.BytesIO, generators: list[Any], layers: list[gym.Env]) -> None:
        super().__init__(buffer)
        self._stand_ins: dict[str, Callable[[int], Any]] = {
            _generator.__name__: generators.__getitem__,
            _layer.__name__: layers.__getitem__,
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name in self._stand_ins:
            return self._stand_ins[name]
        return super().find_class(module, name)
