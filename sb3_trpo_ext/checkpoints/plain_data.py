"""Plain data to bytes and back, with no code on the way: a tree in JSON, and beside it the bytes of arrays.

Numbers, strings, containers, NumPy arrays and torch tensors. What is met twice is one thing again when it is read.
Reading calls nothing that a file names: classes and functions are known to it only if the reader hands them in.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch as th

_AS_IT_IS = (str, int, float, bool, type(None))
_FACTORIES: dict[str, Any] = {"": None, "int": int, "float": float, "list": list, "dict": dict, "set": set, "bool": bool}
_MOST_NESTED = 200
_DTYPE = re.compile(r"[<>|=][?a-zA-Z]\d*(\[\w+\])?")


class NotPlainError(TypeError):
    """Something that is not plain data, or bytes that do not hold any."""


class Name(NamedTuple):
    """Where a class or a function is defined."""

    module: str
    qualname: str

    @classmethod
    def of(cls, value: Any) -> Name:
        return cls(str(value.__module__), str(value.__qualname__))


class Special:
    """What a kind of data beyond the usual ones is written as. This one knows none."""

    def write(self, value: Any, child: Callable[[Any], Any]) -> list[Any] | None:
        """A tag and what follows it, for the values that this is about.

        :param child: writes what is inside
        """
        return None

    def read(self, tag: str, rest: list[Any], child: Callable[[Any], Any], made: Callable[[Any], None]) -> Any:
        """The value again.

        :param child: reads what is inside
        :param made: to be called with the value before anything inside is read, unless it is a tuple
        """
        raise NotPlainError(f"unknown kind of data {tag!r}")


def dumps(value: Any, special: Special | None = None) -> bytes:
    """:raises NotPlainError: naming the first thing that is not plain data"""
    writer = _Writer(special or Special())
    try:
        tree = json.dumps(writer.node(value), separators=(",", ":")).encode()
    except RecursionError:
        raise NotPlainError("it is nested too deeply") from None
    return b"".join([len(tree).to_bytes(8, "little"), tree, *writer.buffers])


def loads(data: bytes, special: Special | None = None) -> Any:
    """:raises NotPlainError: for bytes that :func:`dumps` did not write"""
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        return _Reader(memoryview(data)[end:], special or Special()).value(json.loads(bytes(data[8:end])))
    except NotPlainError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError, RuntimeError) as error:
        raise NotPlainError(f"not what was written: {type(error).__name__}: {error}") from error


class _Writer:
    def __init__(self, special: Special) -> None:
        self.buffers: list[bytes] = []
        self._size = 0
        self._special = special
        self._met: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no number stands for two things
        self._depth = 0

    def node(self, value: Any) -> Any:
        if type(value) in _AS_IT_IS:
            return value
        number = self._met.get(id(value))
        if number is not None:
            return ["same", number]
        self._depth += 1
        if self._depth > _MOST_NESTED:
            raise NotPlainError("it is nested too deeply")
        node = self._tagged(value)
        self._depth -= 1
        return node

    def _tagged(self, value: Any) -> list[Any]:
        write = _WRITERS.get(type(value))
        if write is not None:
            if type(value) in _NUMBERED:
                self._number(value)
            return write(self, value)
        if isinstance(value, np.generic):
            return ["scalar", *self.numpy(np.asarray(value))[1:]]
        if isinstance(value, th.Tensor) and type(value) in (th.Tensor, th.nn.Parameter):
            return self._tensor(value)
        if isinstance(value, tuple):  # it cannot be there before what is inside
            return self._special.write(value, self.node) or self._refuse(value)
        self._number(value)
        return self._special.write(value, self.node) or self._refuse(value)

    def _refuse(self, value: Any) -> NoReturn:
        raise NotPlainError(f"{type(value).__module__}.{type(value).__qualname__} is not plain data")

    def _number(self, value: Any) -> None:
        self._met[id(value)] = len(self._kept)
        self._kept.append(value)

    def _bytes(self, data: bytes) -> list[int]:
        start, self._size = self._size, self._size + len(data)
        self.buffers.append(data)
        return [start, len(data)]

    def _array(self, array: np.ndarray) -> list[Any]:
        # as it lies in memory: sums over it, and convolutions, depend on that in their last bits
        axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
        return [array.dtype.str, list(array.shape), axes, *self._bytes(array.transpose(axes).tobytes())]

    def numpy(self, array: np.ndarray) -> list[Any]:
        if array.dtype == object:
            return ["objects", list(array.shape), [self.node(item) for item in array.ravel().tolist()]]
        if not _DTYPE.fullmatch(array.dtype.str) or array.dtype.hasobject or array.dtype.names is not None:
            raise NotPlainError(f"an array of {array.dtype} is not plain data")
        return ["array", *self._array(array)]

    def _tensor(self, tensor: th.Tensor) -> list[Any]:
        if tensor.layout != th.strided or tensor.is_quantized:
            raise NotPlainError(f"a tensor of layout {tensor.layout} is not plain data")
        whole = tensor.detach().cpu().contiguous()
        raw = whole.reshape(-1).view(th.uint8).numpy().tobytes() if whole.numel() else b""
        return ["tensor", str(whole.dtype).removeprefix("torch."), list(whole.shape), *self._bytes(raw)]

    def items(self, tag: str, values: Iterable[Any], *further: Any) -> list[Any]:
        return [tag, *further, [self.node(value) for value in values]]

    def pairs(self, tag: str, mapping: dict[Any, Any], *further: Any) -> list[Any]:
        return [tag, *further, [[self.node(key), self.node(value)] for key, value in mapping.items()]]

    def default_dict(self, value: defaultdict[Any, Any]) -> list[Any]:
        factory = next((name for name, known in _FACTORIES.items() if known is value.default_factory), None)
        if factory is None:
            raise NotPlainError(f"a defaultdict of {value.default_factory!r} is not plain data")
        return self.pairs("defaultdict", value, factory)


_WRITERS: dict[type, Callable[[_Writer, Any], list[Any]]] = {
    list: lambda writer, value: writer.items("list", value),
    tuple: lambda writer, value: writer.items("tuple", value),
    set: lambda writer, value: writer.items("set", value),
    frozenset: lambda writer, value: writer.items("frozenset", value),
    deque: lambda writer, value: writer.items("deque", value, value.maxlen),
    dict: lambda writer, value: writer.pairs("dict", value),
    OrderedDict: lambda writer, value: writer.pairs("ordered", value),
    defaultdict: lambda writer, value: writer.default_dict(value),
    bytes: lambda writer, value: ["bytes", *writer._bytes(value)],
    bytearray: lambda writer, value: ["bytearray", *writer._bytes(bytes(value))],
    complex: lambda writer, value: ["complex", value.real, value.imag],
    range: lambda writer, value: ["range", value.start, value.stop, value.step],
    np.ndarray: lambda writer, value: writer.numpy(value),
}
_NUMBERED = frozenset((list, set, deque, dict, OrderedDict, defaultdict, bytearray, np.ndarray))
"""What may be changed in place, so that it matters whether two are one."""


class _Reader:
    def __init__(self, buffers: memoryview, special: Special) -> None:
        self._buffers, self._special = buffers, special
        self._made: list[Any] = []

    def value(self, node: Any) -> Any:
        if not isinstance(node, list):
            if type(node) not in _AS_IT_IS:
                raise NotPlainError("not what was written")
            return node
        tag, *rest = node
        read = _READERS.get(tag)
        if read is None:
            return self._special.read(tag, rest, self.value, self.made)
        return read(self, *rest)

    def made(self, value: Any) -> Any:
        self._made.append(value)
        return value

    def bytes(self, start: int, length: int) -> bytes:
        if not 0 <= start <= start + length <= len(self._buffers):
            raise NotPlainError("bytes are missing")
        return bytes(self._buffers[start : start + length])

    def values(self, nodes: list[Any]) -> list[Any]:
        return [self.value(node) for node in nodes]

    def fill(self, mapping: Any, pairs: list[Any]) -> Any:
        self.made(mapping)
        for key, value in pairs:
            mapping[self.value(key)] = self.value(value)
        return mapping

    def extended(self, container: Any, add: str, nodes: list[Any]) -> Any:
        self.made(container)
        for node in nodes:
            getattr(container, add)(self.value(node))
        return container

    def array(self, dtype: str, shape: list[int], axes: list[int], start: int, length: int) -> np.ndarray:
        if not _DTYPE.fullmatch(dtype) or np.dtype(dtype).hasobject or sorted(axes) != list(range(len(shape))):
            raise NotPlainError(f"{dtype!r} is no kind of array")
        raw = self.bytes(start, length)
        flat = np.frombuffer(raw, dtype) if raw else np.empty(0, dtype)
        return flat.reshape([shape[axis] for axis in axes]).copy().transpose(np.argsort(axes))

    def objects(self, shape: list[int], nodes: list[Any]) -> np.ndarray:
        flat = self.made(np.empty(len(nodes), dtype=object).reshape(shape))
        for index, node in zip(np.ndindex(*shape), nodes, strict=True):
            flat[index] = self.value(node)
        return flat

    def tensor(self, dtype: str, shape: list[int], start: int, length: int) -> th.Tensor:
        kind = getattr(th, dtype)
        if not isinstance(kind, th.dtype):
            raise NotPlainError(f"{dtype!r} is no kind of tensor")
        raw = self.bytes(start, length)
        return (th.frombuffer(bytearray(raw), dtype=kind) if raw else th.empty(0, dtype=kind)).reshape(shape).clone()


_READERS: dict[str, Callable[..., Any]] = {
    "same": lambda reader, number: reader._made[number],
    "list": lambda reader, nodes: reader.extended([], "append", nodes),
    "set": lambda reader, nodes: reader.extended(set(), "add", nodes),
    "deque": lambda reader, most, nodes: reader.extended(deque(maxlen=most), "append", nodes),
    "tuple": lambda reader, nodes: tuple(reader.values(nodes)),
    "frozenset": lambda reader, nodes: frozenset(reader.values(nodes)),
    "dict": lambda reader, pairs: reader.fill({}, pairs),
    "ordered": lambda reader, pairs: reader.fill(OrderedDict(), pairs),
    "defaultdict": lambda reader, factory, pairs: reader.fill(defaultdict(_FACTORIES[factory]), pairs),
    "bytes": lambda reader, start, length: reader.bytes(start, length),
    "bytearray": lambda reader, start, length: reader.made(bytearray(reader.bytes(start, length))),
    "complex": lambda reader, real, imaginary: complex(real, imaginary),
    "range": lambda reader, start, stop, step: range(start, stop, step),
    "array": lambda reader, *description: reader.made(reader.array(*description)),
    "objects": lambda reader, *description: reader.objects(*description),
    "scalar": lambda reader, *description: reader.array(*description)[()],
    "tensor": lambda reader, *description: reader.tensor(*description),
}
