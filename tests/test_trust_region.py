import math
from dataclasses import replace

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sb3_trpo_ext.numerics.conjugate_gradient import CGStatus
from sb3_trpo_ext.numerics.parameters import FlatParameters
from sb3_trpo_ext.steps import Evaluation, StepOutcome
from sb3_trpo_ext.trust_region import (
    TrustRegionReport,
    TrustRegionSettings,
    adapted_radius,
    natural_gradient_step,
    propose_step,
    trust_region_step,
)
from tests.cases import CASES, STANDARD, dense_fisher, observations
from tests.test_policy_problem import B, problem_of


class Quadratic:
    """L = gᵀs − c/2 ‖s‖², KL = ½ sᵀFs, from θ_old = 0."""

    def __init__(self, g, fisher, concavity=0.0):
        self.parameter = nn.Parameter(th.zeros(len(g), dtype=th.float64))
        self.parameters = FlatParameters([self.parameter])
        self.g, self.fisher, self.concavity, self.products = g, fisher, concavity, 0

    def gradient(self):
        return 0.0, self.g

    def fisher_product(self):
        def product(v):
            self.products += 1
            return self.fisher @ v

        return product

    def evaluate(self):
        s = self.parameter.detach()
        return Evaluation(float(self.g @ s - 0.5 * self.concavity * s @ s), float(0.5 * s @ self.fisher @ s))


def spd(n, seed):
    a = th.randn(n, n, dtype=th.float64, generator=th.Generator().manual_seed(seed))
    return a @ a.T / n + 0.5 * th.eye(n, dtype=th.float64)


SETTINGS = TrustRegionSettings(target_kl=0.02, cg_damping=0.0, cg_max_steps=50)


def test_the_undamped_full_step_lies_on_the_bound_along_the_natural_gradient():
    F, g = spd(8, 0), th.randn(8, dtype=th.float64)
    problem = Quadratic(g, F)
    report = trust_region_step(problem, TrustRegionSettings(target_kl=0.02 * (1 - 1e-12), cg_damping=0.0, cg_max_steps=50))
    x = th.linalg.solve(F, g)
    # shortening by rounding at the bound itself is allowed
    assert report.outcome is StepOutcome.ACCEPTED and report.backtracks <= 1
    s = problem.parameters.read()
    assert float(s @ x / (s.norm() * x.norm())) == pytest.approx(1.0, abs=1e-9)
    assert report.predicted_kl == pytest.approx(0.02, rel=1e-6)
    full_length = math.sqrt(2 * 0.02 / float(x @ F @ x)) * float(x.norm())
    assert float(s.norm()) == pytest.approx(report.fraction * full_length, rel=1e-6)


def test_damping_enters_solve_and_scale():
    F, g, damping = spd(8, 1), th.randn(8, dtype=th.float64), 0.3
    problem = Quadratic(g, F)
    report = trust_region_step(problem, TrustRegionSettings(0.02, cg_damping=damping, cg_max_steps=50))
    damped = F + damping * th.eye(8, dtype=th.float64)
    x = th.linalg.solve(damped, g)
    expected = math.sqrt(2 * 0.02 / float(x @ damped @ x)) * x
    th.testing.assert_close(problem.parameters.read(), expected, rtol=1e-6, atol=1e-9)
    assert report.fraction == 1.0
    assert report.predicted_kl == pytest.approx(0.5 * float(expected @ F @ expected), rel=1e-6)
    assert report.expected_improvement == pytest.approx(float(g @ expected), rel=1e-6)
    assert report.kl == pytest.approx(report.predicted_kl, rel=1e-6)


def test_one_product_a_conjugate_gradient_step_and_none_beside():
    problem = Quadratic(th.randn(30, dtype=th.float64), spd(30, 2))
    report = trust_region_step(problem, TrustRegionSettings(0.02, cg_damping=0.1, cg_max_steps=7))
    assert report.cg_iterations == problem.products == 7
    assert report.cg_status is CGStatus.STEP_LIMIT


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 0.9))
def test_an_accepted_step_satisfies_every_check_and_a_rejected_one_leaves_theta(seed, target_kl, damping, accept_ratio):
    case = CASES[seed % len(CASES)]
    th.manual_seed(seed)
    problem = problem_of(case.policy(seed=seed % 7), advantages=3 * th.randn(B, dtype=th.float64))
    theta, start = problem.parameters.read(), problem.evaluate()
    _, g = problem.gradient()
    chosen = TrustRegionSettings(
        target_kl, cg_damping=damping, line_search_max_iter=1 + seed % 5, line_search_accept_ratio=accept_ratio
    )
    report = trust_region_step(problem, chosen)
    moved, now = problem.parameters.read(), problem.evaluate()
    if report.outcome is StepOutcome.ACCEPTED:
        assert now.kl == report.kl <= target_kl
        assert now.objective - start.objective == pytest.approx(report.improvement)
        assert report.improvement > 0
        expected = float(g @ (moved - theta))
        assert report.expected_improvement == pytest.approx(expected, rel=1e-6)
        assert report.improvement >= accept_ratio * expected * (1 - 1e-6)
        assert report.step_norm == pytest.approx(float((moved - theta).norm()))
    else:
        assert th.equal(moved, theta)
        assert report.kl == 0.0 and report.step_norm == 0.0


