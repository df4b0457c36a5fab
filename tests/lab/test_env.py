import copy

import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import NPGExt, TRPOExt, check_snapshot
from sb3_trpo_ext.lab.env import FiniteMDPEnv, sample_transitions
from sb3_trpo_ext.lab.mdp import FiniteMDP, evaluate, optimal_values, random_mdp
from sb3_trpo_ext.lab.policies import ActorOf, probabilities


def test_it_is_a_gymnasium_environment():
    check_env(FiniteMDPEnv(random_mdp(4, 3)), skip_render_check=True)


def test_rewards_and_moves_are_the_mdps():
    # 0 → 1 → 2 → 0 by either action
    P = np.tile(np.roll(np.eye(3), 1, axis=1)[:, None, :], (1, 2, 1))
    mdp = FiniteMDP(P, np.arange(6.0).reshape(3, 2), np.array([0.0, 1.0, 0.0]), 0.9)
    env = FiniteMDPEnv(mdp, geometric_episodes=False)
    assert env.reset(seed=0)[0] == 1
    assert [env.step(action)[:4] for action in (0, 1, 1)] == [
        (2, 2.0, False, False),
        (0, 5.0, False, False),
        (1, 1.0, False, False),
    ]
    assert env.reset(options={"state": 2})[0] == 2


def test_states_and_actions_that_are_not_there_are_refused():
    env = FiniteMDPEnv(random_mdp(4, 3))
    with pytest.raises(ValueError, match=r"state must be in Discrete\(4\), got 4"):
        env.reset(options={"state": 4})
    env.reset(seed=0, options={"state": 2})
    bits = copy.deepcopy(env.np_random.bit_generator.state)
    with pytest.raises(ValueError, match=r"state must be in Discrete\(4\), got 9"):
        env.reset(seed=1, options={"state": 9})
    assert env.state == 2 and env.np_random.bit_generator.state == bits
    with pytest.raises(ValueError, match=r"action must be in Discrete\(3\), got -1"):
        env.step(-1)


def test_its_state_is_two_attributes():
    env = FiniteMDPEnv(random_mdp(5, 2))
    env.reset(seed=3)
    for _ in range(7):
        env.step(0)
    state, bits = env.state, copy.deepcopy(env.np_random.bit_generator.state)
    onward = [env.step(i % 2) for i in range(50)]
    other = FiniteMDPEnv(env.mdp)
    other.reset(seed=99)
    for restored in (env, other):
        restored.state, restored.np_random.bit_generator.state = state, copy.deepcopy(bits)
        assert [restored.step(i % 2) for i in range(50)] == onward


@pytest.mark.parametrize("geometric_episodes", [True, False])
def test_it_returns_to_snapshots(geometric_episodes):
    check_snapshot(lambda: FiniteMDPEnv(random_mdp(5, 2), geometric_episodes))


def test_returns_of_episodes_estimate_eta():
    mdp = random_mdp(4, 2, gamma=0.8, seed=1)
    pi = np.full(mdp.shape, 0.5)
    env, returns = FiniteMDPEnv(mdp), []
    env.reset(seed=0)
    for _ in range(2000):
        env.reset()
        returns.append(0.0)
        over = False
        while not over:
            _, reward, _, over, _ = env.step(int(env.np_random.integers(2)))
            returns[-1] += reward
    values = evaluate(mdp, pi)
    assert abs(np.mean(returns) - values.eta) <= 3 * np.std(returns) / np.sqrt(len(returns))


