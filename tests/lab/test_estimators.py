"""What TRPOExt estimates from samples, against the laboratory's exact values."""

from dataclasses import replace

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.lab.env import FiniteMDPEnv, sample_transitions, sampled_problem
from sb3_trpo_ext.lab.mdp import FiniteMDP, evaluate, random_mdp
from sb3_trpo_ext.lab.policies import ActorOf, ExactProblem, LogLinear, policy_gradient, probabilities, scores
from sb3_trpo_ext.objectives import AllActionsSurrogate
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.sampling.buffers import generalized_advantages
from sb3_trpo_ext.trust_region import TrustRegionSettings, trust_region_step
from tests.cases import dense

S, A, P = 3, 4, 5


def log_linear(seed=0, n_states=S, n_actions=A):
    rng = np.random.default_rng(seed)
    return LogLinear(rng.normal(size=(n_states, n_actions, P)), rng.normal(size=P))


def one_step_mdp():
    """Without a future ρ_π = ρ₀, which batches of ten can have exactly."""
    mdp = random_mdp(S, A, seed=3)
    return FiniteMDP(mdp.P, mdp.R, np.array([0.5, 0.3, 0.2]), 0.0), np.repeat([0, 1, 2], [5, 3, 2])


@pytest.mark.parametrize("fisher", ["gauss_newton", "hessian"])
def test_products_on_every_state_are_exact(fisher):
    mdp, states = one_step_mdp()
    policy = log_linear()
    sampled = sampled_problem(policy, states, np.zeros(10, dtype=int), np.zeros(10), fisher)
    matrix = dense(sampled.fisher_product(), P)
    expected = dense(ExactProblem(mdp, policy).fisher_product(), P)
    assert (matrix - expected).norm() <= 1e-6 * expected.norm()


def every_pair(exact):
    """A batch of all (s, a), weighted so that its average is the expectation over ρ_π and π."""
    states, actions = (index.reshape(-1) for index in np.meshgrid(range(S), range(A), indexing="ij"))
    weights = S * A * exact.old.state_weights[states] * exact.old.pi[states, actions]
    return states, actions, weights * exact.old.A[states, actions]


def test_surrogate_and_its_gradient_on_every_pair_are_exact():
    mdp = random_mdp(S, A, gamma=0.9, seed=3)
    policy = log_linear()
    exact = ExactProblem(mdp, policy)
    sampled = sampled_problem(policy, *every_pair(exact))
    expected = exact.gradient()[1]
    assert (sampled.gradient()[1] - expected).norm() <= 1e-6 * expected.norm()
    exact.parameters.write(exact.parameters.read() + 0.1)
    assert sampled.evaluate().objective == pytest.approx(exact.evaluate().objective, rel=1e-6)


def test_a_step_on_exact_samples_is_the_exact_step():
    mdp, _ = one_step_mdp()
    steps = []
    for make in (lambda p: ExactProblem(mdp, p), lambda p: sampled_problem(p, *weighted_by_states(mdp, p))):
        policy = log_linear()
        report = trust_region_step(make(policy), TrustRegionSettings(target_kl=0.02, cg_damping=1e-3))
        steps.append((report.kl, report.improvement, policy.theta.detach()))
    assert steps[1][:2] == pytest.approx(steps[0][:2], rel=1e-6)
    assert (steps[1][2] - steps[0][2]).norm() <= 1e-6


def weighted_by_states(mdp, policy):
    """Ten states as ρ₀ has them, each with every action."""
    old = evaluate(mdp, probabilities(policy, S))
    states, actions = np.repeat(one_step_mdp()[1], A), np.tile(range(A), 10)
    return states, actions, A * old.pi[states, actions] * old.A[states, actions]


@pytest.fixture(scope="module")
def rollout():
    """The last states of independent walkers, whose distribution is ρ_π up to γ^100."""
    mdp, policy = random_mdp(S, A, gamma=0.8, seed=3), log_linear()
    exact = ExactProblem(mdp, policy)
    batch = sample_transitions(mdp, exact.old.pi, 100, 20_000, np.random.default_rng(0))
    return policy, exact, batch.states[-1], batch.actions[-1]


def assert_within_three_standard_errors(estimate, terms, expected):
    """``terms`` (N,) average to the estimate; their spread says how far it may be off."""
    assert estimate == pytest.approx(terms.mean(), rel=1e-6, abs=1e-9)
    assert abs(estimate - expected) <= 3 * terms.std() / np.sqrt(len(terms))


