"""The ladder: its lowest rung of ours takes sb3_contrib's steps, its rule is the plan's, packed runs are the runs."""

import argparse
import copy
import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch as th
from _ladder_report import Comparison, iqm_ratio, report, verdict
from _ladder_rungs import CHECK, CHOICES, RUNGS, STEPS, put_in_place
from _packed import pack, unpack
from _runs import COLUMNS, Run, path_of, write
from _scores import Interval
from _settings import BUDGETS, MUJOCO, RANDOM
from ladder import all_runs, pack_all, run_here
from sb3_contrib import TRPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_trpo_ext import TRPOExt
from tests.envs import Walk, limited

ROOT = Path(__file__).parents[2]


def actor(model):
    return th.cat([p.detach().clone().flatten() for name, p in model.policy.named_parameters() if "value" not in name])


@pytest.mark.parametrize(("seed", "target_kl"), [(0, 0.01), (0, 0.3)])
def test_the_lowest_rung_of_ours_takes_the_steps_of_sb3_contrib(seed, target_kl):
    """The whole of a step, search included: with the larger radius it is the search that ends it."""
    arguments = dict(n_steps=256, batch_size=64, seed=seed, device="cpu", target_kl=target_kl)
    env = DummyVecEnv([lambda: limited(Walk())] * 2)
    theirs = TRPO("MlpPolicy", env, **arguments)
    theirs.learn(1024)  # away from the start
    _, callback = theirs._setup_learn(1024)
    theirs.collect_rollouts(theirs.env, callback, theirs.rollout_buffer, 256)
    ours = TRPOExt("MlpPolicy", env, **RUNGS["as_theirs"].arguments, **arguments)
    ours.set_parameters(theirs.get_parameters())
    ours.rollout_buffer = copy.deepcopy(theirs.rollout_buffer)
    before, steps = actor(theirs), []
    for model in (theirs, ours):
        model.set_logger(Logger(folder=None, output_formats=[]))
        th.manual_seed(0)  # of the solver's start
        with put_in_place(RUNGS["as_theirs"].theirs if model is ours else ()):
            model.train()
        steps.append(actor(model) - before)
    assert (ours.report.backtracks > 0) == (target_kl > 0.01)
    th.testing.assert_close(steps[1], steps[0], rtol=1e-2, atol=1e-3 * float(steps[0].abs().max()))


def test_what_stands_in_place_is_gone_afterwards():
    from sb3_trpo_ext import trust_region
    from sb3_trpo_ext.distributions import GaussianFamily

    old, new = [(th.tensor([[mean]]), th.tensor([[log_std]])) for mean, log_std in ((0.0, 0.0), (1.0, -1.0))]
    family, solver = GaussianFamily(), trust_region.conjugate_gradient
    with put_in_place(("kl", "cg")):
        reverse = family.kl_of(old, new)
        assert trust_region.conjugate_gradient is not solver
    assert trust_region.conjugate_gradient is solver
    assert float(reverse) == float(family.kl_of(new, old)) != float(family.kl_of(old, new))


def test_each_rung_of_ours_differs_from_the_one_below_in_one_thing():
    names = [name for name, rung in RUNGS.items() if rung.base == "trpo_ext_default_norm"]
    for below, above in itertools.pairwise(names[:-1]):
        lower, upper = RUNGS[below], RUNGS[above]
        gone = {name for name in lower.arguments if upper.arguments.get(name) != lower.arguments[name]}
        gone |= set(lower.theirs) - set(upper.theirs)
        assert len(gone - {"kl_reduction"}) <= 1 + (above == "full"), (below, above)
    assert RUNGS["full"].arguments == {} and RUNGS["full_adam"].arguments == {"critic": "adam"}
    assert {rung for step in STEPS for rung in step.rungs} == set(RUNGS)


def some(ratio, chance, n_seeds=10):
    return Comparison([*MUJOCO], (n_seeds, n_seeds), Interval(*map(np.float64, ratio)), Interval(*map(np.float64, chance)))


@pytest.mark.parametrize(
    ("ratio", "chance", "said"),
    [
        ((0.9, 0.8, 0.99), (0.45, 0.3, 0.6), "hurts"),
        ((0.9, 0.8, 1.01), (0.45, 0.3, 0.6), "does not hurt"),
        ((0.96, 0.93, 0.99), (0.45, 0.3, 0.6), "does not hurt"),
        ((1.1, 0.9, 1.3), (0.4, 0.3, 0.49), "hurts"),
    ],
)
def test_the_rule(ratio, chance, said):
    assert verdict(CHOICES[0], some(ratio, chance)) == said
    assert verdict(CHOICES[0], some(ratio, chance, 9)) == f"open; so far: {said}"
    assert verdict(STEPS[0], some(ratio, chance)) == ""
    assert ("differs" in verdict(CHECK, some(ratio, chance))) == (ratio[2] < 1.0)