def test_walkers_see_what_the_environment_shows():
    mdp = random_mdp(4, 2, gamma=0.8, seed=1)
    values = evaluate(mdp, np.tile([0.7, 0.3], (4, 1)))
    batch = sample_transitions(mdp, values.pi, 100, 4000, np.random.default_rng(0))
    assert batch.states.shape == batch.episode_starts.shape == (100, 4000)
    assert batch.last_states.shape == (4000,)
    assert batch.episode_starts[0].all()
    np.testing.assert_array_equal(batch.rewards, mdp.R[batch.states, batch.actions])
    visits = np.bincount(batch.states[-1], minlength=4) / 4000
    assert (np.abs(visits - values.state_weights) <= 3 * np.sqrt(values.state_weights / 4000)).all()
    went_on = ~batch.episode_starts[1:]
    for s in range(4):
        where = (batch.states[:-1] == s) & (batch.actions[:-1] == 1)
        arrivals = np.bincount(batch.states[1:][where & went_on], minlength=4)
        frequency, expected = arrivals / arrivals.sum(), mdp.P[s, 1]
        assert (np.abs(frequency - expected) <= 4 * np.sqrt(expected / arrivals.sum())).all()
    assert 1 - batch.episode_starts[1:].mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 3), "n_steps must be an integer of at least 1, got 0"),
        ((2, 0), "n_walkers must be an integer of at least 1, got 0"),
        ((2, 3, [0, 9, 9]), r"start\[1\] must be a state from 0 to 3, got 9"),
        ((2, 3, [0, -1, 0]), r"start\[1\] must be a state from 0 to 3, got -1"),
        ((2, 3, [0.5, 0, 0]), r"start\[0\] must be a state from 0 to 3, got 0.5"),
        ((2, 3, [1]), r"start's shape must be \(3,\), got \(1,\)"),
    ],
)
def test_walks_that_cannot_be_are_refused(arguments, message):
    n_steps, n_walkers, *start = arguments
    rng, start = np.random.default_rng(0), start[0] if start else None
    with pytest.raises(ValueError, match=message):
        sample_transitions(random_mdp(4, 2), np.full((4, 2), 0.5), n_steps, n_walkers, rng, start=start)


BOTH = pytest.mark.parametrize("algorithm", [TRPOExt, NPGExt])


def model_on(algorithm, mdp, **arguments):
    env = make_vec_env(lambda: FiniteMDPEnv(mdp), n_envs=8, seed=100)
    linear = dict(net_arch=[])
    return algorithm("MlpPolicy", env, gamma=mdp.gamma, policy_kwargs=linear, seed=100, device="cpu", **arguments)


@BOTH
def test_with_exact_values_what_a_rollout_holds_is_exact_over_ends_of_episodes_too(algorithm):
    # next states without chance, so that r + γV(s') − V(s) is the advantage itself
    rng = np.random.default_rng(0)
    mdp = FiniteMDP(np.eye(4)[rng.integers(4, size=(4, 3))], rng.normal(size=(4, 3)), np.ones(4) / 4, 0.8)
    model = model_on(algorithm, mdp, n_steps=64, gae_lambda=1.0)
    values = evaluate(mdp, probabilities(ActorOf(model.policy), 4))
    with th.no_grad():
        model.policy.value_net.weight.copy_(th.as_tensor(values.V)[None])
        model.policy.value_net.bias.zero_()
    _, callback = model._setup_learn(512)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    buffer = model.rollout_buffer
    assert 60 < buffer.episode_starts[1:].sum() < 140
    expected = values.A[buffer.observations[..., 0].astype(int), buffer.actions[..., 0].astype(int)]
    for t in reversed(range(63)):
        expected[t] += mdp.gamma * np.where(buffer.episode_starts[t + 1], 0.0, expected[t + 1])
    np.testing.assert_allclose(buffer.advantages, expected, atol=1e-5)


@BOTH
def test_on_it_learning_comes_near_the_optimum(algorithm):
    mdp = random_mdp(5, 3, gamma=0.9, seed=1)
    model = model_on(algorithm, mdp, n_steps=128, target_kl=0.05, learning_rate=0.02)
    actor = ActorOf(model.policy)
    best, start = optimal_values(mdp).eta, evaluate(mdp, probabilities(actor, 5)).eta
    model.learn(20 * 1024)
    reached = evaluate(mdp, probabilities(actor, 5)).eta
    assert best - reached <= 0.05 * (best - start)
