import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_trpo_ext import old_policy
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.objectives import EntropyBonus, SinglePathSurrogate
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.standard_policies import fixed_features, mlp_actor
from tests.cases import CASES, STANDARD, LearnedExtractor, dense, dense_fisher, observations, sample_actions

B = 7


def problem_of(policy, n=B, dense_layers=False, advantages=None, ent_coef=0.0, **kwargs):
    obs = observations(n)
    actions = sample_actions(policy, obs)
    advantages = th.randn(n, dtype=th.float64) if advantages is None else advantages
    mlp = None
    if dense_layers:
        mlp = mlp_actor(policy), fixed_features(policy, obs, policy.pi_features_extractor, 3)
    objectives = [SinglePathSurrogate(actions, advantages), EntropyBonus(actions, ent_coef)]
    return PolicyProblem(lambda rows: policy.get_distribution(obs[rows]), n, objectives, actions, policy, mlp=mlp, **kwargs)


def assert_relative(actual, expected, tolerance=1e-6):
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("fisher", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fisher_products_agree_with_the_matrix_of_scores(case, fisher):
    policy = case.policy()
    problem = problem_of(policy, fisher=fisher)
    assert_relative(
        dense(problem.fisher_product(), len(problem.parameters)), dense_fisher(policy, observations(B), problem.parameters)
    )


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("case", STANDARD, ids=lambda case: case.name)
def test_the_layerwise_product_agrees_too(case, activation):
    policy = case.policy(activation=activation)
    problem = problem_of(policy, dense_layers=True)
    assert problem.fisher == "gauss_newton"
    assert_relative(
        dense(problem.fisher_product(), len(problem.parameters)), dense_fisher(policy, observations(B), problem.parameters)
    )


def test_features_that_only_unfold_a_batch_are_extracted_when_asked_for_where_they_are_large():
    """One-hot codes and frames as floats take many times the memory of the observations themselves."""
    space = spaces.Discrete(50)
    policy = ActorCriticPolicy(space, spaces.Discrete(2), lambda _: 1e-3)
    obs = th.arange(20)
    read = [fixed_features(policy, obs, policy.pi_features_extractor, size) for size in (3, 2000)]
    assert [isinstance(features, th.Tensor) for features in read] == [False, True]
    for rows in (slice(2, 5), slice(0, 20, 7), th.tensor([4, 1, 1])):
        assert th.equal(read[0][rows], th.eye(50)[obs[rows]]) and th.equal(read[1][rows], read[0][rows])
    learned = LearnedExtractor(spaces.Box(0, 1, (50,)))
    assert isinstance(fixed_features(policy, obs, learned, 1), th.Tensor)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_empirical_fisher_is_the_average_outer_product_of_scores(case):
    policy = case.policy()
    problem = problem_of(policy, fisher="empirical")
    obs = observations(B)
    actions = sample_actions(policy, obs)
    problem._actions = actions
    log_probs = [policy.get_distribution(obs[i : i + 1]).log_prob(actions[i : i + 1]).sum() for i in range(B)]
    scores = [problem.parameters.gradient(log_prob) for log_prob in log_probs]
    expected = sum(th.outer(score, score) for score in scores) / B
    assert_relative(dense(problem.fisher_product(), len(problem.parameters)), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_policy_parameters_are_what_the_distribution_depends_on(case):
    policy = case.policy()
    chosen = {name for name, p in policy.named_parameters() if p in problem_of(policy).parameters}
    expected = {name for name, _ in policy.named_parameters() if not name.startswith(("value_net", "mlp_extractor.value_net"))}
    if not case.share:
        expected -= {name for name in expected if name.startswith("vf_features_extractor")}
    assert chosen == expected
    if case.learned_extractor:
        assert any("value_something" in name for name in chosen)


def test_order_of_parameters_is_the_policys():
    policy = STANDARD[0].policy()
    for dense_layers in (False, True):
        chosen = problem_of(policy, dense_layers=dense_layers).parameters
        assert [id(p) for p in chosen.tensors] == [id(p) for p in policy.parameters() if p in chosen]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_at_theta_old_the_kl_is_zero_and_the_surrogate_the_mean_advantage(case):
    advantages = th.randn(B, dtype=th.float64)
    problem = problem_of(case.policy(), advantages=advantages)
    start = problem.evaluate()
    assert start.kl == 0.0
    assert start.objective == pytest.approx(float(advantages.mean()), abs=1e-15)
    assert problem.gradient()[0] == start.objective


# SB3 stops the gradient of gSDE's σ in the features, which differences of the surrogate do not know
@pytest.mark.parametrize("ent_coef", [0.0, 0.7])
@pytest.mark.parametrize("case", [case for case in CASES if not case.use_sde], ids=lambda case: case.name)
def test_gradient_agrees_with_differences_of_the_surrogate(case, ent_coef):
    problem = problem_of(case.policy(), ent_coef=ent_coef)
    theta, (_, g) = problem.parameters.read(), problem.gradient()
    direction = th.randn_like(g)
    values = []
    for h in (1e-5, -1e-5):
        problem.parameters.write(theta + h * direction)
        values.append(problem.evaluate().objective)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(g @ direction), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("case", STANDARD, ids=lambda case: case.name)
def test_small_steps_have_the_kl_that_the_fisher_matrix_predicts(case):
    problem = problem_of(case.policy())
    theta, s = problem.parameters.read(), 1e-4 * th.randn(len(problem.parameters), dtype=th.float64)
    predicted = 0.5 * float(s @ problem.fisher_product()(s))
    problem.parameters.write(theta + s)
    assert problem.evaluate().kl == pytest.approx(predicted, rel=1e-2)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("dense_layers", [False, True])
@pytest.mark.parametrize("fisher", ["gauss_newton", "hessian", "empirical"])
def test_chunks_change_nothing(fisher, dense_layers, chunk_size):
    whole = problem_of(STANDARD[0].policy(), dense_layers=dense_layers, fisher=fisher, advantages=th.ones(B).double())
    chunked = problem_of(
        STANDARD[0].policy(), dense_layers=dense_layers, fisher=fisher, advantages=th.ones(B).double(), chunk_size=chunk_size
    )
    v = th.randn(len(whole.parameters), dtype=th.float64)
    th.testing.assert_close(chunked.gradient()[1], whole.gradient()[1])
    th.testing.assert_close(chunked.fisher_product()(v), whole.fisher_product()(v))
    for problem in (whole, chunked):
        problem.parameters.write(problem.parameters.read() + 0.1)
    np.testing.assert_allclose(chunked.evaluate(), whole.evaluate())
    assert chunked.entropy == pytest.approx(whole.entropy)


@pytest.mark.parametrize("fisher", ["auto", "hessian", "empirical"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mean_reduction_divides_kl_and_fisher_alike(case, fisher):
    summed, mean = (problem_of(case.policy(), fisher=fisher, kl_reduction=reduction) for reduction in ("sum", "mean"))
    mean._actions = summed._actions
    d = {"box": 2, "multi_binary": 3}.get(case.space, 1)
    v = th.randn(len(summed.parameters), dtype=th.float64)
    th.testing.assert_close(d * mean.fisher_product()(v), summed.fisher_product()(v))
    for problem in (summed, mean):
        problem.parameters.write(problem.parameters.read() + 0.05)
    assert d * mean.evaluate().kl == pytest.approx(summed.evaluate().kl)


@pytest.mark.parametrize("factor", [2, 3, 7, 50])
def test_thinning_touches_the_fisher_product_alone(factor):
    policy = STANDARD[0].policy()
    advantages = th.randn(B, dtype=th.float64)
    whole, thinned = (problem_of(policy, advantages=advantages, sub_sampling_factor=k) for k in (1, factor))
    expected = dense_fisher(policy, observations(B)[::factor], thinned.parameters)
    assert_relative(dense(thinned.fisher_product(), len(thinned.parameters)), expected)
    assert whole.evaluate() == thinned.evaluate()
    assert th.equal(whole.gradient()[1], thinned.gradient()[1])


def test_a_theta_without_a_policy_evaluates_to_nan():
    problem = problem_of(STANDARD[0].policy())
    problem.parameters.write(th.full_like(problem.parameters.read(), th.nan))
    assert all(np.isnan(problem.evaluate()))


def test_parameters_that_the_user_froze_stay_out():
    policy = STANDARD[0].policy()
    policy.log_std.requires_grad_(False)
    for dense_layers in (False, True):
        problem = problem_of(policy, dense_layers=dense_layers)
        assert policy.log_std not in problem.parameters
        reference = FlatParameters(p for p in policy.parameters() if p in problem.parameters)
        assert_relative(
            dense(problem.fisher_product(), len(problem.parameters)), dense_fisher(policy, observations(B), reference)
        )


@pytest.mark.parametrize("shape", [(), (1,), (1, 2)], ids=str)
def test_a_spread_that_is_not_one_number_a_dimension_is_left_to_autograd(shape):
    policy = STANDARD[0].policy()
    policy.log_std = nn.Parameter(th.full(shape, -0.5, dtype=th.float64))
    assert mlp_actor(policy) is None
    problem = problem_of(policy)
    assert policy.log_std in problem.parameters
    assert_relative(
        dense(problem.fisher_product(), len(problem.parameters)), dense_fisher(policy, observations(B), problem.parameters)
    )


class MeanActionOnOwnStates:
    """Averages over states of its own."""

    def __init__(self, states):
        self.states = states

    def set_old(self, old, rows):
        pass

    def terms(self, distribution, rows):
        return distribution.mode().double().sum(dim=1)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_an_objective_may_bring_its_own_states(chunk_size):
    policy, obs = STANDARD[0].policy(), observations(B)
    own = MeanActionOnOwnStates(th.tensor([5, 0, 5]))
    actions, advantages = sample_actions(policy, obs), th.randn(B, dtype=th.float64)

    def problem_with(*objectives):
        return PolicyProblem(
            lambda rows: policy.get_distribution(obs[rows]), B, objectives, actions, policy, chunk_size=chunk_size
        )

    alone, both = problem_with(own), problem_with(SinglePathSurrogate(actions, advantages), own)
    mean = policy.get_distribution(obs[own.states]).mode().sum(dim=1).mean()

    objective, gradient = alone.gradient()
    assert objective == pytest.approx(float(mean.detach()))
    th.testing.assert_close(gradient, alone.parameters.gradient(mean))
    assert both.gradient()[0] == pytest.approx(objective + float(advantages.mean()))
    whole = problem_with(SinglePathSurrogate(actions, advantages))
    th.testing.assert_close(both.gradient()[1], gradient + whole.gradient()[1])
    both.parameters.write(both.parameters.read() + 0.05)
    assert both.evaluate().kl == alone.evaluate().kl == whole.evaluate().kl > 0.0
    assert both.evaluate().objective == pytest.approx(alone.evaluate().objective + whole.evaluate().objective)


class OnceDifferentiable(th.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return th.sin(x)

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        return cotangent * th.cos(ctx.saved_tensors[0])


class Tokens(BaseFeaturesExtractor):
    """Three tokens of four features, through a layer that torch has kernels for which are not differentiable twice."""

    def __init__(self, observation_space, kind):
        super().__init__(observation_space, 4)
        self.kind = kind
        self.read = nn.Linear(3, 12)
        if kind == "multihead":
            self.layer = nn.MultiheadAttention(4, 2, batch_first=True)
        elif kind == "encoder":
            self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        elif kind == "bag":
            self.layer = nn.EmbeddingBag(10, 4)
        elif kind == "compiled":
            self.layer = th.compile(nn.Linear(4, 4), backend="aot_eager")

    def forward(self, observations):
        x = self.read(observations.double()).unflatten(1, (3, 4))
        if self.kind == "multihead":
            x = self.layer(x, x, x, need_weights=False)[0]
        elif self.kind == "attention":
            x = nn.functional.scaled_dot_product_attention(x, x, x)
        elif self.kind == "bag":
            x = th.tanh(x) * self.layer((observations + 2.0).long())[:, None]
        elif self.kind == "once":
            x = OnceDifferentiable.apply(x)
        else:
            x = self.layer(x)
        return x.mean(dim=1)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
@pytest.mark.parametrize("fisher", ["gauss_newton", "hessian", "empirical"])
@pytest.mark.parametrize("kind", ["multihead", "encoder", "attention", "bag", "once", "compiled"])
def test_layers_without_a_second_derivative_have_fisher_products_all_the_same(kind, fisher):
    policy = ActorCriticPolicy(
        spaces.Box(-2.0, 2.0, (3,)),
        spaces.Discrete(3),
        lambda _: 1e-3,
        net_arch=[4],
        features_extractor_class=Tokens,
        features_extractor_kwargs=dict(kind=kind),
    ).double()
    for parameter in policy.parameters():
        parameter.data += 0.3 * th.randn_like(parameter)
    policy.set_training_mode(False)
    problem = problem_of(policy, fisher=fisher)
    theta = problem.parameters.read()
    matrix = dense(problem.fisher_product(), len(problem.parameters))
    expected = dense_fisher(policy, observations(B), problem.parameters)
    if fisher == "empirical":
        obs = observations(B)
        actions = sample_actions(policy, obs)
        scores = [
            problem.parameters.gradient(policy.get_distribution(obs[i : i + 1]).log_prob(actions[i : i + 1])) for i in range(B)
        ]
        expected = sum(th.outer(score, score) for score in scores) / B
    assert_relative(matrix, expected, 1e-6)
    assert th.equal(problem.parameters.read(), theta)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_large_old_policy_is_computed_anew_and_is_the_same(case, monkeypatch):
    seen = []
    for most in (2**24, 0):
        monkeypatch.setattr(old_policy, "_MOST_NUMBERS_KEPT", most)
        policy = case.policy()
        problem = problem_of(policy, chunk_size=3)
        th.manual_seed(0)
        minibatches = problem.minibatches(4)
        start = problem.evaluate()
        theta = problem.parameters.read()
        problem.parameters.write(theta + 0.05 * th.randn(len(theta), dtype=th.float64))
        seen.append((start, problem.evaluate(), [float(minibatch().kl.detach()) for minibatch in minibatches]))
        assert bool(problem._old._kept) is (most > 0)
    assert seen[0] == seen[1] and seen[0][0].kl == 0.0 < seen[0][1].kl
