"""Functions and methods as data.

A bound method goes with the object it is bound to, and a function made at run time with the variables it closes over:
both are part of a state. What has a name in a module is told by its name.
"""

from __future__ import annotations

import random
import sys
from functools import lru_cache
from hashlib import blake2b
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from sb3_trpo_ext.sampling.snapshot.errors import NotPlainError

CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type, np.ufunc)

_OF_CODE = (
    "name", "code", "exceptiontable", "names", "varnames", "cellvars", "freevars", "flags", "argcount", "kwonlyargcount",
    "posonlyargcount",
)  # fmt: skip

_with_name: set[type | FunctionType] = set()  # those that have been looked up

# the process's own: random.gauss and numpy.random.normal are bound to them
_GLOBAL_GENERATORS = {"random": random._inst, "numpy": np.random.mtrand._rand}


def is_fixed(value: Any) -> bool:
    """Whether it is a class or a function without a name that holds nothing which a state could be in."""
    if isinstance(value, FunctionType) and any((value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value))):
        return False
    return isinstance(value, (type, FunctionType)) and not has_a_name(value)


def describe(value: type | FunctionType) -> str:
    """The same in every process, and another for another code."""
    own = isinstance(value, FunctionType) and digest_of(value.__code__)
    return f"{value.__module__}.{value.__qualname__} {own}"


@lru_cache(maxsize=256)
def digest_of(code: CodeType) -> str:
    """The same in every process of one version of Python."""
    return blake2b(repr(_shown(code)).encode(), digest_size=16).hexdigest()


def _shown(constant: Any) -> Any:
    if isinstance(constant, CodeType):
        own = [getattr(constant, f"co_{name}", None) for name in _OF_CODE]
        return [*own, *map(_shown, constant.co_consts)]
    if isinstance(constant, (tuple, frozenset)):
        items = [str(_shown(item)) for item in constant]
        return type(constant), items if isinstance(constant, tuple) else sorted(items)
    return type(constant), repr(constant)


def reduce_code(value: Any) -> Any:
    """How to make it again, as ``__reduce__`` says it; ``NotImplemented`` for what its name tells."""
    if isinstance(value, FunctionType):
        return NotImplemented if has_a_name(value) else _reduce_function(value)
    if isinstance(value, MethodType):
        return _reduce_method(value)
    if isinstance(value, ModuleType):
        return module_named, (value.__name__,)
    if isinstance(value, CellType):
        return new_cell, ()
    return NotImplemented


def reduce_global_generator(value: Any) -> Any:
    """``NotImplemented`` for all others, which are states of their own."""
    names = [name for name, generator in _GLOBAL_GENERATORS.items() if generator is value]
    return (global_generator, tuple(names)) if names else NotImplemented


def global_generator(name: str) -> Any:
    return _GLOBAL_GENERATORS[name]


def has_a_name(value: type | FunctionType) -> bool:
    """Whether a module has it under its name."""
    if value in _with_name:
        return True
    found: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is value:
        _with_name.add(value)
    return found is value


def module_named(name: str) -> Any:
    raise AssertionError("stands for a module: Decoder puts it in")


def _reduce_method(method: MethodType) -> Any:
    owner, function = method.__self__, method.__func__
    if isinstance(owner, type):
        return getattr, (owner, method.__name__)
    for depth, cls in enumerate(type(owner).__mro__):
        if vars(cls).get(method.__name__) is function:
            return method_of, (owner, depth, method.__name__)
    return bound_to, (function, owner)


def bound_to(function: Any, owner: Any) -> MethodType:
    return MethodType(function, owner)


def method_of(owner: Any, depth: int, name: str) -> MethodType:
    # of that class, not whatever the instance or a class nearer to it has under the name
    return MethodType(vars(type(owner).__mro__[depth])[name], owner)


def _reduce_function(function: FunctionType) -> Any:
    module = sys.modules.get(function.__module__)
    if module is None or vars(module) is not function.__globals__:
        raise NotPlainError(f"function {function.__qualname__} is of no module")
    names = function.__module__, digest_of(function.__code__), function.__name__, function.__qualname__
    cells = function.__closure__ or ()
    held = [_content(cell) for cell in cells], function.__defaults__, function.__kwdefaults__, vars(function)
    return function_of, (*names, cells), held, None, None, fill


def new_cell() -> CellType:
    return CellType()


def _content(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return ()


def function_of(*description: Any) -> Any:
    raise AssertionError("stands for a function: Decoder puts it in")


def function_from(code: CodeType, module: str, name: str, qualname: str, cells: tuple[CellType, ...]) -> FunctionType:
    function = FunctionType(code, vars(sys.modules[module]), name, None, cells)
    function.__module__, function.__qualname__ = module, qualname
    return function


def fill(function: FunctionType, held: Any) -> None:
    """Afterwards, because a function may close over itself."""
    contents, function.__defaults__, function.__kwdefaults__, attributes = held
    for cell, content in zip(function.__closure__ or (), contents, strict=True):
        if content:
            cell.cell_contents = content[0]
    vars(function).update(attributes)
