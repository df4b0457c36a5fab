import numpy as np
import pytest
import torch as th
from hypothesis import assume
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext.lab import FiniteMDP, bounds
from sb3_trpo_ext.lab.env import FiniteMDPEnv
from sb3_trpo_ext.lab.mdp import evaluate, evaluate_average, random_mdp
from sb3_trpo_ext.lab.policies import (
    ActorOf,
    ExactProblem,
    LogLinear,
    TabularSoftmax,
    compatible_function,
    compatible_weights,
    first_order_policy,
    fisher_matrix,
    infinite_step_policy,
    log_probabilities,
    natural_gradient,
    parameters_of,
    policy_gradient,
    probabilities,
    scores,
)
from sb3_trpo_ext.trust_region import TrustRegionProblem
from tests.lab.cases import SEEDS, assert_equal, for_all, mdps, st, well_mixed

KINDS = ("tabular", "log_linear", "network")


def make_policy(kind, mdp, seed):
    rng = np.random.default_rng(seed)
    if kind == "tabular":
        return TabularSoftmax(rng.normal(size=mdp.shape))
    if kind == "log_linear":
        return LogLinear(rng.normal(size=(*mdp.shape, 3)), rng.normal(size=3))
    with th.random.fork_rng():
        th.manual_seed(seed)
        return nn.Sequential(nn.Embedding(mdp.shape[0], 2), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, mdp.shape[1])).double()


def eta_with_graph(mdp, policy):
    """η(θ) = ρ₀ᵀ(I − γP_π)⁻¹r_π as torch sees it: an oracle that knows nothing of the policy gradient theorem."""
    P, R, rho0 = (th.as_tensor(array.copy()) for array in (mdp.P, mdp.R, mdp.rho0))
    pi = log_probabilities(policy, mdp.shape[0]).exp()
    chain = th.einsum("sa,sat->st", pi, P)
    return rho0 @ th.linalg.solve(th.eye(len(rho0)).double() - mdp.gamma * chain, (pi * R).sum(dim=1))


@for_all(mdp=mdps(max_states=4), seed=SEEDS, kind=st.sampled_from(KINDS))
def test_policy_gradient_is_the_gradient_of_eta(mdp, seed, kind):
    policy = make_policy(kind, mdp, seed)
    values = evaluate(mdp, probabilities(policy, mdp.shape[0]))
    expected = parameters_of(policy, mdp.shape[0]).gradient(eta_with_graph(mdp, policy))
    assert_equal(policy_gradient(policy, values), expected, np.abs(mdp.R).max() / (1 - mdp.gamma) ** 2)


