"""Batches of observations: tensors, or dicts of tensors, whose first dimension is the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch as th

Batch = TypeVar("Batch")


def leaves(batch: Any) -> Iterator[Any]:
    """The tensors (or arrays) that a batch consists of."""
    if isinstance(batch, dict):
        for part in batch.values():
            yield from leaves(part)
    else:
        yield batch


def tree_map(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with a function applied to each tensor (or array)."""
    if isinstance(batch, dict):
        return {key: tree_map(function, part) for key, part in batch.items()}
    return function(batch)


def take(batch: Batch, rows: Any) -> Batch:
    """The rows of a batch; also of a named tuple of batches, whose missing fields stay None."""
    if batch is None:
        return batch
    if isinstance(batch, dict):
        return {key: take(part, rows) for key, part in batch.items()}  # type: ignore[return-value]
    if isinstance(batch, tuple):
        return type(batch)(*(take(part, rows) for part in batch))
    return batch[rows]  # type: ignore[index]


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch from several."""
    first = batches[0]
    if isinstance(first, dict):
        return {key: concatenate([batch[key] for batch in batches]) for key in first}  # type: ignore[index,return-value]
    return th.cat(batches)  # type: ignore[arg-type,return-value]


def length(batch: Any) -> int:
    """B."""
    return len(next(leaves(batch)))


def entries_per_state(batch: Any) -> int:
    """Numbers in one observation."""
    return sum(int(np.prod(leaf.shape[1:])) for leaf in leaves(batch))
