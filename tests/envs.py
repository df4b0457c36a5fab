"""Small environments for tests."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Walk(gym.Env):
    """A point that actions push about; reward for being near the origin. Ends at random, so episodes differ.

    Any action and observation space; observations are sampled from the space where they are not vectors.
    """

    def __init__(self, action_space=None, observation_space=None, end_probability=0.05):
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (2,))
        self.observation_space = observation_space or spaces.Box(-10.0, 10.0, (3,))
        self.end_probability = end_probability
        self.position = np.zeros(3)

    def _observation(self):
        if isinstance(self.observation_space, spaces.Box) and self.observation_space.shape == (3,):
            return np.clip(self.position, -10, 10).astype(self.observation_space.dtype)
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.position = self.np_random.normal(size=3)
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, dtype=self.action_space.dtype)), action
        self.position += 0.3 * float(np.sum(action)) - 0.1 * self.position + 0.1 * self.np_random.normal(size=3)
        reward = -float(np.square(self.position).sum())
        return self._observation(), reward, bool(self.np_random.random() < self.end_probability), False, {}


class Faulty(gym.Wrapper):
    """Puts a bad number into rewards or observations at one step in ``every``."""

    def __init__(self, env, quantity, bad, every=50, until=float("inf")):
        super().__init__(env)
        self.quantity, self.bad, self.every, self.until, self.steps = quantity, bad, every, until, 0
        self.actions = []

    def step(self, action):
        self.actions.append(np.array(action))
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        if self.steps % self.every == 0 and self.steps <= self.until:
            if self.quantity == "rewards":
                reward = self.bad
            else:
                observation = np.array(observation)
                observation[0] = self.bad
        return observation, reward, terminated, truncated, info


def limited(env, steps=17):
    return gym.wrappers.TimeLimit(env, steps)


class FiniteMDP(gym.Env):
    """States that are observed as they are; an episode ends with the chance that a row of ``transitions`` leaves.

    :param transitions: P(s'|s, a), (S, A, S), summing to at most 1 over s'
    :param rewards: (S, A); each step's reward has a standard deviation of 1 around them
    """

    def __init__(self, transitions, rewards):
        self.transitions, self.rewards = transitions, rewards
        self.observation_space = spaces.Discrete(len(transitions))
        self.action_space = spaces.Discrete(rewards.shape[1])
        self.state = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(len(self.transitions)))
        return self.state, {}

    def step(self, action):
        reward = float(self.rewards[self.state, action] + self.np_random.normal())
        after = int(np.searchsorted(np.cumsum(self.transitions[self.state, action]), self.np_random.random()))
        if after == len(self.transitions):
            return self.state, reward, True, False, {}
        self.state = after
        return self.state, reward, False, False, {}


class Noisy(gym.Env):
    """Pays the sum of the action and its own noise; nothing that is done matters to what follows."""

    def __init__(self, action_space=None):
        self.action_space = action_space or spaces.Box(-9.0, 9.0, (2,))
        self.observation_space = spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        reward = float(np.sum(action)) + 100.0 * float(self.np_random.normal())
        return np.zeros(1, dtype=np.float32), reward, False, False, {}