def differences(function, parameters, h=1e-5):
    """Central differences of a function of nothing in θ."""
    theta, columns = parameters.read(), []
    for e in th.eye(len(theta), dtype=th.float64):
        values = []
        for step in (h * e, -h * e):
            parameters.write(theta + step)
            values.append(np.asarray(function()))
        columns.append((values[0] - values[1]) / (2 * h))
    parameters.write(theta)
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_average_reward_and_of_the_surrogate(kind):
    mdp = random_mdp(4, 3, seed=1)
    policy = make_policy(kind, mdp, 2)
    parameters = parameters_of(policy, 4)
    average, discounted = (evaluation(mdp, probabilities(policy, 4)) for evaluation in (evaluate_average, evaluate))
    of_eta = differences(lambda: evaluate_average(mdp, probabilities(policy, 4)).eta, parameters)
    np.testing.assert_allclose(policy_gradient(policy, average), of_eta, atol=1e-8)
    of_surrogate = differences(lambda: bounds.surrogate(discounted, probabilities(policy, 4)), parameters)
    np.testing.assert_allclose(policy_gradient(policy, discounted), of_surrogate, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_fisher_matrix(kind):
    mdp = random_mdp(4, 3, seed=1)
    policy = make_policy(kind, mdp, 2)
    parameters = parameters_of(policy, 4)
    psi = scores(policy, 4)
    np.testing.assert_allclose(psi, differences(lambda: log_probabilities(policy, 4).detach().numpy(), parameters), atol=1e-8)
    old = evaluate(mdp, probabilities(policy, 4))

    def kl_over_visits(*tensors):
        named = dict(zip(dict(policy.named_parameters()), tensors, strict=True))
        log_probs = th.log_softmax(th.func.functional_call(policy, named, (th.arange(4),)), dim=1)
        weighted = th.as_tensor(old.rho[:, None] * old.pi)
        return (weighted * (th.as_tensor(old.pi).log() - log_probs)).sum()

    blocks = th.autograd.functional.hessian(kl_over_visits, tuple(p.detach() for p in policy.parameters()))
    rows = zip(policy.parameters(), blocks, strict=True)
    hessian = th.cat([th.cat([block.reshape(p.numel(), -1) for block in row], dim=1) for p, row in rows])
    F = fisher_matrix(policy, old.rho)
    np.testing.assert_allclose(F, hessian, atol=1e-10)
    # ρ unnormalised is 1/(1 − γ) of ρ normalised, and F⁺∇η is the same
    np.testing.assert_allclose(F * (1 - mdp.gamma), fisher_matrix(policy, old.state_weights), atol=1e-12)


@for_all(mdp=well_mixed(), seed=SEEDS)
def test_tabular_natural_gradient_is_the_advantage(mdp, seed):
    policy = make_policy("tabular", mdp, seed)
    values = evaluate(mdp, probabilities(policy, mdp.shape[0]))
    # F is singular along constants of a state, so the solution of minimum norm has mean zero
    expected = values.A - values.A.mean(axis=1, keepdims=True)
    direction = natural_gradient(policy, values).reshape(mdp.shape)
    # exact up to the conditioning of F, which π and ρ set
    scale = np.abs(values.A).max() / (values.pi.min() * values.state_weights.min())
    assert_equal(direction, expected, scale, tolerance=1e-12)


@for_all(mdp=well_mixed(max_states=4), seed=SEEDS, kind=st.sampled_from(("tabular", "log_linear")), average=st.booleans())
def test_kakades_first_theorem(mdp, seed, kind, average):
    policy = make_policy(kind, mdp, seed)
    values = (evaluate_average if average else evaluate)(mdp, probabilities(policy, mdp.shape[0]))
    weights = compatible_weights(policy, values)
    psi, visits = scores(policy, mdp.shape[0]), values.rho[:, None] * values.pi
    scale = np.abs(values.Q).max() * values.rho.sum() * np.abs(psi).max() ** 2 + np.abs(weights).max()
    if kind == "tabular":
        # least squares and F⁺∇η are two ways to one vector, the second with F's condition number
        condition = 1.0 / (values.pi.min() * values.state_weights.min())
        assert_equal(natural_gradient(policy, values), weights, scale * condition, tolerance=1e-12)
    else:
        # a few features of few states may be nearly dependent; then the vectors differ where F says nothing
        F = fisher_matrix(policy, values.rho)
        assert_equal(F @ natural_gradient(policy, values), F @ weights, scale * values.rho.sum())
    # f in place of Q leaves the gradient exact, and the residual is orthogonal to the features
    f = compatible_function(policy, weights, mdp.shape[0])
    assert_equal(np.einsum("sa,sap->p", visits * f, psi), policy_gradient(policy, values), scale * values.rho.sum())
    assert_equal(np.einsum("sa,sap->p", visits * (f - values.Q), psi), 0.0, scale * values.rho.sum())


def test_compatible_weights_are_of_minimum_norm_where_rounding_hides_what_is_singular():
    # with NumPy's threshold the weights had a part of 0.3 along constants here
    mdp = FiniteMDP(np.ones((1, 2, 1)), np.array([[0.10490012, -0.53566937]]), np.ones(1), 0.0)
    policy = make_policy("tabular", mdp, 3)
    weights = compatible_weights(policy, evaluate(mdp, probabilities(policy, 1)))
    assert abs(weights.sum()) < 1e-9


@for_all(mdp=well_mixed(max_states=4), seed=SEEDS, kind=st.sampled_from(("tabular", "log_linear")))
def test_kakades_second_theorem(mdp, seed, kind):
    policy = make_policy(kind, mdp, seed)
    values = evaluate(mdp, probabilities(policy, mdp.shape[0]))
    direction = natural_gradient(policy, values)
    f = compatible_function(policy, direction, mdp.shape[0])
    best_two = np.sort(f, axis=1)[:, -2:]
    # a finite step is as good as an infinite one where there are no near ties
    assume(f.shape[1] == 1 or np.diff(best_two).min() > 1e-4)
    limit = infinite_step_policy(values.pi, f)
    parameters = parameters_of(policy, mdp.shape[0])
    parameters.write(parameters.read() + 1e7 * th.as_tensor(direction))
    np.testing.assert_allclose(probabilities(policy, mdp.shape[0]), limit, atol=1e-9)
    if kind == "tabular":  # f = A: the limit is policy iteration
        np.testing.assert_array_equal(limit.argmax(axis=1), values.A.argmax(axis=1))


def test_ties_share_the_infinite_step():
    pi = np.array([[0.2, 0.3, 0.5]])
    np.testing.assert_allclose(infinite_step_policy(pi, np.array([[1.0, 1.0, 0.0]])), [[0.4, 0.6, 0.0]])


def test_an_action_without_probability_stays_without():
    pi = np.array([[0.0, 0.4, 0.6]])
    np.testing.assert_array_equal(infinite_step_policy(pi, np.array([[2.0, 1.0, 0.0]])), [[0.0, 1.0, 0.0]])


@for_all(mdp=well_mixed(max_states=4), seed=SEEDS, kind=st.sampled_from(("tabular", "log_linear")))
def test_kakades_third_theorem(mdp, seed, kind):
    policy = make_policy(kind, mdp, seed)
    values = evaluate(mdp, probabilities(policy, mdp.shape[0]))
    parameters, direction = parameters_of(policy, mdp.shape[0]), natural_gradient(policy, values)
    f = compatible_function(policy, direction, mdp.shape[0])
    alpha = 1e-3 / max(np.abs(f).max(), 1e-3)
    parameters.write(parameters.read() + alpha * th.as_tensor(direction))
    # e^{αf} over its mean, of which the mean of f is zero: the rest is below (α max|f|)²
    error = np.abs(probabilities(policy, mdp.shape[0]) - first_order_policy(values.pi, f, alpha)).max()
    assert error <= 1.1 * (alpha * np.abs(f).max()) ** 2 + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_after_the_first_order_is_of_the_second(kind):
    mdp = random_mdp(4, 3, seed=3)
    policy = make_policy(kind, mdp, 4)
    values = evaluate(mdp, probabilities(policy, 4))
    parameters, direction = parameters_of(policy, 4), natural_gradient(policy, values)
    theta, f = parameters.read(), compatible_function(policy, direction, 4)
    errors = []
    for alpha in (1e-3, 5e-4):
        parameters.write(theta + alpha * th.as_tensor(direction))
        errors.append(np.abs(probabilities(policy, 4) - first_order_policy(values.pi, f, alpha)).max())
    # half the step, a quarter of the error
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)
    assert errors[0] < 0.1 * 1e-3 * np.abs(values.pi * f).max()


