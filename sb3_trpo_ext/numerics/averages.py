"""Averages over states: sums over chunks of rows, divided by a count. The only place that does so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch as th

T = TypeVar("T")


def chunks_of(n_states: int, chunk_size: int) -> list[slice]:
    """Consecutive rows, ``chunk_size`` at a time.

    :raises ValueError: if either number is below 1
    """
    if n_states < 1 or chunk_size < 1:
        raise ValueError(f"n_states and chunk_size must be at least 1, got {n_states} and {chunk_size}")
    return [slice(start, min(start + chunk_size, n_states)) for start in range(0, n_states, chunk_size)]


class StateAverage:
    """The average over B states of anything that is a sum over rows.

    Rows are taken in chunks, so memory is bounded by ``chunk_size`` and not by B.

    :param n_states: B, at least 1
    :param chunk_size: the most states to handle in one pass
    """

    def __init__(self, n_states: int, chunk_size: int) -> None:
        self.n_states = n_states
        self.chunks = chunks_of(n_states, chunk_size)

    def __call__(self, sum_over: Callable[[slice], th.Tensor]) -> th.Tensor:
        """(1/B) Σ over chunks of ``sum_over(rows)``, a tensor of any fixed shape."""
        total = sum_over(self.chunks[0])
        for rows in self.chunks[1:]:
            total = total + sum_over(rows)
        return total / self.n_states

    def keep_if_whole(self, build: Callable[[slice], T]) -> Callable[[slice], T]:
        """``build`` itself, or its one result where the batch is a single chunk.

        So a batch that fits is linearised once, and of a larger one only one chunk's graph is alive
        at a time.
        """
        if len(self.chunks) > 1:
            return build
        kept = build(self.chunks[0])
        return lambda rows: kept
