"""The statistics of the learning report, on samples whose answers are known."""

import numpy as np
import pytest
from _scores import (
    COVERAGE,
    interquartile_mean,
    interval,
    normalized,
    performance_profile,
    probability_of_improvement,
    time_to_reach,
)


def test_the_random_policy_scores_0_and_the_reference_1_on_average():
    reference, random = np.array([[10.0, -100.0], [30.0, -300.0]]), np.array([0.0, -1000.0])
    scores = normalized(np.vstack([reference.mean(axis=0), random]), reference, random)
    np.testing.assert_allclose(scores, [[1.0, 1.0], [0.0, 0.0]])


def test_interquartile_mean_drops_a_quarter_at_each_end():
    reference, random = np.array([[0.0], [2.0]]), np.zeros(1)
    scores = np.array([[-1e9], [1.0], [3.0], [1e9]])
    assert interquartile_mean(scores, reference, random) == pytest.approx(2.0)


def test_probability_of_improvement_counts_pairs_and_half_of_ties():
    ours, theirs = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.5])
    pairs = [(x > y) + 0.5 * (x == y) for x in ours for y in theirs]
    assert probability_of_improvement(ours[:, None], theirs[:, None]) == pytest.approx(np.mean(pairs))


def test_a_profile_is_the_share_of_runs_above_a_level():
    reference, random = np.full((2, 2), 10.0), np.zeros(2)
    profile = performance_profile(np.array([[5.0, 15.0], [20.0, 0.0]]), reference, random, np.array([0.0, 1.0, 1.5]))
    np.testing.assert_allclose(profile, [0.75, 0.5, 0.25])


def test_an_interval_covers_what_it_should_and_is_repeatable():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        found = interval(lambda x: x.mean(), rng.normal(3.0, 1.0, (20, 1)))
        hits += found.low <= 3.0 <= found.high
    assert 33 <= hits <= 40
    scores = rng.normal(size=(10, 2))
    assert interval(np.mean, scores) == interval(np.mean, scores)


@pytest.mark.parametrize("n_runs", COVERAGE)
def test_of_few_runs_an_interval_covers_as_seldom_as_the_report_says(n_runs):
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(2000, n_runs))
    drawn = rng.integers(0, n_runs, (2000, n_runs))
    low, high = np.percentile(samples[:, drawn].mean(axis=2), [2.5, 97.5], axis=1)
    assert 100 * np.mean((low <= 0.0) & (high >= 0.0)) == pytest.approx(COVERAGE[n_runs], abs=2.0)


def test_both_sides_are_resampled():
    ours, reference, random = np.full((5, 1), 10.0), np.array([[5.0], [10.0], [15.0]]), np.zeros(1)
    found = interval(lambda x, y: interquartile_mean(x, y, random), ours, reference)
    assert found.estimate == pytest.approx(1.0)
    # ours has no spread, so the interval is that of 10 / mean of three of the reference
    assert found.low == pytest.approx(10.0 / 15.0, rel=0.2) and found.high == pytest.approx(2.0, rel=0.2)


def test_several_figures_at_once_keep_their_order():
    found = interval(lambda x: np.array([x.mean(), x.mean() + 1.0]), np.arange(6.0)[:, None])
    np.testing.assert_allclose(found.high - found.low, (found.high - found.low)[0])
    np.testing.assert_allclose(found.estimate, [2.5, 3.5])


def test_time_to_reach_is_between_the_points_around_it():
    times, returns = np.array([0.0, 10.0, 20.0, 30.0]), np.array([0.0, 4.0, 8.0, 2.0])
    assert time_to_reach(5.0, times, returns) == pytest.approx(12.5)
    assert time_to_reach(-1.0, times, returns) == 0.0
    assert time_to_reach(9.0, times, returns) == np.inf
