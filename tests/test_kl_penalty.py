import math

import pytest
import torch as th
from torch import nn

from sb3_trpo_ext.kl_penalty import KLPenaltySettings, _loss, adapted_beta, kl_penalty_step
from sb3_trpo_ext.objectives import SinglePathSurrogate
from sb3_trpo_ext.policy_problem import PolicyProblem
from sb3_trpo_ext.steps import Evaluation, StepOutcome
from tests.cases import CASES, STANDARD, observations, sample_actions
from tests.test_policy_problem import problem_of

N = 8
SETTINGS = KLPenaltySettings(beta=0.5, n_epochs=3, batch_size=4, max_grad_norm=0.0)


def moved(case, **kwargs):
    """A problem and its minibatches, θ having moved since."""
    problem = problem_of(case.policy(), N, **kwargs)
    minibatches = problem.minibatches(4)
    problem.parameters.write(problem.parameters.read() + 0.05)
    return problem, minibatches


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_minibatches_average_to_the_surrogate_and_the_kl(case, ent_coef):
    problem, minibatches = moved(case, ent_coef=ent_coef)
    whole = problem.evaluate()
    with th.no_grad():
        means = [minibatch() for minibatch in minibatches]
    assert sum(float(m.objective) for m in means) / 2 == pytest.approx(whole.objective, rel=1e-9)
    assert sum(float(m.kl) for m in means) / 2 == pytest.approx(whole.kl, rel=1e-9)


class OwnStates(SinglePathSurrogate):
    """A surrogate on some of the states."""

    def __init__(self, states, actions, advantages):
        super().__init__(actions, advantages)
        self.states = states


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_objectives_with_states_of_their_own_are_shared_out_without_bias(batch_size):
    policy, obs = STANDARD[0].policy(), observations(N)
    actions, states = sample_actions(policy, obs), th.tensor([6, 1, 3])
    objective = OwnStates(states, actions[states], th.randn(3, dtype=th.float64))
    problem = PolicyProblem(lambda rows: policy.get_distribution(obs[rows]), N, [objective], actions, policy)
    minibatches = problem.minibatches(batch_size)
    problem.parameters.write(problem.parameters.read() + 0.05)
    with th.no_grad():
        means = [minibatch() for minibatch in minibatches]
    whole = problem.evaluate()
    assert sum(float(m.objective) for m in means) / len(means) == pytest.approx(whole.objective, rel=1e-9)
    assert sum(float(m.kl) for m in means) / len(means) == pytest.approx(whole.kl, rel=1e-9)


@pytest.mark.parametrize("case", STANDARD, ids=lambda case: case.name)
def test_the_loss_agrees_with_differences_of_surrogate_and_kl(case):
    problem, (minibatch,) = (p := problem_of(case.policy(), N)), p.minibatches(N)
    theta = problem.parameters.read() + 0.05
    problem.parameters.write(theta)
    g = problem.parameters.gradient(_loss(minibatch(), SETTINGS))
    direction, values = th.randn_like(g), []
    for h in (1e-5, -1e-5):
        problem.parameters.write(theta + h * direction)
        objective, kl = problem.evaluate()
        values.append(0.5 * kl - objective)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(g @ direction), rel=1e-5, abs=1e-8)


def test_the_sample_estimate_is_the_mean_of_minus_log_pi():
    """The lecture's regulariser, E[ln 1/π_θ(a|s)]; its gradient is KL's in the mean over actions."""
    policy, obs = STANDARD[1].policy(), observations(N)
    problem, (minibatch,) = (p := problem_of(policy, N, advantages=th.zeros(N).double())), p.minibatches(N)
    g = problem.parameters.gradient(_loss(minibatch(), KLPenaltySettings(beta=2.0, kl_estimator="sample")))
    actions = sample_actions(policy, obs)
    log_probs = policy.get_distribution(obs).log_prob(actions)
    th.testing.assert_close(g, problem.parameters.gradient(-2.0 * log_probs.mean()))


def fit(case=STANDARD[0], settings=SETTINGS, lr=1e-2, steps_before=0, **kwargs):
    policy = case.policy()
    problem = problem_of(policy, N, **kwargs)
    optimizer = th.optim.Adam(policy.parameters(), lr=lr)
    for _ in range(steps_before):
        kl_penalty_step(problem_of(policy, N, **kwargs), optimizer, settings)
    before = problem.parameters.read()
    return problem, optimizer, before


