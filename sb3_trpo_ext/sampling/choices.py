"""Observations that are numbers of choices, as SB3 counts them: from 0, whatever kind of number they come as."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces


class Choices:
    """Discrete and MultiDiscrete observations, cast to integers as SB3 casts them and checked.

    :param space: Discrete or MultiDiscrete
    """

    def __init__(self, space: spaces.Space) -> None:
        self._space = space
        self.sizes = np.reshape(space.n if isinstance(space, spaces.Discrete) else space.nvec, -1).astype(np.int64)  # type: ignore[attr-defined]
        self._limits = self.sizes.astype(np.uint64)

    def rows(self, observations: np.ndarray) -> np.ndarray:
        """Choices (E, k) of observations (E, ·).

        :raises ValueError: for a number that stands for no choice
        """
        rows = observations.astype(np.int64, copy=False).reshape(-1, len(self.sizes))
        # a negative number is a huge one without its sign
        beyond = rows.view(np.uint64) >= self._limits
        if np.count_nonzero(beyond):
            row, i = np.argwhere(beyond)[0]
            advice = "; SB3 knows no start: subtract it in a wrapper" if np.any(getattr(self._space, "start", 0)) else ""
            expected = f"observations in {self._space} must be integers from 0 to {self.sizes[i] - 1}"
            raise ValueError(f"{expected}, got {observations.reshape(rows.shape)[row, i]}{advice}")
        return rows


class Checks:
    """The choices among observations of a space, each to be looked at before a network sees it."""

    def __init__(self, space: spaces.Space) -> None:
        parts: dict[Any, spaces.Space] = dict(space.spaces) if isinstance(space, spaces.Dict) else {None: space}
        self._choices = {
            key: Choices(part) for key, part in parts.items() if isinstance(part, (spaces.Discrete, spaces.MultiDiscrete))
        }

    def __call__(self, observations: Any) -> None:
        """:raises ValueError: for a number that stands for no choice"""
        for key, choices in self._choices.items():
            choices.rows(observations if key is None else observations[key])
