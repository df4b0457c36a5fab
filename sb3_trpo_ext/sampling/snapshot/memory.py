"""NumPy arrays that share memory: views stay views of what they were views of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th

from sb3_trpo_ext.sampling.snapshot.errors import NotPlainError


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
    return _view, (memory, *place, array.flags.writeable)


def _view(
    memory: Any, offset: int, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...], writeable: bool
) -> np.ndarray:
    flat = np.frombuffer(memory, np.uint8) if isinstance(memory, bytearray) else memory.reshape(-1, order="A").view(np.uint8)
    view = np.ndarray(shape, dtype, flat, offset, strides)
    view.flags.writeable &= writeable
    return view


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
