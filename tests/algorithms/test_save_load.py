"""Archives: ours and sb3_contrib's, with and without an environment, and learning on."""

import io
import json
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import TRPOExt
from tests.envs import Walk, limited

FAST = dict(n_steps=64, seed=0, device="cpu")


def flat(model):
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = TRPOExt(
        "MlpPolicy", limited(Walk()), critic="gauss_newton", critic_steps=2, target_kl=0.03, cg_damping=0.2, **FAST
    ).learn(192)
    path = tmp_path_factory.mktemp("models") / "model"
    model.save(path)
    return model, path


def test_parameters_settings_and_our_own_state_come_back(saved):
    model, path = saved
    loaded = TRPOExt.load(path, device="cpu")
    assert th.equal(flat(loaded), flat(model))
    for name in ("target_kl", "cg_damping", "critic", "critic_steps", "kl_reduction", "line_search_accept_ratio", "fisher"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert loaded.critic_damping == model.critic_damping and loaded.outcome_counts == model.outcome_counts
    assert loaded._n_updates == model._n_updates
    obs = np.zeros((1, 3), dtype=np.float32)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


def test_learning_goes_on_after_load(saved):
    _, path = saved
    loaded = TRPOExt.load(path, env=limited(Walk()), device="cpu")
    before, count = flat(loaded), loaded.num_timesteps
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.num_timesteps == count + 128
    assert not th.equal(flat(loaded), before)


def test_another_number_of_environments(saved):
    _, path = saved
    loaded = TRPOExt.load(path, env=make_vec_env(lambda: limited(Walk()), n_envs=3), device="cpu")
    loaded.learn(192)
    assert loaded.rollout_buffer.n_envs == 3 and loaded.actor_path == "numpy"


def test_keyword_arguments_override_and_are_checked(saved):
    _, path = saved
    assert TRPOExt.load(path, device="cpu", target_kl=0.5).target_kl == 0.5
    with pytest.raises(ValueError, match=r"target_kl must be a number in \(0, inf\), got -1"):
        TRPOExt.load(path, device="cpu", target_kl=-1)


def test_a_buffer_class_as_a_dotted_path_can_be_given_to_load(saved):
    _, path = saved
    dotted = "stable_baselines3.common.buffers.RolloutBuffer"
    loaded = TRPOExt.load(path, env=limited(Walk()), device="cpu", rollout_buffer_class=dotted)
    assert loaded.learn(64)


def test_an_archive_without_some_of_our_names_is_still_ours(saved, tmp_path):
    model, _ = saved
    model.save(tmp_path / "part", exclude=["outcome_counts"])
    assert TRPOExt.load(tmp_path / "part", device="cpu").kl_reduction == "sum"


def test_get_and_set_parameters(saved):
    model, path = saved
    other = TRPOExt("MlpPolicy", limited(Walk()), **FAST)
    other.set_parameters(model.get_parameters())
    assert th.equal(flat(other), flat(model))
    other = TRPOExt("MlpPolicy", limited(Walk()), **FAST)
    other.set_parameters(str(path))
    assert th.equal(flat(other), flat(model))


def test_what_is_ours_in_the_archive_is_plain_data(saved):
    _, path = saved
    with zipfile.ZipFile(f"{path}.zip") as archive:
        data = json.loads(archive.read("data"))
    theirs = set(vars(TRPO("MlpPolicy", limited(Walk()), batch_size=64, **FAST)))
    ours = set(data) - theirs
    assert {"outcome_counts", "critic_damping", "kl_reduction", "critic"} <= ours
    assert "report" not in data
    assert [name for name in ours if isinstance(data[name], dict) and ":serialized:" in data[name]] == []


@pytest.fixture(scope="module")
def contrib(tmp_path_factory):
    env = gym.make("Pendulum-v1")
    model = TRPO("MlpPolicy", env, n_steps=128, seed=0, device="cpu", target_kl=0.007, n_critic_updates=4).learn(256)
    path = tmp_path_factory.mktemp("models") / "contrib"
    model.save(path)
    return model, path


def test_an_archive_of_sb3_contrib_goes_on_as_it_was(contrib):
    model, path = contrib
    loaded = TRPOExt.load(path, env=gym.make("Pendulum-v1"), device="cpu")
    assert (loaded.kl_reduction, loaded.critic, loaded.line_search_accept_ratio) == ("mean", "adam", 0.0)
    assert (loaded.target_kl, loaded.n_critic_updates, loaded.n_steps) == (0.007, 4, 128)
    assert loaded.initial_std is None and loaded.policy.log_std_init == 0.0
    assert th.equal(flat(loaded), flat(model))
    theirs, ours = (m.policy.optimizer.state_dict()["state"] for m in (model, loaded))
    assert theirs.keys() == ours.keys()
    assert all(th.equal(theirs[key]["exp_avg"], ours[key]["exp_avg"]) for key in theirs)
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.outcome_counts["accepted"] == 1


def test_actions_of_our_earlier_archives_started_as_sb3s_do(tmp_path):
    model = TRPOExt("MlpPolicy", "Pendulum-v1", initial_std=None, **FAST)
    del model.initial_std  # there was no such name
    model.save(tmp_path / "earlier")
    loaded = TRPOExt.load(tmp_path / "earlier", device="cpu")
    assert loaded.initial_std is None and loaded.kl_reduction == "sum" and th.equal(flat(loaded), flat(model))
    assert TRPOExt.load(tmp_path / "earlier", device="cpu", initial_std=0.2).initial_std == 0.2


def test_and_can_be_told_otherwise(contrib):
    _, path = contrib
    loaded = TRPOExt.load(path, device="cpu", critic="gauss_newton", kl_reduction="sum")
    assert (loaded.kl_reduction, loaded.critic, loaded.line_search_accept_ratio) == ("sum", "gauss_newton", 0.0)


def test_open_files_and_paths_of_every_kind(contrib, saved, tmp_path):
    for (model, path), reduction in ((contrib, "mean"), (saved, "sum")):
        for given in (path, str(path), f"{path}.zip"):
            assert TRPOExt.load(given, device="cpu").kl_reduction == reduction
        buffer = io.BytesIO()
        model.save(buffer)
        buffer.seek(0)
        assert TRPOExt.load(buffer, device="cpu").kl_reduction == reduction
