"""Plain data to bytes and back: numbers, strings, arrays, containers and simple objects of these.

The bytes are a pickle, of data only: whatever has its own idea of how to be pickled is refused, because
that idea is often wrong (an ``EzPickle`` environment comes back freshly constructed).
"""

from __future__ import annotations

import copyreg
import enum
import functools
import io
import pickle
import sys
from collections.abc import Callable, Collection, Mapping
from types import CellType
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_trpo_ext.sampling.snapshot import code, elsewhere
from sb3_trpo_ext.sampling.snapshot.allowed import Code, UnknownCodeError, find
from sb3_trpo_ext.sampling.snapshot.code import CODE, reduce_code, reduce_global_generator
from sb3_trpo_ext.sampling.snapshot.constants import LARGE, Constants, Key
from sb3_trpo_ext.sampling.snapshot.errors import NotPlainError
from sb3_trpo_ext.sampling.snapshot.generators import GENERATORS, state_of
from sb3_trpo_ext.sampling.snapshot.memory import memory_of, reduce_unusual, reduce_view, require_apart, view_of

Place = tuple[Any, ...]  # number of a layer, and perhaps an attribute of it; or where a module or class has it

_TRUSTED = (np.generic, np.dtype, enum.Enum)
_CODE = (*CODE, CellType)
_TRUSTED_MODULES = ("collections", "datetime", "decimal", "fractions", "functools", "logging", "operator", "torch")
# iterators of dicts and sets come back as iterators of lists, which do not follow what becomes of the dict
_TRUSTED_BUILTINS = (
    "complex slice range object ellipsis NotImplementedType enumerate zip map filter reversed list_iterator "
    "list_reverseiterator tuple_iterator str_iterator str_ascii_iterator bytes_iterator bytearray_iterator "
    "range_iterator longrange_iterator callable_iterator"
)
_NEW = copyreg.__newobj__  # type: ignore[attr-defined]
_HOOKS = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def _find_is_simple(kind: type) -> bool:
    """Whether instances are their attributes (and, for a subclass of a container, its items)."""
    if kind.__module__ == "builtins":
        return kind.__qualname__ in _TRUSTED_BUILTINS.split() or issubclass(kind, BaseException)
    if kind.__module__.split(".")[0] in _TRUSTED_MODULES:
        return True
    builtin = _builtin_of(kind)
    hooks = [hook for hook in _HOOKS if getattr(kind, hook, None) is not getattr(builtin, hook, None)]
    if hasattr(kind, "__del__"):
        return False  # what a copy of it would free is not its own
    of_dataclass = all(getattr(getattr(kind, hook), "__module__", "") == "dataclasses" for hook in hooks)  # with slots
    return of_dataclass and kind.__module__ != "weakref"  # a proxy pretends to be what it stands for


is_simple: Callable[[type], bool] = functools.lru_cache(maxsize=1024)(_find_is_simple)


def is_an_object(value: Any) -> bool:
    """Whether it is its attributes and nothing else, so that it may be known by where it is."""
    kind = type(value)
    of_library = kind.__module__.split(".")[0] in (*_TRUSTED_MODULES, "builtins") or issubclass(kind, _TRUSTED)
    return kind is object or (not of_library and _builtin_of(kind) is object and is_simple(kind))


def _builtin_of(kind: type) -> type:
    return next(base for base in kind.__mro__ if base.__module__ == "builtins")


