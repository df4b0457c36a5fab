"""On finite MDPs whose Q is known, the gradient of the vine's surrogate is on average what theory says.

Each case pools its rounds into one statistic: the projection of ĝ − E ĝ on the exact gradient, within three standard
errors of zero. The expectation is that of the states that were drawn, so these add no noise.
"""

import itertools

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_trpo_ext import SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.objectives import SelfNormalizedSurrogate
from tests.envs import FiniteMDP

GAMMA = 0.9
S, A = 4, 3
ROUNDS = 24


def mdp(seed=0):
    rng = np.random.default_rng(seed)
    transitions = 0.75 * rng.dirichlet(np.ones(S), size=(S, A))  # an episode ends with a chance of 1/4
    return transitions, 5.0 * rng.normal(size=(S, A))


class ExactValues(TRPOExt):
    """Cuts branches with the true V."""

    values = None

    def predict_values(self, observations):
        return th.as_tensor(self.values, dtype=th.float32)[observations.long().flatten()].reshape(-1, 1)


def model_of(exact_values=False, **vine):
    env = DummyVecEnv([lambda: SnapshotWrapper(FiniteMDP(*mdp()))] * 8)
    model = (ExactValues if exact_values else TRPOExt)(
        "MlpPolicy",
        env,
        n_steps=8,
        batch_size=64,
        gamma=GAMMA,
        seed=0,
        device="cpu",
        normalize_advantage=False,
        rollout_buffer_class=VineRolloutBuffer,
        rollout_buffer_kwargs=dict(n_rollout_states=64, **vine),
        policy_kwargs=dict(net_arch=dict(pi=[4], vf=[4])),
    )
    for parameter in model.policy.parameters():  # away from the uniform start
        parameter.data += 0.5 * th.randn_like(parameter)
    probabilities = probabilities_of(model).detach().numpy()
    transitions, rewards = mdp()
    pi_rewards = (probabilities * rewards).sum(axis=1)
    pi_transitions = np.einsum("sa,sat->st", probabilities, transitions)
    model.values = np.linalg.solve(np.eye(S) - GAMMA * pi_transitions, pi_rewards)
    model.q = rewards + GAMMA * transitions @ model.values
    return model


def probabilities_of(model):
    return model.policy.get_distribution(th.arange(S)).distribution.probs


def gradients_by_state(model, parameters, objective_of):
    """∇ of one number per state, (S, P), from the probabilities (A,) and Q (A,) of each."""
    q = th.as_tensor(model.q, dtype=th.float32)
    return th.stack([parameters.gradient(objective_of(probabilities_of(model)[s], q[s])) for s in range(S)])


def exact(p, q):
    return (p * q).sum()


def self_normalized(n_actions):
    """The mean of Σ w Q / Σ w over all tuples of actions drawn uniformly, w ∝ π."""

    def objective(p, q):
        tuples = th.tensor(list(itertools.product(range(A), repeat=n_actions)))
        return ((p[tuples] * q[tuples]).sum(dim=1) / p[tuples].sum(dim=1)).mean()

    return objective


def standard_errors(model, *expectations):
    """For each objective and factor: standard errors between zero and the mean of u·(ĝ − factor ∇objective)."""
    _, callback = model._setup_learn(10**9)
    deviations = []
    for _ in range(ROUNDS):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        states = model.rollout_buffer.branches.states
        visited = model.rollout_buffer.observations[states % 8, states // 8].flatten().astype(int)
        problem = model._policy_problem(next(model.rollout_buffer.get()))
        if not deviations:
            expected = [factor * gradients_by_state(model, problem.parameters, of) for of, factor in expectations]
            direction = gradients_by_state(model, problem.parameters, exact).mean(dim=0)
        estimate = problem.gradient()[1]
        deviations.append([float(direction @ (estimate - by_state[visited].mean(dim=0))) for by_state in expected])
    errors = np.std(deviations, axis=0, ddof=1) / np.sqrt(ROUNDS)
    # common random numbers may leave nothing but rounding in single precision, which has a mean of its own
    rounding = 1e-6 * float(direction @ direction)
    return np.abs(np.mean(deviations, axis=0)) / np.hypot(errors, rounding)


def test_all_actions_have_the_exact_gradient_on_average():
    model = model_of(n_branch_actions="all", branch_length=60)
    right, wrong = standard_errors(model, (exact, 1.0), (exact, (A - 1) / A))
    assert right < 3.0 < wrong


@pytest.mark.parametrize("n_actions", [2, 4])
def test_draws_from_the_policy_shrink_the_gradient_by_one_part_in_k(n_actions):
    model = model_of(n_branch_actions=n_actions, branch_length=60, proposal="policy")
    right, wrong = standard_errors(model, (exact, (n_actions - 1) / n_actions), (exact, 1.0))
    assert right < 3.0 < wrong


@pytest.mark.parametrize("n_actions", [2, 4])
def test_uniform_draws_have_the_expectation_over_action_tuples(n_actions):
    model = model_of(n_branch_actions=n_actions, branch_length=60, proposal="uniform")
    right, wrong = standard_errors(model, (self_normalized(n_actions), 1.0), (exact, 1.0))
    assert right < 3.0 < wrong


def test_branches_that_are_cut_go_on_with_v():
    model = model_of(n_branch_actions="all", branch_length=3, exact_values=True)
    assert standard_errors(model, (exact, 1.0)) < 3.0


def test_branches_that_are_cut_and_do_not_go_on_know_what_came_before():
    model = model_of(n_branch_actions="all", branch_length=1, branch_bootstrap=False)
    rewards = th.as_tensor(mdp()[1], dtype=th.float32)
    model.q, q = rewards.numpy(), model.q
    (right,) = standard_errors(model, (exact, 1.0))
    model.q = q
    (wrong,) = standard_errors(model, (exact, 1.0))
    assert right < 3.0 < wrong


def test_without_common_random_numbers_the_mean_is_the_same():
    model = model_of(n_branch_actions="all", branch_length=60, common_random_numbers=False)
    assert standard_errors(model, (exact, 1.0)) < 3.0


def test_the_bias_of_uniform_draws_falls_as_one_over_k():
    logits = th.tensor([0.3, 0.0, -0.2], dtype=th.float64, requires_grad=True)
    q = th.tensor([1.0, -2.0, 0.5], dtype=th.float64)

    def gradient(objective):
        return th.autograd.grad(objective, logits)[0]

    biases = []
    for n_actions in (2, 4, 8):
        tuples = th.tensor(list(itertools.product(range(A), repeat=n_actions)))
        n, uniform = len(tuples), th.full(tuples.shape, -np.log(A))
        surrogate = SelfNormalizedSurrogate(th.zeros(n), tuples, q[tuples], uniform, th.ones(tuples.shape))
        policy = CategoricalDistribution(A).proba_distribution(logits.expand(n, A))
        mean = gradient(surrogate.terms(policy, slice(0, n)).mean())
        th.testing.assert_close(mean, gradient(self_normalized(n_actions)(th.softmax(logits, 0), q)))
        biases.append(float((mean - gradient(exact(th.softmax(logits, 0), q))).norm()))
    assert biases[0] / biases[1] == pytest.approx(2.0, rel=0.1)
    assert biases[1] / biases[2] == pytest.approx(2.0, rel=0.1)