@pytest.mark.parametrize("case", STANDARD, ids=lambda case: case.name)
def test_with_enough_steps_the_direction_is_the_dense_solution(case):
    policy = case.policy()
    problem = problem_of(policy, advantages=th.randn(B, dtype=th.float64))
    damping = 0.5
    F = dense_fisher(policy, observations(B), problem.parameters)
    _, g = problem.gradient()
    x = th.linalg.solve(F + damping * th.eye(len(g), dtype=th.float64), g)
    theta = problem.parameters.read()
    report = trust_region_step(problem, TrustRegionSettings(1e-6, cg_damping=damping, cg_max_steps=200))
    assert report.outcome is StepOutcome.ACCEPTED
    s = problem.parameters.read() - theta
    assert float(s @ x / (s.norm() * x.norm())) > 1 - 1e-8


def test_backtracking_finds_the_improvement_that_the_full_step_overshoots():
    problem = Quadratic(th.ones(3, dtype=th.float64), th.eye(3, dtype=th.float64), concavity=18.0)
    report = trust_region_step(problem, SETTINGS)
    assert report.outcome is StepOutcome.ACCEPTED and report.backtracks > 0
    assert report.fraction == pytest.approx(0.8**report.backtracks)
    assert report.improvement >= 0.1 * report.expected_improvement


def test_accept_ratio_zero_takes_any_improvement():
    def fraction(ratio):
        problem = Quadratic(th.ones(3, dtype=th.float64), th.eye(3, dtype=th.float64), concavity=16.5)
        settings_ = TrustRegionSettings(0.0199, cg_damping=0.0, line_search_accept_ratio=ratio)
        return trust_region_step(problem, settings_).fraction

    assert fraction(0.0) > fraction(0.1) > fraction(0.5) > 0.0


def rejected(problem, settings_=SETTINGS):
    before = problem.parameters.read()
    report = trust_region_step(problem, settings_)
    assert th.equal(problem.parameters.read(), before)
    assert report.kl == report.fraction == report.step_norm == 0.0
    return report


def test_no_improvement_is_an_outcome():
    problem = Quadratic(th.ones(3, dtype=th.float64), th.eye(3, dtype=th.float64), concavity=1e6)
    report = rejected(problem)
    assert report.outcome is StepOutcome.NO_IMPROVEMENT and report.backtracks == 10
    assert report.improvement < 0


def test_zero_gradient_is_an_outcome():
    problem = Quadratic(th.zeros(3, dtype=th.float64), th.eye(3, dtype=th.float64))
    assert rejected(problem).outcome is StepOutcome.ZERO_GRADIENT
    assert problem.products == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_an_outcome(bad):
    g = th.tensor([1.0, bad, 0.0], dtype=th.float64)
    report = rejected(Quadratic(g, th.eye(3, dtype=th.float64)))
    assert report.outcome is StepOutcome.NON_FINITE_GRADIENT and report.outcome.is_fault


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_curvature_that_is_not_finite_is_an_outcome(bad):
    F = th.eye(3, dtype=th.float64) * bad
    report = rejected(Quadratic(th.ones(3, dtype=th.float64), F))
    assert report.outcome is StepOutcome.NON_FINITE_CURVATURE and report.outcome.is_fault


def test_negative_curvature_is_an_outcome():
    F = th.diag(th.tensor([1.0, 1.0, -2.0], dtype=th.float64))
    report = rejected(Quadratic(th.ones(3, dtype=th.float64), F))
    assert report.outcome is StepOutcome.NON_POSITIVE_CURVATURE and not report.outcome.is_fault


def test_candidates_that_cannot_be_evaluated_are_refused():
    problem = Quadratic(th.ones(3, dtype=th.float64), th.eye(3, dtype=th.float64))
    problem.evaluate = lambda: Evaluation(math.nan, math.nan)
    assert rejected(problem).outcome is StepOutcome.NO_IMPROVEMENT


@pytest.mark.parametrize("evaluation", [Evaluation(math.inf, 0.001), Evaluation(1.0, -math.inf), Evaluation(1.0, math.nan)])
def test_an_infinite_improvement_is_none(evaluation):
    problem = Quadratic(th.ones(3, dtype=th.float64), th.eye(3, dtype=th.float64))
    problem.evaluate = lambda: evaluation
    assert rejected(problem).outcome is StepOutcome.NO_IMPROVEMENT


