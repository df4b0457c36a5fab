"""Averages over states: weighted sums over chunks of rows, divided by the sum of weights. The only place that does so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch as th

T = TypeVar("T")

Rows = slice | th.Tensor
"""Consecutive states of a batch, or their indices."""


class Group(Protocol):
    """Those who average together: several processes that each hold a share of a batch, or one that holds it all."""

    def sum(self, shares: th.Tensor) -> th.Tensor:
        """The sum of everybody's shares, the same for everybody."""
        ...


class Alone:
    """The group of one process."""

    def sum(self, shares: th.Tensor) -> th.Tensor:
        return shares


ALONE = Alone()


def chunks_of(n_states: int, chunk_size: int) -> list[slice]:
    """Consecutive rows, ``chunk_size`` at a time.

    :raises ValueError: if either number is below 1
    """
    if n_states < 1 or chunk_size < 1:
        raise ValueError(f"n_states and chunk_size must be at least 1, got {n_states} and {chunk_size}")
    return [slice(start, min(start + chunk_size, n_states)) for start in range(0, n_states, chunk_size)]


@dataclass(frozen=True)
class Units:
    """How a batch of states may be split, how much each state counts, and with whom averages are taken.

    A unit is a state, or a sequence of states that a policy with memory needs together. The states of a unit are
    consecutive rows of the batch.

    :param count: of units, at least 1
    :param length: T, the states of each unit, padding included
    :param weights: of the states, (count * T,), 0 for padding; None: each counts 1
    :param group: who else holds a share of the batch
    """

    count: int
    length: int = 1
    weights: th.Tensor | None = None
    group: Group = ALONE
    total: float = field(init=False)
    """The sum of the weights, everybody's: so all of a group make their units at once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.total_of(slice(0, self.n_states)))

    @classmethod
    def of(cls, states: int | Units) -> Units:
        """Units as they are; a number stands for as many states, each a unit that counts 1."""
        return states if isinstance(states, Units) else cls(states)

    @property
    def n_states(self) -> int:
        """B: rows of the batch."""
        return self.count * self.length

    def chunks(self, chunk_size: int) -> list[slice]:
        """Consecutive rows, about ``chunk_size`` at a time, at least a unit."""
        units = chunks_of(self.count, max(1, chunk_size // self.length) if chunk_size > 0 else chunk_size)
        return [slice(part.start * self.length, part.stop * self.length) for part in units]

    def rows_of(self, units: th.Tensor) -> th.Tensor:
        """The rows of some units, given by their numbers."""
        if self.length == 1:
            return units
        return (units[:, None] * self.length + th.arange(self.length, device=units.device)).flatten()

    def apart(self, count: int) -> Units:
        """As many states of the batch that are averaged over by themselves, each counting 1."""
        return Units(count, group=self.group)

    def units_of(self, rows: Rows) -> Rows:
        """The numbers of the units that some rows are made of, in their order."""
        if isinstance(rows, slice):
            return slice(rows.start // self.length, rows.stop // self.length)
        return rows[:: self.length] // self.length

    def every(self, stride: int) -> tuple[Units, Callable[[slice], Rows]]:
        """Every ``stride``-th unit, and the rows here by the rows there."""
        count = -(-self.count // stride)
        if self.length == 1:

            def rows_here(rows: slice) -> Rows:
                return slice(rows.start * stride, rows.stop * stride, stride)
        else:

            def rows_here(rows: slice) -> Rows:
                return self.rows_of(th.arange(rows.start // self.length, rows.stop // self.length) * stride)

        whole = rows_here(slice(0, count * self.length))
        return replace(self, count=count, weights=None if self.weights is None else self.weights[whole]), rows_here

    def partition(self, size: int) -> list[th.Tensor]:
        """A random partition into parts of about ``size`` states, at least a unit each, from torch's global generator.

        In a group everybody makes as many parts, so that one's parts are shares of them.
        """
        order, each = th.randperm(self.count, device="cpu"), max(1, size // self.length)
        if self.group is ALONE:
            return [self.rows_of(units) for units in order.split(each)]
        units, at_once = self.group.sum(th.tensor([self.count, each], dtype=th.float64, device="cpu")).tolist()
        return [self.rows_of(units) for units in order.tensor_split(math.ceil(units / at_once))]

    def weigh(self, terms: th.Tensor, rows: Rows) -> th.Tensor:
        """Terms of these states, (rows, ·), times their weights."""
        if self.weights is None:
            return terms
        return terms * self.weights[rows].to(terms).view(-1, *[1] * (terms.ndim - 1))

    def moments(self, x: th.Tensor) -> tuple[float, float, float]:
        """Weighted mean, standard deviation with one degree of freedom less, and root mean square, everybody's.

        :param x: double precision, (B,); sums of weights must be above 1
        """
        everything = slice(0, self.n_states)
        total, squares = self.group.sum(th.stack([self.weigh(part, everything).sum() for part in (x, x * x)])).tolist()
        mean = total / self.total
        variance = float(self.group.sum(self.weigh((x - mean).square(), everything).sum())) / (self.total - 1.0)
        return mean, math.sqrt(variance), math.sqrt(squares / self.total)

    def mean(self, terms: th.Tensor, rows: th.Tensor, total: float) -> th.Tensor:
        """The weighted mean of the terms of a minibatch, (rows,); in a group one's share of it, with its graph.

        :param total: their :meth:`total_of`; asked for apart, because that waits for the others of a group
        """
        if self.weights is None and self.group is ALONE:
            return terms.mean()
        return self.weigh(terms, rows).sum() / total

    def total_of(self, rows: Rows) -> float:
        """The sum of the weights of a minibatch, everybody's."""
        if self.weights is not None:
            own = self.weights[rows].sum(dtype=th.float64)
        else:
            own = th.tensor(self.n_states if isinstance(rows, slice) else len(rows), dtype=th.float64, device="cpu")
        return float(self.group.sum(own))


class StateAverage:
    """The weighted average over the states of a batch of anything that is a sum over its rows.

    Rows are taken in chunks, so memory is bounded by ``chunk_size`` and not by the batch.

    :param states: B, or the units that the batch consists of
    :param chunk_size: the most states to handle in one pass, at least one unit
    """

    def __init__(self, states: int | Units, chunk_size: int) -> None:
        self.units = Units.of(states)
        self.chunks = self.units.chunks(chunk_size)

    def __call__(self, sum_over: Callable[[slice], th.Tensor]) -> th.Tensor:
        """(1/Σw) Σ over chunks of ``sum_over(rows)``, a tensor of any fixed shape; everybody's sums in a group.

        ``sum_over`` sums terms that :meth:`Units.weigh` has weighted.
        """
        total = sum_over(self.chunks[0])
        for rows in self.chunks[1:]:
            total = total + sum_over(rows)
        return self.units.group.sum(total) / self.units.total

    def keep_if_whole(self, build: Callable[[slice], T]) -> Callable[[slice], T]:
        """``build`` itself, or its one result where the batch is a single chunk.

        So a batch that fits is linearised once, and of a larger one only one chunk's graph is alive
        at a time.
        """
        if len(self.chunks) > 1:
            return build
        kept = build(self.chunks[0])
        return lambda rows: kept
