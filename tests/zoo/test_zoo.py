"""The Zoo's verbs for real, on a small budget, each in a process of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import optuna
import pytest
import rl_zoo3
import yaml
from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_trpo_ext import NPGExt, SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.zoo import config_path, register
from sb3_trpo_ext.zoo.__main__ import VERBS, main, with_own_config
from sb3_trpo_ext.zoo.registration import ALGORITHMS, SAMPLERS, convert_params
from tests.envs import Walk

PAGE = "sb3_trpo_ext.plots.TrainingPage"


def zoo(*arguments, cwd, expect=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "sb3_trpo_ext.zoo", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def plot(monkeypatch, capsys):
    """A plotting verb in this process: what it prints, and the curves that it would have shown."""

    def plotted(folder, *arguments):
        curves = []

        def show():
            curves.extend(line.get_xydata() for n in plt.get_fignums() for ax in plt.figure(n).axes for line in ax.lines)
            plt.close("all")

        monkeypatch.chdir(folder)
        monkeypatch.setattr(plt, "show", show)
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        main()
        return capsys.readouterr().out, curves

    with plt.rc_context():
        yield plotted


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    arguments = ("--algo", "trpo_ext", "--env", "CartPole-v1", "--conf-file", config_path(), "-f", "logs")
    return folder, zoo("train", *arguments, "-n", 4096, "--eval-freq", 1024, "--seed", 0, "-P", cwd=folder)


def test_train(trained):
    folder, output = trained
    run = folder / "logs" / "trpo_ext" / "CartPole-v1_1"
    assert "trust_region/" in output and (run / "CartPole-v1.zip").exists()
    settings = yaml.unsafe_load((run / "CartPole-v1" / "config.yml").read_text())
    assert dict(settings)["n_steps"] == 1024
    assert TRPOExt.load(run / "CartPole-v1.zip", device="cpu").num_timesteps >= 2048


def test_record_video(trained):
    folder, _ = trained
    zoo("record_video", "--algo", "trpo_ext", "--env", "CartPole-v1", "-f", "logs", "-n", 10, cwd=folder)
    assert list((folder / "logs").rglob("videos/*.mp4"))


def test_enjoy(trained):
    folder, _ = trained
    options = ("--algo", "trpo_ext", "--env", "CartPole-v1", "-f", "logs", "--no-render", "-n", 600)
    output = zoo("enjoy", *options, cwd=folder)
    assert "Episode Reward" in output


def test_resume(trained):
    folder, _ = trained
    model = "logs/trpo_ext/CartPole-v1_1/CartPole-v1.zip"
    zoo("train", "--algo", "trpo_ext", "--env", "CartPole-v1", "-i", model, "-n", 1024, "--eval-freq", -1, cwd=folder)
    trained_once, resumed = (
        TRPOExt.load(folder / f"logs/trpo_ext/CartPole-v1_{n}/CartPole-v1.zip", device="cpu") for n in (1, 2)
    )
    # the Zoo counts timesteps anew; updates go on from the model's
    assert resumed._n_updates == trained_once._n_updates + 1 == 3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_optimize(tmp_path, algorithm):
    options = ("--n-trials", 2, "--n-startup-trials", 1, "--n-evaluations", 1, "--no-optim-plots", "--n-jobs", 1)
    arguments = ("--algo", algorithm, "--env", "CartPole-v1", "-n", 300, "-optimize", *options)
    output = zoo("train", *arguments, "-f", "logs", cwd=tmp_path)
    assert "Best trial" in output


def test_a_schedule_of_the_radius_comes_through_the_zoo(tmp_path):
    options = ("--algo", "npg_ext", "--env", "CartPole-v1", "-n", 4096, "--eval-freq", -1, "-f", "logs", "--seed", 0)
    zoo("train", *options, "-params", "target_kl:'lin_0.02'", cwd=tmp_path)
    model = NPGExt.load(tmp_path / "logs/npg_ext/CartPole-v1_1/CartPole-v1.zip", device="cpu")
    assert isinstance(model.target_kl, LinearSchedule) and model.target_kl(0.5) == 0.01
    assert model.outcome_counts == {"accepted": 1, "zero_radius": 1}


def test_a_trial_of_a_study_is_trained_as_it_was_sampled(tmp_path):
    study = ("--storage", "sqlite:///study.db", "--study-name", "mine", "-f", "logs")
    options = ("--n-trials", 2, "--n-startup-trials", 1, "--n-evaluations", 1, "--no-optim-plots", "--pruner", "halving")
    common = ("train", "--algo", "trpo_ext", "--env", "Pendulum-v1", "-n", 400)
    zoo(*common, "-optimize", *options, *study, cwd=tmp_path)
    zoo(*common, "--trial-id", 1, "--eval-freq", -1, *study, cwd=tmp_path)
    sampled = optuna.load_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="mine").trials[1].params
    model = TRPOExt.load(tmp_path / "logs/trpo_ext/Pendulum-v1_2/Pendulum-v1.zip", device="cpu")
    assert model.cg_damping == sampled["cg_damping"] and model.critic == sampled["critic"]
    assert model.policy_kwargs["log_std_init"] == sampled["log_std_init"]
    assert isinstance(model.target_kl, LinearSchedule) == sampled["target_kl_falls"]


def test_the_page_of_pictures_as_a_callback_of_a_zoo_file(tmp_path):
    entry = {
        "policy": "MlpPolicy",
        "n_timesteps": 600,
        "n_steps": 64,
        "callback": [{PAGE: {"picture": "page.png", "every": 4}}],
    }
    (tmp_path / "mine.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    options = ("--conf-file", "mine.yml", "-f", "logs", "--eval-freq", -1)
    zoo("train", "--algo", "trpo_ext", "--env", "CartPole-v1", *options, cwd=tmp_path)
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")
def test_plot_train(trained, plot):
    folder, _ = trained
    _, curves = plot(folder, "plot_train", "--algo", "trpo_ext", "--env", "CartPole-v1", "-f", "logs", "-w", 5)
    assert curves and all(len(curve) > 10 for curve in curves)


@pytest.mark.filterwarnings("ignore")
def test_all_plots_and_plot_from_file(trained, plot):
    folder, _ = trained
    for seed in (1, 2):  # plot_from_file skips one run alone
        shutil.copytree(folder / "logs/trpo_ext/CartPole-v1_1", folder / f"two/trpo_ext/CartPole-v1_{seed}")
    options = ("-a", "trpo_ext", "-e", "CartPole-v1", "-f", "two", "--no-million", "-o", "gathered")
    table, (gathered,) = plot(folder, "all_plots", *options)
    assert "TRPO_EXT" in table
    evaluations = np.load(folder / "logs" / "trpo_ext" / "CartPole-v1_1" / "evaluations.npz")
    np.testing.assert_allclose(gathered, np.array([evaluations["timesteps"], evaluations["results"].mean(axis=1)]).T)
    _, curves = plot(folder, "plot_from_file", "-i", "gathered.pkl", "--no-million")
    np.testing.assert_array_equal(curves[0], gathered)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["enjoy", "--help"]])
def test_help_names_our_algorithms(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["zoo", *arguments])
    with contextlib.suppress(SystemExit):
        main()
    output = capsys.readouterr().out
    assert all(name in output for name in ALGORITHMS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["zoo", verb, "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "--env" in capsys.readouterr().out or verb == "plot_from_file"


def test_a_verb_that_does_not_exist_is_named(tmp_path):
    output = zoo("tarin", cwd=tmp_path, expect=1)
    assert "{train,enjoy" in output and "got tarin" in output


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_v4_names_have_the_entries_of_v5(algorithm):
    file = entries(algorithm)
    assert {"default", "atari", "MountainCar-v0"} <= set(file)
    v5 = [name for name in file if name.endswith("-v5")]
    assert v5 and all(file[name.replace("-v5", "-v4")] == file[name] for name in v5)


def test_what_the_zoo_tunes_and_installs_here_is_covered():
    zoo_file = Path(rl_zoo3.__file__).parent / "hyperparams" / "trpo.yml"
    theirs = {name for name in yaml.safe_load(zoo_file.read_text()) if "Bullet" not in name}
    assert theirs <= set(entries())


def test_our_file_is_taken_where_none_is_named():
    own = ["--conf-file", str(config_path())]
    assert with_own_config(["--algo", "trpo_ext"]) == ["--algo", "trpo_ext", *own]
    assert with_own_config(["--algo=trpo_ext"]) == ["--algo=trpo_ext", *own]
    spellings = (["-conf", "mine.yml"], ["--conf", "mine.yml"], ["--conf-file=mine.yml"], ["-conf=mine.yml"])
    for given in (["--algo", "ppo"], ["--env", "CartPole-v1"], *(["--algo", "trpo_ext", *own] for own in spellings)):
        assert with_own_config(given) == given


SNAPSHOTS = "sb3_trpo_ext.SnapshotWrapper"
VINE_FILE = config_path().with_name("trpo_ext_vine.yml")


@pytest.mark.parametrize("environment", yaml.safe_load(VINE_FILE.read_text()))
def test_every_vine_entry_is_understood(environment):
    entry = yaml.safe_load(VINE_FILE.read_text())[environment]
    assert entry["env_wrapper"] == SNAPSHOTS or entry["env_wrapper"][-1] == SNAPSHOTS
    arguments = {key: value for key, value in entry.items() if key not in zoo_only()}
    is_finite = entry["rollout_buffer_kwargs"]["n_branch_actions"] == "all"
    env = DummyVecEnv([lambda: SnapshotWrapper(Walk(spaces.Discrete(3) if is_finite else None))] * entry["n_envs"])
    model = TRPOExt("MlpPolicy", env, device="cpu", **arguments)
    assert isinstance(model.rollout_buffer, VineRolloutBuffer)


def test_vine_through_the_zoo(tmp_path):
    options = ("--conf-file", VINE_FILE, "-n", 3000, "--eval-freq", 300, "--eval-episodes", 1, "-f", "logs", "--seed", 0)
    output = zoo("train", "--algo", "trpo_ext", "--env", "CartPole-v1", *options, cwd=tmp_path)
    assert "branch_steps" in output and "Eval num_timesteps" in output
    model = TRPOExt.load(tmp_path / "logs/trpo_ext/CartPole-v1_1/CartPole-v1.zip", device="cpu")
    assert model.num_timesteps > 512 * model._n_updates > 0


def image(*shape):
    return spaces.Box(0, 255, shape, np.uint8)


OBSERVATIONS = {
    "Dict": (spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)}), MultiInputActorCriticPolicy),
    "image": (image(36, 40, 3), ActorCriticCnnPolicy),
    "channels first": (image(1, 36, 36), ActorCriticCnnPolicy),
    "small image": (image(7, 7, 3), ActorCriticPolicy),
    "grid": (spaces.Box(-1, 1, (40, 40, 3)), ActorCriticPolicy),
    "vector": (spaces.Box(-10, 10, (3,)), ActorCriticPolicy),
    "Discrete": (spaces.Discrete(4), ActorCriticPolicy),
}


@pytest.mark.parametrize(
    ("algorithm", "kind"), [*[("trpo_ext", kind) for kind in OBSERVATIONS], ("npg_ext", "Dict"), ("kl_ppo_ext", "Dict")]
)
def test_an_environment_without_an_entry_gets_the_policy_of_its_observations(tmp_path, monkeypatch, algorithm, kind):
    space, policy = OBSERVATIONS[kind]
    register()
    spec = gym.envs.registration.EnvSpec("Unlisted-v0", entry_point=f"{Walk.__module__}:Walk", max_episode_steps=20)
    monkeypatch.setitem(gym.envs.registry, spec.id, spec)
    monkeypatch.setattr(Walk, "metadata", {"render_modes": []})
    options = dict(eval_freq=-1, config=str(config_path(algorithm)), device="cpu", verbose=0)
    given = dict(env_kwargs=dict(observation_space=space), hyperparams=dict(n_steps=32, batch_size=32))
    manager = ExperimentManager(None, algorithm, spec.id, str(tmp_path), **options, **given)
    monkeypatch.setattr(manager, "_save_config", lambda saved: None)  # it needs the arguments of a command line
    model, _ = manager.setup_experiment()
    assert model.policy_class is type(model.policy) is policy
    assert model.learn(32).num_timesteps == 32
    model.env.close()
    model.save(tmp_path / "model")
    assert ALGORITHMS[algorithm].load(tmp_path / "model", device="cpu").policy_class is policy


def test_an_algorithm_that_is_not_ours_has_no_file():
    with pytest.raises(ValueError, match=r"one of .*trpo_ext.*got 'ppo'"):
        config_path("ppo")


def zoo_only():
    """Keys of a Zoo file that never reach the constructor."""
    return {"n_timesteps", "n_envs", "normalize", "env_wrapper", "frame_stack", "policy"}


def entries(algorithm="trpo_ext"):
    return yaml.safe_load(config_path(algorithm).read_text())


@pytest.mark.parametrize(
    "algorithm, entry",
    [
        pytest.param(algorithm, entry, id=f"{algorithm}-{environment}")
        for algorithm in ALGORITHMS
        for environment, entry in entries(algorithm).items()
    ],
)
def test_every_entry_of_the_files_is_understood(algorithm, entry):
    arguments = {key: value for key, value in entry.items() if key not in zoo_only()}
    arguments = ExperimentManager._preprocess_schedules(arguments)
    images = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    space = images if entry["policy"] == "CnnPolicy" else None
    env = DummyVecEnv([lambda: Walk(observation_space=space)] * entry.get("n_envs", 1))
    model = ALGORITHMS[algorithm](entry["policy"], env, device="cpu", **arguments)
    for name, value in arguments.items():
        held = getattr(model, name)
        if isinstance(value, str) and value.startswith("lin_"):
            assert [held(progress) for progress in (1.0, 0.5)] == [float(value[4:]), float(value[4:]) / 2]
        else:
            assert held == value


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_sampler_gives_arguments_that_the_constructor_takes(algorithm):
    study = optuna.create_study()
    for _ in range(5):
        sampled = SAMPLERS[algorithm](study.ask(), 2, 1, {})
        # warnings are errors here: nothing is sampled that the critic makes no use of
        ALGORITHMS[algorithm]("MlpPolicy", Walk(), device="cpu", **sampled)
    register()
    register()
    from rl_zoo3 import ALGOS
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER

    assert ALGOS[algorithm] is ALGORITHMS[algorithm]
    assert HYPERPARAMS_CONVERTER[algorithm] is convert_params


@pytest.mark.parametrize("algorithm", ["trpo_ext", "npg_ext"])
def test_both_critics_are_searched_whatever_the_entry(algorithm):
    study, found = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), set()
    for _ in range(10):
        sampled = SAMPLERS[algorithm](study.ask(), 2, 1, {})
        found.add(
            ALGORITHMS[algorithm](env=Walk(), device="cpu", **{"policy": "MlpPolicy", "critic": "adam", **sampled}).critic
        )
    assert found == {"gauss_newton", "adam"}


@pytest.mark.parametrize(("env_id", "n_actions"), [("HalfCheetah-v5", 6), ("Humanoid-v5", 17), ("CartPole-v1", 0)])
def test_the_search_reaches_the_files_own_settings(env_id, n_actions):
    trial = optuna.create_study().ask()
    SAMPLERS["trpo_ext"](trial, n_actions, 1, {})
    n_dims = max(n_actions, 1)
    radius = yaml.safe_load(config_path().read_text())[env_id].get("target_kl", f"lin_{0.01 * n_dims}")
    for name, value in (("target_kl", float(radius.removeprefix("lin_"))), ("cg_damping", 0.1 * n_dims)):
        limits = trial.distributions[name]
        assert limits.low < value < limits.high


def test_a_step_that_nothing_shortens_is_sampled_smaller():
    searched, taken = optuna.create_study().ask(), optuna.create_study().ask()
    SAMPLERS["trpo_ext"](searched, 2, 1, {})
    SAMPLERS["npg_ext"](taken, 2, 1, {})
    for name, end in (("target_kl", "high"), ("cg_damping", "low")):
        limits = [getattr(trial.distributions[name], end) for trial in (searched, taken)]
        assert limits == sorted(limits, reverse=end == "high") and limits[0] != limits[1]
