"""NaN, infinite and huge numbers, injected one by one: nothing is damaged and training goes on."""

import copy
import math
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext import KLPPOExt, NPGExt, TRPOExt
from sb3_trpo_ext.critic import CriticProblem
from sb3_trpo_ext.numerics import conjugate_gradient as cg
from sb3_trpo_ext.numerics.flat_optimizer import FlatOptimizer
from sb3_trpo_ext.policy_problem import PolicyProblem
from tests.envs import Faulty, Walk, limited

BATCH = {"adam": {"batch_size": 32}, "gauss_newton": {}, "none": {}}
FAULTS = [math.nan, math.inf, -math.inf, 1e30, 1e38]


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.policy.named_parameters()}


def same(a, b):
    return all(th.equal(a[name], b[name]) for name in a)


class OwnForward(ActorCriticPolicy):
    def forward(self, obs, deterministic=False):
        return super().forward(obs, deterministic)


@pytest.mark.parametrize("critic", ["adam", "gauss_newton", "none"])
@pytest.mark.parametrize("bad", FAULTS)
@pytest.mark.parametrize("quantity", ["rewards", "observations"])
@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (2,)), spaces.Discrete(2)], ids=["box", "discrete"])
def test_a_fault_in_the_data_skips_the_update_and_training_goes_on(space, quantity, bad, critic):
    env = Faulty(limited(Walk(space)), quantity, bad, every=50, until=50)
    model = TRPOExt("MlpPolicy", env, n_steps=64, seed=0, device="cpu", critic=critic, **BATCH[critic])
    start = parameters_of(model)
    with pytest.warns(UserWarning, match=f"update skipped: NaN, infinite or huge {quantity}") as caught:
        model.learn(64)
    assert len(caught) == 1
    assert same(start, parameters_of(model))
    assert model.outcome_counts == {"faults": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(128, reset_num_timesteps=False)
    assert model.outcome_counts["accepted"] >= 1
    assert not same(start, parameters_of(model))
    assert all(th.isfinite(p).all() for p in model.policy.parameters())
    assert all(np.isfinite(action).all() for action in env.actions)


def test_observations_in_half_precision_are_judged_too():
    env = Faulty(limited(Walk(observation_space=spaces.Box(-10, 10, (3,), dtype=np.float16))), "observations", np.inf, every=7)
    model = TRPOExt("MlpPolicy", env, n_steps=32, seed=0, device="cpu")
    with pytest.warns(UserWarning, match="observations") as caught:
        model.learn(32)
    assert len(caught) == 1
    assert all(np.isfinite(action).all() for action in env.actions)


@pytest.mark.parametrize("policy", ["MlpPolicy", OwnForward])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_every_way_of_acting_survives_bad_observations(policy, bad):
    for arguments in ({}, {"use_sde": True}):
        env = Faulty(limited(Walk()), "observations", bad, every=7)
        model = TRPOExt(policy, env, n_steps=32, seed=0, device="cpu", **arguments)
        start = parameters_of(model)
        with pytest.warns(UserWarning, match="observations"):
            model.learn(64)
        assert same(start, parameters_of(model))
        assert all(np.isfinite(action).all() for action in env.actions)


def learned(critic="gauss_newton", **kwargs):
    kwargs = {**BATCH[critic], **kwargs}
    model = TRPOExt("MlpPolicy", limited(Walk()), n_steps=64, seed=0, device="cpu", critic=critic, **kwargs)
    model.learn(128)
    return model


def update_with_a_fault(model, quantity):
    start = parameters_of(model)
    with pytest.warns(UserWarning, match=f"huge {quantity}"):
        model.learn(64, reset_num_timesteps=False)
    assert same(start, parameters_of(model))
    assert model.outcome_counts["faults"] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(monkeypatch, bad):
    model = learned()
    gradient = PolicyProblem.gradient
    with monkeypatch.context() as patch:
        patch.setattr(PolicyProblem, "gradient", lambda self: (gradient(self)[0], gradient(self)[1] * bad))
        update_with_a_fault(model, "gradient")
    assert model.outcome_counts["non_finite_gradient"] == 1
    model.learn(64, reset_num_timesteps=False)
    assert model.report.outcome == "accepted"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_curvature_that_is_not_finite(monkeypatch, bad):
    model = learned()
    with monkeypatch.context() as patch:
        patch.setattr(PolicyProblem, "fisher_product", lambda self: lambda v: v * bad)
        update_with_a_fault(model, "curvature")
    assert model.outcome_counts["non_finite_curvature"] == 1


@pytest.mark.parametrize("advantage", [math.nan, math.inf, 1e30])
def test_bad_advantages(monkeypatch, advantage):
    from sb3_trpo_ext.sampling import single_path

    model, compute_returns = learned(), single_path.compute_returns

    def spoiled(buffer, last_values, dones):
        compute_returns(buffer, last_values, dones)
        buffer.advantages[3] = advantage

    monkeypatch.setattr(single_path, "compute_returns", spoiled)
    update_with_a_fault(model, "advantages")


def test_negative_curvature_is_counted_and_the_critic_still_fits(monkeypatch):
    model = learned()
    start = parameters_of(model)
    monkeypatch.setattr(PolicyProblem, "fisher_product", lambda self: lambda v: -v)
    model.learn(64, reset_num_timesteps=False)
    now = parameters_of(model)
    assert model.outcome_counts["non_positive_curvature"] == 1
    moved = {name for name in now if not th.equal(now[name], start[name])}
    assert moved and all("value" in name for name in moved)


@pytest.mark.parametrize("critic", ["adam", "gauss_newton"])
def test_a_line_search_that_fails_still_lets_the_critic_fit(monkeypatch, critic):
    model = learned(critic=critic)
    start = parameters_of(model)
    gradient = PolicyProblem.gradient
    monkeypatch.setattr(PolicyProblem, "gradient", lambda self: (gradient(self)[0], -gradient(self)[1]))
    model.learn(64, reset_num_timesteps=False)
    now = parameters_of(model)
    assert model.outcome_counts["no_improvement"] == 1
    moved = {name for name in now if not th.equal(now[name], start[name])}
    assert moved and all("value" in name for name in moved)


def test_constant_advantages_are_an_outcome(monkeypatch):
    class Constant(Walk):
        def step(self, action):
            observation, _, _, truncated, info = super().step(action)
            return observation, 0.0, False, truncated, info

    model = TRPOExt("MlpPolicy", Constant(), n_steps=64, seed=0, device="cpu", critic="none")
    start = parameters_of(model)
    model.learn(64)
    assert model.outcome_counts == {"zero_gradient": 1}
    assert same(start, parameters_of(model))


@pytest.mark.parametrize("critic", ["adam", "gauss_newton"])
def test_a_critic_fit_that_overflows_is_taken_back(monkeypatch, critic):
    model = learned(critic=critic)
    start, damping, problem_of = parameters_of(model), model.critic_damping, model._critic_problem

    def overflowing(*args):
        problem = problem_of(*args)
        problem.returns = problem.returns * math.inf
        return problem

    monkeypatch.setattr(model, "_critic_problem", overflowing)
    with pytest.warns(UserWarning, match="huge value loss"):
        model.learn(64, reset_num_timesteps=False)
    assert same(start, parameters_of(model)) and model.critic_damping == damping
    assert model.report.outcome == "undone" and model.report.kl == model.report.step_norm == 0.0
    assert model.outcome_counts["undone"] == model.outcome_counts["faults"] == 1


def test_a_bad_last_observation_costs_the_update_that_learns_from_it_and_no_other():
    env = Faulty(limited(Walk()), "observations", math.nan, every=64, until=64)
    model = TRPOExt("MlpPolicy", env, n_steps=64, seed=0, device="cpu")
    model.learn(64)
    assert model.outcome_counts == {"accepted": 1}
    with pytest.warns(UserWarning, match="observations") as caught:
        model.learn(128, reset_num_timesteps=False)
    assert len(caught) == 1 and model.outcome_counts["faults"] == 1


@pytest.mark.parametrize("bad", [3e38, -1e30])
@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (2,)), spaces.Discrete(2)], ids=["box", "discrete"])
def test_huge_observations_reach_no_unbounded_activation(space, bad):
    env = Faulty(limited(Walk(space)), "observations", bad, every=7)
    for arguments in ({}, {"values_at_each_step": True}):
        model = TRPOExt(
            "MlpPolicy", env, n_steps=32, seed=0, device="cpu", policy_kwargs=dict(activation_fn=nn.ReLU), **arguments
        )
        with pytest.warns(UserWarning, match="observations"):
            model.learn(64)
    assert all(np.isfinite(action).all() for action in env.actions)