def test_an_sb3_policy_has_exact_values_too():
    mdp = random_mdp(3, 2, seed=1)
    env = FiniteMDPEnv(mdp)
    policy = ActorCriticPolicy(env.observation_space, env.action_space, lambda _: 1e-3, net_arch=[4])
    actor = ActorOf(policy)
    pi = probabilities(actor, 3)
    with th.no_grad():
        expected = policy.get_distribution(th.arange(3)).distribution.probs
    np.testing.assert_allclose(pi, expected, rtol=1e-6)
    # of the actor's parameters alone, in the policy's precision
    assert policy_gradient(actor, evaluate(mdp, pi)).shape == (3 * 4 + 4 + 4 * 2 + 2,)


@pytest.mark.parametrize("constraint, index", [("mean", 3), ("max", 2)])
def test_the_exact_problem_is_a_trust_region_problem(constraint, index):
    mdp = random_mdp(4, 3, seed=3)
    policy = make_policy("log_linear", mdp, 4)
    problem: TrustRegionProblem = ExactProblem(mdp, policy, constraint)
    old = evaluate(mdp, probabilities(policy, 4))
    assert problem.evaluate() == (pytest.approx(0.0, abs=1e-15), 0.0)
    problem.parameters.write(problem.parameters.read() + 0.1)
    pi = probabilities(policy, 4)
    gain = (bounds.surrogate(old, pi) - old.eta) * (1 - mdp.gamma)
    assert problem.evaluate() == pytest.approx((gain, bounds.divergence(old, pi)[index]))
    problem.parameters.write(th.full((3,), th.nan, dtype=th.float64))
    assert np.isnan(problem.evaluate()).all()


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"the logits' shape must be \(2, A\), got \(2,\)"):
        probabilities(nn.Flatten(0), 2)
    for policy in (TabularSoftmax(np.zeros((2, 2))), nn.Embedding(2, 2)):
        with pytest.raises(ValueError, match="the policy must have logits for 3 states, got: "):
            probabilities(policy, 3)
    with pytest.raises(ValueError, match="constraint must be one of 'mean', 'max', got 'median'"):
        ExactProblem(random_mdp(2, 2), TabularSoftmax(np.zeros((2, 2))), "median")
