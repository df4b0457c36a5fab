"""The environment families that return exactly, wrapped as they are used; and small ones of our own."""

from functools import partial

import ale_py
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.monitor import Monitor

gym.register_envs(ale_py)


def standard(env_id):
    return Monitor(gym.make(env_id))


def pong():
    return Monitor(FrameStackObservation(AtariPreprocessing(gym.make("PongNoFrameskip-v4")), 4))


def breakout(sticky=0.0):
    return AtariWrapper(Monitor(gym.make("BreakoutNoFrameskip-v4")), action_repeat_probability=sticky)


PLAIN = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0", "FrozenLake-v1", "Taxi-v4", "Blackjack-v1"]
MUJOCO = ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5", "InvertedDoublePendulum-v5", "Reacher-v5", "Pusher-v5"]
LAGGING = ["Ant-v5", "Humanoid-v5", "HumanoidStandup-v5"]  # read kinematics that lag behind the state
BOX2D = ["LunarLander-v3", "BipedalWalker-v3"]

FAMILIES = {env_id: partial(standard, env_id) for env_id in (*PLAIN, *MUJOCO, *LAGGING, *BOX2D)}
FAMILIES |= {"Pong": pong, "Breakout": breakout, "Breakout, sticky": partial(breakout, 0.25)}


class Told(CartPoleEnv):
    """Says something when it is reset, and stops early."""

    def reset(self, **kwargs):
        observation, _ = super().reset(**kwargs)
        return observation, {"start": observation.copy()}


def told():
    return gym.wrappers.TimeLimit(Told(), 20)


class Own(gym.Env):
    """A point in a random walk, with something that a test wants to be in an environment."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.position = np.zeros(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=1)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position = self.position + action + self.noise()
        return self.position.astype(np.float32), 1.0, bool(abs(self.position[0]) > 20), False, {"where": self.position.copy()}

    def noise(self):
        return self.np_random.normal()
