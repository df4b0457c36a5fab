from itertools import islice, pairwise

import numpy as np
import pytest
import torch as th

from sb3_trpo_ext.lab import bounds
from sb3_trpo_ext.lab.algorithms import (
    conservative_policy_iteration,
    exact_trpo,
    gradient_ascent,
    monotone_policy_iteration,
    natural_policy_gradient,
    trust_region_policy_iteration,
)
from sb3_trpo_ext.lab.mdp import FiniteMDP, evaluate, greedy, optimal_values, random_mdp
from sb3_trpo_ext.lab.page import two_action_example
from sb3_trpo_ext.lab.policies import LogLinear, TabularSoftmax, probabilities
from sb3_trpo_ext.trust_region import TrustRegionSettings
from tests.lab.cases import SEEDS, assert_equal, for_all, mdps, random_policy, st


def history(algorithm, n=4):
    return list(islice(algorithm, n))


def assert_never_falls(iterates):
    returns = [iterate.values.eta for iterate in iterates]
    assert np.diff(returns).min() >= -1e-10


def assert_bounds_hold(iterates):
    slack = 1e-10 * max(1.0, abs(iterates[0].values.eta))
    for before, after in pairwise(iterates):
        assert after.values.eta >= after.lower_bound - slack
        assert after.lower_bound >= before.values.eta - slack


@for_all(mdp=mdps(), seed=SEEDS)
def test_conservative_policy_iteration_is_monotone(mdp, seed):
    iterates = history(conservative_policy_iteration(mdp, random_policy(mdp, seed)), 20)
    assert_never_falls(iterates)
    assert_bounds_hold(iterates)


@for_all(mdp=mdps(), seed=SEEDS)
def test_the_mixtures_step_is_the_best_for_the_bound(mdp, seed):
    start, after = history(conservative_policy_iteration(mdp, random_policy(mdp, seed)), 2)
    old = start.values
    others = [bounds.mixture_lower_bound(old, greedy(old), alpha) for alpha in np.linspace(0, 1, 21)]
    assert after.lower_bound >= max(others) - 1e-9 * (1 + np.abs(others).max())


@for_all(mdp=mdps(), seed=SEEDS)
def test_the_penalty_algorithm_is_monotone(mdp, seed):
    iterates = history(monotone_policy_iteration(mdp, random_policy(mdp, seed)), 3)
    assert_never_falls(iterates)
    assert_bounds_hold(iterates)


@pytest.mark.parametrize("algorithm", [monotone_policy_iteration, "natural gradient"])
def test_long_histories_are_monotone(algorithm):
    for seed in range(12):
        mdp = random_mdp(4, 3, gamma=[0.3, 0.6, 0.9, 0.97][seed % 4], seed=seed, concentration=[0.1, 1.0][seed % 2])
        pi = random_policy(mdp, seed)
        if algorithm == "natural gradient":
            assert_never_falls(history(natural_policy_gradient(mdp, TabularSoftmax(np.log(pi)), 0.1), 40))
        else:
            iterates = history(algorithm(mdp, pi), 25)
            assert_never_falls(iterates)
            assert_bounds_hold(iterates)


@pytest.mark.parametrize("seed", range(5))
def test_the_penalty_algorithm_stays_where_it_is_when_rounding_is_all_there_is_to_gain(seed):
    mdp = random_mdp(4, 3, seed=seed)
    nearly_optimal = bounds.mixture(optimal_values(mdp).pi, np.full(mdp.shape, 1 / 3), 1e-12)
    start, after = history(monotone_policy_iteration(mdp, nearly_optimal), 2)
    assert after.lower_bound == after.values.eta == start.values.eta
    np.testing.assert_array_equal(after.values.pi, start.values.pi)


@for_all(mdp=mdps(), seed=SEEDS, closeness=st.floats(-12, 0), further=st.floats(0.1, 3.0), other=SEEDS)
def test_no_policy_has_a_higher_penalised_surrogate(mdp, seed, closeness, further, other):
    start, after = history(monotone_policy_iteration(mdp, random_policy(mdp, seed)), 2)
    old, new = start.values, after.values.pi
    rivals = [bounds.mixture(old.pi, target, 10.0**closeness) for target in (random_policy(mdp, other), greedy(old))]
    # along the step, short of it and beyond
    rivals.append(bounds.mixture(old.pi, new, min(further, 1.0)))
    if (bounds.mixture(old.pi, new, further) >= 0.0).all():
        rivals.append(bounds.mixture(old.pi, new, further))
    for rival in rivals:
        slack = 1e-8 * (after.lower_bound - old.eta) + 1e-12 * (1.0 + np.abs(old.Q).max() / (1 - mdp.gamma))
        assert bounds.kl_lower_bound(old, rival) <= after.lower_bound + slack