def test_an_interrupt_in_the_line_search_leaves_the_policy_as_it_was(monkeypatch):
    model = learned()
    start = parameters_of(model)

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(PolicyProblem, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, reset_num_timesteps=False)
    assert same(start, parameters_of(model))


@pytest.mark.parametrize(
    "critic,interrupted,activation",
    [
        ("adam", (FlatOptimizer, "step"), nn.Tanh),
        ("adam", (CriticProblem, "values"), nn.PReLU),  # not a dense network: by autograd
        ("gauss_newton", (CriticProblem, "values"), nn.Tanh),
    ],
)
def test_an_interrupt_in_the_critic_fit_leaves_the_critic_as_it_was(monkeypatch, critic, interrupted, activation):
    model, calls = learned(critic=critic, policy_kwargs=dict(activation_fn=activation)), iter(range(100))
    start, moments = parameters_of(model), copy.deepcopy(model.policy.optimizer.state_dict()["state"])
    method = getattr(*interrupted)

    def interrupt(self, *args):
        if next(calls) >= 3:
            raise KeyboardInterrupt
        return method(self, *args)

    monkeypatch.setattr(*interrupted, interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, reset_num_timesteps=False)
    now = parameters_of(model)
    assert all(th.equal(now[name], start[name]) for name in now if "value" in name)
    th.testing.assert_close(model.policy.optimizer.state_dict()["state"], moments, rtol=0, atol=0)


