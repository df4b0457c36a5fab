"""Small environments for tests."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_trpo_ext.masks import choices_of


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


def random_masks(space, n, rng, chance=0.5):
    """Masks of n states, (n, Σ choices), each dimension with at least one choice."""
    blocks = []
    for size in choices_of(space):
        block = rng.random((n, size)) < chance
        block[np.arange(n), rng.integers(size, size=n)] = True
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


def is_allowed(space, mask, action):
    """Whether each choice of an action is."""
    sizes = choices_of(space)
    return all(mask[np.cumsum([0, *sizes[:-1]]) + np.asarray(action).astype(int).reshape(-1)])


class Picky(Walk):
    """A walk of which each state allows only some choices, drawn anew at each step; any other is an AssertionError."""

    def __init__(self, action_space, observation_space=None, end_probability=0.05):
        super().__init__(action_space, observation_space, end_probability)
        self.mask, self.n_asked = None, 0

    def _observation(self):
        self.mask = random_masks(self.action_space, 1, self.np_random)[0]
        return super()._observation()

    def action_masks(self):
        self.n_asked += 1
        return self.mask

    def step(self, action):
        assert is_allowed(self.action_space, self.mask, action), (self.mask, action)
        return super().step(action)


class Telling(Picky):
    """The same, with its mask among its observations instead."""

    def __init__(self, action_space):
        super().__init__(action_space)
        n = sum(choices_of(action_space))
        self.observation_space = spaces.Dict({"where": spaces.Box(-10.0, 10.0, (3,)), "mask": spaces.MultiBinary(n)})

    def _observation(self):
        self.mask = random_masks(self.action_space, 1, self.np_random)[0]
        return {"where": np.clip(self.position, -10, 10).astype(np.float32), "mask": self.mask.astype(np.int8)}

    def __getattribute__(self, name):
        if name == "action_masks":
            raise AttributeError(name)
        return super().__getattribute__(name)
