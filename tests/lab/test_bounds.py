import itertools

import numpy as np
import pytest

from sb3_trpo_ext.lab import bounds
from sb3_trpo_ext.lab.mdp import FiniteMDP, evaluate, evaluate_average, random_mdp
from tests.lab.cases import SEEDS, assert_equal, for_all, mdps, random_policy, random_rows, st, well_mixed


@for_all(mdp=mdps(), seeds=st.tuples(SEEDS, SEEDS))
def test_performance_difference_lemma(mdp, seeds):
    old, new = (evaluate(mdp, random_rows(mdp, seed)) for seed in seeds)
    assert_equal(bounds.performance_difference(old, new), new.eta - old.eta, abs(old.eta))


@for_all(mdp=well_mixed(), seeds=st.tuples(SEEDS, SEEDS))
def test_performance_difference_lemma_of_the_average_reward(mdp, seeds):
    old, new = (evaluate_average(mdp, random_rows(mdp, seed)) for seed in seeds)
    assert_equal(bounds.performance_difference(old, new), new.eta - old.eta, abs(old.eta))


@for_all(mdp=mdps(), seeds=st.tuples(SEEDS, SEEDS))
def test_the_surrogate_is_eta_at_the_old_policy_and_linear(mdp, seeds):
    old, pi_new = evaluate(mdp, random_rows(mdp, seeds[0])), random_rows(mdp, seeds[1])
    assert_equal(bounds.surrogate(old, old.pi), old.eta, abs(old.eta))
    # the surrogate is what the lemma gives with the old policy's visits
    direct = old.eta + sum(
        old.rho[s] * pi_new[s, a] * (old.Q[s, a] - old.V[s]) for s, a in itertools.product(*map(range, mdp.shape))
    )
    assert_equal(bounds.surrogate(old, pi_new), direct, abs(old.eta))
    half = bounds.surrogate(old, bounds.mixture(old.pi, pi_new, 0.5))
    assert_equal(half, 0.5 * (old.eta + bounds.surrogate(old, pi_new)), abs(old.eta))


@for_all(n=st.integers(1, 6), seeds=st.tuples(SEEDS, SEEDS), same=st.booleans())
def test_total_variation_is_one_number_three_ways(n, seeds, same):
    p, q = (np.random.default_rng(seed).dirichlet(np.full(n, 0.5)) for seed in seeds)
    q = p if same else q
    tv = bounds.total_variation(p, q)
    assert_equal(bounds.total_variation_over_events(p, q), tv)
    joint = bounds.maximal_coupling(p, q)
    assert joint.min() >= 0.0
    assert_equal(joint.sum(axis=1), p)
    assert_equal(joint.sum(axis=0), q)
    assert_equal(joint.sum() - np.trace(joint), tv)
    # no coupling does better: any other one, the independent one say, differs at least as often
    assert 1.0 - np.trace(np.outer(p, q)) >= tv - 1e-9


@for_all(n=st.integers(1, 6), seeds=st.tuples(SEEDS, SEEDS))
def test_pinsker(n, seeds):
    p, q = (np.random.default_rng(seed).dirichlet(np.full(n, 0.5)) for seed in seeds)
    tv, kl = bounds.total_variation(p, q), bounds.kl_divergence(p, q)
    assert tv**2 <= kl / 2 + 1e-12
    assert kl >= 0.0
    assert bounds.kl_divergence(p, p) == 0.0


def test_kl_where_probabilities_are_zero():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([1.0, 0.0, 0.0])
    assert bounds.kl_divergence(p, q) == np.inf
    assert bounds.kl_divergence(q, p) == pytest.approx(np.log(2))


@for_all(mdp=mdps(), seeds=st.tuples(SEEDS, SEEDS))
def test_expected_advantages_are_bounded_by_the_coupling(mdp, seeds):
    old, pi_new = evaluate(mdp, random_rows(mdp, seeds[0])), random_rows(mdp, seeds[1])
    gain = bounds.expected_advantage(old, pi_new)
    assert np.abs(gain).max() <= bounds.expected_advantage_bound(old, pi_new) + 1e-9 * max(1.0, abs(old.eta))
    for s in range(mdp.shape[0]):
        joint = bounds.maximal_coupling(old.pi[s], pi_new[s])
        disagreement = (joint * (old.A[s][None, :] - old.A[s][:, None])).sum()
        assert_equal(disagreement, gain[s], abs(old.eta))


@for_all(mdp=mdps(), seeds=st.tuples(SEEDS, SEEDS), closeness=st.floats(0, 1))
def test_lower_bounds_of_any_new_policy(mdp, seeds, closeness):
    old = evaluate(mdp, random_rows(mdp, seeds[0]))
    pi_new = bounds.mixture(old.pi, random_rows(mdp, seeds[1]), closeness)
    eta, slack = evaluate(mdp, pi_new).eta, 1e-9 * max(1.0, abs(old.eta))
    assert eta >= bounds.tv_lower_bound(old, pi_new) - slack
    assert eta >= bounds.kl_lower_bound(old, pi_new) - slack
    assert bounds.kl_lower_bound(old, pi_new) <= bounds.tv_lower_bound(old, pi_new) + slack


@for_all(mdp=mdps(), seeds=st.tuples(SEEDS, SEEDS), alpha=st.floats(0, 1))
def test_lower_bound_of_mixtures(mdp, seeds, alpha):
    old, other = evaluate(mdp, random_rows(mdp, seeds[0])), random_rows(mdp, seeds[1])
    mixed = bounds.mixture(old.pi, other, alpha)
    bound, slack = bounds.mixture_lower_bound(old, other, alpha), 1e-9 * max(1.0, abs(old.eta))
    assert evaluate(mdp, mixed).eta >= bound - slack
    # the survey's eq. 33, which is looser
    epsilon = np.abs(bounds.expected_advantage(old, other)).max()
    loose = bounds.surrogate(old, mixed) - 2 * epsilon * mdp.gamma * alpha**2 / (1 - mdp.gamma) ** 2
    assert loose <= bound + slack