@pytest.mark.parametrize("kl_estimator", ["analytic", "sample"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_report_says_what_the_step_did(case, kl_estimator):
    problem, optimizer, theta = fit(case)
    start, (_, g) = problem.evaluate(), problem.gradient()
    report = kl_penalty_step(problem, optimizer, KLPenaltySettings(**{**vars(SETTINGS), "kl_estimator": kl_estimator}))
    now, s = problem.evaluate(), problem.parameters.read() - theta
    assert report.outcome is StepOutcome.ACCEPTED and report.epochs == 3
    assert (report.objective, report.kl) == now and report.kl > 0
    assert report.improvement == pytest.approx(now.objective - start.objective)
    assert report.expected_improvement == pytest.approx(float(g @ s))
    assert report.step_norm == pytest.approx(float(s.norm()))


def test_a_larger_beta_ends_nearer_to_the_old_policy_and_at_its_optimum():
    """For many small full-batch steps: at a stationary point of L − β KL, nearer for larger β."""
    kls = []
    for beta in (2.0, 16.0):
        problem, optimizer, _ = fit(STANDARD[1], lr=1e-2)
        (minibatch,) = problem.minibatches(N)
        settings = KLPenaltySettings(beta, n_epochs=500, batch_size=N, max_grad_norm=0.0)
        start = float(problem.gradient()[1].norm())
        kls.append(kl_penalty_step(problem, optimizer, settings).kl)
        assert float(problem.parameters.gradient(_loss(minibatch(), settings)).norm()) < 0.05 * start
    assert kls[0] > kls[1] > 0


def test_descent_ends_before_the_minibatch_whose_kl_is_above_max_kl():
    settings = KLPenaltySettings(0.0, n_epochs=50, batch_size=N, max_grad_norm=0.0)
    unbounded = kl_penalty_step(*fit(settings=settings)[:2], settings)
    problem, optimizer, _ = fit(settings=settings)
    bounded = kl_penalty_step(problem, optimizer, KLPenaltySettings(**{**vars(settings), "max_kl": 0.01}))
    assert bounded.outcome is StepOutcome.ACCEPTED and 0 < bounded.epochs < unbounded.epochs == 50
    assert 0.01 < bounded.kl < 0.1 * unbounded.kl


def test_gradients_are_clipped():
    steps = []
    for norm in (0.0, 1e-12):
        policy = STANDARD[0].policy()
        problem, optimizer = problem_of(policy, N), th.optim.SGD(policy.parameters(), lr=0.1)
        settings = KLPenaltySettings(**{**vars(SETTINGS), "max_grad_norm": norm})
        steps.append(kl_penalty_step(problem, optimizer, settings).step_norm)
    assert steps[0] > 1e-3 and steps[1] <= 0.1 * 1e-12 * 6


def state(problem, optimizer):
    memory = {(i, k): v.clone() for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return problem.parameters.read(), memory


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("fault", ["learning rate", "advantages", "evaluation", "loss"])
def test_a_step_that_is_not_finite_never_lands(fault, steps_before, monkeypatch):
    problem, optimizer, _ = fit(steps_before=steps_before)
    expected = StepOutcome.NON_FINITE_STEP
    if fault == "learning rate":
        optimizer.param_groups[0]["lr"] = 1e300
    elif fault == "advantages":
        problem._parts[0].objectives[0].advantages[3] = math.nan
        expected = StepOutcome.NON_FINITE_GRADIENT
    elif fault == "evaluation":
        monkeypatch.setattr(problem, "evaluate", lambda: Evaluation(1.0, math.inf))
    else:
        terms = SinglePathSurrogate.terms
        calls = iter(range(100))
        monkeypatch.setattr(SinglePathSurrogate, "terms", lambda *a: terms(*a) * (math.inf if next(calls) == 4 else 1.0))
    start = state(problem, optimizer)
    report = kl_penalty_step(problem, optimizer, SETTINGS)
    assert report.outcome is expected and report.outcome.is_fault and report.kl == report.step_norm == 0.0
    th.testing.assert_close(state(problem, optimizer), start, rtol=0, atol=0)


def test_without_a_gradient_momentum_moves_nothing():
    problem, optimizer, _ = fit(steps_before=1)
    problem._parts[0].objectives[0].advantages.zero_()
    start = state(problem, optimizer)
    report = kl_penalty_step(problem, optimizer, SETTINGS)
    assert report.outcome is StepOutcome.ZERO_GRADIENT
    th.testing.assert_close(state(problem, optimizer), start, rtol=0, atol=0)


def test_other_parameters_of_the_optimizer_are_not_touched():
    policy = STANDARD[0].policy()
    critic = [p for name, p in policy.named_parameters() if "value" in name]
    before = [p.detach().clone() for p in critic]
    for p in critic:
        p.grad = th.ones_like(p)
    kl_penalty_step(problem_of(policy, N), optimizer := th.optim.Adam(policy.parameters()), SETTINGS)
    assert all(th.equal(a, b) for a, b in zip(critic, before, strict=True)) and not any(p in optimizer.state for p in critic)


@pytest.mark.parametrize(
    "kl, expected", [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1.0), (0.01, 1.0), (0.0149, 1.0), (0.0151, 2.0), (9.0, 2.0)]
)
def test_beta_is_doubled_above_and_halved_below(kl, expected):
    assert adapted_beta(1.0, kl, 0.01) == expected


@pytest.mark.parametrize(
    "beta, too_far, on_target, too_near", [(1e8, 1e8, 1e8, 5e7), (1e-9, 2e-9, 1e-9, 1e-9), (9e5, 1e6, 9e5, 4.5e5)]
)
def test_beta_never_moves_against_its_direction(beta, too_far, on_target, too_near):
    assert [adapted_beta(beta, kl, 0.01) for kl in (0.1, 0.01, 0.001)] == [too_far, on_target, too_near]


def test_beta_stays_in_a_range_that_it_comes_back_from():
    beta = 1.0
    for _ in range(2000):
        beta = adapted_beta(beta, 0.0, 0.01)
    assert 0.0 < beta < 1e-5
    for _ in range(2000):
        beta = adapted_beta(beta, 1.0, 0.01)
    assert 1e5 < beta < math.inf


def test_nn_is_trained_in_single_precision_too():
    policy = STANDARD[0].policy(dtype=th.float32, activation=nn.ReLU)
    obs = observations(N)
    actions = sample_actions(policy, obs)
    problem = PolicyProblem(
        lambda rows: policy.get_distribution(obs[rows]), N, [SinglePathSurrogate(actions, th.randn(N))], actions, policy
    )
    report = kl_penalty_step(problem, th.optim.Adam(policy.parameters()), SETTINGS)
    assert report.outcome is StepOutcome.ACCEPTED