def test_the_ratio_of_a_rung_to_itself_is_one():
    rng = np.random.default_rng(0)
    reference, random = rng.exponential(size=(10, 4)) + 1.0, np.zeros(4)
    assert iqm_ratio(reference, reference, random) == 1.0
    assert iqm_ratio(1.2 * reference, reference, random) == pytest.approx(1.2)


def made_up(rung, env_id, seed, final, **about):
    rows = pd.DataFrame([dict.fromkeys(COLUMNS, 0.0), {**dict.fromkeys(COLUMNS, 1.5), "timesteps": 1, "mean": final}])
    algorithm = {"algorithm": rung, "base": RUNGS[rung].base if rung in RUNGS else rung, "sources": "abc"}
    return Run({**algorithm, "env": env_id, "seed": seed, "timesteps": 1, **about}, rows.astype({"timesteps": int}))


def test_packed_runs_are_the_runs_and_the_same_bytes_each_time(tmp_path):
    runs = [made_up("full", env_id, seed, 10.0 * seed) for env_id in ("Swimmer-v5", "Hopper-v5") for seed in (200, 20)]
    pack(runs, tmp_path / "a.csv.gz")
    found = unpack(tmp_path / "a.csv.gz")
    assert [(run.about["env"], run.about["seed"], run.final) for run in found] == [
        *(("Hopper-v5", 20, 200.0), ("Hopper-v5", 200, 2000.0), ("Swimmer-v5", 20, 200.0), ("Swimmer-v5", 200, 2000.0)),
    ]
    assert [run.about for run in found[:2]] == [runs[3].about, runs[2].about]
    pd.testing.assert_frame_equal(found[1].rows, runs[2].rows)
    pack(found, tmp_path / "b.csv.gz")
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    table = pd.read_csv(tmp_path / "a.csv.gz", comment="#")
    assert [*table] == ["algorithm", "env", "seed", *COLUMNS] and len(table) == 8
    pack([made_up("full", "Hopper-v5", 200, 1.0, timesteps=5)], tmp_path / "a.csv.gz")
    with pytest.raises(ValueError, match="expected evaluations up to 5 steps, got 1"):
        unpack(tmp_path / "a.csv.gz")


def test_files_of_their_own_are_packed_with_what_is_packed(tmp_path, capsys):
    for seed, final in ((200, 1.0), (201, 2.0), (200, 3.0)):
        write(made_up("full", "Hopper-v5", seed, final), path_of(tmp_path, "full", "Hopper-v5", seed))
        pack_all(tmp_path)
    assert [(run.about["seed"], run.final) for run in all_runs(tmp_path)] == [(200, 3.0), (201, 2.0)]
    assert not [*tmp_path.glob("*/*/*.csv")]


def test_report_says_what_is_there_and_decides_with_ten_seeds(tmp_path, capsys):
    rng = np.random.default_rng(0)
    random = [made_up(RANDOM, env_id, 0, 0.0) for env_id in MUJOCO]
    level = {"acceptance": 2.0, "cg": 1.0, "kl": 1.0}
    for n_seeds, said in ((3, "open; so far: hurts"), (10, "hurts")):
        runs = [
            made_up(rung, env_id, 200 + seed, level[rung] * rng.uniform(90, 110))
            for rung in level
            for env_id in MUJOCO
            for seed in range(n_seeds)
        ]
        report([*random, *runs], tmp_path)
        text = (tmp_path / "report.md").read_text()
        rows = {line.split(":")[0].strip("| "): line.rstrip("| ").split("|")[-1].strip() for line in text.splitlines()}
        assert rows["relative CG tolerance, zero start"] == said
        assert rows["acceptance ratio 0.1"] == said.replace("hurts", "does not hurt")
        assert f"({n_seeds})" in text and "not run" in text and (tmp_path / "ladder.png").exists()


def test_a_run_says_what_it_was_made_of(tmp_path):
    where = dict(folder=tmp_path, envs=["Hopper-v5"], seeds=[200], quick=True, machine="words")
    run_here(argparse.Namespace(rungs=["kl"], **where))
    (run,) = all_runs(tmp_path)
    assert run.about["setting"]["theirs"] == ["cg"] and run.about["versions"]["cpu"].endswith(", words")
    assert run.about["resolved"]["line_search_accept_ratio"] == 0.0 and run.about["outcomes"] == {"accepted": 1}


def test_the_plan_names_every_rung():
    plan = (ROOT / "benchmarks" / "results" / "tuning" / "ladder.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", plan, flags=re.MULTILINE) == [*RUNGS]
    assert {BUDGETS[env_id] for env_id in MUJOCO} == {1_000_000}
