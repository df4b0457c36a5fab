"""What the bytes of a snapshot may name: data, and code that environments of its kind have. Nothing is imported.

A pickle can name any function and have it called. So a snapshot from elsewhere gets what builds plain data, and the
functions, classes and code that environments with the same signature have named in this process themselves.
"""

from __future__ import annotations

import enum
import importlib
import io
import marshal
import pickle
import sys
from collections.abc import Callable
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch as th

from sb3_trpo_ext.sampling.snapshot import code, memory
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError

Key = tuple[str, str, str]  # "name", "class", "module" or "code"; of which module; which

_BUILDERS = {
    "builtins": "bytearray complex frozenset object range set slice iter enumerate zip map filter reversed "
    "abs bool bytes dict divmod float int len list max min pow round sorted str sum tuple",
    "collections": "Counter OrderedDict defaultdict deque",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "functools": "partial",
    "numpy": "dtype",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.multiarray": "_reconstruct scalar",
    "torch._utils": "_rebuild_parameter _rebuild_tensor_v2",
    memory.__name__: "new_array view_of",
    code.__name__: "bound_to fill global_generator new_cell",
}
_ALLOWED = frozenset((module, name) for module, names in _BUILDERS.items() for name in names.split())
_DATA = (enum.EnumMeta, np.ufunc, th.dtype, th.layout, th.memory_format, type(Ellipsis), type(NotImplemented))

_OF_CLASSES = (FunctionType, type(np.random.RandomState.normal))


class UnknownCodeError(SnapshotError):
    """A snapshot names what no environment of its kind has had in this process."""

    def __init__(self, key: Key) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        kind, module, name = self.key
        what = {"module": module, "code": f"a function without a name in {module}"}.get(kind, f"{module}.{name}")
        return f"the snapshot names {what}, which no environment of this kind has had in this process"


class Code:
    """What environments of one kind have named."""

    def __init__(self) -> None:
        self._noted: dict[int, Any] = {}
        self._named: set[Key] = set()
        self._nameless: dict[Key, CodeType] = {}

    def note(self, value: Any) -> None:
        """Of a function, a class or a module; methods are known by what they are bound to."""
        if id(value) in self._noted:
            return
        if isinstance(value, FunctionType) and not code.has_a_name(value):
            self.add(("code", value.__module__, code.digest_of(value.__code__)), value.__code__)
        elif isinstance(value, ModuleType):
            self._keep(value, ("module", value.__name__, ""))
        elif isinstance(value, (FunctionType, type)) or isinstance(getattr(value, "__self__", None), ModuleType):
            self._keep(value, ("name", value.__module__, value.__qualname__))

    def _keep(self, value: Any, key: Key) -> None:
        self._noted[id(value)] = value
        self._named.add(key)

    def __contains__(self, key: Key) -> bool:
        return key in self._named or key in self._nameless

    def require(self, *key: str) -> None:
        """:raises UnknownCodeError: if nobody has named it"""
        if key not in self._named:
            raise UnknownCodeError(key)  # type: ignore[arg-type]

    def nameless(self, module: str, digest: str) -> CodeType:
        """:raises UnknownCodeError: if nobody has had such a function"""
        found = self._nameless.get(("code", module, digest))
        if found is None:
            raise UnknownCodeError(("code", module, digest))
        return found

    def add(self, key: Key, nameless: CodeType) -> None:
        self._nameless[key] = nameless

    def told(self, key: Key) -> bytes | None:
        """For an environment of the same kind in another process: code if it is that, nothing if it has a name.

        ``None`` for what nobody has named.
        """
        if key in self._nameless:
            return marshal.dumps(self._nameless[key])
        return b"" if key in self._named else None

    def trust(self, key: Key, marshalled: bytes) -> None:
        """What :meth:`told` gave."""
        importlib.import_module(key[1])
        if marshalled:
            self.add(key, marshal.loads(marshalled))
        else:
            self._named.add(key)


@cache
def code_of_kind(signature: str) -> Code:
    """Of all environments in this process with one signature, which exchange snapshots."""
    return Code()


def find(module: str, name: str, known: Code) -> Any:
    """What a pickle means by a name.

    :param known: code that it may name besides what builds plain data
    :raises UnknownCodeError: if it may not have it
    """
    if (module, name) in _IN_PLACE_OF:
        return _IN_PLACE_OF[module, name]
    guarded = _GUARDED.get((module, name))
    if guarded is not None:
        return partial(guarded, known)
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if is_builder(module, name) or isinstance(found, _DATA):
        return found
    known.require("name", module, name)
    return found


def is_builder(module: str, name: str) -> bool:
    """Whether it is one of those that any snapshot may name."""
    return (module, name) in _ALLOWED or (module, name) in _IN_PLACE_OF


def loads_plain(data: bytes) -> Any:
    """Of a pickle of numbers, strings, arrays and containers."""
    return _Plain(io.BytesIO(data)).load()


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if is_builder(module, name):
            return find(module, name, _NOTHING)
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


_NOTHING = Code()


# -- what is looked at before it is built -----------------------------------------------------------------


def _attribute(known: Code, owner: Any, name: str) -> Any:
    """Methods of classes, and those of built-in objects, are pickled as ``getattr(owner, name)``."""
    found = getattr(owner, name)
    if name.startswith("_") or not isinstance(found, (MethodType, BuiltinFunctionType)) or isinstance(owner, ModuleType):
        raise pickle.UnpicklingError(f"{name!r} of {type(owner).__qualname__} is no method of its own")
    return found


def _method(known: Code, owner: Any, depth: int, name: str) -> MethodType:
    method = code.method_of(owner, depth, name)
    if (name.startswith("__") and name != "__call__") or not isinstance(method.__func__, _OF_CLASSES):
        raise pickle.UnpicklingError(f"{name!r} of {type(owner).__qualname__} is no method of its own")
    return method


def _function(known: Code, module: str, digest: str, *rest: Any) -> FunctionType:
    return code.function_from(known.nameless(module, digest), module, *rest)


def _module(known: Code, name: str) -> ModuleType:
    known.require("module", name, "")
    return sys.modules[name]


def _storage(data: bytes) -> Any:
    """torch's own would read any pickle."""
    return th.load(io.BytesIO(data), weights_only=True)


_GUARDED: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "getattr"): _attribute,
    (code.__name__, code.method_of.__name__): _method,
    (code.__name__, code.function_of.__name__): _function,
    (code.__name__, code.module_named.__name__): _module,
}
_IN_PLACE_OF: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy._core.numeric", "_frombuffer"): memory.own_array,
    ("numpy.core.numeric", "_frombuffer"): memory.own_array,
    ("torch.storage", "_load_from_bytes"): _storage,
}