# -- large numbers that are no spikes ---------------------------------------------------------------------


class Rewards(gym.RewardWrapper):
    """Rewards as a function of the step's number and its own reward."""

    def __init__(self, env, reward_of):
        super().__init__(env)
        self.reward_of, self.n_steps = reward_of, 0

    def reward(self, reward):
        self.n_steps += 1
        return self.reward_of(self.n_steps, float(reward))


def cart_pole(reward_of):
    return Rewards(gym.make("CartPole-v1"), reward_of)


@pytest.mark.parametrize("critic", ["adam", "gauss_newton", "none"])
@pytest.mark.parametrize("scale", [2e8, 1e9, 1e14, -1e14])
def test_large_rewards_train(scale, critic):
    env = cart_pole(lambda n, reward: scale * reward)
    model = TRPOExt("MlpPolicy", env, n_steps=256, seed=0, device="cpu", critic=critic, **BATCH[critic])
    model.learn(4 * 256)
    assert model.outcome_counts["accepted"] == 4 and "faults" not in model.outcome_counts
    if critic == "gauss_newton":
        assert model.logger.name_to_value["train/explained_variance"] > 0.1


def spike_at(steps, size, usual=1.0):
    return lambda n, reward: size if n in steps else usual * reward


@pytest.mark.parametrize("critic", ["gauss_newton", "none"])
@pytest.mark.parametrize("size, usual", [(1e12, 1.0), (-1e16, 1.0), (1e30, 1e9), (math.nan, 1e9), (1e12, 0.0)])
def test_one_spike_among_usual_rewards_is_skipped_and_named(size, usual, critic):
    model = TRPOExt("MlpPolicy", cart_pole(spike_at([300], size, usual)), n_steps=256, seed=0, device="cpu", critic=critic)
    model.learn(256)
    start, counts = parameters_of(model), dict(model.outcome_counts)
    number = "nan" if math.isnan(size) else f"{abs(size):.3g}"
    expected = (
        rf"huge rewards \(up to {re.escape(number)}, the limit is .*VecNormalize\(norm_reward=True\) \(update 2, 1 in a row\)"
    )
    with pytest.warns(UserWarning, match=expected):
        model.learn(256, reset_num_timesteps=False)
    assert same(start, parameters_of(model)) and model.outcome_counts == {**counts, "faults": 1}
    model.learn(256, reset_num_timesteps=False)
    assert model.outcome_counts["faults"] == 1


def test_a_large_reward_that_comes_again_is_a_scale():
    """As at the end of each episode, say, with nothing before it."""
    env = cart_pole(lambda n, reward: 1e12 if n % 20 == 0 else 0.0)
    model = TRPOExt("MlpPolicy", env, n_steps=256, seed=0, device="cpu")
    with pytest.warns(UserWarning, match="limit is 1e.10"):
        model.learn(256)
    model.learn(3 * 256, reset_num_timesteps=False)
    assert model.outcome_counts == {"faults": 1, "accepted": 3}


@pytest.mark.parametrize("critic", ["adam", "gauss_newton"])
def test_a_critic_that_has_gone_far_off_is_fitted_and_stops_no_update(critic):
    model = TRPOExt("MlpPolicy", "CartPole-v1", n_steps=512, seed=0, device="cpu", critic=critic, **BATCH[critic])
    model.learn(512)
    model.policy.value_net.bias.data.fill_(3e11)
    model.learn(4 * 512, reset_num_timesteps=False)
    assert "faults" not in model.outcome_counts
    if critic == "gauss_newton":
        assert float(np.abs(model.rollout_buffer.values).max()) < 1e11 and model.report.outcome == "accepted"


def test_a_critic_that_is_not_finite_is_named():
    model = learned()
    model.policy.value_net.bias.data.fill_(math.nan)
    with pytest.warns(UserWarning, match="huge values .up to nan.*the critic has diverged"):
        model.learn(64, reset_num_timesteps=False)


