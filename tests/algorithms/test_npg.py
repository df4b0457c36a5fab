"""NPGExt, and what it shares with TRPOExt: step sizes, the L2 ball, schedules and adaptation of the radius."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.utils import LinearSchedule

from sb3_trpo_ext import NPGExt, TRPOExt
from tests.cases import ACTION_SPACES
from tests.envs import Walk, limited

FAST = dict(n_steps=64, batch_size=32, seed=0, device="cpu")
BOTH = pytest.mark.parametrize("algorithm", [TRPOExt, NPGExt])


def make(algorithm=NPGExt, env=None, **arguments):
    return algorithm("MlpPolicy", env or limited(Walk()), **{**FAST, **arguments})


def flat(model):
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


@pytest.mark.parametrize("space", ACTION_SPACES)
def test_npg_and_trpo_give_the_same_parameters_when_the_first_candidate_is_accepted(space):
    env = limited(Walk(ACTION_SPACES[space]))
    trpo, npg = (make(algorithm, env, target_kl=1e-3).learn(192) for algorithm in (TRPOExt, NPGExt))
    assert trpo.outcome_counts == npg.outcome_counts == {"accepted": 3} and trpo.report.backtracks == 0
    assert th.equal(flat(trpo), flat(npg))


@pytest.mark.parametrize("fisher", ["auto", "gauss_newton", "hessian", "empirical", "identity"])
def test_every_fisher_choice(fisher):
    model = make(fisher=fisher).learn(128)
    assert model.outcome_counts == {"accepted": 2} and model.report.kl > 0


def test_a_fixed_step_size():
    steps = [make(step_size=alpha).learn(64).report.step_norm for alpha in (0.01, 0.02)]
    assert steps[1] == pytest.approx(2 * steps[0], rel=1e-4)


@BOTH
def test_the_l2_ball(algorithm):
    model = make(algorithm, fisher="identity", step_radius=1e-4).learn(64)
    assert model.outcome_counts == {"accepted": 1} and model.report.cg_iterations == 1
    assert 0.5 * model.report.step_norm**2 == pytest.approx(1e-4, rel=1e-4)


def test_in_the_l2_ball_trpo_tests_the_kl_and_npg_logs_it():
    ball = dict(fisher="identity", step_radius=0.05)
    trpo = make(TRPOExt, line_search_max_iter=40, target_kl=1e-3, **ball).learn(64).report
    npg = make(NPGExt, **ball).learn(64).report
    assert trpo.backtracks > 0 and 0 < trpo.kl <= 1e-3 < npg.kl


@BOTH
@pytest.mark.parametrize("damping, max_steps", [(0.0, 15), (0.0, 100), (1e-6, 15)])
def test_without_damping_training_goes_on_within_the_radius(algorithm, damping, max_steps):
    kls = []

    class Watched(algorithm):
        def _adapt(self, report):
            super()._adapt(report)
            kls.append(report.kl)

    model = Watched("MlpPolicy", "CartPole-v1", n_steps=512, cg_damping=damping, cg_max_steps=max_steps, seed=0, device="cpu")
    model.learn(4 * 512)
    assert model.outcome_counts == {"accepted": 4}
    assert all(0.0 < kl <= (0.01 if algorithm is TRPOExt else 0.1) for kl in kls)


# -- schedules --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("target_kl", ["lin_0.02", LinearSchedule(0.02, 0.0, 1.0), lambda progress: 0.02 * progress])
def test_a_schedule_of_the_radius(algorithm, target_kl):
    seen, model = [], make(algorithm, target_kl=target_kl)
    update = model._update_policy

    def watched(problem):
        seen.append(update(problem))
        return seen[-1]

    model._update_policy = watched
    model.learn(250)  # four updates, the last of them beyond the end
    assert [report.target_kl for report in seen] == pytest.approx([0.02 * (1 - 64 * i / 250) for i in (1, 2, 3)] + [0.0])
    assert [report.outcome for report in seen] == ["accepted"] * 3 + ["zero_radius"]


@BOTH
def test_a_schedule_is_saved_as_sb3s_own(algorithm, tmp_path):
    model = make(algorithm, target_kl="lin_0.02").learn(128)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=limited(Walk()), device="cpu")
    assert type(loaded.target_kl) is LinearSchedule and loaded.target_kl(1.0) == 0.02
    loaded.learn(128)
    again = algorithm.load(tmp_path / "model", device="cpu", target_kl="lin_0.5")
    assert again.target_kl(1.0) == 0.5


@BOTH
def test_a_learn_of_one_rollout_says_that_its_schedule_has_come_to_zero(algorithm):
    model = make(algorithm, target_kl="lin_0.02")
    for reset in (True, False):
        with pytest.warns(UserWarning, match="this learn.. has made no step: it was one rollout long") as caught:
            model.learn(64, reset_num_timesteps=reset)
        assert len(caught) == 1
    model.learn(128)  # the last update of several is none of these
    assert model.outcome_counts == {"zero_radius": 3, "accepted": 1}


@pytest.mark.parametrize("bad", ["lin_0", lambda _: -1.0, "cos_0.1", "lin_-1"])
def test_schedules_that_cannot_work_are_refused(bad):
    with pytest.raises(ValueError, match=r"target_kl .*must be"):
        make(target_kl=bad)


def test_a_schedule_may_be_given_as_words_later_too():
    model = make()
    model.target_kl = "lin_0.02"
    model.learn(128)
    assert model.outcome_counts == {"accepted": 1, "zero_radius": 1}
    model.target_kl = "lin_x"
    with pytest.raises(ValueError, match=r"target_kl must be a number, a schedule or \"lin_x\" .*got 'lin_x'"):
        model.learn(64)


# -- adaptation --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("fisher, start", [("auto", 0.004), ("identity", 1e-5)])
def test_an_adaptive_radius_grows_where_the_model_is_good_and_is_saved(algorithm, fisher, start, tmp_path):
    radius = dict(target_kl=0.004) if fisher == "auto" else dict(step_radius=1e-5)
    model = make(algorithm, adaptive_radius=True, fisher=fisher, **radius)
    assert model.radius == start
    model.learn(64)
    assert model.report.improvement > 0.75 * model.report.expected_improvement
    assert model.radius == 2 * start
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=limited(Walk()), device="cpu")
    assert loaded.radius == 2 * start
    loaded.learn(64, reset_num_timesteps=False)
    if fisher == "auto":
        assert loaded.report.target_kl == 2 * start
    else:
        assert 0.5 * loaded.report.step_norm**2 == pytest.approx(2 * start, rel=1e-3)


@BOTH
def test_loading_with_another_radius_starts_from_it(algorithm, tmp_path):
    model = make(algorithm, adaptive_radius=True, target_kl=0.004).learn(64)
    model.save(tmp_path / "model")

    def loaded(**arguments):
        return algorithm.load(tmp_path / "model", env=limited(Walk()), device="cpu", **arguments)

    assert model.radius == loaded().radius == loaded(target_kl=0.004).radius == 0.008
    assert loaded(fisher="identity").radius == 0.01
    other = loaded(target_kl=0.5)
    assert other.radius == 0.5
    other.learn(64)
    assert other.report.target_kl == 0.5


def test_an_adaptive_radius_can_be_switched_on_between_two_calls_of_learn():
    model = make(target_kl=0.004).learn(64)
    model.adaptive_radius = True
    model.learn(64)
    assert model.radius is not None and model.radius != 0.004


def test_an_adaptive_radius_shrinks_where_the_full_step_leads_to_something_not_finite():
    model = make(adaptive_radius=True, target_kl=1e30, radius_bounds=(1e-3, 1e30))
    with pytest.warns(UserWarning, match="update skipped: NaN, infinite or huge step"):
        model.learn(64)
    assert model.radius == 5e29


@BOTH
def test_an_adaptive_radius_shrinks_where_the_model_is_bad_and_stays_within_bounds(algorithm, monkeypatch):
    model = make(algorithm, adaptive_radius=True, target_kl=0.01, radius_bounds=[0.004, 0.02])
    problem_of = model._policy_problem

    def deceived(samples):
        problem = problem_of(samples)
        gradient = problem.gradient
        monkeypatch.setattr(problem, "gradient", lambda: (gradient()[0], -gradient()[1]))
        return problem

    monkeypatch.setattr(model, "_policy_problem", deceived)
    model.learn(64)
    assert model.radius == 0.005
    model.learn(128)
    assert model.radius == 0.004


@BOTH
def test_a_schedule_and_adaptation_at_once_are_refused(algorithm):
    with pytest.raises(ValueError, match="adaptive_radius must be False with a schedule of target_kl, got True"):
        make(algorithm, adaptive_radius=True, target_kl="lin_0.01")


@BOTH
@pytest.mark.parametrize(
    "arguments",
    [dict(step_radius=0.0, fisher="identity"), dict(radius_bounds=(0.1,), adaptive_radius=True)]
    + [dict(radius_bounds=bad, adaptive_radius=True) for bad in ((0.2, 0.1), 0.1, "ab", {0.1, 0.2}, (0.05, 0.1))],
    ids=str,
)
def test_values_that_cannot_work_are_refused_by_name(algorithm, arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=rf"{name} must be .*got {re.escape(repr(value))}"):
        make(algorithm, **arguments)


@pytest.mark.parametrize("bad", [0.0, "0.1", float("inf"), float("nan"), None])
def test_a_bound_of_the_radius_that_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match=rf"radius_bounds\[1\] must be a number in \(0, inf\), got {bad!r}"):
        make(radius_bounds=(0.01, bad), adaptive_radius=True)


def test_bounds_of_the_radius_may_be_an_array_and_are_checked_when_loading(tmp_path):
    model = make(radius_bounds=np.array([0.005, 0.02]), adaptive_radius=True)
    assert model.radius_bounds == (0.005, 0.02)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"radius_bounds must be around 0.5, the radius to start from, got \(0.005, 0.02\)"):
        NPGExt.load(tmp_path / "model", device="cpu", target_kl=0.5)
    assert NPGExt.load(tmp_path / "model", device="cpu", target_kl=0.5, radius_bounds=[0.1, 1]).radius_bounds == (0.1, 1.0)


@BOTH
def test_by_default_the_radius_stays_within_a_tenth_and_ten_times_the_first(algorithm):
    model = make(algorithm, adaptive_radius=True, target_kl=0.004).learn(64)
    for improvement, end in ((1.0, 0.04), (-1.0, 0.0004)):
        for _ in range(10):
            model._adapt(replace(model.report, expected_improvement=1.0, improvement=improvement))
        assert model.radius == pytest.approx(end)


def test_with_a_fixed_step_size_no_radius_adapts():
    with pytest.warns(UserWarning, match="makes no use of adaptive_radius=True"):
        model = make(step_size=0.01, adaptive_radius=True)
    start = model.radius
    assert model.learn(64).radius == start


@pytest.mark.parametrize("step_size", [0.0, -1.0, float("nan"), "1"])
def test_step_sizes_that_cannot_work_are_refused(step_size):
    with pytest.raises(ValueError, match="step_size must be a number"):
        make(step_size=step_size)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(fisher="identity", cg_damping=0.3), "fisher='identity' makes no use of cg_damping=0.3"),
        (dict(fisher="identity", target_kl=0.3), "fisher='identity' makes no use of target_kl=0.3"),
        (dict(step_radius=0.3), "fisher='auto' makes no use of step_radius=0.3"),
        (dict(radius_bounds=(0.1, 1)), "adaptive_radius=False makes no use of radius_bounds"),
        (dict(step_size=0.1, target_kl=0.3), "step_size=0.1 makes no use of target_kl=0.3"),
        (dict(step_size=0.1, adaptive_radius=True), "step_size=0.1 makes no use of adaptive_radius=True"),
    ],
)
def test_keywords_without_effect_are_named(arguments, message):
    with pytest.warns(UserWarning, match=message) as caught:
        make(**arguments)
    assert len(caught) == 1


def test_how_the_step_is_made_is_printed(capsys):
    make(verbose=1, target_kl=0.03)
    make(verbose=1, step_size=0.2)
    make(verbose=1, target_kl="lin_0.03")
    out = capsys.readouterr().out
    for part in ("Natural gradient: 0.03 nats", "step size 0.2, damping 0.2;", "LinearSchedule(start=0.03"):
        assert part in out
    make(verbose=1, fisher="identity")
    make(verbose=1, fisher="identity", step_size=0.2)
    out = capsys.readouterr().out
    for part in ("Plain gradient: KL(old || new)", "; 1/2 |s|^2 = 0.01; Fisher", "; step size 0.2; Fisher"):
        assert part in out
    assert "nats" not in out


@pytest.mark.parametrize("arguments", [dict(fisher="identity"), dict(step_size=0.1), dict(step_size=0.1, fisher="identity")])
def test_a_bound_that_has_no_part_in_the_step_is_not_reported(arguments):
    model = make(**arguments).learn(64)
    assert model.outcome_counts == {"accepted": 1} and model.report.target_kl is None
    assert "trust_region/target_kl" not in model.logger.name_to_value


@BOTH
def test_the_success_of_a_search_is_logged_where_there_is_one(algorithm):
    log = make(algorithm).learn(64).logger.name_to_value
    searches = algorithm is TRPOExt
    assert ("train/is_line_search_success" in log) == ("trust_region/backtracks" in log) == searches
    assert log["trust_region/target_kl"] > 0
