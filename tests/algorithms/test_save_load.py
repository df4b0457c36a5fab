"""Archives: ours and sb3_contrib's, with and without an environment, and learning on."""

import io
import json
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import KLPPOExt, NPGExt, TRPOExt, VineRolloutBuffer
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


# -- defaults that follow from other arguments ------------------------------------------------------------


D = 6
"""Action dimensions of ``six()``."""


def six():
    return limited(Walk(gym.spaces.Box(-1, 1, (D,))))


def region(model):
    return model.kl_reduction, model.target_kl, model.cg_damping


SUMMED, AVERAGED = ("sum", 0.01 * D, 0.1 * D), ("mean", 0.01, 0.1)


@pytest.fixture
def again(tmp_path):
    """What comes of a model that is saved and loaded."""

    def saved_and_loaded(model, cls=None, without=(), **arguments):
        model.save(tmp_path / "again", exclude=without)
        return (cls or type(model)).load(tmp_path / "again", device="cpu", **arguments)

    return saved_and_loaded


@pytest.mark.parametrize("cls", [TRPOExt, NPGExt])
def test_the_default_region_follows_its_scale(again, cls):
    model = cls("MlpPolicy", six(), **FAST)
    assert region(model) == region(again(model)) == region(again(model, kl_reduction="sum")) == SUMMED
    averaged = again(model, kl_reduction="mean")
    assert region(averaged) == AVERAGED
    # also of a model that was loaded before, in either direction
    assert region(again(again(averaged), kl_reduction="sum")) == SUMMED
    made = cls("MlpPolicy", six(), kl_reduction="mean", **FAST)
    assert region(made) == AVERAGED and region(again(made, kl_reduction="sum")) == SUMMED


def test_a_region_that_was_given_stays_as_it_was_given(again):
    model = TRPOExt("MlpPolicy", six(), target_kl=0.03, **FAST)
    assert region(again(model, kl_reduction="mean")) == ("mean", 0.03, 0.1)
    model = TRPOExt("MlpPolicy", six(), target_kl="lin_0.03", cg_damping=0.2, **FAST)
    averaged = again(model, kl_reduction="mean")
    assert averaged.target_kl(0.5) == 0.015 and averaged.cg_damping == 0.2
    default = TRPOExt("MlpPolicy", six(), **FAST)
    given_now = again(default, kl_reduction="mean", target_kl=0.05)
    assert region(given_now) == ("mean", 0.05, 0.1)
    # given, if with the value of the default
    assert region(again(again(default, target_kl=0.01 * D), kl_reduction="mean")) == ("mean", 0.01 * D, 0.1)
    assert region(again(default, kl_reduction="mean", custom_objects={"target_kl": 0.02})) == ("mean", 0.02, 0.1)
    default.target_kl = 0.04
    assert region(again(default, kl_reduction="mean")) == ("mean", 0.04, 0.1)


def test_an_adaptive_radius_starts_anew_where_the_scale_is_another(again):
    model = TRPOExt("MlpPolicy", six(), adaptive_radius=True, **FAST)
    model.radius = 0.1
    assert again(model).radius == 0.1
    assert again(model, kl_reduction="mean").radius == 0.01


def test_archives_that_do_not_say_what_was_given_load_as_they_did(again):
    model = TRPOExt("MlpPolicy", six(), **FAST)
    with pytest.warns(UserWarning, match="makes no use of n_critic_updates=3"):
        earlier = again(model, without=["derived_arguments"], kl_reduction="mean", n_critic_updates=3)
    assert region(earlier) == ("mean", 0.01 * D, 0.1 * D) and earlier.critic == "gauss_newton"


def test_the_defaults_of_sb3_contrib_follow_their_scale_too(again):
    arguments = dict(n_steps=128, seed=0, device="cpu")
    assert region(again(TRPO("MlpPolicy", six(), **arguments), TRPOExt)) == AVERAGED
    assert region(again(TRPO("MlpPolicy", six(), **arguments), TRPOExt, kl_reduction="sum")) == SUMMED
    given = TRPO("MlpPolicy", six(), target_kl=0.02, **arguments)
    assert region(again(given, TRPOExt, kl_reduction="sum")) == ("sum", 0.02, 0.1 * D)


def test_sb3_contrib_reads_our_numbers_on_its_scale(again):
    # as the table for those who come from there says
    def region(model):
        return model.target_kl, model.cg_damping

    summed, averaged = (TRPOExt("MlpPolicy", six(), kl_reduction=reduction, **FAST) for reduction in ("sum", "mean"))
    theirs = region(TRPO("MlpPolicy", six(), n_steps=128, device="cpu"))
    assert region(again(averaged, TRPO)) == theirs
    assert region(again(summed, TRPO)) == tuple(D * value for value in theirs)


def test_the_critic_follows_keywords_given_to_load_as_in_the_constructor(again):
    model = TRPOExt("MlpPolicy", six(), **FAST)
    assert (model.critic, again(model).critic) == ("gauss_newton", "gauss_newton")
    adam = again(model, learning_rate=1e-4)
    assert (adam.critic, again(adam).critic, again(adam, critic_steps=2).critic) == ("adam", "adam", "gauss_newton")
    by_keyword = TRPOExt("MlpPolicy", six(), n_critic_updates=4, **FAST)
    assert (again(by_keyword).critic, again(by_keyword, gamma=0.9).critic) == ("adam", "adam")
    assert again(again(model, critic="auto", batch_size=32), critic="auto").critic == "gauss_newton"


