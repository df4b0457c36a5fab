"""A snapshot as a tree of data, and the snapshot again: so that no code comes out of a file.

A snapshot is a pickle, which names functions and has them called. In the tree each such call is written down instead,
and only the few kinds of them that snapshots have are known to whoever reads it.
"""

from __future__ import annotations

import ast
import enum
import io
import pickle
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import numpy as np

from sb3_trpo_ext.checkpoints.plain_data import Name, NotPlainError, Special
from sb3_trpo_ext.sampling.snapshot.allowed import is_builder
from sb3_trpo_ext.sampling.snapshot.chain import Chain
from sb3_trpo_ext.sampling.snapshot.code import CODE, digest_of
from sb3_trpo_ext.sampling.snapshot.plain import FILL, MAKERS, Decoder, Encoder, is_simple

_KINDS = {(maker.__module__, maker.__qualname__): kind for kind, maker in MAKERS.items()}


class _Made:
    """In the tree: what is made by one of ``MAKERS`` when the environment is restored."""

    def __init__(self, kind: str, *args: Any) -> None:
        self.kind, self.args = kind, args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self) -> Any:
        raise AssertionError("only what is made can be called: a container may ask whether it can")


class OfAnEnvironment(Special):
    """Simple objects, enumerations, and names of code, which must be of the environment itself.

    :param chain: the environment
    """

    def __init__(self, chain: Chain) -> None:
        self._code = chain.code
        self._modules = frozenset(cls.__module__ for layer in chain.layers for cls in type(layer.env).__mro__)
        self._known: dict[Name, Any] = {}

    def write(self, value: Any, child: Callable[[Any], Any]) -> list[Any] | None:
        if isinstance(value, _Made):
            return ["made", value.kind, [child(item) for item in value.args], child(value.state)]
        if isinstance(value, np.dtype):
            return ["dtype", repr(np.lib.format.dtype_to_descr(value))]
        if isinstance(value, CODE):
            return ["code", *self._name(value)]
        if isinstance(value, enum.Enum):
            return ["enum", *self._name(type(value)), value.name]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return ["fields", *self._name(type(value)), [child(item) for item in value]]
        if not is_simple(type(value)) or type(value).__basicsize__ != _SIMPLE:
            return None
        return ["object", *self._name(type(value)), [[name, child(item)] for name, item in vars(value).items()]]

    def _name(self, value: Any) -> Name:
        name = Name("numpy", value.__name__) if isinstance(value, np.ufunc) else Name.of(value)
        self._known.setdefault(name, value)
        return name

    def read(self, tag: str, rest: list[Any], child: Callable[[Any], Any], made: Callable[[Any], None]) -> Any:
        if tag == "made":
            return self._read_made(rest, child, made)
        if tag == "dtype":
            made(dtype := _dtype(rest[0]))
            return dtype
        cls = self._found(Name(*rest[:2]), tag)
        if tag == "code":
            value = cls
        elif tag == "enum":
            value = cls[rest[2]]
        elif tag == "fields":
            return tuple.__new__(cls, [child(node) for node in rest[2]])
        elif tag == "object":
            made(value := object.__new__(cls))
            vars(value).update({name: child(node) for name, node in rest[2]})
            return value
        else:
            return super().read(tag, rest, child, made)
        made(value)
        return value

    def _read_made(self, rest: list[Any], child: Callable[[Any], Any], made: Callable[[Any], None]) -> _Made:
        kind, args, state = rest
        if kind not in MAKERS:
            raise NotPlainError(f"{kind!r} is nothing that snapshots have")
        made(value := _Made(kind))
        value.args = tuple(child(node) for node in args)
        value.state = child(state)
        if kind == "function":
            self._look_for_code(*value.args[:2])
        return value

    def _look_for_code(self, module: str, digest: str) -> None:
        """Of a function without a name that the environment has not had since the process started."""
        if ("code", module, digest) not in self._code and module in self._modules:
            found = next((code for code in _codes_in(module) if digest_of(code) == digest), None)
            if found is not None:
                self._code.add(("code", module, digest), found)

    def _found(self, name: Name, tag: str) -> Any:
        if name in self._known:
            return self._known[name]
        found: Any = sys.modules.get(name.module)
        for part in name.qualname.split("."):
            found = getattr(found, part, None)
        if not self._may_be_read(name, found, tag):
            raise NotPlainError(f"{name.module}.{name.qualname} is not part of this environment")
        return found

    def _may_be_read(self, name: Name, found: Any, tag: str) -> bool:
        """As nothing is called here, what the environment's modules define may be read, too."""
        is_own = name.module in self._modules and getattr(found, "__module__", None) == name.module
        if tag == "code":
            is_known = ("name", *name) in self._code or is_builder(*name) or isinstance(found, np.ufunc)
            return is_known or (is_own and isinstance(found, (FunctionType, type)))
        return is_own and isinstance(found, type) and (issubclass(found, enum.Enum) if tag == "enum" else is_simple(found))


class _Object:
    pass


_SIMPLE = _Object.__basicsize__  # of objects that are their attributes and nothing else


def _dtype(description: str) -> np.dtype:
    dtype = np.lib.format.descr_to_dtype(ast.literal_eval(description))
    if dtype.hasobject:
        raise NotPlainError(f"{dtype} is no kind of array")
    return dtype


def _codes_in(module: str) -> Iterator[CodeType]:
    """Of all functions in a module, those inside of others too."""
    waiting: list[Any] = list(vars(sys.modules[module]).values())
    met: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in met:
            continue
        met.add(id(value))
        if isinstance(value, CodeType):
            yield value
            waiting += value.co_consts
        elif getattr(value, "__module__", None) == module:
            waiting += vars(value).values() if isinstance(value, type) else []
            waiting += [getattr(value, "__code__", None), getattr(value, "__wrapped__", None), getattr(value, "fget", None)]


# -- from a snapshot and back ------------------------------------------------------------------------------


class _TreeDecoder(Decoder):
    """Writes down what would be made."""

    def find_class(self, module: str, name: str) -> Any:
        kind = _KINDS.get((module, name))
        if kind is not None:
            return partial(_Made, kind)
        return (
            _Made.__setstate__ if (module, name) == (FILL.__module__, FILL.__qualname__) else super().find_class(module, name)
        )


class _TreeEncoder(Encoder):
    """Writes what is to be made as an :class:`Encoder` writes these things themselves."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Made):
            return super().reducer_override(value)
        setter = (None, None, FILL) if value.kind == "function" else ()
        return MAKERS[value.kind], value.args, value.state, *setter


def tree_of(chain: Chain, snapshot: bytes) -> Any:
    """What a snapshot holds that was taken in this process and is self-contained."""
    signature, compressed, states, slots, _, body = pickle.loads(snapshot)
    content = _TreeDecoder(io.BytesIO(zlib.decompress(body) if compressed else body), chain.code, [], [], _Made).load()
    return (signature, states, slots), content


def snapshot_of(chain: Chain, tree: Any) -> bytes:
    """The counterpart."""
    (signature, states, slots), content = tree
    buffer = io.BytesIO()
    _TreeEncoder(buffer, chain.code, {}).dump(content)
    return pickle.dumps((signature, False, states, slots, [], buffer.getvalue()), protocol=5)
