"""The standard deviation with which Gaussian actions start, of all three algorithms."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy

from tests.algorithms.test_contract import DICT, IMAGE, SIBLINGS, flat, make
from tests.cases import ACTION_SPACES
from tests.envs import Walk, limited

pytestmark = pytest.mark.parametrize("algorithm", SIBLINGS)


class OwnSpread(ActorCriticPolicy):
    def __init__(self, *args, log_std_init=-1.0, **kwargs):
        super().__init__(*args, log_std_init=log_std_init, **kwargs)


class Filled(ActorCriticPolicy):
    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        with th.no_grad():
            self.log_std.fill_(-2.0)


class Frozen(ActorCriticPolicy):
    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.log_std.requires_grad_(False)


class Softplus(DiagGaussianDistribution):
    def proba_distribution(self, mean_actions, log_std):
        return super().proba_distribution(mean_actions, th.nn.functional.softplus(log_std).log())


class OfAnotherDistribution(ActorCriticPolicy):
    def _build(self, lr_schedule):
        self.action_dist = Softplus(self.action_dist.action_dim)
        super()._build(lr_schedule)


BOX = ACTION_SPACES["box"]


@pytest.mark.parametrize(
    "arguments, std",
    [
        ({}, 0.5),
        ({"initial_std": 0.2}, 0.2),
        ({"initial_std": None}, 1.0),
        ({"policy_kwargs": {"log_std_init": 0.0}}, 1.0),
        ({"policy": OwnSpread}, np.exp(-1.0)),
    ],
    ids=str,
)
def test_the_actions_of_a_new_policy_start_with_a_standard_deviation(algorithm, arguments, std):
    model = make(algorithm, env=limited(Walk(BOX)), **arguments)
    assert model.policy.log_std.requires_grad
    np.testing.assert_allclose(model.policy.log_std.exp().detach(), std, rtol=1e-6)
    obs = th.zeros(1, 3)
    np.testing.assert_allclose(model.policy.get_distribution(obs).distribution.scale.detach(), std, rtol=1e-6)
    # the same network in a policy that is made from what the policy says of itself
    again = type(model.policy)(**model.policy._get_constructor_parameters())
    assert th.equal(again.log_std, model.policy.log_std)


def test_nothing_else_of_a_new_policy_differs_from_sb3s(algorithm):
    ours, theirs = (make(algorithm, env=limited(Walk(BOX)), initial_std=std).policy.state_dict() for std in (0.5, None))
    assert [name for name in ours if not th.equal(ours[name], theirs[name])] == ["log_std"]
    policy_kwargs = {"net_arch": [8]}
    assert make(algorithm, env=limited(Walk(BOX)), policy_kwargs=policy_kwargs).policy_kwargs == {"net_arch": [8]}


def test_an_initial_standard_deviation_that_is_not_used_is_named(algorithm):
    assert make(algorithm, env=limited(Walk(BOX)), use_sde=True).policy.log_std_init == 0.0
    with pytest.warns(UserWarning, match="use_sde=True makes no use of initial_std=0.2"):
        assert make(algorithm, env=limited(Walk(BOX)), use_sde=True, initial_std=0.2).policy.log_std_init == 0.0
    with pytest.warns(UserWarning, match="a log_std_init in policy_kwargs makes no use of initial_std=0.2"):
        model = make(algorithm, env=limited(Walk(BOX)), policy_kwargs={"log_std_init": -2.0}, initial_std=0.2)
    assert (model.policy.log_std == -2.0).all()


@pytest.mark.parametrize("policy, log_std", [(OwnSpread, -1.0), (Filled, -2.0), (Frozen, 0.0), (OfAnotherDistribution, 0.0)])
def test_a_policy_that_starts_in_a_way_of_its_own_is_left_alone(algorithm, policy, log_std):
    assert (make(algorithm, policy=policy, env=limited(Walk(BOX))).policy.log_std == log_std).all()
    with pytest.warns(UserWarning, match=f"{policy.__name__} has a start of its own and makes no use of initial_std=0.2"):
        model = make(algorithm, policy=policy, env=limited(Walk(BOX)), initial_std=0.2)
    assert (model.policy.log_std == log_std).all()


@pytest.mark.parametrize("policy, observations", [("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)])
def test_other_policies_of_sb3_start_with_it_too(algorithm, policy, observations):
    model = make(algorithm, policy, env=limited(Walk(BOX, observation_space=observations)), initial_std=0.2)
    np.testing.assert_allclose(model.policy.log_std.exp().detach(), 0.2, rtol=1e-6)


def test_an_initial_standard_deviation_of_discrete_actions_has_no_use(algorithm):
    with pytest.warns(UserWarning, match=r"the action space Discrete\(3\) makes no use of initial_std=0.2"):
        make(algorithm, env=limited(Walk(ACTION_SPACES["discrete"])), initial_std=0.2)
    make(algorithm, env=limited(Walk(ACTION_SPACES["discrete"])), initial_std=None)


def test_a_loaded_policy_keeps_its_standard_deviation(algorithm, tmp_path):
    model = make(algorithm, env=limited(Walk(BOX)), initial_std=0.2).learn(192)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=limited(Walk(BOX)), device="cpu")
    assert loaded.initial_std == 0.2 and th.equal(flat(loaded), flat(model))
