import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_trpo_ext.objectives import EntropyBonus, SinglePathSurrogate, normalize_advantages
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
