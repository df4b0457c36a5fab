"""A run that is interrupted and started again is the run that was not, bit for bit."""

import random
import shutil
import time

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_trpo_ext import Checkpoints, KLPPOExt, NPGExt, SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.checkpoints.environments import Environments
from sb3_trpo_ext.checkpoints.parts import PARTS
from tests.checkpoints.runs import N_STEPS, assert_equal_models, cartpole, learn, make_model, train
from tests.envs import Walk

VINE = {
    "rollout_buffer_class": VineRolloutBuffer,
    "rollout_buffer_kwargs": {"n_rollout_states": 4, "n_branch_actions": "all", "branch_length": 5},
}


def walk(**kwargs):
    """Continuous actions, cheap."""
    return make_vec_env("Pendulum-v1", 2, seed=3, wrapper_class=SnapshotWrapper, **kwargs)


def images():
    space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    return make_vec_env(lambda: Walk(spaces.Discrete(2), space), 2, seed=0, wrapper_class=SnapshotWrapper)


def dicts():
    space = spaces.Dict({"vector": spaces.Box(-1, 1, (3,)), "number": spaces.Discrete(3)})
    env = make_vec_env(lambda: Walk(observation_space=space), 2, seed=0, wrapper_class=SnapshotWrapper)
    return VecNormalize(env, norm_obs_keys=["vector"])


def stacked():
    env = DummyVecEnv([lambda: SnapshotWrapper(gym.make("CartPole-v1"))] * 2)
    env.seed(0)
    return VecFrameStack(VecNormalize(VecMonitor(env)), 3)


