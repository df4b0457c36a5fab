"""A learning run: evaluation leaves training alone, files keep what was run, settings are the Zoo's."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rl_zoo3
import torch as th
import yaml
from _measure import versions
from _results import cpu_of
from _runs import (
    COLUMNS,
    FINAL_EPISODES,
    Clock,
    Evaluation,
    Run,
    evaluation_env,
    learn,
    made_with,
    one,
    path_of,
    read,
    read_all,
    write,
)
from _settings import BUDGETS, RANDOM, Setting, resolved, setting_of
from learning import is_there
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPOExt

ZOO = Path(rl_zoo3.__file__).parent / "hyperparams" / "trpo.yml"
ROWS = pd.DataFrame([dict.fromkeys(COLUMNS, 1.0)])
SMALL = Setting({"policy": "MlpPolicy", "n_steps": 64}, 2, {"gamma": 0.9})


@pytest.mark.parametrize("algorithm", [TRPOExt, TRPO])
def test_evaluation_leaves_training_alone(algorithm):
    parameters, states = [], []
    for evaluated in (True, False):
        env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=3), gamma=0.9)
        model = algorithm("MlpPolicy", env, n_steps=64, seed=3, device="cpu")
        evaluation = Evaluation(evaluation_env("Pendulum-v1", {"gamma": 0.9}), 512, 3) if evaluated else None
        model.learn(512, callback=evaluation)
        parameters.append(th.nn.utils.parameters_to_vector(model.policy.parameters()))
        states.append(th.get_rng_state())
    assert th.equal(*parameters)
    assert th.equal(*states)


def test_the_evaluation_environment_takes_its_statistics_from_training():
    env = VecNormalize(make_vec_env("Pendulum-v1", seed=0))
    evaluation = Evaluation(evaluation_env("Pendulum-v1", {}), 256, 0)
    TRPOExt("MlpPolicy", env, n_steps=128, device="cpu").learn(256, callback=evaluation)
    evaluation.evaluate(1)
    np.testing.assert_array_equal(evaluation._env.obs_rms.mean, env.obs_rms.mean)
    assert evaluation._env.obs_rms.count == env.obs_rms.count
    # returns are the environment's own: below zero and not scaled
    assert -2000.0 < evaluation.rows[-1]["mean"] < -100.0


def test_a_run_has_its_evaluations_at_their_steps():
    run = learn("trpo_ext_zoo", "CartPole-v1", 0, 2560, SMALL)
    assert run.rows["timesteps"].tolist() == [128 * n for n in range(21)]
    assert (np.diff(run.rows["wall_seconds"]) > 0.0).all() and (np.diff(run.rows["cpu_seconds"]) >= 0.0).all()
    assert run.rows["episodes"].tolist() == [10] * 20 + [FINAL_EPISODES]
    assert sum(run.about["outcomes"].values()) == 20


def test_the_clock_stands_still_between_stop_and_start(monkeypatch):
    now = [np.array([0.0, 0.0])]
    monkeypatch.setattr(Clock, "_now", staticmethod(lambda: now[0]))
    clock = Clock()
    clock.start()
    now[0] = np.array([2.0, 1.0])
    assert clock.stop() == (2.0, 1.0)
    now[0] = np.array([50.0, 40.0])
    clock.start()
    now[0] = np.array([51.0, 40.5])
    assert clock.stop() == (3.0, 1.5)


def test_a_file_keeps_the_run(tmp_path):
    run = one(RANDOM, "CartPole-v1", 0, 100, machine="slow")
    assert cpu_of(run) == f"{versions()['cpu']}, slow"
    path = path_of(tmp_path, RANDOM, "CartPole-v1", 0)
    write(run, path)
    back = read(path)
    assert back.about == run.about and back.about["versions"]["stable_baselines3"]
    assert back.final == pytest.approx(run.final, abs=1e-3) and 15.0 < back.final < 30.0
    assert [read.about for read in read_all(tmp_path)] == [run.about]
    assert list(tmp_path.rglob("*.part")) == []


def test_settings_of_the_zoo():
    setting = setting_of("sb3_contrib_zoo", "Swimmer-v5")
    entry = yaml.safe_load(ZOO.read_text())["Swimmer-v4"]
    assert setting.n_envs == entry["n_envs"] and setting.normalize == {"gamma": 0.9999}
    assert setting.arguments == {k: v for k, v in entry.items() if k not in ("n_envs", "n_timesteps", "normalize")}
    assert setting_of("sb3_contrib_zoo", "CartPole-v1").normalize is None
    assert setting_of("trpo_ext_default", "Hopper-v5") == Setting({"policy": "MlpPolicy"})
    assert setting_of("trpo_ext_default_norm", "Hopper-v5").normalize == {"norm_obs": True, "norm_reward": False}


@pytest.mark.parametrize("env_id", BUDGETS)
def test_budgets_are_the_zoos(env_id):
    entries = yaml.safe_load(ZOO.read_text())
    assert BUDGETS[env_id] == entries.get(env_id, entries.get(env_id.replace("-v5", "-v4")))["n_timesteps"]


def test_our_setting_is_what_the_zoo_builds(tmp_path, monkeypatch):
    from rl_zoo3.exp_manager import ExperimentManager

    from sb3_trpo_ext.zoo import config_path, register

    register()
    monkeypatch.setattr(sys, "argv", ["train"])
    manager = ExperimentManager(
        *(type("Arguments", (), {})(), "trpo_ext", "HalfCheetah-v5", str(tmp_path)),
        config=str(config_path()),
        eval_freq=-1,
        device="cpu",
        seed=0,
    )
    theirs, _ = manager.setup_experiment()
    theirs.env.close()  # its Monitors' files
    setting = setting_of("trpo_ext_zoo", "HalfCheetah-v5")
    ours = TRPOExt(env=make_vec_env("HalfCheetah-v5", n_envs=setting.n_envs), device="cpu", **setting.arguments)
    for name in ("n_envs", "n_steps", "gamma", "gae_lambda", "critic", "critic_steps", "policy_kwargs", "initial_std"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert [theirs.target_kl(progress) for progress in (1.0, 0.5)] == [ours.target_kl(progress) for progress in (1.0, 0.5)]
    normalize = theirs.get_vec_normalize_env()
    normalize.close()
    assert normalize.gamma == setting.normalize["gamma"] and normalize.norm_obs and normalize.norm_reward


def test_a_file_of_another_setting_is_passed_over_and_said(tmp_path, capsys):
    arguments = argparse.Namespace(folder=tmp_path, conf_file=None)
    budget = BUDGETS["CartPole-v1"]
    setting = setting_of("trpo_ext_zoo", "CartPole-v1")
    now = {"setting": setting._asdict(), "resolved": resolved("trpo_ext_zoo", setting)}
    run = Run(
        {"algorithm": "trpo_ext_zoo", "env": "CartPole-v1", "seed": 0, "timesteps": budget, **now},
        ROWS.assign(timesteps=budget),
    )
    assert not is_there(arguments, "trpo_ext_zoo", "CartPole-v1", 0)
    for found, said in (
        ({}, ""),
        ({"setting": {**setting._asdict(), "n_envs": 7}}, "skipped: it was run with another setting (setting)"),
        ({"resolved": {**now["resolved"], "cg_max_steps": 10}}, "(setting)"),  # a default of then
    ):
        write(Run({**run.about, **found}, run.rows), path_of(tmp_path, "trpo_ext_zoo", "CartPole-v1", 0))
        assert is_there(arguments, "trpo_ext_zoo", "CartPole-v1", 0)
        output = capsys.readouterr().out
        assert said in output and bool(said) == bool(output)
    write(one(RANDOM, "CartPole-v1", 0, budget), path_of(tmp_path, RANDOM, "CartPole-v1", 0))
    assert is_there(arguments, RANDOM, "CartPole-v1", 0) and capsys.readouterr().out == ""


def test_a_keyword_newer_than_a_run_counts_as_what_it_did_where_it_has_an_effect(tmp_path):
    def run_of(algorithm, env_id, **arguments):
        setting = Setting({"policy": "MlpPolicy", **arguments})
        about = {"algorithm": algorithm, "env": env_id, "timesteps": 1, "setting": setting._asdict()}
        return Run({**about, "resolved": resolved(algorithm, setting)}, ROWS)

    def kept_without(run):
        del run.about["resolved"]["initial_std"]
        write(run, tmp_path / "0.csv")
        return made_with(read(tmp_path / "0.csv"))

    for env_id, arguments, matters in (
        ("Hopper-v5", {}, True),
        ("Pendulum-v1", {"use_sde": True}, False),
        ("CartPole-v1", {}, False),
    ):
        before = kept_without(run_of("trpo_ext_default", env_id, **arguments))
        assert before == made_with(run_of("trpo_ext_default", env_id, initial_std=None, **arguments))
        assert (before == made_with(run_of("trpo_ext_default", env_id, **arguments))) is not matters
    theirs = run_of("sb3_contrib_default", "Hopper-v5")
    write(theirs, tmp_path / "0.csv")
    assert read(tmp_path / "0.csv").about["resolved"] == theirs.about["resolved"]


def test_a_file_that_was_cut_off_is_not_taken_for_a_run(tmp_path, capsys):
    path = path_of(tmp_path, "trpo_ext_zoo", "CartPole-v1", 0)
    about = {"algorithm": "trpo_ext_zoo", "env": "CartPole-v1", "seed": 0, "timesteps": BUDGETS["CartPole-v1"]}
    write(Run(about, ROWS), path)
    with pytest.raises(ValueError, match="expected evaluations up to 100000 steps, got 1"):
        read(path)
    for content in (path.read_text(), path.read_text()[:20]):
        path.write_text(content)
        assert not is_there(argparse.Namespace(folder=tmp_path, conf_file=None), "trpo_ext_zoo", "CartPole-v1", 0)
        assert "run again" in capsys.readouterr().out


def test_the_arguments_of_a_run_include_the_defaults():
    found = resolved("trpo_ext_default", setting_of("trpo_ext_default", "Hopper-v5"))
    model = TRPOExt("MlpPolicy", "Pendulum-v1")
    assert found.items() >= {"policy": "MlpPolicy", "n_steps": model.n_steps, "cg_max_steps": 15, "critic": "auto"}.items()
    assert not {"env", "seed", "device"} & set(found)