@for_all(mdp=mdps(), seed=SEEDS, step_size=st.floats(1e-3, 0.1))
def test_tabular_natural_gradient_is_monotone(mdp, seed, step_size):
    logits = np.log(random_policy(mdp, seed))
    assert_never_falls(history(natural_policy_gradient(mdp, TabularSoftmax(logits), step_size)))


def test_tabular_natural_gradient_finds_the_optimum_and_stays_there():
    gaps = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        mdp = random_mdp(*rng.integers(2, 6, size=2), gamma=float(rng.choice([0.5, 0.8, 0.9])), seed=seed)
        best = optimal_values(mdp).eta
        iterates = []
        for iterate in islice(natural_policy_gradient(mdp, TabularSoftmax(np.zeros(mdp.shape)), lambda k: 1.2**k), 301):
            iterates.append(iterate)
            # some go on for long: then the probabilities underflow, and F with them
            if seed >= 5 and best - iterate.values.eta <= 1e-6:
                break
        assert_never_falls(iterates)
        gaps.append(best - iterates[-1].values.eta)
    assert max(gaps) <= 1e-6
    assert min(gaps) >= -1e-9


@pytest.mark.parametrize("constraint", ["mean", "max"])
@for_all(mdp=mdps(), seed=SEEDS, other=SEEDS, target_kl=st.floats(1e-4, 0.5))
def test_no_policy_within_the_constraint_has_a_higher_surrogate(constraint, mdp, seed, other, target_kl):
    start, after = history(trust_region_policy_iteration(mdp, random_policy(mdp, seed), target_kl, constraint), 2)
    old = start.values

    def kl(pi):
        apart = bounds.divergence(old, pi)
        return apart.max_kl if constraint == "max" else apart.mean_kl

    assert kl(after.values.pi) <= target_kl * (1 + 1e-6) + 1e-12
    best = bounds.surrogate(old, after.values.pi)
    for target in (random_policy(mdp, other), greedy(old), after.values.pi):
        fraction = next(c for c in 0.9 ** np.arange(300) if kl(bounds.mixture(old.pi, target, c)) <= target_kl)
        rival = bounds.surrogate(old, bounds.mixture(old.pi, target, fraction))
        assert rival <= best + 1e-4 * (best - old.eta) + 1e-9 * (1 + abs(old.eta))


@pytest.mark.parametrize("constraint", ["mean", "max"])
def test_trust_region_policy_iteration_uses_the_whole_constraint_and_arrives(constraint):
    mdp = random_mdp(5, 3, seed=1)
    iterates = history(trust_region_policy_iteration(mdp, np.full(mdp.shape, 1 / 3), 0.05, constraint), 20)
    used = iterates[1].max_kl if constraint == "max" else iterates[1].mean_kl
    assert used == pytest.approx(0.05, rel=1e-4)
    assert iterates[-1].values.eta == pytest.approx(optimal_values(mdp).eta, abs=1e-3)


@pytest.mark.parametrize("constraint", ["mean", "max"])
def test_exact_trpo_keeps_to_the_constraint_and_arrives(constraint):
    mdp = random_mdp(5, 3, seed=1)
    settings = TrustRegionSettings(target_kl=0.05, cg_damping=1e-8)
    iterates = history(exact_trpo(mdp, TabularSoftmax(np.zeros(mdp.shape)), settings, constraint), 40)
    for iterate in iterates[1:]:
        assert (iterate.max_kl if constraint == "max" else iterate.mean_kl) <= 0.05
    assert_never_falls(iterates)
    assert iterates[-1].values.eta == pytest.approx(optimal_values(mdp).eta, abs=1e-2)


