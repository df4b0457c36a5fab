"""A policy learns from the numbers that it acted on and with, whatever kind of number its spaces have."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, VecNormalize

from sb3_trpo_ext import KLPPOExt, NPGExt, SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.observations import leaves, tree_map
from sb3_trpo_ext.sampling.buffers import make_room
from tests.envs import Walk, limited

INTEGERS = [np.uint8, np.int8, np.int32, np.int64]
T = 12


class OwnAdd(RolloutBuffer):
    def add(self, *args, **kwargs):
        super().add(*args, **kwargs)


PATHS = {
    "numpy": {},
    "torch": dict(policy_kwargs=dict(activation_fn=th.nn.GELU)),
    "sb3": dict(values_at_each_step=True),
    "own_add": dict(rollout_buffer_class=OwnAdd),
    "vine": dict(
        rollout_buffer_class=VineRolloutBuffer,
        rollout_buffer_kwargs=dict(n_rollout_states=4, n_branch_actions=2, branch_length=3),
    ),
}


class Steps(BaseCallback):
    """What the policy saw and did."""

    def _on_training_start(self):
        self.seen = []

    def _on_step(self):
        step = {name: self.locals[name] for name in ("obs_tensor", "actions", "clipped_actions")}
        self.seen.append(tree_map(lambda leaf: th.as_tensor(leaf).clone().numpy(), step))
        return True


def collected(env, **arguments):
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    model, steps = TRPOExt(policy, env, n_steps=T, seed=0, device="cpu", **arguments), Steps()
    _, callback = model._setup_learn(1000, steps)
    callback.on_training_start({}, {})
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, T)
    return model, steps.seen


def assert_kept(model, seen):
    buffer = model.rollout_buffer
    for stored, *of_steps in zip(leaves(buffer.observations), *(leaves(step["obs_tensor"]) for step in seen), strict=True):
        assert stored.dtype.kind == "f" and not np.array_equal(stored, np.trunc(stored))
        np.testing.assert_array_equal(stored, np.stack(of_steps))
    np.testing.assert_array_equal(buffer.actions, np.stack([step["actions"] for step in seen]).reshape(buffer.actions.shape))
    with th.no_grad():
        obs = tree_map(lambda array: th.as_tensor(array.reshape(-1, *array.shape[2:])), buffer.observations)
        expected = model.action_distribution(obs).log_prob(th.as_tensor(buffer.actions.reshape(-1, buffer.action_dim)))
    np.testing.assert_allclose(buffer.log_probs.reshape(-1), expected, rtol=1e-5, atol=1e-4)
    model.train()
    assert model.outcome_counts.keys() <= {"accepted", "no_improvement"}


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("path", PATHS)
def test_normalised_integers_and_actions_in_a_box_of_integers(path, dtype):
    observations, actions = spaces.Box(0, 100, (2,), dtype=dtype), spaces.Box(0, 5, (2,), dtype=dtype)

    env = DummyVecEnv([lambda: SnapshotWrapper(limited(Walk(actions, observations)))] * 2)
    model, seen = collected(VecNormalize(env), **PATHS[path])
    for step in seen:
        assert step["clipped_actions"].dtype.kind == "f", "environments get what SB3 gives them"
        np.testing.assert_array_equal(step["clipped_actions"], np.clip(step["actions"], 0, 5))
    assert model.rollout_buffer.actions.dtype == np.float32
    assert_kept(model, seen)


@pytest.mark.parametrize("path", ["torch", "sb3", "vine"])
def test_keys_of_a_dict(path):
    space = spaces.Dict(a=spaces.Box(0, 100, (2,), dtype=np.uint8), b=spaces.Box(0, 9, (1,), dtype=np.int64))
    env = DummyVecEnv([lambda: SnapshotWrapper(limited(Walk(None, space)))] * 2)
    assert_kept(*collected(VecNormalize(env), **PATHS[path]))


class Halved(VecEnvWrapper):
    """Says nothing of it to the space, and leaves what a reset gives as it is."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observations, *rest = self.venv.step_wait()
        return observations / 2.0, *rest


@pytest.mark.parametrize("vec_env", [DummyVecEnv, lambda makers: SubprocVecEnv(makers, start_method="fork")])
def test_floats_may_come_at_the_second_step(vec_env):
    env = Halved(vec_env([lambda: limited(Walk(None, spaces.Box(0, 100, (2,), dtype=np.int16)))] * 2))
    assert_kept(*collected(env))
    env.close()


