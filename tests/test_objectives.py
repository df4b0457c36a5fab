import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_trpo_ext.objectives import (
    AllActionsSurrogate,
    EntropyBonus,
    SelfNormalizedSurrogate,
    SinglePathSurrogate,
    center_q_values,
    normalize_advantages,
)
from tests.cases import CASES, observations, sample_actions


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20))
def test_normalised_advantages_are_always_finite(values):
    advantages = th.tensor(values)
    normalised = normalize_advantages(advantages)
    assert normalised.dtype == advantages.dtype and th.isfinite(normalised).all()
    if normalised.any():
        assert abs(float(normalised.double().mean())) < 1e-5


def test_normalisation_is_that_of_sb3_contrib():
    advantages = th.randn(100) * 3 + 7
    expected = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    th.testing.assert_close(normalize_advantages(advantages), expected)


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.7e8, 1e-30])
def test_constant_advantages_prefer_nothing(constant):
    assert not normalize_advantages(th.full((9,), constant)).any()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_surrogate_is_the_importance_weighted_advantage(case):
    old, new, obs = case.policy(seed=0), case.policy(seed=3), observations(5)
    actions, advantages = sample_actions(old, obs), th.randn(5, dtype=th.float64)
    surrogate = SinglePathSurrogate(actions, advantages)
    with th.no_grad():
        log_old = old.get_distribution(obs).log_prob(actions)
        log_new = new.get_distribution(obs).log_prob(actions)
        for rows in (slice(0, 2), slice(2, 5)):
            surrogate.set_old(old.get_distribution(obs[rows]), rows)
            expected = (log_new.exp() / log_old.exp() * advantages)[rows]
            th.testing.assert_close(surrogate.terms(new.get_distribution(obs[rows]), rows), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_entropy_bonus(case):
    policy, obs = case.policy(), observations(4)
    actions = sample_actions(policy, obs)
    bonus = EntropyBonus(actions, ent_coef=0.3)
    with th.no_grad():
        distribution = policy.get_distribution(obs)
        bonus.set_old(distribution, slice(0, 4))
        entropy = distribution.entropy()
        expected = -distribution.log_prob(actions) if entropy is None else entropy
        np.testing.assert_allclose(bonus.terms(distribution, slice(0, 4)), 0.3 * expected)


def branches_of(policy, obs, n_actions=3):
    with th.no_grad():
        th.manual_seed(5)
        actions = th.stack([policy.get_distribution(obs).get_actions() for _ in range(n_actions)], dim=1)
        log_probs = th.stack([policy.get_distribution(obs).log_prob(actions[:, k]) for k in range(n_actions)], dim=1)
    return actions, log_probs


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_surrogates_of_the_vine_are_the_papers_sums(case):
    old, new, obs = case.policy(seed=0), case.policy(seed=3), observations(5)
    actions, log_q = branches_of(old, obs)
    q_values, multiplicities = th.randn(5, 3, dtype=th.float64), th.tensor([[1.0, 2.0, 0.0]]).expand(5, 3).double()
    with th.no_grad():
        distribution = new.get_distribution(obs)
        p = th.stack([distribution.log_prob(actions[:, k]).exp() for k in range(3)], dim=1)
        weights = multiplicities * p / log_q.exp()
        expected = (weights * q_values).sum(1) / weights.sum(1)
        states, rows = th.arange(5), slice(1, 4)
        part = new.get_distribution(obs[rows])
        sampled = SelfNormalizedSurrogate(states, actions, q_values, log_q, multiplicities)
        th.testing.assert_close(sampled.terms(part, rows), expected[rows])
        part = new.get_distribution(obs[rows])
        enumerated = AllActionsSurrogate(states, actions, q_values)
        th.testing.assert_close(enumerated.terms(part, rows), (p * q_values).sum(1)[rows])


def test_weights_that_underflow_leave_the_best_action():
    policy, obs = CASES[0].policy(), observations(2)
    far = th.stack([th.full((2, 2), 60.0), th.full((2, 2), 80.0)], dim=1).double()
    surrogate = SelfNormalizedSurrogate(th.arange(2), far, th.tensor([[1.0, 2.0]] * 2), th.zeros(2, 2), th.ones(2, 2))
    with th.no_grad():
        np.testing.assert_allclose(surrogate.terms(policy.get_distribution(obs), slice(0, 2)), 1.0)


def test_centred_q_values_have_mean_zero_in_each_state_and_one_scale():
    rng = np.random.default_rng(0)
    q_values = 1e6 + 100 * rng.normal(size=(50, 1)) + 3 * rng.normal(size=(50, 4))
    weights = rng.dirichlet(np.ones(4), size=50)
    for normalize in (False, True):
        centered = center_q_values(q_values, weights, normalize)
        np.testing.assert_allclose((weights * centered).sum(axis=1), 0.0, atol=1e-8)
        scale = np.diff(q_values, axis=1) / np.diff(centered, axis=1)
        np.testing.assert_allclose(scale, scale[0, 0])
        assert normalize == (abs(scale[0, 0] - 1.0) > 0.1)
    assert np.mean((weights * centered**2).sum(axis=1)) == pytest.approx(1.0)
    assert not center_q_values(np.full((2, 3), 7e5), np.full((2, 3), 1 / 3), True).any()