def test_small_trust_region_steps_are_natural_gradient_steps():
    mdp = random_mdp(4, 3, seed=2)
    start, after = history(trust_region_policy_iteration(mdp, np.full(mdp.shape, 1 / 3), 1e-8), 2)
    old = start.values
    # sqrt(2δ / gᵀF⁺g) F⁺g, of which A is the tabular F⁺g
    size = np.sqrt(2e-8 / (old.state_weights @ (old.pi * old.A**2).sum(axis=1)))
    np.testing.assert_allclose(after.values.pi, old.pi * (1 + size * old.A), atol=1e-7)


def test_plain_gradient_ascent_climbs():
    mdp = random_mdp(4, 3, seed=2)
    iterates = history(gradient_ascent(mdp, LogLinear(np.random.default_rng(0).normal(size=(4, 3, 3))), 0.01), 30)
    assert_never_falls(iterates)
    assert iterates[-1].values.eta > iterates[0].values.eta + 0.1


@pytest.mark.parametrize("theta", [-3.0, 0.0, 2.0])
def test_the_lectures_two_actions(theta):
    plain, natural = two_action_example(theta, step_size=0.01, n_steps=20)
    np.testing.assert_allclose(np.diff(natural), 0.99, rtol=1e-9)
    slope = 99 * np.exp(plain) / (1 + np.exp(plain)) ** 2
    np.testing.assert_allclose(np.diff(plain), 0.01 * slope[:-1], rtol=1e-9)
    rising = plain[:-1] > 0
    assert (np.diff(np.diff(plain)[rising]) < 0).all()


def test_the_lectures_natural_steps_end_where_the_other_action_has_no_probability_left():
    steps = np.diff(two_action_example(step_size=0.1)[1])
    np.testing.assert_allclose(steps[:70], 9.9, rtol=1e-9)
    assert (steps[-10:] == 0.0).all()


def test_without_a_future_one_step_is_enough():
    mdp = random_mdp(4, 3, gamma=0.0)
    for algorithm in (conservative_policy_iteration, monotone_policy_iteration):
        iterates = history(algorithm(mdp, np.full(mdp.shape, 1 / 3)))
        assert_equal([iterate.values.eta for iterate in iterates[1:]], optimal_values(mdp).eta)


def test_at_the_optimum_nothing_moves():
    mdp = FiniteMDP(np.full((2, 2, 2), 0.5), np.ones((2, 2)), np.array([0.5, 0.5]), 0.9)
    pi = np.array([[0.3, 0.7], [0.5, 0.5]])
    for algorithm in (
        conservative_policy_iteration(mdp, pi),
        monotone_policy_iteration(mdp, pi),
        trust_region_policy_iteration(mdp, pi, 0.1),
        trust_region_policy_iteration(mdp, pi, 0.1, "max"),
    ):
        assert_equal([iterate.values.eta for iterate in history(algorithm)], 10.0)


def test_arguments_are_checked():
    mdp, even = random_mdp(2, 2), np.full((2, 2), 0.5)
    for algorithm in (monotone_policy_iteration, lambda mdp, pi: trust_region_policy_iteration(mdp, pi, 0.1)):
        with pytest.raises(ValueError, match=r"pi\[1, 1\] must be positive, got 0.0"):
            algorithm(mdp, np.array([[0.5, 0.5], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="target_kl must be a number in"):
        trust_region_policy_iteration(mdp, even, 0.0)
    with pytest.raises(ValueError, match="constraint must be one of 'mean', 'max', got 'median'"):
        trust_region_policy_iteration(mdp, even, 0.1, "median")
    policy = TabularSoftmax(np.zeros((2, 2)))
    for bad in (np.nan, -0.1, "0.1"):
        with pytest.raises(ValueError, match=r"step_size must be a number in \[0, inf\), got"):
            gradient_ascent(mdp, policy, bad)
    with pytest.raises(ValueError, match=r"step_size must be .*got nan"):
        history(natural_policy_gradient(mdp, policy, lambda k: [0.1, np.nan][k]))
    assert (policy.logits.detach().numpy() != 0.0).all() and np.isfinite(policy.logits.detach().numpy()).all()


def test_policies_are_moved_in_place():
    mdp, policy = random_mdp(2, 2), TabularSoftmax(np.zeros((2, 2)))
    iterates = history(natural_policy_gradient(mdp, policy, 0.5), 3)
    np.testing.assert_allclose(probabilities(policy, 2), iterates[-1].values.pi, rtol=1e-14)
    assert evaluate(mdp, iterates[-1].values.pi).eta == iterates[-1].values.eta
    assert policy.logits.dtype == th.float64