@pytest.mark.parametrize(
    "dtype, given, kept",
    [
        (np.uint8, np.uint8, np.uint8),
        (np.uint8, np.int64, np.uint8),  # an environment that does not keep to its space
        (np.uint8, np.float32, np.float32),
        (np.int64, np.float64, np.float32),
        (bool, np.float32, np.float32),
        (np.float16, np.float32, np.float32),
        (np.float16, np.float16, np.float16),
        (np.float32, np.float64, np.float32),
        (np.float64, np.float32, np.float64),
    ],
)
def test_room_is_made_only_where_there_is_none(dtype, given, kept):
    space = spaces.Box(0, 1, (2,), dtype=dtype)
    buffer = RolloutBuffer(3, space, space, device="cpu")
    make_room(buffer, np.zeros((1, 2), given), np.zeros((1, 2), given))
    assert buffer.observations.dtype == buffer.actions.dtype == kept
    buffer = DictRolloutBuffer(3, spaces.Dict(a=space, b=spaces.Discrete(3)), spaces.MultiBinary(2), device="cpu")
    make_room(buffer, {"a": np.zeros((1, 2), given), "b": np.zeros(1, np.int64)}, np.zeros((1, 2), np.float32))
    assert buffer.observations["a"].dtype == kept and buffer.observations["b"].dtype == np.int64
    assert buffer.actions.dtype == np.int8, "which holds zeros and ones"


def test_what_a_buffer_keeps_in_its_own_way_is_left_to_it():
    buffer = RolloutBuffer(3, *[spaces.Box(0, 9, (2,), dtype=np.uint8)] * 2, device="cpu")
    buffer.observations = kept = ["bytes"]
    del buffer.actions
    make_room(buffer, np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32))
    assert buffer.observations is kept and not hasattr(buffer, "actions")


class Six(gym.Env):
    """Pays most for an action of 6."""

    def __init__(self, dtype):
        self.observation_space, self.action_space = spaces.Box(-1, 1, (1,)), spaces.Box(0, 10, (1,), dtype=dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), -float((action[0] - 6) ** 2), True, False, {}


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize(
    "algorithm, arguments", [(TRPOExt, {}), (NPGExt, dict(target_kl=0.1)), (KLPPOExt, dict(target_kl=0.1, batch_size=64))]
)
def test_actions_in_a_box_of_integers_are_learned(algorithm, arguments, dtype):
    arguments = dict(target_kl=0.3, n_steps=32, seed=0, device="cpu") | arguments
    model = algorithm("MlpPolicy", DummyVecEnv([lambda: Six(dtype)] * 4), **arguments).learn(40 * 128)
    mean = model.predict(np.zeros(1, np.float32), deterministic=True)[0]
    assert mean.item() == pytest.approx(6.0, abs=0.1)
    # once it is there, a search may find nothing better
    assert model.outcome_counts["accepted"] >= 30 and model.outcome_counts.keys() <= {"accepted", "no_improvement"}


class Middle(gym.Env):
    """Pays for telling 4, 5 and 6 from the other numbers up to 10, 50 times."""

    def __init__(self, dtype):
        self.observation_space, self.action_space = spaces.Box(0, 10, (1,), dtype=dtype), spaces.Discrete(2)

    def _observation(self):
        self.number = int(self.np_random.integers(11))
        return np.array([self.number], self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action):
        reward = float(int(action) == int(4 <= self.number <= 6))
        self.steps += 1
        return self._observation(), reward, self.steps == 50, False, {}


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_normalised_integers_are_learned_from(dtype):
    env = VecNormalize(DummyVecEnv([lambda: Middle(dtype)] * 4), norm_reward=False, gamma=0.0)
    kwargs = dict(net_arch=[16], activation_fn=th.nn.ReLU)
    model = TRPOExt("MlpPolicy", env, n_steps=64, target_kl=0.2, gamma=0.0, seed=0, device="cpu", policy_kwargs=kwargs)
    model.learn(60 * 256)
    numbers = np.arange(11)
    actions, _ = model.predict(env.normalize_obs(numbers[:, None]), deterministic=True)
    assert 50 * np.mean(actions == ((numbers >= 4) & (numbers <= 6))) == 50.0