def test_tiny_gradients_do_not_underflow():
    problem = Quadratic(th.full((3,), 1e-24), th.eye(3))
    problem.parameter.data = problem.parameter.data.float()
    _, report = propose_step(problem, 0.0, problem.g, SETTINGS)
    assert report.predicted_kl == pytest.approx(0.02, rel=1e-4)


def test_a_step_that_overflows_is_an_outcome():
    problem = Quadratic(th.full((3,), 1e-30), th.eye(3) * 1e-38)
    problem.parameter.data = problem.parameter.data.float()
    problem.evaluate = lambda: pytest.fail("a step that is not finite must not be tried")
    report = rejected(problem, TrustRegionSettings(1e60, cg_damping=0.0))
    assert report.outcome is StepOutcome.NON_FINITE_STEP and report.outcome.is_fault


# -- where F is as good as singular ----------------------------------------------------------------------


class FlatAtTheStart(Quadratic):
    """Directions in which the KL is nearly flat at θ_old, and nowhere else."""

    def __init__(self, wall=1.0):
        curvature = th.tensor([1.0, 0.3, 1e-5, 1e-6], dtype=th.float64)
        super().__init__(th.tensor([1.0, 1.0, 0.02, 0.02], dtype=th.float64), th.diag(curvature))
        self.wall = wall

    def evaluate(self):
        objective, kl = super().evaluate()
        return Evaluation(objective, kl + self.wall * float(self.parameter.detach().pow(4).sum()))


@pytest.mark.parametrize("damping", [0.0, 1e-8])
@pytest.mark.parametrize("max_steps", [3, 4, 100])
@pytest.mark.parametrize("step", [trust_region_step, natural_gradient_step])
def test_a_step_that_nearly_flat_directions_lead_far_beyond_the_radius_is_taken_along_an_earlier_iterate(
    step, max_steps, damping
):
    problem = FlatAtTheStart()
    report = step(problem, TrustRegionSettings(0.02, cg_damping=damping, cg_max_steps=max_steps))
    assert report.outcome is StepOutcome.ACCEPTED and 0.005 < report.kl <= (0.02 if step is trust_region_step else 0.2)
    assert report.cg_iterations < max_steps and report.cg_iterations < problem.products
    assert report.improvement > 0.5 * report.expected_improvement > 0.0


def test_a_step_that_is_far_beyond_the_radius_along_every_iterate_is_refused():
    problem = FlatAtTheStart(wall=1e6)
    report = natural_gradient_step(problem, SETTINGS)
    assert report.outcome is StepOutcome.BEYOND_RADIUS and not report.outcome.is_fault
    assert th.equal(problem.parameters.read(), th.zeros(4, dtype=th.float64))
    assert report.kl == report.fraction == report.step_norm == 0.0
    assert report.candidate_kl > 10 * report.target_kl and report.cg_iterations == 1


def test_a_search_that_fails_where_the_kl_is_as_predicted_is_not_tried_again():
    problem = Quadratic(th.randn(30, dtype=th.float64), spd(30, 2), concavity=1e6)
    report = rejected(problem, TrustRegionSettings(0.02, cg_damping=0.1, cg_max_steps=7))
    assert report.outcome is StepOutcome.NO_IMPROVEMENT and report.cg_iterations == problem.products == 7


# -- the natural gradient step --------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["auto", "hessian", "empirical", "identity"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_backtracking_the_natural_gradient_step_is_the_trust_region_step_bit_for_bit(case, fisher):
    advantages = th.randn(B, dtype=th.float64)
    chosen = TrustRegionSettings(1e-4, cg_damping=0.5)
    if fisher in ("empirical", "identity"):  # whose radius is not the KL's
        chosen = TrustRegionSettings(1.0, step_radius=1e-6, cg_damping=0.1)
    problems = [problem_of(case.policy(), advantages=advantages, fisher=fisher) for _ in range(2)]
    searched, taken = trust_region_step(problems[0], chosen), natural_gradient_step(problems[1], chosen)
    assert searched.backtracks == 0 and replace(searched, backtracks=None) == taken
    assert th.equal(*(problem.parameters.read() for problem in problems))


def test_a_fixed_step_size_multiplies_the_natural_gradient():
    F, g = spd(8, 3), th.randn(8, dtype=th.float64)
    problem = Quadratic(g, F)
    report = natural_gradient_step(problem, TrustRegionSettings(1e-9, step_size=0.3, cg_damping=0.1, cg_max_steps=50))
    x = th.linalg.solve(F + 0.1 * th.eye(8, dtype=th.float64), g)
    th.testing.assert_close(problem.parameters.read(), 0.3 * x, rtol=1e-6, atol=1e-9)
    # far outside of δ: the KL is reported, not tested
    assert report.outcome is StepOutcome.ACCEPTED and report.kl > report.target_kl
    assert report.kl == pytest.approx(report.predicted_kl, rel=1e-6)


