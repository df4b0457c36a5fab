"""Backtracking over fractions of a full step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class LineSearchResult(Generic[Value]):
    """What :func:`backtracking_line_search` found.

    :param accepted: whether a candidate passed
    :param fraction: the fraction of the accepted candidate, 0.0 if none passed
    :param value: what ``evaluate`` gave for the accepted candidate, else for the last one tried
    :param backtracks: how many candidates were refused
    """

    accepted: bool
    fraction: float
    value: Value
    backtracks: int


def backtracking_line_search(
    evaluate: Callable[[float], Value],
    accept: Callable[[float, Value], bool],
    *,
    shrinking_factor: float,
    max_iter: int,
) -> LineSearchResult[Value]:
    """Try the fractions 1, c, c², … of a full step until one is accepted.

    :param evaluate: moves to a fraction of the step and measures there
    :param accept: judges a fraction and its measurement
    :param shrinking_factor: c, strictly between 0 and 1
    :param max_iter: how many candidates to try, at least 1
    :raises ValueError: for a shrinking factor or a number of candidates outside its range
    """
    if not 0.0 < shrinking_factor < 1.0:
        raise ValueError(f"shrinking_factor must lie strictly between 0 and 1, got {shrinking_factor}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    for backtracks in range(max_iter):
        fraction = shrinking_factor**backtracks
        value = evaluate(fraction)
        if accept(fraction, value):
            return LineSearchResult(True, fraction, value, backtracks)
    return LineSearchResult(False, 0.0, value, max_iter)