def test_a_critic_that_was_given_stays_and_load_says_what_it_has_no_use_for(again):
    model = TRPOExt("MlpPolicy", six(), critic="gauss_newton", **FAST)
    with pytest.warns(UserWarning, match=r"critic='gauss_newton' makes no use of learning_rate=0.0001$"):
        assert again(model, learning_rate=1e-4).critic == "gauss_newton"
    with pytest.warns(UserWarning, match="adaptive_radius=False makes no use of radius_bounds"):
        again(model, radius_bounds=(0.01, 0.1))
    # what the constructor has warned of already is not said again
    with pytest.warns(UserWarning, match="makes no use of batch_size=32"):
        warned = TRPOExt("MlpPolicy", six(), critic="gauss_newton", batch_size=32, **FAST)
    assert again(warned).batch_size == 32


def test_what_another_class_does_not_derive_is_a_value_to_it(again):
    model = TRPOExt("MlpPolicy", six(), **FAST)
    assert again(model, KLPPOExt).target_kl == 0.01 * D
    ppo = again(PPO("MlpPolicy", six(), n_steps=64, device="cpu"), TRPOExt)
    assert region(ppo) == SUMMED and ppo.critic == "gauss_newton" and region(again(ppo, kl_reduction="mean")) == AVERAGED


class OwnBuffer(VineRolloutBuffer):
    def __init__(self, *args, branch_length=7, **kwargs):
        super().__init__(*args, branch_length=branch_length, **kwargs)


@pytest.mark.parametrize(
    ("cls", "given", "expected"),
    [
        (VineRolloutBuffer, None, (128, 4, 100)),
        (VineRolloutBuffer, dict(n_rollout_states=9, n_branch_actions=2), (9, 2, 100)),
        (OwnBuffer, dict(n_branch_actions=3), (128, 3, 7)),
    ],
)
def test_branches_of_earlier_archives_are_as_they_were(again, cls, given, expected):
    model = TRPOExt("MlpPolicy", six(), n_steps=160, device="cpu", rollout_buffer_class=cls, rollout_buffer_kwargs=given)

    def branches(model):
        buffer = model.rollout_buffer
        return buffer.n_rollout_states, buffer.n_branch_actions, buffer.branch_length

    earlier = again(model, without=["derived_arguments"])
    assert branches(earlier) == branches(again(earlier)) == expected
    assert branches(again(model)) == branches(model)
    now = again(model, without=["derived_arguments"], rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs={})
    assert branches(now) == (40, 4, 10)


# -- what load() looks at, as the constructor does --------------------------------------------------------


def test_load_checks_the_size_of_the_rollout_as_the_constructor_does(again):
    two = TRPOExt("MlpPolicy", make_vec_env(lambda: limited(Walk()), n_envs=2), n_steps=1, device="cpu")
    with pytest.raises(AssertionError, match="must be greater than 1 to normalise advantages, got n_steps=1 and n_envs=1"):
        again(two, env=limited(Walk()))
    assert again(two).n_steps == 1  # only to predict
    one = TRPOExt("MlpPolicy", limited(Walk()), critic="adam", batch_size=32, **FAST)
    with pytest.raises(AssertionError, match="n_steps=1 and n_envs=1"):
        again(one, env=limited(Walk()), n_steps=1)
    assert again(one, env=limited(Walk()), n_steps=1, batch_size=1, normalize_advantage=False).n_steps == 1
    with pytest.warns(UserWarning, match=r"batch_size=48 does not divide n_steps \* n_envs = 64"):
        again(one, env=limited(Walk()), batch_size=48)


def damaged(archive):
    """The archive with one bit of its data changed."""
    at = archive.index(b'"policy_class"')
    return archive[:at] + bytes([archive[at] ^ 1]) + archive[at + 1 :]


def zipped(name, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("made_of", "error", "message"),
    [
        (lambda _: b"words", ValueError, "wasn't a zip-file"),
        (lambda _: b"", ValueError, "wasn't a zip-file"),
        (lambda archive: archive[:1000], ValueError, "wasn't a zip-file"),
        (damaged, ValueError, "wasn't a zip-file"),
        (lambda _: zipped("other", ""), AssertionError, "No data found"),
        (lambda _: zipped("data", "{"), ValueError, "Expecting"),
        (lambda _: zipped("data", b"\xff"), ValueError, "can't decode"),
        (lambda _: zipped("data", "[{}]"), AttributeError, "'list' object has no attribute 'items'"),
    ],
    ids=["words", "empty", "truncated", "damaged", "without data", "no JSON", "no text", "a list"],
)
def test_a_file_that_is_no_archive_is_refused_as_by_sb3(saved, tmp_path, made_of, error, message):
    _, path = saved
    content = made_of(path.with_suffix(".zip").read_bytes())
    (tmp_path / "file.zip").write_bytes(content)
    for given in (tmp_path / "file", str(tmp_path / "file.zip"), io.BytesIO(content)):
        for cls in (PPO, TRPOExt):
            with pytest.raises(error, match=message):
                cls.load(given, device="cpu")


def test_a_folder_and_a_file_that_is_not_there(tmp_path):
    for cls in (PPO, TRPOExt):
        with pytest.raises(IsADirectoryError):
            cls.load(tmp_path, device="cpu")
        with pytest.raises(FileNotFoundError, match=r"missing\.zip"):
            cls.load(tmp_path / "missing", device="cpu")
