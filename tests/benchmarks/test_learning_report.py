"""The report, on runs made up so that the answers are known."""

import argparse
import json

import numpy as np
import pandas as pd
import pytest
from _learning_report import cells_of_times, index, of_defaults, put_into_page, report, runs_section, section
from _learning_summary import Bar, bars, in_words, standing, summaries_of
from _results import NEVER, ZOO, Curves, Results, Timed, median_time_ratio, time_ratio
from _runs import Run, path_of, read_all, write
from _scores import Interval
from _settings import RANDOM

ENVS = ("Pendulum-v1", "Acrobot-v1")


def made_up(algorithm, env_id, seed, final, seconds=100.0, cpu="A"):
    """A straight line from −1000 to its final return, in ten evaluations."""
    share = np.linspace(0.0, 1.0, 11)
    rows = pd.DataFrame(
        {
            "timesteps": (1000 * share).astype(int),
            "wall_seconds": 2.0 * seconds * share,
            "cpu_seconds": seconds * share,
            "mean": -1000.0 + (final + 1000.0) * share,
            "std": 1.0,
            "episodes": 10,
        }
    )
    about = {"algorithm": algorithm, "env": env_id, "seed": seed, "timesteps": 1000, "versions": {"torch": "1", "cpu": cpu}}
    return Run(about, rows)


@pytest.fixture
def folder(tmp_path):
    runs = [made_up(RANDOM, env_id, 0, -1000.0) for env_id in ENVS]
    for seed in range(4):
        runs += [made_up("sb3_contrib_zoo", env_id, seed, -500.0 + 10.0 * seed) for env_id in ENVS]
        runs += [made_up("trpo_ext_zoo", "Pendulum-v1", seed, 10.0 * seed, seconds=50.0)]
    runs += [made_up("trpo_ext_zoo", "Acrobot-v1", seed, -1000.0, seconds=50.0) for seed in range(3)]
    runs += [made_up("trpo_ext_zoo", "Pendulum-v1", 100, 1e6)]  # a seed of tuning
    for run in runs:
        write(run, path_of(tmp_path, run.about["algorithm"], run.about["env"], run.about["seed"]))
    return tmp_path


def results_of(folder):
    return Results(read_all(folder), range(10))


def arguments_of(folder, *, page=None, quick=False):
    return argparse.Namespace(folder=folder, seeds=range(10), page=page, quick=quick)


def test_seeds_that_were_run_on_all_environments_count_together(folder):
    results = results_of(folder)
    assert results.seeds("trpo_ext_zoo", "Pendulum-v1") == [0, 1, 2, 3]
    assert results.seeds("trpo_ext_zoo", *ENVS) == [0, 1, 2]
    np.testing.assert_allclose(results.finals("trpo_ext_zoo", ENVS), [[0.0, -1000.0], [10.0, -1000.0], [20.0, -1000.0]])
    assert results.environments(ZOO, [*ENVS, "CartPole-v1"]) == [*ENVS]


def test_times_to_reach_are_compared_where_the_mean_curves_cross(folder):
    results = results_of(folder)
    ours, theirs = (results.curves(name, "Pendulum-v1") for name in (ZOO.ours, ZOO.reference))
    # from −1000 to 15 in 50 s, so −485 is reached after 50 · 515 / 1015 s; theirs takes 100 s
    assert time_ratio(ours, theirs, "cpu") == pytest.approx(0.5 * 515.0 / 1015.0)
    assert time_ratio(ours, theirs, "wall") == pytest.approx(0.5 * 515.0 / 1015.0)
    (timed,) = results.timed_each(ZOO, "Pendulum-v1")
    median = median_time_ratio(results, ZOO, ["Pendulum-v1"], timed, "cpu")
    assert median.estimate == pytest.approx(0.5 * 515.0 / 1015.0)
    assert median.low <= median.estimate <= median.high