MODELS = {
    "TRPO": make_model,
    "NPG, radius and Adam": lambda: make_model(walk(), NPGExt, adaptive_radius=True, critic="adam", batch_size=32),
    "KL-PPO, schedule, beta": lambda: make_model(walk(), KLPPOExt, batch_size=32, learning_rate=lambda left: 1e-3 * left),
    "gSDE": lambda: make_model(walk(), use_sde=True, sde_sample_freq=8),
    "vine": lambda: make_model(**VINE),
    "normalised, stacked, monitored": lambda: make_model(stacked()),
    "images, whose channels come last": lambda: make_model(images(), policy="CnnPolicy", policy_kwargs={"net_arch": [8]}),
    "dict observations": lambda: make_model(dicts(), policy="MultiInputPolicy"),
    "values at each step": lambda: make_model(values_at_each_step=True),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_run_goes_on_bit_for_bit(tmp_path, make):
    steps = 8 * 2 * N_STEPS
    whole, _ = train(tmp_path / "whole", steps, make)
    train(tmp_path / "killed", steps, make, kill_at=steps // 3)
    train(tmp_path / "killed", steps, make, kill_at=2 * steps // 3)
    resumed, checkpoints = train(tmp_path / "killed", steps, make)
    assert checkpoints.resumed_at is not None and 0 < checkpoints.resumed_at < steps
    assert_equal_models(whole, resumed)
    for name in ("beta", "radius"):
        assert getattr(whole, name, None) == getattr(resumed, name, None)
    if isinstance(whole.env.unwrapped, DummyVecEnv) and whole.get_vec_normalize_env() is not None:
        one, other = whole.get_vec_normalize_env(), resumed.get_vec_normalize_env()
        assert repr(Environments(one, True).state()["statistics"]) == repr(Environments(other, True).state()["statistics"])
        np.testing.assert_array_equal(one.returns, other.returns)


def test_worker_processes_go_on_bit_for_bit(tmp_path):
    def make():
        return make_model(cartpole(vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}))

    steps = 4 * 2 * N_STEPS
    whole, _ = train(tmp_path / "whole", steps, make)
    killed, _ = train(tmp_path / "killed", steps, make, kill_at=steps // 2 + 10, exact=True)
    resumed, checkpoints = train(tmp_path / "killed", steps, make, exact=True)
    assert checkpoints.resumed_at == steps // 2
    assert_equal_models(whole, resumed)
    for model in (whole, killed, resumed):
        model.env.close()


class Global(gym.Env):
    """Draws from every generator that a process has of its own."""

    observation_space, action_space = spaces.Box(-9, 9, (4,)), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action):
        return self._observation(), float(action), bool(self.np_random.random() < 0.1), False, {}

    def _observation(self):
        drawn = [random.random(), np.random.random(), self.np_random.random(), float(self.observation_space.sample()[0])]
        return np.array(drawn, dtype=np.float32)


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
def test_generators_of_processes_and_spaces_go_on(tmp_path, vec_env):
    def make():
        kwargs = {"start_method": "fork"} if vec_env is SubprocVecEnv else {}
        env = make_vec_env(Global, 2, wrapper_class=SnapshotWrapper, vec_env_cls=vec_env, vec_env_kwargs=kwargs)
        return make_model(env, seed=None)

    steps = 4 * 2 * N_STEPS
    train(tmp_path, steps, make, kill_at=1)
    (first,) = tmp_path.glob("*.checkpoint")
    kept = first.read_bytes()
    whole, _ = train(tmp_path, steps, make)
    for path in tmp_path.glob("*.checkpoint"):
        path.unlink()
    first.write_bytes(kept)
    again, checkpoints = train(tmp_path, steps, make)
    assert checkpoints.resumed_at == 0
    assert_equal_models(whole, again)
    for model in (whole, again):
        model.env.close()


def test_it_may_begin_anywhere_an_iteration_ends_without_a_seed(tmp_path):
    """The initial parameters are in the first checkpoint, so that a run without a seed goes on, too."""
    make = lambda: make_model(cartpole(seed=None), seed=None)  # noqa: E731
    killed, _ = train(tmp_path, 1000, make, kill_at=5)
    resumed, checkpoints = train(tmp_path, 1000, make, kill_at=5)
    assert checkpoints.resumed_at == 0
    for one, other in zip(killed.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert th.equal(one, other)


def test_a_vine_without_a_seed_goes_on_bit_for_bit(tmp_path):
    """Its branches follow the global generators."""
    make = lambda: make_model(cartpole(seed=None), seed=None, **VINE)  # noqa: E731
    steps = 8 * 2 * N_STEPS
    train(tmp_path / "whole", steps, make, kill_at=5)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    whole, _ = train(tmp_path / "whole", steps, make)
    train(tmp_path / "killed", steps, make, kill_at=2 * steps // 3)
    resumed, checkpoints = train(tmp_path / "killed", steps, make)
    assert 0 < checkpoints.resumed_at < steps
    assert_equal_models(whole, resumed)


def test_a_finished_run_is_finished(tmp_path):
    steps = 3 * 2 * N_STEPS
    whole, _ = train(tmp_path, steps)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again, checkpoints = train(tmp_path, steps)
    assert checkpoints.resumed_at == whole.num_timesteps
    assert_equal_models(whole, again)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_finished_run_may_be_made_longer(tmp_path):
    train(tmp_path / "short", 3 * 2 * N_STEPS)
    longer, checkpoints = train(tmp_path / "short", 6 * 2 * N_STEPS)
    whole, _ = train(tmp_path / "whole", 6 * 2 * N_STEPS)
    assert checkpoints.resumed_at == 3 * 2 * N_STEPS
    assert_equal_models(whole, longer)


@pytest.mark.parametrize("interrupted_in", [1, 2])
@pytest.mark.parametrize("anew", [True, False])
def test_several_calls_of_learn(tmp_path, interrupted_in, anew):
    steps = 4 * 2 * N_STEPS

    def script(folder, kill_at=(None, None)):
        model, done = make_model(), []
        for number, at in enumerate(kill_at):
            checkpoints = Checkpoints(folder, every=2)
            if not learn(model, steps, [checkpoints], at, reset_num_timesteps=number == 0 or anew):
                break
            done.append(model.num_timesteps)
        return model, done

    whole, expected = script(tmp_path / "whole")
    at = steps // 2 if anew or interrupted_in == 1 else steps + steps // 2
    script(tmp_path / "killed", (at, None) if interrupted_in == 1 else (None, at))
    resumed, done = script(tmp_path / "killed")
    assert done == expected
    assert_equal_models(whole, resumed)


class Written(KVWriter):
    def __init__(self, rows):
        self.rows = rows

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))


def test_iterations_and_the_clock_go_on(tmp_path):
    def script(folder, kill_at=None):
        model, written = make_model(), []
        model.set_logger(Logger(None, [Written(written)]))
        learn(model, 9 * 2 * N_STEPS, [Checkpoints(folder, every=1)], kill_at, log_interval=3)
        return model, written

    _, expected = script(tmp_path / "whole")
    killed, _ = script(tmp_path / "killed", 5 * 2 * N_STEPS + 2)
    elapsed = time.time_ns() - killed.start_time
    resumed, written = script(tmp_path / "killed")
    assert [row["time/iterations"] for row in expected] == [3, 6, 9]
    assert [row["time/iterations"] for row in written] == [6, 9]
    for row, other in zip(expected[1:], written, strict=True):
        assert row.keys() == other.keys()
        assert row["time/total_timesteps"] == other["time/total_timesteps"]
        # recorded by an update before the interruption, written after it
        assert row["train/policy_objective"] == other["train/policy_objective"]
    assert resumed._num_timesteps_at_start == 0
    assert time.time_ns() - resumed.start_time >= elapsed / 2


def test_learn_is_sb3s_without_checkpoints():
    seen = {}

    class Seen(BaseCallback):
        def _on_training_start(self):
            seen.update(self.locals)

        def _on_step(self):
            return True

    make_model().learn(10, Seen(), tb_log_name="name")
    expected = {"total_timesteps": 10, "log_interval": 1, "tb_log_name": "name", "reset_num_timesteps": True}
    assert expected.items() <= seen.items() and {"self", "callback", "progress_bar", "iteration"} <= seen.keys()


def test_a_model_that_was_loaded_goes_on(tmp_path):
    make_model().learn(2 * N_STEPS).save(tmp_path / "model")

    def make():
        return TRPOExt.load(tmp_path / "model", env=cartpole(), device="cpu")

    whole, _ = train(tmp_path / "whole", 6 * 2 * N_STEPS, make)
    train(tmp_path / "killed", 6 * 2 * N_STEPS, make, kill_at=4 * 2 * N_STEPS + 3)
    resumed, _ = train(tmp_path / "killed", 6 * 2 * N_STEPS, make)
    assert_equal_models(whole, resumed)


@pytest.mark.parametrize("part", ["policy", "algorithm", "environments", "generators"])
def test_each_part_matters(tmp_path, monkeypatch, part):
    def make():
        return make_model(VecNormalize(cartpole()), critic="adam", batch_size=32)

    steps = 6 * 2 * N_STEPS
    whole, _ = train(tmp_path / "whole", steps, make)
    train(tmp_path / "killed", steps, make, kill_at=steps // 2)
    monkeypatch.setitem(PARTS, part, PARTS[part]._replace(put=lambda run, state: None))
    with pytest.raises(AssertionError):
        assert_equal_models(whole, train(tmp_path / "killed", steps, make)[0])


class Spikes(gym.RewardWrapper):
    """A reward in each rollout that is far beyond all others."""

    def __init__(self, env):
        super().__init__(env)
        self.steps = 0

    def reward(self, reward):
        self.steps += 1
        return 1e12 if self.steps % N_STEPS == 5 else 0.0


def test_rollouts_are_judged_by_those_before_the_interruption(tmp_path, monkeypatch):
    def make():
        env = make_vec_env("CartPole-v1", 2, seed=0, wrapper_class=lambda env: SnapshotWrapper(Spikes(env)))
        return make_model(env)

    steps = 6 * 2 * N_STEPS
    with pytest.warns(UserWarning, match="update skipped: NaN, infinite or huge rewards"):
        whole, _ = train(tmp_path / "whole", steps, make)
    assert whole.outcome_counts["faults"] == 1
    with pytest.warns(UserWarning, match="update skipped"):
        train(tmp_path / "killed", steps, make, kill_at=2 * N_STEPS + 3, every=1)
    with monkeypatch.context() as without, pytest.warns(UserWarning, match="update skipped"):
        shutil.copytree(tmp_path / "killed", tmp_path / "without")
        without.setitem(PARTS, "watch", PARTS["watch"]._replace(put=lambda run, state: None))
        assert train(tmp_path / "without", steps, make)[0].outcome_counts["faults"] == 2
    resumed, _ = train(tmp_path / "killed", steps, make)
    assert_equal_models(whole, resumed)
    assert resumed._watch.get_state() == whole._watch.get_state()


class TwoDistributions(ActorCriticPolicy):
    def evaluate_actions(self, obs, actions):
        values, log_probs, entropy = super().evaluate_actions(obs, actions)
        return values, log_probs - 1.0, entropy


def test_what_a_user_has_been_told_is_not_told_again(tmp_path):
    def make():
        return make_model(policy=TwoDistributions)

    steps = 6 * 2 * N_STEPS
    with pytest.warns(UserWarning, match="has two distributions"):
        train(tmp_path, steps, make, kill_at=steps // 2 + 3)
    train(tmp_path, steps, make)  # warnings are errors
