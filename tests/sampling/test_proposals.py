import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution

from sb3_trpo_ext.sampling.proposals import all_actions, choices_of, policy_actions, uniform_actions

FINITE = {
    "discrete": (spaces.Discrete(3), 3),
    "multi_discrete": (spaces.MultiDiscrete([2, 3]), 6),
    "multi_discrete_matrix": (spaces.MultiDiscrete([[2, 2], [1, 3]]), 12),
    "multi_binary": (spaces.MultiBinary(3), 8),
    "multi_binary_matrix": (spaces.MultiBinary([2, 1]), 4),
}


@pytest.mark.parametrize("name", FINITE)
def test_all_actions_lists_each_once_and_all_are_of_the_space(name):
    space, n_actions = FINITE[name]
    first = all_actions(space, 2)
    assert first.actions.shape[:2] == first.multiplicities.shape == (2, n_actions)
    assert len(np.unique(first.actions[1], axis=0)) == n_actions
    assert all(space.contains(action.reshape(space.shape).astype(space.dtype)) for action in first.actions[0])


@pytest.mark.parametrize("name", FINITE)
def test_uniform_draws_are_uniform_and_know_their_density(name):
    space, n_actions = FINITE[name]
    first = uniform_actions(space, 3000, 4, np.random.default_rng(0))
    np.testing.assert_allclose(first.log_proposal, -np.log(n_actions))
    np.testing.assert_array_equal(first.multiplicities.sum(axis=1), 4)
    listed = first.multiplicities > 0
    _, where = np.unique(first.actions[listed], axis=0, return_inverse=True)
    counts = np.bincount(where.flatten(), first.multiplicities[listed])
    chi_square = ((counts - 12_000 / n_actions) ** 2 / (12_000 / n_actions)).sum()
    assert len(counts) == n_actions and chi_square < n_actions - 1 + 4 * np.sqrt(2 * (n_actions - 1))


def test_an_action_drawn_twice_is_listed_once():
    first = uniform_actions(spaces.Discrete(2), 50, 5, np.random.default_rng(0))
    for actions, multiplicities in zip(first.actions, first.multiplicities, strict=True):
        listed = actions[multiplicities > 0]
        assert len(np.unique(listed, axis=0)) == len(listed) <= 2 and multiplicities.sum() == 5


def test_draws_from_the_policy_are_its_own_and_touch_no_global_generator():
    mean, log_std = th.tensor([[1.0, -2.0]]).expand(5000, 2), th.tensor([0.0, -1.0])
    policy = DiagGaussianDistribution(2).proba_distribution(mean, log_std)
    state = th.get_rng_state()
    first = policy_actions(policy, 5000, 3, th.Generator().manual_seed(0), lambda a: policy.log_prob(th.as_tensor(a)), False)
    assert th.equal(state, th.get_rng_state())
    np.testing.assert_allclose(first.actions.mean(axis=(0, 1)), [1.0, -2.0], atol=0.03)
    np.testing.assert_allclose(first.actions.std(axis=(0, 1)), [1.0, np.exp(-1.0)], rtol=0.03)
    expected = policy.log_prob(th.as_tensor(first.actions[:, 2]))
    np.testing.assert_allclose(first.log_proposal[:, 2], expected, rtol=1e-5)


def test_the_density_of_a_discrete_policy_belongs_to_its_action():
    logits = th.tensor([[0.0, 1.0, -1.0]]).expand(200, 3)
    policy = CategoricalDistribution(3).proba_distribution(logits)
    log_prob_of = lambda actions: policy.log_prob(th.as_tensor(actions).flatten())  # noqa: E731
    first = policy_actions(policy, 200, 4, th.Generator().manual_seed(0), log_prob_of, True)
    listed = first.multiplicities > 0
    expected = th.log_softmax(logits[0], 0).numpy()[first.actions[..., 0].astype(int)]
    np.testing.assert_allclose(first.log_proposal[listed], expected[listed], rtol=1e-5)
    drawn = np.bincount(first.actions[listed][:, 0].astype(int), first.multiplicities[listed])
    np.testing.assert_allclose(drawn / 800, th.softmax(logits[0], 0), atol=0.06)


def test_a_continuous_space_has_no_choices():
    with pytest.raises(ValueError, match="Discrete, MultiDiscrete or MultiBinary"):
        choices_of(spaces.Box(-1, 1, (2,)))
