import itertools

import numpy as np
import pytest

from sb3_trpo_ext.lab.mdp import FiniteMDP, evaluate, evaluate_average, greedy, optimal_values, random_mdp
from tests.lab.cases import SEEDS, assert_equal, for_all, mdps, random_rows, well_mixed

P = np.full((2, 3, 2), 0.5)
R = np.zeros((2, 3))
RHO0 = np.array([0.5, 0.5])


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((changed(P, (1, 2, 0), 0.6), R, RHO0, 0.9), r"the sum of P\[1, 2\] must be 1, got 1.1"),
        ((changed(P, (0, 1), [1.5, -0.5]), R, RHO0, 0.9), r"P\[0, 1, 1\] must be a probability, got -0.5"),
        ((changed(P, (1, 0, 1), np.nan), R, RHO0, 0.9), r"P\[1, 0, 1\] must be a probability, got nan"),
        ((np.full((2, 3, 3), 1 / 3), R, RHO0, 0.9), r"P's shape must be \(S, A, S\), got \(2, 3, 3\)"),
        ((np.ones((2, 2)), R, RHO0, 0.9), r"P's shape must be \(S, A, S\), got \(2, 2\)"),
        ((P, R.T, RHO0, 0.9), r"R's shape must be \(2, 3\), as P says, got \(3, 2\)"),
        ((P, changed(R, (1, 2), np.inf), RHO0, 0.9), r"R\[1, 2\] must be finite, got inf"),
        ((P, R, np.ones(3) / 3, 0.9), r"rho0's shape must be \(2,\), got \(3,\)"),
        ((P, R, np.array([0.5, 0.4]), 0.9), r"the sum of rho0 must be 1, got 0.9"),
        ((P, R, RHO0, 1.0), r"gamma must be a number in \[0, 1\), got 1.0"),
        ((P, R, RHO0, -0.1), r"gamma must be a number in \[0, 1\), got -0.1"),
        ((P, R, RHO0, np.nan), r"gamma must be a number in \[0, 1\), got nan"),
    ],
)
def test_what_is_no_mdp_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        FiniteMDP(*arguments)


@pytest.mark.parametrize("evaluation", [evaluate, evaluate_average])
@pytest.mark.parametrize(
    "pi, message",
    [
        (np.ones((2, 2)) / 2, r"pi's shape must be \(2, 3\), got \(2, 2\)"),
        (np.ones((2, 3)), r"the sum of pi\[0\] must be 1, got 3.0"),
        (np.array([[1.0, 0.0, 0.0], [0.5, 0.7, -0.2]]), r"pi\[1, 2\] must be a probability, got -0.2"),
    ],
)
def test_what_is_no_policy_is_refused_by_name(evaluation, pi, message):
    with pytest.raises(ValueError, match=message):
        evaluation(FiniteMDP(P, R, RHO0, 0.9), pi)


def test_rows_in_single_precision_are_made_exact():
    thirds = np.full((3, 1, 3), 1 / 3, dtype=np.float32)
    mdp = FiniteMDP(thirds, np.zeros((3, 1)), thirds[0, 0], 0.5)
    assert mdp.P.dtype == np.float64
    assert (mdp.P.sum(axis=-1) == 1.0).all()
    with pytest.raises(ValueError, match="read-only"):
        mdp.P[0, 0, 0] = 1.0


@for_all(mdp=mdps(), seed=SEEDS)
def test_values_satisfy_their_definitions(mdp, seed):
    pi = random_rows(mdp, seed)
    values = evaluate(mdp, pi)
    scale = np.abs(mdp.R).max() / (1 - mdp.gamma)
    assert_equal(values.V, (pi * values.Q).sum(axis=1), scale)
    assert_equal(values.Q, mdp.R + mdp.gamma * mdp.P @ values.V, scale)
    assert_equal((pi * values.A).sum(axis=1), 0.0, scale)
    assert_equal(values.rho.sum(), 1 / (1 - mdp.gamma), 1 / (1 - mdp.gamma))
    assert_equal((values.rho[:, None] * pi * mdp.R).sum(), values.eta, scale)
    # the series that ρ is the sum of: what is left of it after T terms is γ^T/(1 − γ)
    chain, weight, states, total = np.einsum("sa,sat->st", pi, mdp.P), 1.0, mdp.rho0, np.zeros(len(mdp.rho0))
    for _ in range(60):
        total, states, weight = total + weight * states, states @ chain, weight * mdp.gamma
    assert np.abs(values.rho - total).max() <= weight / (1 - mdp.gamma) + 1e-9 * (1 + values.rho.max())


@for_all(mdp=well_mixed(), seed=SEEDS)
def test_average_values_satisfy_their_definitions(mdp, seed):
    pi = random_rows(mdp, seed)
    values = evaluate_average(mdp, pi)
    chain = np.einsum("sa,sat->st", pi, mdp.P)
    scale = np.abs(values.Q).max() + np.abs(mdp.R).max()
    assert_equal(values.rho @ chain, values.rho)
    assert_equal(values.rho.sum(), 1.0)
    assert_equal(values.eta, (values.rho[:, None] * pi * mdp.R).sum(), scale)
    assert_equal(values.V, (pi * values.Q).sum(axis=1), scale)
    assert_equal(values.Q, mdp.R - values.eta + mdp.P @ values.V, scale)
    assert_equal(values.rho @ values.V, 0.0, scale)


def test_average_q_is_the_sum_of_what_rewards_exceed_their_average_by():
    mdp = random_mdp(4, 2, seed=5)
    pi = np.full(mdp.shape, 0.5)
    values = evaluate_average(mdp, pi)
    chain, rewards = np.einsum("sa,sat->st", pi, mdp.P), (pi * mdp.R).sum(axis=1)
    total, states = mdp.R - values.eta, mdp.P
    for _ in range(200):
        total, states = total + states @ (rewards - values.eta), states @ chain
    np.testing.assert_allclose(values.Q, total, atol=1e-12)


def test_an_average_that_depends_on_the_start_is_refused():
    stay = np.eye(3)[:, None, :]
    with pytest.raises(ValueError, match="one recurrent class"):
        evaluate_average(FiniteMDP(stay, np.arange(3.0)[:, None], np.ones(3) / 3, 0.9), np.ones((3, 1)))


def test_a_periodic_chain_has_an_average():
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])[:, None, :]
    values = evaluate_average(FiniteMDP(swap, np.array([[1.0], [0.0]]), np.array([1.0, 0.0]), 0.9), np.ones((2, 1)))
    assert values.eta == pytest.approx(0.5)
    np.testing.assert_allclose(values.V, [0.25, -0.25])


@pytest.mark.parametrize("seed", range(10))
def test_the_optimum_is_the_best_of_all_deterministic_policies(seed):
    mdp = random_mdp(3, 3, gamma=0.9, seed=seed, concentration=0.3)
    best = max(evaluate(mdp, np.eye(3)[list(choice)]).eta for choice in itertools.product(range(3), repeat=3))
    optimum = optimal_values(mdp)
    assert optimum.eta == pytest.approx(best, abs=1e-10)
    assert optimum.A.max() <= 1e-10
    np.testing.assert_array_equal(greedy(optimum).argmax(axis=1), optimum.pi.argmax(axis=1))