class Encoder(pickle.Pickler):
    """Encodes once; ``generators`` are those it met, or was told of, by number.

    :param code: is told of the functions and classes that are named
    :param places: what is not carried but stays where it is, by its id: layers, and what their attributes hold for good
    :param constants: large arrays that are told by their content, if any may be
    :param engine_owns: whether an array is a view of an engine's memory
    :param shared: ids of what owns the memory of several arrays, as another encoder found it
    """

    def __init__(
        self,
        buffer: io.BytesIO,
        code: Code,
        places: Mapping[int, Place],
        constants: Constants | None = None,
        engine_owns: Callable[[np.ndarray], bool] = lambda array: False,
        shared: Collection[int] = (),
    ) -> None:
        super().__init__(buffer, protocol=5)
        self.generators: list[Any] = []
        self.keys: list[Key] = []
        self.shared: set[int] = set()
        self._numbers: dict[int, int] = {}
        self._code = code
        self._places, self._constants, self._engine_owns, self._known_shared = places, constants, engine_owns, shared
        self._owners: dict[int, tuple[Any, np.ndarray]] = {}  # each with the first array that was met of it
        self._roots: dict[int, np.ndarray] = {}
        self._tensors: list[th.Tensor] = []

    def number(self, generator: Any) -> int:
        """Its number; a generator that is met twice has one."""
        number = self._numbers.setdefault(id(generator), len(self.generators))
        if number == len(self.generators):
            self.generators.append(generator)
        return number

    def states(self) -> list[tuple[str, Any]]:
        return [state_of(generator) for generator in self.generators]

    def dump(self, value: Any) -> None:
        super().dump(value)
        if self._tensors:
            arrays = [memory_of(array)[0] for owner, array in self._owners.values() if not isinstance(owner, th.Tensor)]
            require_apart(self._tensors, arrays)

    def reducer_override(self, value: Any) -> Any:
        # called for all but the built-in types
        place = self._places.get(id(value))
        if place is not None:
            if isinstance(place[0], int):
                return _place, place
            if elsewhere.at(place) is value:
                return _place, place, _attributes_of(value)
        if isinstance(value, np.ndarray):
            return self._reduce_array(value)
        if isinstance(value, _TRUSTED):
            return NotImplemented
        if isinstance(value, _CODE):
            self._code.note(value)
            return reduce_code(value)
        if type(value) in GENERATORS or id(value) in self._numbers:
            of_process = reduce_global_generator(value)
            return (_generator, (self.number(value),)) if of_process is NotImplemented else of_process
        if isinstance(value, (gym.Env, gym.Space)) or not is_simple(type(value)):
            raise NotPlainError(f"{type(value).__module__}.{type(value).__qualname__} is not plain data")
        if isinstance(value, th.Tensor):
            self._tensors.append(value)
        return _reduce_instance(value)

    def _reduce_array(self, array: np.ndarray) -> Any:
        if array.base is None:
            self._note(array, array)
        else:
            reduced = self._reduce_view(array)
            if reduced is not NotImplemented:
                return reduced
        key = self._constants.key_of(array) if self._constants is not None and array.nbytes >= LARGE else None
        if key is None:
            return reduce_unusual(array)
        self.keys.append(key)
        return _constant, (len(self.keys) - 1,)

    def _reduce_view(self, array: np.ndarray) -> Any:
        """As a view of its memory where others share it; alone it is as good as an array of its own."""
        root, owner = memory_of(array)
        if self._engine_owns(array):
            raise NotPlainError("it holds a view of the engine's memory, which only an attribute itself may be")
        if self._note(array, owner) and isinstance(owner, th.Tensor):
            self._tensors.append(owner)
        if isinstance(owner, bytearray):
            return reduce_view(array, owner)
        if id(owner) not in self._known_shared:
            return NotImplemented
        if self._roots.setdefault(id(owner), root) is not root:
            raise NotPlainError(f"it shares its memory with another array, through {type(owner).__qualname__}")
        return reduce_view(array, root) if array is not root and array.size else NotImplemented

    def _note(self, array: np.ndarray, owner: Any) -> bool:
        """Remember what owns its memory; tell whether that was not met before."""
        first = self._owners.setdefault(id(owner), (owner, array))[1]
        if first is not array:
            self.shared.add(id(owner))
        return first is array


def _attributes_of(value: Any) -> Any:
    return (*value.__reduce_ex__(pickle.HIGHEST_PROTOCOL), None)[2]


def _reduce_instance(value: Any) -> Any:
    """By the name of its class, so that the class itself is not in the bytes, where it could be called."""
    reduced = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    if isinstance(reduced, str) or reduced[0] is not _NEW:
        return reduced
    kind, *args = reduced[1]
    return (_instance, (kind.__module__, kind.__qualname__, *args), *reduced[2:])


def _instance(module: str, qualname: str, *args: Any) -> Any:
    kind = class_named(module, qualname)
    return kind.__new__(kind, *args)


@functools.lru_cache(maxsize=1024)
def class_named(module: str, qualname: str) -> Any:
    """:raises UnknownCodeError: if there is none, or its instances are more than their attributes"""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and is_simple(found)):
        raise UnknownCodeError(("class", module, qualname))
    return found


def _generator(number: int) -> Any:
    raise AssertionError("stands for a generator: Decoder puts it in")


def _constant(number: int) -> Any:
    raise AssertionError("stands for a large array: Decoder puts it in")


def _place(*place: Any) -> Any:
    raise AssertionError("stands for what stays where it is: Decoder puts it in")


MAKERS: dict[str, Callable[..., Any]] = {
    "generator": _generator,
    "place": _place,
    "view": view_of,
    "attribute": getattr,
    "method": code.method_of,
    "bound": code.bound_to,
    "function": code.function_of,
    "cell": code.new_cell,
    "generator of the process": code.global_generator,
    "module": code.module_named,
    "partial": functools.partial,
    "iter": iter,
    **{kind.__name__: kind for kind in (enumerate, zip, map, filter, reversed)},
}
"""What an :class:`Encoder` names to have something made, other than data."""

FILL = code.fill
"""What it names to give a function its state."""


class Decoder(pickle.Unpickler):
    """What an :class:`Encoder` wrote, with the given generators, arrays and what stays in their places.

    :param code: what it may name besides plain data
    """

    def __init__(
        self,
        buffer: io.BytesIO,
        code: Code,
        generators: list[Any],
        constants: list[np.ndarray],
        at: Callable[..., Any],
    ) -> None:
        super().__init__(buffer)
        self._code = code
        self._stand_ins: dict[str, Callable[..., Any]] = {
            _generator.__name__: generators.__getitem__,
            _constant.__name__: constants.__getitem__,
            _place.__name__: at,
            _instance.__name__: _instance,
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name in self._stand_ins:
            return self._stand_ins[name]
        return find(module, name, self._code)
