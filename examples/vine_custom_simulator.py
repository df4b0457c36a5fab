"""Vine sampling on a simulator of your own whose state sits behind a handle: three methods make it restorable."""

import random

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import SnapshotWrapper, TRPOExt, VineRolloutBuffer, check_snapshot


class Engine:
    """Stands for a simulator in C++ with a random generator of its own."""

    def __init__(self):
        self.level, self.noise = 0.0, random.Random(0)


class Tank(gym.Env):
    """Keep the level near 0."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Discrete(3)

    def __init__(self):
        self.engine = Engine()
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.engine.level, self.steps = float(self.np_random.normal()), 0
        return np.array([self.engine.level], dtype=np.float32), {}

    def step(self, action):
        self.engine.level += 0.2 * (int(action) - 1) + self.engine.noise.gauss(0.0, 0.1)
        self.steps += 1
        observation = np.array([self.engine.level], dtype=np.float32)
        return observation, -abs(self.engine.level), False, self.steps >= 50, {}

    def snapshot_state(self):  # plain data: numbers, bytes, arrays, containers of these
        return self.engine.level, self.engine.noise.getstate(), self.steps

    def restore_state(self, state):
        self.engine.level, noise, self.steps = state
        self.engine.noise.setstate(noise)

    def seed_state(self, seed):  # so that branches from one state can share their noise
        self.engine.noise.seed(seed)


def main(total_timesteps: int = 50_000) -> None:
    check_snapshot(Tank)  # raises, naming what differs, if Tank does not return bit for bit
    env = make_vec_env(Tank, n_envs=4, wrapper_class=SnapshotWrapper)
    model = TRPOExt(
        "MlpPolicy",
        env,
        n_steps=64,
        rollout_buffer_class=VineRolloutBuffer,
        rollout_buffer_kwargs=dict(n_branch_actions="all", branch_length=10),
        seed=0,
    )
    model.learn(total_timesteps)
    print(f"{model.num_timesteps} simulator steps, branches included; outcomes {model.outcome_counts}")


if __name__ == "__main__":
    main()
