"""NumPy arrays that share memory: views stay views of what they were views of."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th

from sb3_trpo_ext.sampling.snapshot.errors import NotPlainError

_from_buffer: Any = np.zeros(1).__reduce_ex__(5)[0]


def memory_of(array: np.ndarray) -> tuple[np.ndarray, Any]:
    """The array at the bottom of a chain of views, and what owns its memory: that array, or something else."""
    root, owner = array, array.base
    while isinstance(owner, (np.ndarray, memoryview)):
        if isinstance(owner, np.ndarray):
            root, owner = owner, owner.base
        else:
            owner = owner.obj
    return root, root if owner is None else owner


def reduce_view(array: np.ndarray, memory: Any) -> Any:
    """How to make a view again.

    :param memory: an array, or a bytearray, that it is a view of
    """
    of_bytes = isinstance(memory, bytearray)
    root = np.frombuffer(memory, np.uint8) if of_bytes else memory
    for part in (array, root):
        if type(part) is not np.ndarray or part.dtype.hasobject:
            raise NotPlainError(f"it shares its memory with another array, as {type(part).__qualname__} of {part.dtype}")
    if not root.flags.forc:
        raise NotPlainError(f"it shares its memory with an array of unusual strides {root.strides}")
    place = _address(array) - _address(root), array.dtype, array.shape, array.strides
    return view_of, (memory, *place, array.flags.writeable)


def view_of(
    memory: Any, offset: int, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...], writeable: bool
) -> np.ndarray:
    if dtype.hasobject:
        raise NotPlainError("objects are not made from bytes")
    flat = np.frombuffer(memory, np.uint8) if isinstance(memory, bytearray) else memory.reshape(-1, order="A").view(np.uint8)
    view = np.ndarray(shape, dtype, flat, offset, strides)
    view.flags.writeable &= writeable
    return view


def reduce_unusual(array: np.ndarray) -> Any:
    """How to make an array again that is not told by its bytes in one piece."""
    if type(array) is not np.ndarray or (array.flags.forc and not array.dtype.hasobject):
        return NotImplemented
    reduced: Any = array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    # without the class itself, which could be called and would take any bytes for objects
    return (new_array, (), *reduced[2:]) if reduced[1][0] is np.ndarray else reduced


def new_array() -> np.ndarray:
    return np.empty(0)


def own_array(*description: Any) -> np.ndarray:
    """What NumPy would make of them, but not as a view of the bytes that were read."""
    array = _from_buffer(*description)
    return array.copy(order="K") if array.flags.writeable else array


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def require_apart(tensors: Sequence[th.Tensor], arrays: Sequence[np.ndarray]) -> None:
    """:raises NotPlainError: if a tensor shares its memory with another, or with an array"""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu" and tensor.numel()]
    spans = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
    spans += [(_address(array), _address(array) + array.nbytes) for array in arrays if array.size]
    spans.sort()
    if any(start < end for (_, end), (start, _) in pairwise(spans)):
        raise NotPlainError("it shares its memory with a tensor, or is a tensor that does")
