"""Statistics of a few runs, with rliable: scores against a reference, both sides resampled (Agarwal et al. 2021).

Scores are arrays (runs, environments). Intervals are 95% percentile intervals of the bootstrap that resamples
runs within each environment, the reference's independently of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from rliable import library, metrics

REPEATS = 5_000
"""Resamples of an interval."""
COVERAGE = {3: 75, 5: 83, 10: 90}
"""Of normal samples of so many runs: how often in 100 a 95% interval covers their mean."""
Statistic = Callable[..., "np.ndarray | float"]


class Interval(NamedTuple):
    """An estimate and the ends of its interval: numbers, or arrays of one shape."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __str__(self) -> str:
        return self.in_words("{:.2f}".format)

    def in_words(self, words: Callable[[float], str]) -> str:
        """As one line, each number put as ``words`` puts it."""
        return f"{words(float(self.estimate))} [{words(float(self.low))}, {words(float(self.high))}]"


def interval(statistic: Statistic, *samples: np.ndarray, effort: float = 1.0) -> Interval:
    """A statistic of one or several samples, each resampled by itself.

    :param statistic: samples ↦ a number, or an array (n,)
    :param samples: (runs, environments) each
    :param effort: share of ``REPEATS`` that a slow statistic is worth
    """
    logging.getLogger("absl").setLevel(logging.WARNING)
    np.random.seed(0)  # rliable draws from the global generator

    def flat(*drawn: np.ndarray) -> np.ndarray:
        return np.atleast_1d(np.asarray(statistic(*drawn), dtype=float))

    estimates, intervals = library.get_interval_estimates({"": list(samples)}, flat, reps=int(effort * REPEATS))
    estimate, (low, high) = estimates[""], intervals[""]
    if len(estimate) == 1:
        return Interval(estimate[0], low[0], high[0])
    return Interval(estimate, low, high)


def spread(scores: np.ndarray) -> str:
    """Mean ± standard deviation, where there are two or more, and how many there are."""
    deviation = f" ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""
    return f"{scores.mean():.1f}{deviation} ({len(scores)})"


def normalized(scores: np.ndarray, reference: np.ndarray, random: np.ndarray) -> np.ndarray:
    """(score − random) / (mean of the reference − random), environment by environment.

    :param scores: (runs, environments)
    :param reference: (runs of the reference, environments)
    :param random: of the random policy, (environments,)
    """
    return (scores - random) / (reference.mean(axis=0) - random)


def interquartile_mean(scores: np.ndarray, reference: np.ndarray, random: np.ndarray) -> float:
    """IQM of normalised scores over runs and environments together."""
    return float(metrics.aggregate_iqm(normalized(scores, reference, random)))


def probability_of_improvement(scores: np.ndarray, reference: np.ndarray) -> float:
    """P(a run of ours is better than one of the reference), ties counted half; averaged over environments."""
    return float(metrics.probability_of_improvement(scores, reference))


def performance_profile(scores: np.ndarray, reference: np.ndarray, random: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Share of runs whose normalised score is above each level, (levels,)."""
    return (normalized(scores, reference, random).reshape(-1, 1) > levels).mean(axis=0)


def time_to_reach(level: float, times: np.ndarray, returns: np.ndarray) -> float:
    """When a curve first reaches a level, straight between its points; infinite where it does not.

    :param times: (points,)
    :param returns: (points,)
    """
    reached = np.flatnonzero(returns >= level)
    if len(reached) == 0:
        return np.inf
    after = int(reached[0])
    if after == 0:
        return float(times[0])
    rise = returns[after] - returns[after - 1]
    share = (level - returns[after - 1]) / rise
    return float(times[after - 1] + share * (times[after] - times[after - 1]))