DIRECTIONS = np.random.default_rng(9).normal(size=(4, P))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sampled_surrogate_gradient(rollout, direction):
    policy, exact, states, actions = rollout
    advantages = exact.old.A[states, actions]
    estimate = sampled_problem(policy, states, actions, advantages).gradient()[1].numpy() @ direction
    terms = advantages * (scores(policy, S) @ direction)[states, actions]
    assert_within_three_standard_errors(estimate, terms, exact.gradient()[1].numpy() @ direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("fisher", ["gauss_newton", "hessian", "empirical"])
def test_sampled_fisher_products(rollout, direction, fisher):
    policy, exact, states, actions = rollout
    v = th.as_tensor(direction)
    estimate = float(v @ sampled_problem(policy, states, actions, np.zeros(len(states)), fisher).fisher_product()(v))
    squares = (scores(policy, S) @ direction) ** 2
    at_samples = squares[states, actions] if fisher == "empirical" else (exact.old.pi * squares).sum(axis=1)[states]
    assert_within_three_standard_errors(estimate, at_samples, float(v @ exact.fisher_product()(v)))


def estimated_advantages(batch, values):
    return generalized_advantages(
        batch.rewards,
        values.V[batch.states],
        batch.episode_starts,
        values.V[batch.last_states],
        np.zeros(batch.states.shape[1], dtype=bool),
        gamma=values.gamma,
        gae_lambda=1.0,
    )


def test_gae_without_chance_is_the_advantage():
    # dynamics and policy are deterministic: the estimate has nothing to average
    rng = np.random.default_rng(0)
    P_det = np.eye(4)[rng.integers(4, size=(4, 3))]
    mdp = FiniteMDP(P_det, rng.normal(size=(4, 3)), np.ones(4) / 4, 0.9)
    values = evaluate(mdp, np.eye(3)[rng.integers(3, size=4)])
    batch = sample_transitions(mdp, values.pi, 30, 16, rng, geometric_episodes=False)
    np.testing.assert_allclose(estimated_advantages(batch, values), values.A[batch.states, batch.actions], atol=1e-6)


@pytest.mark.parametrize("state, action", [(0, 0), (1, 2), (2, 3)])
def test_gae_with_exact_values_is_unbiased(state, action):
    mdp = random_mdp(S, A, gamma=0.8, seed=3)
    values = evaluate(mdp, probabilities(log_linear(), S))
    start = np.full(40_000, state)
    batch = sample_transitions(mdp, values.pi, 20, 40_000, np.random.default_rng(1), start=start, geometric_episodes=False)
    estimates = estimated_advantages(batch, values)[0][batch.actions[0] == action]
    assert len(estimates) > 500
    assert abs(estimates.mean() - values.A[state, action]) <= 3 * estimates.std() / np.sqrt(len(estimates))


@pytest.fixture(scope="module")
def vine():
    """Branches of TRPOExt from a trunk through an endless MDP, of every action, so long that nothing is cut off."""
    mdp = random_mdp(S, A, gamma=0.8, seed=3)
    branches = dict(n_rollout_states=400, n_branch_actions="all", branch_length=60, branch_bootstrap=False)
    model = TRPOExt(
        "MlpPolicy",
        make_vec_env(lambda: FiniteMDPEnv(mdp, geometric_episodes=False), n_envs=4, seed=0, wrapper_class=SnapshotWrapper),
        n_steps=100,
        gamma=mdp.gamma,
        rollout_buffer_class=VineRolloutBuffer,
        rollout_buffer_kwargs=branches,
        seed=0,
        device="cpu",
    )
    _, callback = model._setup_learn(400)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    actor = ActorOf(model.policy)
    rollout = model.rollout_buffer.branches
    envs, steps = np.divmod(rollout.states, model.n_steps)
    return (
        evaluate(mdp, probabilities(actor, S)),
        actor,
        model.rollout_buffer.observations[steps, envs, 0].astype(int),
        rollout,
    )


@pytest.mark.parametrize("state", range(S))
def test_branches_estimate_q(vine, state):
    values, _, states, rollout = vine
    taken = rollout.first.actions.reshape(len(states), A)
    assert (taken == np.arange(A)).all()
    estimates = rollout.q_values[states == state]
    assert len(estimates) > 50
    errors = estimates.mean(axis=0) - values.Q[state]
    assert (np.abs(errors) <= 3 * estimates.std(axis=0) / np.sqrt(len(estimates))).all()


def test_the_vines_surrogate_has_the_exact_gradient(vine):
    values, actor, states, rollout = vine
    taken, q_values = rollout.first.actions.reshape(-1, A), rollout.q_values
    surrogate = AllActionsSurrogate(th.arange(len(states)), th.as_tensor(taken), th.as_tensor(q_values))
    problem = PolicyProblem(
        lambda rows: actor.policy.get_distribution(th.as_tensor(states)[rows]),
        len(states),
        [surrogate],
        th.zeros(len(states)),
        actor.policy,
    )
    direction = np.random.default_rng(1).normal(size=len(problem.parameters))
    estimate = float(problem.gradient()[1].double().numpy() @ direction)
    slopes = values.pi * (scores(actor, S) @ direction)
    exact = (slopes * values.Q).sum(axis=1)[states]
    errors = (slopes[states] * q_values).sum(axis=1) - exact
    assert estimate == pytest.approx((exact + errors).mean(), rel=1e-4)
    assert abs(estimate - exact.mean()) <= 3 * errors.std() / np.sqrt(len(errors))
    # the states of the trunk in place of ρ
    visited = replace(values, rho=np.bincount(states, minlength=S) / len(states))
    assert exact.mean() == pytest.approx(policy_gradient(actor, visited) @ direction, rel=1e-5)
