"""What is not this run's is refused, and what cannot be exact says so."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

import sb3_trpo_ext
from sb3_trpo_ext import Checkpoints, NPGExt, SnapshotWrapper
from tests.checkpoints.runs import N_STEPS, cartpole, learn, make_model, train
from tests.envs import Walk

STEPS = 4 * 2 * N_STEPS


@pytest.mark.parametrize(
    ("name", "value"), [("every", 0), ("keep", 0), ("exact", "yes"), ("signals", ["SIGKILL"]), ("signals", "SIGTERM")]
)
def test_arguments_are_checked(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*got"):
        Checkpoints(tmp_path, **{name: value})


def test_a_folder_is_needed():
    with pytest.raises(ValueError, match="folder must be a folder"):
        make_model().learn(10, Checkpoints())


def test_a_folder_that_cannot_be_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        make_model().learn(10, Checkpoints(tmp_path / "file"))


def test_other_algorithms_do_not_say_when_to_save(tmp_path):
    with pytest.raises(ValueError, match=r"needs an algorithm of sb3_trpo_ext.*PPO"):
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").learn(10, Checkpoints(tmp_path))


OTHERS = {
    "n_steps": (lambda: make_model(n_steps=16), r"n_steps was 32 and is 16"),
    "seed": (lambda: make_model(seed=1), r"seed was 0 and is 1"),
    "learning rate": (
        lambda: make_model(learning_rate=lambda left: 1e-2 * left),
        r"learning_rate was 0.001 and is a schedule",
    ),
    "net_arch": (lambda: make_model(policy_kwargs={"net_arch": [4]}), r"policy_kwargs was .*\[8\].* and is .*\[4\]"),
    "algorithm": (lambda: make_model(algorithm=NPGExt), r"algorithm was .*TRPOExt and is .*NPGExt"),
    "n_envs": (lambda: make_model(cartpole(3)), r"number of environments was 2 and is 3"),
    "spaces": (
        lambda: make_model(make_vec_env("Acrobot-v1", 2, wrapper_class=SnapshotWrapper)),
        r"observation space was .*and is .*; action space was .*; environment was .*CartPole-v1 and is .*Acrobot-v1",
    ),
    "VecNormalize": (lambda: make_model(VecNormalize(cartpole())), r"environment was Dummy.* and is VecNormalize > Dummy"),
}


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_another_run_is_refused_naming_both_sides(tmp_path, make, message):
    train(tmp_path, 10)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        train(tmp_path, 10, make)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_what_changes_nothing_may_be_other(tmp_path):
    train(tmp_path, 10)
    _, checkpoints = train(tmp_path, 10, lambda: make_model(verbose=1, tensorboard_log=str(tmp_path / "tb")))
    assert checkpoints.resumed_at == 2 * N_STEPS


def test_another_version_is_refused(tmp_path, monkeypatch):
    train(tmp_path, 10)
    monkeypatch.setattr(sb3_trpo_ext, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"version of sb3_trpo_ext was .* and is 9\.9"):
        train(tmp_path, 10)


def test_other_environments_of_the_same_spaces_are_refused(tmp_path):
    def make(end_probability):
        return lambda: make_model(
            make_vec_env(
                lambda: gym.wrappers.TimeLimit(Walk(), 20) if end_probability else Walk(), 2, wrapper_class=SnapshotWrapper
            )
        )

    train(tmp_path, 10, make(0))
    with pytest.raises(ValueError, match=r"of other environments: (.|\n)*cannot be restored into"):
        train(tmp_path, 10, make(1))


def test_another_number_of_threads_is_not_bit_for_bit(tmp_path):
    train(tmp_path, 10)
    th.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="not bit for bit.*torch's threads was 1 and is 2"):
            train(tmp_path, 10)
    finally:
        th.set_num_threads(1)


# -- environments that do not return ---------------------------------------------------------------------


class Seeds(gym.Wrapper):
    """Remembers from which seeds its episodes came."""

    def __init__(self, env):
        super().__init__(env)
        self.began = []

    def reset(self, **kwargs):
        result = self.env.reset(**kwargs)
        self.began.append(self.env.unwrapped.np_random.bit_generator.state["state"]["state"])
        return result


@pytest.mark.parametrize("seed", [0, None])
def test_new_episodes_are_new(tmp_path, seed):
    began, first = [], []

    def script(kill_at=None):
        env = make_vec_env("CartPole-v1", 2, seed=seed, wrapper_class=Seeds)
        model = make_model(VecNormalize(env), seed=seed)
        learn(model, STEPS, [Checkpoints(tmp_path, every=1)], kill_at)
        for inner in env.envs:
            first.append(inner.began[0])
            began.extend(inner.began[1:])
        return model

    script(STEPS // 3)
    for at in (STEPS // 2, None):
        with pytest.warns(UserWarning) as caught:
            model = script(at)
        told = [str(warning.message) for warning in caught if "bit for bit" in str(warning.message)]
        assert len(told) == 1 and "not wrapped in SnapshotWrapper" in told[0] and "wrapper_class=SnapshotWrapper" in told[0]
    assert len(set(began)) == len(began) > 6
    # what the script itself begins with is reset again, before it is played
    assert set(first[2:]) == set(first[:2]) or seed is None
    assert not set(first[2:]) & set(began)
    assert model.num_timesteps == STEPS and np.isfinite(model.get_vec_normalize_env().obs_rms.mean).all()


@pytest.mark.parametrize("vec_env", [None, SubprocVecEnv])
def test_exact_refuses_at_the_start(tmp_path, vec_env):
    kwargs = {} if vec_env is None else {"vec_env_cls": vec_env, "vec_env_kwargs": {"start_method": "fork"}}
    env = cartpole(wrapped=False, **kwargs)
    with pytest.raises(
        ValueError, match=r"exact=True, but the environments of training cannot be restored.*wrapper_class=SnapshotWrapper"
    ):
        make_model(env).learn(10, Checkpoints(tmp_path, exact=True))
    env.close()


def test_workers_that_are_not_wrapped_go_on_with_new_episodes(tmp_path):
    def make():
        return make_model(cartpole(wrapped=False, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}))

    killed, _ = train(tmp_path, STEPS, make, kill_at=STEPS // 2 + 10)
    with pytest.warns(UserWarning, match="not bit for bit"):
        model, checkpoints = train(tmp_path, STEPS, make)
    assert model.num_timesteps == STEPS and checkpoints.resumed_at > 0
    killed.env.close()
    model.env.close()


def test_environments_that_were_wrapped_later(tmp_path):
    train(tmp_path, STEPS, lambda: make_model(cartpole(wrapped=False)), kill_at=STEPS // 2 + 10)
    with pytest.warns(UserWarning, match=r"not bit for bit.*written without them"):
        train(tmp_path, STEPS, lambda: make_model(cartpole()), kill_at=STEPS // 2 + 20)
    _, checkpoints = train(tmp_path, STEPS, lambda: make_model(cartpole()))
    assert checkpoints.resumed_at == STEPS // 2


class Forgetful(gym.Env):
    """Says that it returns, and does not."""

    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        Forgetful.steps += 1
        return np.full(1, (Forgetful.steps % 100) / 100, np.float32), 0.0, False, False, {}


def test_exact_proves_that_environments_return(tmp_path):
    env = make_vec_env(Forgetful, 1, wrapper_class=SnapshotWrapper)
    with pytest.raises(ValueError, match="exact=True, but the environment does not return"):
        make_model(env).learn(10, Checkpoints(tmp_path, exact=True))
