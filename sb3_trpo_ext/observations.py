"""Batches of observations: tensors, or dicts of tensors, whose first dimension is the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_trpo_ext.numerics.averages import Rows, Units


class Indexed(Protocol):
    """Vectors of a batch of states by rows: a tensor (B, D), or what computes its rows when asked."""

    def __getitem__(self, rows: Rows, /) -> th.Tensor: ...


Batch = TypeVar("Batch")
Samples = TypeVar("Samples")


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


def take(batch: Any, rows: Any) -> Any:
    """The rows of a batch."""
    return tree_map(lambda leaf: leaf[rows], batch)


def take_samples(samples: Samples, rows: Rows, states: int | Units) -> Samples:
    """The rows of a rollout buffer's samples, whatever further fields they have.

    Only tensors that are as long as the batch have rows, and those that are as long as it has units have one for each
    unit; anything else belongs to the batch as a whole.

    :param states: B, or the units that the batch consists of
    """
    batch = Units.of(states)
    rows_by_length = {batch.count: batch.units_of(rows), batch.n_states: rows}

    def part(field: Any) -> Any:
        if isinstance(field, dict):
            return {key: part(value) for key, value in field.items()}
        if isinstance(field, (tuple, list)):
            parts = [part(value) for value in field]
            return type(field)(*parts) if hasattr(field, "_fields") else type(field)(parts)
        own = rows_by_length.get(len(field)) if isinstance(field, th.Tensor) and field.ndim > 0 else None
        return field if own is None else field[own]

    return part(samples)


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


def numbers_seen(space: spaces.Space) -> int:
    """Numbers that SB3's preprocessing has in hand, at most, when it shows one observation to the networks."""
    if isinstance(space, spaces.Dict):
        return sum(numbers_seen(part) for part in space.values())
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        # one-hot codes as whole numbers of twice the size, then as floats
        return 3 * choices(space)
    return int(np.prod(space.shape or ()))


def choices(space: spaces.Discrete | spaces.MultiDiscrete) -> int:
    return int(space.n if isinstance(space, spaces.Discrete) else space.nvec.sum())
