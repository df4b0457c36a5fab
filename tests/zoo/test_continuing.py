"""The Zoo's ``train``, started again: an unfinished run of the same command goes on in its folder."""

import sys

import numpy as np
import pytest
import torch as th
import yaml

from sb3_trpo_ext import Checkpoints, TRPOExt
from sb3_trpo_ext.checkpoints.folder import Folder
from sb3_trpo_ext.zoo import register

ENTRY = {
    "n_envs": 2,
    "n_timesteps": 512,
    "policy": "MlpPolicy",
    "n_steps": 32,
    "normalize": True,
    "env_wrapper": "sb3_trpo_ext.SnapshotWrapper",
    "callback": [{"sb3_trpo_ext.Checkpoints": {"every": 1, "exact": True}}],
}
CRASH = "a crash"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``train`` in this process; whether it came to its end."""
    register()
    from rl_zoo3.train import train as zoo_train

    monkeypatch.chdir(tmp_path)
    boundary = Checkpoints.boundary

    def trained(*arguments, entry=ENTRY, crash_at=None, folder="logs", seed=("--seed", "1")):
        def crashing(self, *args):
            if self._run.iterations.done == crash_at:
                raise RuntimeError(CRASH)
            return boundary(self, *args)

        (tmp_path / "entry.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
        options = ("--algo", "trpo_ext", "--env", "CartPole-v1", "--conf-file", "entry.yml", "-f", folder, *seed)
        evaluation = ("--eval-freq", "128", "--eval-episodes", "1", "--num-threads", "1", "-tb", f"{folder}-tb")
        monkeypatch.setattr(sys, "argv", ["train", *options, *evaluation, *arguments])
        monkeypatch.setattr(Checkpoints, "boundary", crashing)
        try:
            zoo_train()
        except RuntimeError as error:
            assert str(error) == CRASH
            return False
        return True

    return trained


def runs(tmp_path, folder="logs"):
    return sorted(path.name for path in (tmp_path / folder / "trpo_ext").iterdir())


def rows(path):
    return [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()[1:]]


def test_an_unfinished_run_goes_on_in_its_folder(tmp_path, train):
    assert train(folder="whole")
    for crash_at in (3, 6):
        assert not train(crash_at=crash_at)
    assert train()
    assert runs(tmp_path) == ["CartPole-v1_1"]
    assert sorted(path.name for path in (tmp_path / "logs-tb/CartPole-v1").iterdir()) == ["TRPOExt_1"]
    whole, killed = (tmp_path / name / "trpo_ext" / "CartPole-v1_1" for name in ("whole", "logs"))
    for name in ("0.monitor.csv", "1.monitor.csv"):
        assert rows(whole / name) == rows(killed / name)
    one, other = (TRPOExt.load(path / "CartPole-v1.zip", device="cpu") for path in (whole, killed))
    assert one.num_timesteps == other.num_timesteps
    for parameter, its in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        assert th.equal(parameter, its)
    with np.load(whole / "evaluations.npz") as expected, np.load(killed / "evaluations.npz") as found:
        assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_what_is_finished_or_another_command_gets_a_folder_of_its_own(tmp_path, train):
    assert train() and train()
    assert runs(tmp_path) == ["CartPole-v1_1", "CartPole-v1_2"]
    assert not train("-n", "1024", crash_at=2)
    assert train("-n", "640")
    assert runs(tmp_path) == [f"CartPole-v1_{i}" for i in (1, 2, 3, 4)]
    assert train("-n", "1024")
    assert runs(tmp_path) == [f"CartPole-v1_{i}" for i in (1, 2, 3, 4)]


def test_a_seed_that_was_drawn_is_the_runs(tmp_path, train):
    assert not train(crash_at=3, seed=())
    assert train(seed=())
    assert runs(tmp_path) == ["CartPole-v1_1"]
    drawn = TRPOExt.load(tmp_path / "logs/trpo_ext/CartPole-v1_1/CartPole-v1.zip", device="cpu")
    assert f"- - seed\n    - {drawn.seed}\n" in (tmp_path / "logs/trpo_ext/CartPole-v1_1/CartPole-v1/args.yml").read_text()
    assert not train(crash_at=3, seed=())
    assert train()  # with another seed
    assert runs(tmp_path) == ["CartPole-v1_1", "CartPole-v1_2", "CartPole-v1_3"]


def test_a_run_that_is_still_going_on_is_left_alone(tmp_path, train):
    assert not train(crash_at=2)
    going_on = Folder(tmp_path / "logs/trpo_ext/CartPole-v1_1/checkpoints")
    going_on.lock()
    assert train()
    going_on.unlock()
    assert runs(tmp_path) == ["CartPole-v1_1", "CartPole-v1_2"]


def test_without_checkpoints_the_zoo_is_as_it_was(tmp_path, train):
    entry = {key: value for key, value in ENTRY.items() if key != "callback"}
    assert train(entry=entry) and train(entry=entry)
    assert runs(tmp_path) == ["CartPole-v1_1", "CartPole-v1_2"]


@pytest.mark.filterwarnings("ignore")
def test_a_search_has_no_checkpoints(tmp_path, train, monkeypatch):
    monkeypatch.setattr(Checkpoints, "lock", lambda self: (tmp_path / "was.checkpoint").touch())
    few = ("--n-trials", "1", "--n-startup-trials", "1", "--n-evaluations", "1", "-n", "100")
    assert train("-optimize", "--no-optim-plots", *few)
    assert not list(tmp_path.rglob("*.checkpoint"))
