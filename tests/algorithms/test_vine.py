"""Vine sampling in the algorithms: what is wrapped, what is refused, and what saving keeps."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_trpo_ext import KLPPOExt, NPGExt, SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.sampling.vine_buffer import VineDictRolloutBuffer
from tests.envs import Walk, limited

VINE = dict(n_rollout_states=8, n_branch_actions=2, branch_length=5)


def model_of(env, policy="MlpPolicy", vine=None, **arguments):
    arguments = dict(n_steps=32, batch_size=32, seed=0, device="cpu") | arguments
    kwargs = VINE | (vine or {})
    return TRPOExt(policy, env, rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=kwargs, **arguments)


def outermost(model):
    return [type(env) for env in model.env.unwrapped.envs]


def unwrapped():
    return make_vec_env("CartPole-v1", n_envs=2)


@pytest.mark.parametrize(
    "env",
    [
        lambda: "CartPole-v1",
        lambda: gym.make("CartPole-v1"),
        lambda: Monitor(gym.make("CartPole-v1")),
        lambda: SnapshotWrapper(gym.make("CartPole-v1")),
        lambda: make_vec_env("CartPole-v1", n_envs=1, wrapper_class=SnapshotWrapper),
    ],
    ids=["id", "env", "monitored", "wrapped", "vec_env"],
)
def test_what_the_algorithm_makes_it_wraps_itself(env):
    model = model_of(env())
    model.learn(64)
    assert outermost(model) == [SnapshotWrapper]
    assert len(model.ep_info_buffer) > 0 and model.num_timesteps > 64 and model.rollout_buffer.branches is not None


def test_other_environments_are_refused_with_what_to_wrap():
    with pytest.raises(ValueError, match=r"make_vec_env\(\.\.\., wrapper_class=SnapshotWrapper\)"):
        model_of(unwrapped())


def test_set_env_wraps_or_refuses_in_the_same_way():
    model = model_of("CartPole-v1")
    model.set_env(gym.make("CartPole-v1"))
    assert outermost(model) == [SnapshotWrapper]
    good = model.env
    with pytest.raises(ValueError, match="SnapshotWrapper"):
        model.set_env(make_vec_env("CartPole-v1", n_envs=1))
    assert model.env is good
    model.learn(64)


def test_load_wraps_or_refuses_in_the_same_way(tmp_path):
    model = model_of("CartPole-v1")
    model.learn(64)
    model.save(tmp_path / "model")
    loaded = TRPOExt.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
    assert outermost(loaded) == [SnapshotWrapper]
    assert isinstance(loaded.rollout_buffer, VineRolloutBuffer) and loaded.rollout_buffer.n_rollout_states == 8
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps > model.num_timesteps
    with pytest.raises(ValueError, match="SnapshotWrapper"):
        TRPOExt.load(tmp_path / "model", env=unwrapped(), device="cpu")
    without = TRPOExt.load(tmp_path / "model", device="cpu")  # only to predict
    assert without.predict(np.zeros(4, dtype=np.float32))[0] in (0, 1)


def test_without_vine_nothing_is_wrapped():
    model = TRPOExt("MlpPolicy", gym.make("CartPole-v1"), n_steps=32, batch_size=32, device="cpu")
    assert outermost(model) == [Monitor]


def test_the_buffer_class_may_be_a_dotted_path_and_dict_observations_find_their_twin():
    observations = spaces.Dict({"a": spaces.Box(-1, 1, (2,))})
    model = TRPOExt(
        "MultiInputPolicy",
        limited(Walk(spaces.Discrete(2), observations)),
        n_steps=32,
        batch_size=32,
        device="cpu",
        rollout_buffer_class="sb3_trpo_ext.VineRolloutBuffer",
        rollout_buffer_kwargs=VINE,
    )
    assert isinstance(model.rollout_buffer, VineDictRolloutBuffer)
    model.learn(64)
    assert model.report.outcome == "accepted"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(vine=dict(n_rollout_states=33)), r"n_rollout_states must be at most n_steps \* n_envs = 32"),
        (dict(vine=dict(n_branch_actions=1)), "n_branch_actions must be 'all' or at least 2"),
        (dict(use_sde=True), "use_sde must be False with VineRolloutBuffer.*got True"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(gym.make("Pendulum-v1"), **arguments)


HIDDEN = np.random.default_rng(0)


def test_learn_refuses_a_simulator_that_does_not_return():
    class Luck(Walk):
        """Draws from a generator that no snapshot knows of."""

        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, float(HIDDEN.normal()), *rest

    model = model_of(Luck(spaces.Discrete(2)))
    start = [p.clone() for p in model.policy.parameters()]
    with pytest.raises(ValueError):
        model.learn(64)
    assert all(th.equal(a, b) for a, b in zip(start, model.policy.parameters(), strict=True))


def test_a_vine_of_every_state_goes_through_normalisation_and_other_critics():
    for critic in ("gauss_newton", "none"):
        env = DummyVecEnv([lambda: SnapshotWrapper(limited(Walk()))] * 2)
        model = model_of(
            env, vine=dict(n_rollout_states=64), critic=critic, normalize_advantage=critic == "none", batch_size=128
        )
        model.learn(600)
        assert model.outcome_counts == {"accepted": model._n_updates}


@pytest.mark.parametrize("algorithm", [NPGExt, KLPPOExt], ids=lambda algorithm: algorithm.__name__)
def test_siblings_learn_from_branches_too(algorithm):
    env = DummyVecEnv([lambda: SnapshotWrapper(limited(Walk()))] * 2)
    kwargs = dict(rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=VINE)
    model = algorithm("MlpPolicy", env, n_steps=32, batch_size=32, seed=0, device="cpu", ent_coef=0.01, **kwargs)
    model.learn(300)
    assert model.outcome_counts == {"accepted": model._n_updates}


def test_the_log_says_what_branches_cost_and_what_their_weights_are_worth():
    seen = []

    class Watch(TRPOExt):
        def _log_update(self):
            super()._log_update()
            seen.append(dict(self.logger.name_to_value))

    env = DummyVecEnv([lambda: SnapshotWrapper(limited(Walk()))] * 2)
    kwargs = dict(rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=VINE | dict(n_branch_actions=4))
    model = Watch("MlpPolicy", env, n_steps=32, batch_size=32, seed=0, device="cpu", **kwargs)
    _, callback = model._setup_learn(1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 32)
    model.train()
    (log,) = seen
    assert log["vine/branches"] == 8 * 4 and log["vine/branch_steps"] == model.num_timesteps - 64
    assert log["vine/effective_sample_size"] == pytest.approx(4.0)  # draws from π_old weigh alike
    assert 1.0 < log["vine/effective_sample_size_after"] < 4.0
    assert 0.0 <= log["vine/cut_fraction"] <= 1.0 and log["time/branches_seconds"] > 0.0