def test_times_are_compared_on_one_processor(folder):
    # on another one, theirs takes ten times as long
    put(folder, *(made_up("sb3_contrib_zoo", "Pendulum-v1", seed, -500.0 + 10.0 * seed, 1000.0, "B") for seed in (0, 1)))
    results = results_of(folder)
    timed = results.timed(ZOO, "Pendulum-v1")
    assert timed == Timed("A", {"trpo_ext_zoo": [0, 1, 2, 3], "sb3_contrib_zoo": [2, 3]})
    ratio = 0.5 * 515.0 / 1015.0 * 1.02  # to the mean of seeds 2 and 3, which is a little above
    assert median_time_ratio(results, ZOO, ["Pendulum-v1"], timed, "cpu").estimate == pytest.approx(ratio, rel=0.02)
    group = "Classic control and Box2D"
    text = section(results, ZOO, group, summaries_of(results)[ZOO, group])
    assert "3.3 (1.7) / 1.7 (0.8)" in text and "(A, 3 seeds of ours, 2 of sb3_contrib)" in text
    # returns count all the same
    assert "-485.0 ± 12.9 (4)" in text
    put(folder, *(made_up("sb3_contrib_zoo", "Pendulum-v1", seed, -500.0, 1000.0, "B") for seed in range(4)))
    results = results_of(folder)
    assert results.timed(ZOO, "Pendulum-v1") is None
    assert "the two sides were not run on the same processor" in summaries_of(results)[ZOO, group].sentences()
    assert "no common processor" in section(results, ZOO, group, None)


def test_times_on_every_processor_with_enough_seeds_are_said(folder):
    put(folder, *(made_up("sb3_contrib_zoo", env_id, seed, -500.0, 1000.0, "B") for env_id in ENVS for seed in range(4, 8)))
    put(folder, *(made_up("trpo_ext_zoo", env_id, seed, 0.0, 1000.0, "B") for env_id in ENVS for seed in range(4, 7)))
    put(folder, *(made_up(name, env_id, 8, 0.0, 1.0, "C") for env_id in ENVS for name in ("trpo_ext_zoo", "sb3_contrib_zoo")))
    summary = summaries_of(results_of(folder))[ZOO, "Classic control and Box2D"]
    assert [times.timed.cpu for times in summary.times] == ["A", "B"]
    assert summary.times[1].ratios["cpu", 1.0].estimate == pytest.approx(0.5)
    assert "(B, 3 seeds of ours, 4 of sb3_contrib)" in summary.sentences() and "(C" not in summary.sentences()


def test_each_environment_is_left_out_in_turn(folder):
    assert summaries_of(results_of(folder))[ZOO, "Classic control and Box2D"].iqm_without == {}  # of two
    runs = [made_up(name, "CartPole-v1", seed, 90.0 * seed) for name in ZOO[1:] for seed in range(3)]
    put(folder, made_up(RANDOM, "CartPole-v1", 0, -1000.0), *runs)
    results = results_of(folder)
    without = summaries_of(results)[ZOO, "Classic control and Box2D"].iqm_without
    assert set(without) == {*ENVS, "CartPole-v1"}
    finals = [np.delete(results.finals(name, [*ENVS, "CartPole-v1"]), 1, axis=1) for name in ZOO[1:]]
    scores = np.sort(((finals[0] + 1000.0) / (finals[1].mean(axis=0) + 1000.0)).ravel())
    assert without["Acrobot-v1"] == pytest.approx(scores[1:5].mean())  # of six, one is dropped at each end


def test_on_a_plateau_the_way_there_counts_and_not_the_last_touch():
    rng = np.random.default_rng(0)
    curve = np.minimum(np.linspace(0.0, 4.0, 41), 1.0)
    theirs = curves_of(100.0 * np.tile(curve, (4, 1)) - rng.uniform(0.0, 2.0, (4, 41)), 100.0)
    theirs.returns[:, -1] = 100.0  # touched at the very end
    ours = curves_of(101.0 * np.tile(curve, (4, 1)), 100.0)
    assert time_ratio(ours, theirs, "cpu") == pytest.approx(0.25, rel=0.05)
    assert time_ratio(ours, theirs, "cpu", start=0.0, share=0.95) == pytest.approx(1.0, rel=0.05)
    # the way is from where the random policy is
    ahead = curves_of(100.0 * np.tile(curve, (4, 1)) ** 0.5, 100.0)
    straight = curves_of(100.0 * np.tile(curve, (4, 1)), 100.0)
    assert time_ratio(ahead, straight, "cpu", start=-100.0, share=0.75) == pytest.approx(0.5**2 / 0.5, rel=0.02)


def test_of_processors_with_as_many_seeds_it_is_always_the_same_one(folder):
    for algorithm in ("sb3_contrib_zoo", "trpo_ext_zoo"):
        put(folder, *(made_up(algorithm, "Pendulum-v1", seed, 0.0, cpu="B") for seed in (0, 1)))
    assert results_of(folder).timed(ZOO, "Pendulum-v1").cpu == "A"


def test_what_is_not_reached_is_not_a_number():
    found = Interval(np.float64(NEVER / 2 + 0.2), np.float64(0.3), np.float64(NEVER))
    assert in_words(found) == "not reached [0.30, not reached]"