@pytest.mark.filterwarnings("default")
def test_the_warning_comes_again_each_time_the_number_of_skipped_updates_has_doubled():
    env = cart_pole(lambda n, reward: math.nan)
    model = TRPOExt("MlpPolicy", env, n_steps=16, seed=0, device="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # which shows the same text once
        model.learn(16 * 20)
    skipped = [int(found[1]) for w in caught if (found := re.search(r"(\d+) in a row", str(w.message)))]
    assert skipped == [1, 2, 4, 8, 16]
    standing = [int(found[1]) for w in caught if (found := re.search(r"not moved for (\d+) updates", str(w.message)))]
    assert standing == [10, 20]


def test_a_policy_that_stands_still_is_said_to():
    env = cart_pole(lambda n, reward: 0.0)
    model = TRPOExt("MlpPolicy", env, n_steps=16, seed=0, device="cpu", critic="none")
    model.learn(9 * 16)
    with pytest.warns(UserWarning, match=r"has not moved for 10 updates \(10 zero_gradient\), up to update 10"):
        model.learn(16, reset_num_timesteps=False)
    model.learn(9 * 16, reset_num_timesteps=False)
    with pytest.warns(UserWarning, match="not moved for 20 updates"):
        model.learn(16, reset_num_timesteps=False)


# -- nothing to train ------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [TRPOExt, NPGExt, KLPPOExt])
def test_training_that_could_change_nothing_is_refused_by_name(algorithm):
    def made(**arguments):
        return algorithm("MlpPolicy", limited(Walk()), n_steps=64, batch_size=64, seed=0, device="cpu", **arguments)

    model = made()
    with th.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        model.learn(64)
    with th.inference_mode():
        inside = made()
    with pytest.raises(ValueError, match="inference_mode"):
        inside.learn(64)
    model.learn(64)
    with th.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        model.train()
    model.policy.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trainable: all parameters of ActorCriticPolicy are frozen"):
        model.learn(64)


@pytest.mark.parametrize("critic", ["adam", "gauss_newton"])
@pytest.mark.parametrize("algorithm", [TRPOExt, NPGExt, KLPPOExt])
def test_a_frozen_policy_is_an_outcome_and_its_critic_is_fitted(algorithm, critic):
    model = algorithm("MlpPolicy", limited(Walk()), n_steps=64, seed=0, device="cpu", critic=critic, **BATCH[critic])
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_("value" in name)
    start = parameters_of(model)
    model.learn(128)
    assert model.outcome_counts == {"no_parameters": 2}
    assert {name for name in start if not th.equal(start[name], parameters_of(model)[name])} == {
        name for name in start if "value" in name
    }


@pytest.mark.parametrize("critic", ["gauss_newton", "none"])
def test_neither_policy_nor_critic_to_move_is_refused(critic):
    class Detached(TRPOExt):
        def action_distribution(self, observations, samples=None):
            with th.no_grad():
                return super().action_distribution(observations, samples)

    model = Detached("MlpPolicy", limited(Walk()), n_steps=64, seed=0, device="cpu", critic=critic)
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_("value" not in name)
    with pytest.raises(ValueError, match="nothing is trainable: the action distribution depends on no parameter"):
        model.learn(64)


@pytest.mark.parametrize("critic", ["adam", "gauss_newton"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.PReLU])
def test_training_under_no_grad(activation, critic):
    kwargs = dict(
        n_steps=64, seed=0, device="cpu", critic=critic, policy_kwargs=dict(activation_fn=activation), **BATCH[critic]
    )
    with th.no_grad():
        inside = TRPOExt("MlpPolicy", limited(Walk()), **kwargs).learn(128)
    outside = TRPOExt("MlpPolicy", limited(Walk()), **kwargs).learn(128)
    assert same(parameters_of(inside), parameters_of(outside)) and inside.outcome_counts == {"accepted": 2}


@pytest.mark.parametrize("bias", [True, False])
def test_a_critic_whose_output_layer_is_zero_and_frozen_undoes_no_update(bias):
    model = TRPOExt("MlpPolicy", limited(Walk()), n_steps=64, seed=0, device="cpu", critic="gauss_newton")
    model.policy.value_net.weight.data.zero_()
    model.policy.value_net.weight.requires_grad_(False)
    model.policy.value_net.bias.requires_grad_(bias)
    model.learn(128)
    unchanged = {} if bias else {"critic_unchanged": 2}
    assert model.outcome_counts == {"accepted": 2, **unchanged}


def test_the_solver_is_never_asked_about_bad_data(monkeypatch):
    env = Faulty(limited(Walk()), "rewards", math.nan, every=10)
    model = TRPOExt("MlpPolicy", env, n_steps=64, seed=0, device="cpu")
    monkeypatch.setattr(cg, "_recursion", lambda *_: pytest.fail("solved with bad data"))
    with pytest.warns(UserWarning, match="rewards"):
        model.learn(64)
