"""NaN, infinite and huge numbers, injected one by one: nothing is damaged and training goes on."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext import TRPOExt
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
    with pytest.warns(UserWarning, match=f"huge {quantity};"):
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


def test_the_solver_is_never_asked_about_bad_data(monkeypatch):
    env = Faulty(limited(Walk()), "rewards", math.nan, every=10)
    model = TRPOExt("MlpPolicy", env, n_steps=64, seed=0, device="cpu")
    monkeypatch.setattr(cg, "_recursion", lambda *_: pytest.fail("solved with bad data"))
    with pytest.warns(UserWarning, match="rewards"):
        model.learn(64)