def put(folder, *runs):
    for run in runs:
        write(run, path_of(folder, run.about["algorithm"], run.about["env"], run.about["seed"]))


def test_seeds_may_be_chosen_without_that_of_the_random_policy(folder):
    results = Results(read_all(folder), range(1, 4))
    assert results.seeds("trpo_ext_zoo", "Pendulum-v1") == [1, 2, 3]
    np.testing.assert_array_equal(results.random(ENVS), [-1000.0, -1000.0])


def test_what_cannot_be_reported_is_named(folder):
    def said():
        with pytest.raises(SystemExit) as stopped:
            report(arguments_of(folder))
        return str(stopped.value)

    other = made_up("trpo_ext_zoo", "Pendulum-v1", 3, 30.0)
    put(folder, Run({**other.about, "setting": {"arguments": {"target_kl": 0.1}}}, other.rows))
    assert "trpo_ext_zoo on Pendulum-v1 must share" in said() and "seeds 3: {" in said() and "seeds 0, 1, 2" in said()
    put(folder, Run(other.about, other.rows.iloc[1:]))
    assert "trpo_ext_zoo on Pendulum-v1 must share" in said()
    put(folder, other)
    path_of(folder, RANDOM, "Pendulum-v1", 0).unlink()
    assert "expected a run of the random policy on Pendulum-v1" in said()
    path = path_of(folder, RANDOM, "Pendulum-v1", 0)
    for content in ("", "time,mean\n1,2\n", '# {"seed": 0}\n', '# {"seed": 0}\ntimesteps,mean\n0,1.0\n'):
        path.write_text(content)
        assert f"{path}: expected" in said()


def test_an_environment_where_the_reference_learned_nothing_has_no_score(folder):
    group = "Classic control and Box2D"
    for random in (-400.0, -490.0):  # sb3_contrib: -485 with a standard error of 6.5
        put(folder, made_up(RANDOM, "Pendulum-v1", 0, random))
        results = results_of(folder)
        summary = summaries_of(results)[ZOO, group]
        assert summary.env_ids == ["Acrobot-v1"]
        text = section(results, ZOO, group, summary)
        assert "sb3_contrib is not clearly above the random policy: Pendulum-v1." in text and "| Pendulum-v1" in text


def curves_of(returns, seconds):
    share = np.linspace(0.0, 1.0, returns.shape[1])
    times = np.tile(seconds * share, (len(returns), 1))
    return Curves(1000 * share, {"wall": times, "cpu": times}, returns)


def test_the_reference_reaches_its_own_final_return_whatever_the_rounding():
    rng = np.random.default_rng(0)
    for _ in range(50):
        # ten seeds, each at its best in the end: sums in another order differ in the last digit
        finals = (500.0 + 30.0 * rng.normal(size=(10, 1))).round(3)
        theirs = curves_of(-200.0 + (finals + 200.0) * np.linspace(0.0, 1.0, 21), 100.0)
        assert time_ratio(theirs, theirs, "cpu") == 1.0


def test_a_return_that_is_there_before_training_is_no_gain_of_time():
    flat, rising = curves_of(np.zeros((3, 5)), 10.0), curves_of(np.tile(np.linspace(-1.0, 1.0, 5), (3, 1)), 10.0)
    assert time_ratio(flat, flat, "wall") == 1.0
    assert time_ratio(rising, flat, "wall") == NEVER


def test_the_section_says_what_there_is_and_what_is_not(folder):
    results, group = results_of(folder), "Classic control and Box2D"
    text = section(results, ZOO, group, summaries_of(results)[ZOO, group])
    row = next(line for line in text.splitlines() if line.startswith("| Pendulum-v1"))
    assert "-485.0 ± 12.9 (4)" in row and "15.0 ± 12.9 (4)" in row and "1.00 [1.00, 1.00]" in row
    row = next(line for line in text.splitlines() if line.startswith("| Acrobot-v1"))
    assert "not reached" in row and "0.00 [0.00, 0.00]" in row
    assert "(3 seeds of ours, 4 of sb3_contrib that were run on all)" in text
    assert "Pendulum-v1 (sb3_contrib_zoo 6 of 10, trpo_ext_zoo 6 of 10)" in text
    assert "LunarLander-v3 (sb3_contrib_zoo 10 of 10, trpo_ext_zoo 10 of 10)" in text
    assert section(results, ZOO, "MuJoCo", None).endswith("Not run.")


