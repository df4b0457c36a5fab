"""Whatever a user replaces has its effect, however it is replaced and however the rollout is filled."""

import types

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common import policies
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_trpo_ext import KLPPOExt, NPGExt, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.standard_policies import mlp_actor
from tests.cases import LearnedExtractor
from tests.envs import Walk, limited

T = 12
BRANCHES = dict(n_rollout_states=4, n_branch_actions=2, branch_length=3)
PATHS = {
    "numpy": {},
    "torch": dict(policy_kwargs=dict(activation_fn=nn.GELU)),
    "sb3": dict(policy_kwargs=dict(features_extractor_class=LearnedExtractor)),
    "values": dict(values_at_each_step=True),
    "vine": dict(rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=BRANCHES),
}
HOWS = ("subclass", "instance", "class")


class Last(BaseCallback):
    """Keeps the values of the last observations."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.values = self.locals["values"]


def make(path, policy=ActorCriticPolicy, algorithm=TRPOExt, action_space=None, **arguments):
    arguments = {**PATHS[path], **arguments}
    arguments["policy_kwargs"] = dict(net_arch=[8], **arguments.get("policy_kwargs", {}))
    return algorithm(policy, limited(Walk(action_space), 5), n_steps=T, seed=0, device="cpu", **arguments)


def collect(model):
    model.last = Last()
    _, callback = model._setup_learn(10**6, model.last)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, T)
    return model


# What takes the place of a method, and how it shows in a model after a rollout.


def raised(method):
    """Actions, values or features are 1000 more; of several, the first."""

    def replacement(self, *args, **kwargs):
        replacement.calls += 1
        result = method(self, *args, **kwargs)
        return (result[0] + 1000.0, *result[1:]) if isinstance(result, tuple) else result + 1000.0

    replacement.calls = 0
    return replacement


def moved(method):
    """The means are 1000 more."""

    def replacement(self, *args, **kwargs):
        distribution = method(self, *args, **kwargs)
        distribution.distribution = th.distributions.Normal(
            distribution.distribution.loc + 1000.0, distribution.distribution.scale
        )
        return distribution

    return replacement


def less_likely(method):
    def replacement(self, *args, **kwargs):
        values, log_probs, entropy = method(self, *args, **kwargs)
        return values, log_probs - 1000.0, entropy

    return replacement


def counted(method):
    def replacement(self, *args, **kwargs):
        replacement.calls += 1
        return method(self, *args, **kwargs)

    replacement.calls = 0
    return replacement


def of_zeros(method):
    return lambda *args, **kwargs: th.zeros_like(method(*args, **kwargs))


def emptied(method):
    def replacement(self, *args, **kwargs):
        self.returns = np.full_like(self.returns, 42.0)

    return replacement


def acts_far_away(model, replacement):
    branches = getattr(model.rollout_buffer, "branches", None)
    first = True if branches is None else branches.first.actions.min() > 900
    return model.rollout_buffer.actions.min() > 900 and first


def trunk_is_far_away(model, replacement):
    return model.rollout_buffer.actions.min() > 900


def values_are_large(model, replacement):
    branches = getattr(model.rollout_buffer, "branches", None)
    cut = True if branches is None else branches.q_values.max() > 900
    return min(model.rollout_buffer.values.min(), model.last.values.min()) > 900 and cut


def knows_no_state(model, replacement):
    return np.ptp(model.rollout_buffer.values) < 1e-6


def is_called(model, replacement):
    return replacement.calls > 0


def is_called_at_each_step(model, replacement):
    return replacement.calls == T


def returns_are_its_own(model, replacement):
    return (model.rollout_buffer.returns == 42.0).all()


DISAGREES = r"has two distributions: {}gave the actions"
OF_POLICIES = {
    # the method, what takes its place, how it shows in the buffer, and what is said
    "forward": (raised, trunk_is_far_away, DISAGREES.format(r"forward\(\) ")),
    "extract_features": (of_zeros, knows_no_state, DISAGREES.format(r"forward\(\) ")),
    "predict_values": (raised, values_are_large, None),
    "evaluate_actions": (less_likely, None, DISAGREES.format(r"evaluate_actions\(\) ")),
    "get_distribution": (moved, acts_far_away, None),
    "_get_action_dist_from_latent": (moved, acts_far_away, None),
    "obs_to_tensor": (counted, is_called, None),
    "set_training_mode": (counted, is_called, None),
}


def replaced(how, owner, thing, name, replace, monkeypatch):
    """The replacement, once it is in place."""
    replacement = replace(getattr(owner, name))
    if how == "class":
        monkeypatch.setattr(owner, name, replacement)
    else:
        setattr(thing, name, types.MethodType(replacement, thing))
    return replacement


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", OF_POLICIES)
@pytest.mark.parametrize("path", PATHS)
def test_methods_of_policies(path, name, how, monkeypatch):
    replace, shows, says = OF_POLICIES[name]
    if how == "subclass":
        replacement = replace(getattr(ActorCriticPolicy, name))
        model = make(path, type("Own", (ActorCriticPolicy,), {name: replacement}))
    else:
        model = make(path)
        replacement = replaced(how, ActorCriticPolicy, model.policy, name, replace, monkeypatch)
    if name == "extract_features":
        model.policy.action_net.weight.data *= 100.0  # so that the states matter
    if says is None:
        collect(model)
    else:
        with pytest.warns(UserWarning, match=says):
            collect(model)
    assert shows is None or shows(model, replacement)


OTHERS = {
    "proba_distribution": (DiagGaussianDistribution, lambda model: model.policy.action_dist, moved, acts_far_away),
    "sample": (DiagGaussianDistribution, lambda model: model.policy.action_dist, raised, acts_far_away),
    "get_actions": (Distribution, lambda model: model.policy.action_dist, raised, acts_far_away),
    "forward_actor": (MlpExtractor, lambda model: model.policy.mlp_extractor, counted, is_called),
    "forward_critic": (MlpExtractor, lambda model: model.policy.mlp_extractor, of_zeros, knows_no_state),
    "forward": (FlattenExtractor, lambda model: model.policy.features_extractor, of_zeros, knows_no_state),
    "add": (RolloutBuffer, lambda model: model.rollout_buffer, counted, is_called_at_each_step),
    "compute_returns_and_advantage": (RolloutBuffer, lambda model: model.rollout_buffer, emptied, returns_are_its_own),
    "action_distribution": (TRPOExt, lambda model: model, moved, acts_far_away),
    "predict_values": (TRPOExt, lambda model: model, raised, values_are_large),
}


@pytest.mark.parametrize("how", ("instance", "class"))
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("path", PATHS)
def test_methods_of_distributions_networks_buffers_and_algorithms(path, name, how, monkeypatch):
    owner, of, replace, shows = OTHERS[name]
    if path == "sb3" and owner is FlattenExtractor:
        return  # whose features are learned
    model = make(path)
    replacement = replaced(how, owner, of(model), name, replace, monkeypatch)
    assert shows(collect(model), replacement)


@pytest.mark.parametrize("path", PATHS)
def test_the_preprocessing_of_observations(path, monkeypatch):
    preprocess = policies.preprocess_obs
    monkeypatch.setattr(policies, "preprocess_obs", lambda *args, **kwargs: 0.0 * preprocess(*args, **kwargs))
    model = make(path)
    model.policy.log_std.data.fill_(-9.0)
    model.policy.action_net.weight.data *= 100.0
    assert knows_no_state(collect(model), None) and model.rollout_buffer.actions.std(axis=(0, 1)).max() < 1e-2


@pytest.mark.parametrize("how", ("instance", "class"))
@pytest.mark.parametrize("path", PATHS)
def test_a_mask_that_is_put_into_sb3s_distribution_is_kept(path, how, monkeypatch):
    def masked(method):
        return lambda self, action_logits: method(self, action_logits.index_fill(1, th.tensor([0]), -1e8))

    model = make(path, action_space=spaces.Discrete(3))
    replaced(how, CategoricalDistribution, model.policy.action_dist, "proba_distribution", masked, monkeypatch)
    assert mlp_actor(model.policy) is None, "the Fisher products would go round it"
    assert collect(model).rollout_buffer.actions.min() == 1 and model.rollout_buffer.log_probs.min() > -5.0


@pytest.mark.parametrize("how", ("instance", "class"))
def test_log_probabilities_are_of_the_distribution_that_acted(how, monkeypatch):
    def narrow(method):
        return lambda self, mean, log_std: method(self, mean, log_std - 3.0)

    model = make("numpy")
    replaced(how, DiagGaussianDistribution, model.policy.action_dist, "proba_distribution", narrow, monkeypatch)
    buffer = collect(model).rollout_buffer
    # of a Gaussian, the mean log-probability is minus the entropy
    std = 0.5 * np.exp(-3.0)
    assert buffer.actions.std() == pytest.approx(std, rel=0.5)
    assert buffer.log_probs.mean() == pytest.approx(-2 * (np.log(std) + 0.5 * np.log(2 * np.pi * np.e)), abs=1.0)


# -- the policy that acts is the one that learns ----------------------------------------------------------


class AsForPPO(ActorCriticPolicy):
    """Masks where PPO looks, and nowhere else."""

    def masked(self, obs):
        latent_pi, latent_vf = self.mlp_extractor(self.extract_features(obs))
        distribution = self._get_action_dist_from_latent(latent_pi)
        logits = distribution.distribution.logits.index_fill(1, th.tensor([0]), -1e8)
        return distribution.proba_distribution(logits), self.value_net(latent_vf)

    def forward(self, obs, deterministic=False):
        distribution, values = self.masked(obs)
        actions = distribution.get_actions(deterministic)
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(self, obs, actions):
        distribution, values = self.masked(obs)
        return values, distribution.log_prob(actions), distribution.entropy()


class AsForUs(AsForPPO):
    def get_distribution(self, obs):
        return self.masked(obs)[0]


@pytest.mark.parametrize("algorithm", [TRPOExt, NPGExt, KLPPOExt])
def test_a_policy_that_learns_another_distribution_than_it_acts_by_is_told_of_once(algorithm, tmp_path):
    arguments = dict(algorithm=algorithm, action_space=spaces.Discrete(3))
    if algorithm is KLPPOExt:
        arguments["batch_size"] = T
    model = make("numpy", AsForPPO, **arguments)
    message = (
        r"^AsForPPO has two .*forward\(\) and evaluate_actions\(\) gave .* by up to 0.\d.*get_distribution\(\).*override "
    )
    with pytest.warns(UserWarning, match=rf"{message}{algorithm.__name__}.action_distribution\(\)"):
        model.learn(T)
    model.learn(T, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match=message):  # another run, another reader
        algorithm.load(tmp_path / "model", env=limited(Walk(spaces.Discrete(3)))).learn(T)
    make("numpy", AsForUs, **arguments).learn(T)