def test_the_lectures_radius_is_twice_ours():
    """Subject to sᵀFs ≤ δ, without the ½, the step is sqrt(δ / gᵀF⁻¹g) F⁻¹g."""
    F, g, delta = spd(6, 4), th.randn(6, dtype=th.float64), 0.02
    problem = Quadratic(g, F)
    natural_gradient_step(problem, TrustRegionSettings(delta / 2, cg_damping=0.0, cg_max_steps=50))
    x = th.linalg.solve(F, g)
    th.testing.assert_close(problem.parameters.read(), math.sqrt(delta / float(g @ x)) * x, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("step", [trust_region_step, natural_gradient_step])
def test_the_l2_ball_gives_the_plain_gradient(step):
    problem = problem_of(STANDARD[0].policy(), advantages=th.randn(B, dtype=th.float64), fisher="identity")
    theta, (_, g) = problem.parameters.read(), problem.gradient()
    report = step(problem, TrustRegionSettings(1.0, step_radius=1e-4, cg_damping=0.0))
    s = problem.parameters.read() - theta
    assert report.outcome is StepOutcome.ACCEPTED and report.fraction == 1.0 and report.cg_iterations == 1
    assert 0.5 * float(s @ s) == pytest.approx(1e-4)
    th.testing.assert_close(s / s.norm(), g / g.norm())
    assert report.kl > 0 and math.isnan(report.predicted_kl)


def test_in_the_l2_ball_the_search_still_tests_the_kl_and_the_full_step_does_not():
    problems = [problem_of(STANDARD[0].policy(), advantages=th.ones(B).double().cumsum(0), fisher="identity") for _ in "ab"]
    chosen = TrustRegionSettings(1e-4, step_radius=0.5, cg_damping=0.0, line_search_max_iter=60)
    searched, taken = trust_region_step(problems[0], chosen), natural_gradient_step(problems[1], chosen)
    assert searched.outcome is StepOutcome.ACCEPTED and searched.kl <= 1e-4 and searched.backtracks > 0
    assert taken.outcome is StepOutcome.ACCEPTED and taken.kl > 1e-4


@pytest.mark.parametrize("evaluation", [Evaluation(math.nan, math.nan), Evaluation(math.inf, 0.1), Evaluation(1.0, math.inf)])
def test_a_full_step_to_something_not_finite_never_lands(evaluation):
    problem = Quadratic(th.ones(3, dtype=th.float64), th.eye(3, dtype=th.float64))
    problem.evaluate = lambda: evaluation
    report = natural_gradient_step(problem, SETTINGS)
    assert report.outcome is StepOutcome.NON_FINITE_STEP and report.outcome.is_fault
    assert th.equal(problem.parameters.read(), th.zeros(3, dtype=th.float64))
    assert report.kl == report.fraction == report.step_norm == 0.0


@pytest.mark.parametrize("step", [trust_region_step, natural_gradient_step])
def test_a_radius_of_zero_is_an_outcome_without_a_product(step):
    problem = Quadratic(th.ones(3, dtype=th.float64), th.eye(3, dtype=th.float64))
    assert step(problem, TrustRegionSettings(0.0)).outcome is StepOutcome.ZERO_RADIUS
    assert problem.products == 0


# -- the radius ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outcome, ratio, fraction, factor",
    [
        ("accepted", 0.9, 1.0, 2.0),
        ("accepted", 1.3, 1.0, 2.0),
        ("accepted", 0.9, 0.8, 1.0),
        ("accepted", 0.5, 1.0, 1.0),
        ("accepted", 0.2, 1.0, 0.5),
        ("accepted", -3.0, 1.0, 0.5),
        ("no_improvement", -1.0, 0.0, 0.5),
        ("beyond_radius", 0.9, 0.0, 0.5),
        ("undone", 0.9, 1.0, 1.0),
        ("zero_gradient", math.nan, 0.0, 1.0),
        ("non_finite_step", math.nan, 0.0, 0.5),
        ("non_finite_gradient", math.nan, 0.0, 1.0),
    ],
)
def test_the_radius_follows_the_ratio_of_actual_to_expected_improvement(outcome, ratio, fraction, factor):
    improvements = dict(improvement=3 * ratio, expected_improvement=3.0)
    outcome = StepOutcome(outcome)
    report = TrustRegionReport(outcome=outcome, objective=0.0, target_kl=0.01, fraction=fraction, **improvements)
    assert adapted_radius(0.01, report, (1e-3, 1e-1)) == pytest.approx(0.01 * factor)
    assert adapted_radius(0.01, report, (0.009, 0.015)) == pytest.approx(min(max(0.01 * factor, 0.009), 0.015))