def test_what_only_one_side_ran_is_not_said_to_be_missing_altogether(folder):
    put(folder, made_up(RANDOM, "Hopper-v5", 0, 0.0))
    put(folder, made_up("trpo_ext_zoo", "Hopper-v5", 0, 500.0))
    text = section(results_of(folder), ZOO, "MuJoCo", None)
    assert "Not run.\n" not in text and "Hopper-v5 (sb3_contrib_zoo 10 of 10, trpo_ext_zoo 9 of 10)" in text


def test_cells_of_times_are_of_the_seeds_that_the_summary_takes(folder):
    summed = summaries_of(results_of(folder))[ZOO, "Classic control and Box2D"].env_ids

    def minutes():
        return {env_id: cells_of_times(results_of(folder), ZOO, env_id, summed)[0] for env_id in summed}

    before, alone = minutes(), cells_of_times(results_of(folder), ZOO, summed[0], summed[:1])[0]
    # a seed that was run on one environment alone, and took far longer
    extra = made_up("sb3_contrib_zoo", summed[0], 7, 0.0)
    extra.rows[["wall_seconds", "cpu_seconds"]] *= 100.0
    put(folder, extra)
    assert minutes() == before
    assert cells_of_times(results_of(folder), ZOO, summed[0], summed[:1])[0] != alone


def test_a_score_stands_where_its_interval_does():
    found = [standing(Interval(*score)) for score in ((1.2, 1.1, 1.3), (1.2, 0.9, 1.3), (0.9, 0.8, 1.1), (0.8, 0.7, 0.9))]
    assert found == ["ahead", "rather ahead, not clearly", "rather behind, not clearly", "behind"]


def test_a_bar_of_times_is_reached_on_every_processor_or_not_at_all(folder):
    def wall_and_cpu():
        results = results_of(folder)
        return bars(results, summaries_of(results))[1:3]

    put(folder, made_up(RANDOM, "Hopper-v5", 0, -1000.0))
    put(folder, *(made_up("sb3_contrib_zoo", "Hopper-v5", seed, 0.0, 100.0) for seed in range(4)))
    put(folder, *(made_up("trpo_ext_zoo", "Hopper-v5", seed, 0.0, 10.0) for seed in range(4)))
    assert [(bar.met, bar.stretch, bar.seeds) for bar in wall_and_cpu()] == [(True, True, "4 on one processor")] * 2
    put(folder, *(made_up("sb3_contrib_zoo", "Hopper-v5", seed, 0.0, 100.0, "B") for seed in range(4, 7)))
    put(folder, *(made_up("trpo_ext_zoo", "Hopper-v5", seed, 0.0, 25.0, "B") for seed in range(4, 7)))
    assert [(bar.met, bar.stretch, bar.seeds) for bar in wall_and_cpu()] == [(True, False, "4, 3 on one processor")] * 2
    assert wall_and_cpu()[0].reached == "0.10 [0.10, 0.10] (A); 0.25 [0.25, 0.25] (B)"


def test_bars_are_judged_by_what_was_run(folder):
    results = results_of(folder)
    *others, no_worse, acrobot, pendulum = bars(results, summaries_of(results))
    assert [bar.verdict for bar in others] == ["not run"] * 4
    assert no_worse.met is False and no_worse.reached == "Acrobot-v1"
    assert [pendulum.verdict, acrobot.verdict] == ["met so far", "missed so far"]
    assert pendulum.what.startswith("Pendulum-v1") and acrobot.what.startswith("Acrobot-v1")
    for seed in range(3):
        runs = [made_up(RANDOM, "Hopper-v5", 0, -1000.0)]
        runs += [made_up("sb3_contrib_zoo", "Hopper-v5", seed, 0.0), made_up("trpo_ext_zoo", "Hopper-v5", seed, 500.0)]
        for run in runs:
            write(run, path_of(folder, run.about["algorithm"], run.about["env"], run.about["seed"]))
    results = results_of(folder)
    iqm, wall, cpu, *_ = bars(results, summaries_of(results))
    # 1500 / 1000 of theirs, reached after two thirds of their time
    assert iqm.met and iqm.reached.startswith("1.50 ") and iqm.seeds == "3 of 10 on 1 of 4 environments"
    assert cpu.met is False and cpu.reached.startswith("0.67 ") and wall.met is False
    assert [iqm.verdict, cpu.verdict] == ["met so far", "missed so far"]
    whole = [bar._replace(so_far=False, stretch=True).verdict for bar in (iqm, cpu)]
    assert whole == ["further goal met", "missed"] and Bar("", "", True, "").verdict == "met"