def test_bounds_by_hand():
    # one state, rewards 1 and 0, γ = ½, even π: η = 1, A = ±½, C = 4·½·½/¼ = 4
    mdp = FiniteMDP(np.ones((1, 2, 1)), np.array([[1.0, 0.0]]), np.ones(1), 0.5)
    old, better = evaluate(mdp, np.array([[0.5, 0.5]])), np.array([[1.0, 0.0]])
    assert bounds.penalty_coefficient(old) == pytest.approx(4.0)
    # L = 1 + 2·½, TV = ½, KL = ∞ one way and, to (¾, ¼), ½ log(4/3); ε = ½ for the mixture with the better policy
    assert bounds.surrogate(old, better) == pytest.approx(2.0)
    assert bounds.tv_lower_bound(old, better) == pytest.approx(2.0 - 4.0 * 0.25)
    assert bounds.kl_lower_bound(old, better) == -np.inf
    assert bounds.kl_lower_bound(old, np.array([[0.75, 0.25]])) == pytest.approx(1.5 - 4.0 * 0.5 * np.log(4 / 3))
    assert bounds.mixture_lower_bound(old, better, 0.5) == pytest.approx(1.5 - 2 * 0.5 * 0.5 * 0.25 / (0.75 * 0.5))
    assert bounds.expected_advantage_bound(old, better) == pytest.approx(2 * 0.5 * 0.5)


def test_the_bounds_are_about_the_discounted_return():
    mdp = random_mdp(3, 2)
    old = evaluate_average(mdp, np.full(mdp.shape, 0.5))
    for bound in (bounds.tv_lower_bound, bounds.kl_lower_bound, lambda v, pi: bounds.mixture_lower_bound(v, pi, 0.5)):
        with pytest.raises(ValueError, match="gamma must be below 1"):
            bound(old, old.pi)


def trajectory_kl(mdp, pi, pi_new, horizon):
    """By every trajectory there is."""
    n_states, n_actions = mdp.shape
    total = 0.0
    for tau in itertools.product(itertools.product(range(n_states), range(n_actions)), repeat=horizon):
        p = q = mdp.rho0[tau[0][0]]
        for h, (s, a) in enumerate(tau):
            dynamics = mdp.P[s, a, tau[h + 1][0]] if h + 1 < horizon else 1.0
            p, q = p * pi[s, a] * dynamics, q * pi_new[s, a] * dynamics
        total += p * np.log(p / q)
    return total


@for_all(mdp=mdps(max_states=2), seeds=st.tuples(SEEDS, SEEDS), horizon=st.integers(1, 2))
def test_the_kl_of_trajectories_is_the_sum_of_the_steps(mdp, seeds, horizon):
    pi, pi_new = (random_policy(mdp, seed) for seed in seeds)
    steps = bounds.step_kls(mdp, pi, pi_new, horizon)
    assert steps.shape == (horizon,)
    assert_equal(steps.sum(), trajectory_kl(mdp, pi, pi_new, horizon), steps.sum())


@for_all(mdp=mdps(), seeds=st.tuples(SEEDS, SEEDS))
def test_discounted_steps_add_up_to_the_kl_over_visits(mdp, seeds):
    pi, pi_new = (random_policy(mdp, seed) for seed in seeds)
    old = evaluate(mdp, pi)
    steps = bounds.step_kls(mdp, pi, pi_new, 80)
    discounted = (mdp.gamma ** np.arange(80)) @ steps
    expected = old.rho @ bounds.kl_divergence(pi, pi_new)
    rest = mdp.gamma**80 / (1 - mdp.gamma) * bounds.divergence(old, pi_new).max_kl
    assert -1e-9 <= expected - discounted <= rest + 1e-9
    assert_equal(bounds.divergence(old, pi_new).mean_kl, expected * (1 - mdp.gamma), expected)


def test_arguments_are_checked():
    mdp = random_mdp(2, 2)
    pi = np.full(mdp.shape, 0.5)
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1, got 0"):
        bounds.step_kls(mdp, pi, pi, 0)
    with pytest.raises(ValueError, match=r"pi_new's shape must be \(2, 2\), got \(3, 2\)"):
        bounds.surrogate(evaluate(mdp, pi), np.full((3, 2), 0.5))
    with pytest.raises(ValueError, match="at most 20"):
        bounds.total_variation_over_events(np.ones(21) / 21, np.ones(21) / 21)
    for alpha in (-1.0, 2.0, np.nan):
        with pytest.raises(ValueError, match=r"alpha must be a number in \[0, 1\]"):
            bounds.mixture_lower_bound(evaluate(mdp, pi), pi, alpha)


@pytest.mark.parametrize(
    "function",
    [bounds.total_variation, bounds.total_variation_over_events, bounds.maximal_coupling, bounds.kl_divergence],
)
@pytest.mark.parametrize(
    "p, q, message",
    [
        ([0.5, 0.5], [1.0, 0.0, 0.0], r"q's shape must be \(2,\), got \(3,\)"),
        ([0.5, 0.5], [1.0], r"q's shape must be \(2,\), got \(1,\)"),
        ([5.0, 5.0], [0.5, 0.5], "the sum of p must be 1, got 10.0"),
        ([0.5, 0.5], [1.5, -0.5], r"q\[1\] must be a probability, got -0.5"),
    ],
)
def test_what_are_no_distributions_is_refused_by_name(function, p, q, message):
    with pytest.raises(ValueError, match=message):
        function(p, q)