def test_every_run_is_listed_with_its_processor(folder):
    put(folder, made_up("trpo_ext_zoo", "Pendulum-v1", 3, 30.0, cpu="B"))
    lines = runs_section(results_of(folder)).splitlines()
    row = next(line for line in lines if " trpo_ext_zoo |" in line and line.startswith("| Pendulum-v1"))
    assert "0: 0 ± 1, 1: 10 ± 1, 2: 20 ± 1, 3: 30 ± 1" in row and "A (0, 1, 2); B (3)" in row
    # seeds that were chosen away are there all the same
    chosen = Results(read_all(folder), [2])
    assert chosen.missing(ZOO, "Pendulum-v1") == "sb3_contrib_zoo 6 of 10, trpo_ext_zoo 6 of 10"


def test_the_index_names_each_way_of_running_once(folder):
    kinds = index(read_all(folder))["runs"]
    assert [kind["algorithm"] for kind in kinds] == [RANDOM, "sb3_contrib_zoo", "trpo_ext_zoo"]
    assert kinds[1]["runs"] == {env_id: [0, 1, 2, 3] for env_id in sorted(ENVS)}
    assert kinds[1]["versions"] == {"torch": "1", "cpu": "A"}


def test_runs_from_before_a_keyword_are_put_together_with_later_ones_of_the_same_setting(tmp_path):
    setting = {"arguments": {"policy": "MlpPolicy"}, "n_envs": 1, "normalize": None}
    after = {"policy": "MlpPolicy", "n_steps": 2048, "initial_std": None}
    before = {name: after[name] for name in ("policy", "n_steps")}
    runs = [made_up(RANDOM, "Hopper-v5", 0, 0.0)]
    for seed, whole in enumerate((before, after)):
        runs.append(made_up("trpo_ext_std_1", "Hopper-v5", seed, 1.0))
        runs[-1].about.update(setting=setting, resolved=whole)
    put(tmp_path, *runs)
    assert results_of(tmp_path).seeds("trpo_ext_std_1", "Hopper-v5") == [0, 1]
    kind = index(read_all(tmp_path))["runs"][1]
    assert kind["setting"]["arguments"] == after and kind["runs"] == {"Hopper-v5": [0, 1]}


def test_the_page_says_how_default_arguments_compare(folder, tmp_path):
    folder = tmp_path / "defaults"
    runs = [made_up(RANDOM, "Hopper-v5", 0, -1000.0)]
    for seed in range(3):
        runs.append(made_up("sb3_contrib_default_norm", "Hopper-v5", seed, 9.0 + seed))
        runs.append(made_up("trpo_ext_default_norm", "Hopper-v5", seed, -495.0))
    put(folder, *runs)
    results = results_of(folder)
    words = of_defaults(summaries_of(results), "report.md")
    assert (
        "default arguments, normalised observations: 0.50 [0.50, 0.50], behind (3 seeds of ours, 3 of sb3_contrib)" in words
        and "(report.md)" in words
    )
    assert "as far as they were run" in of_defaults({}, "report.md")


def test_the_report_writes_tables_pictures_and_the_page(folder, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- learning: made by benchmarks/learning.py report --page -->\nold\n<!-- /learning -->\nafter\n"
    )
    report(arguments_of(folder, page=page))
    assert (folder / "report.md").read_text() in capsys.readouterr().out
    assert json.loads((folder / "index.json").read_text())["runs"]
    assert {path.name for path in folder.glob("*.png")} == {"classic-zoo.png", "profiles.png"}
    text = page.read_text()
    assert "tuned on v5" in text and "(report.md)" in text
    assert text.startswith("before\n") and text.endswith("<!-- /learning -->\nafter\n")
    # a picture that was not drawn is not linked
    assert "Not run." in text and "old" not in text and "mujoco-zoo.png" not in text
    assert "(classic-zoo.png)" in (folder / "report.md").read_text()
    (tmp_path / "other.md").write_text("no marks")
    with pytest.raises(SystemExit, match="expected a line"):
        put_into_page(tmp_path / "other.md", "")
    with pytest.raises(SystemExit, match="no runs below"):
        report(arguments_of(tmp_path / "empty"))


def test_runs_of_other_settings_than_the_present_ones_are_named(folder, capsys):
    report(arguments_of(folder))
    said = capsys.readouterr().err
    assert "trpo_ext_zoo on Pendulum-v1, seeds 0, 1, 2, 3, 100: not run with what is there now (setting, timesteps)" in said
    assert "random on Acrobot-v1, seeds 0: not run with what is there now (timesteps)" in said
    report(arguments_of(folder, quick=True))
    assert capsys.readouterr().err == ""
