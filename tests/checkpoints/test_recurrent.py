"""A policy with memory goes on with what it remembered, also in environments with masks."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import Checkpoints, SnapshotWrapper, TRPOExt


class Interrupt(BaseCallback):
    def __init__(self, rollout):
        super().__init__()
        self.rollout = rollout

    def _on_rollout_start(self):
        self.rollout -= 1
        if self.rollout == 0:
            raise KeyboardInterrupt

    def _on_step(self):
        return True


class Masked(gym.Wrapper):
    """Allows no step to the right every third time."""

    steps = 0

    def step(self, action):
        assert self.action_masks()[action]
        self.steps += 1
        return self.env.step(action)

    def action_masks(self):
        return np.array([True, self.steps % 3 != 0])


def learn(wrapper, *callbacks):
    env = make_vec_env(lambda: wrapper(gym.make("CartPole-v1")), 2, seed=0, wrapper_class=SnapshotWrapper)
    model = TRPOExt("MlpLstmPolicy", env, n_steps=32, seed=0, device="cpu")
    return model.learn(5 * 64, callback=[*callbacks])


@pytest.mark.parametrize("wrapper", [gym.Wrapper, Masked])
def test_a_run_that_remembers_goes_on_bit_for_bit(tmp_path, wrapper):
    whole = learn(wrapper)
    with pytest.raises(KeyboardInterrupt):
        learn(wrapper, Checkpoints(tmp_path, every=1), Interrupt(4))
    resumed = learn(wrapper, Checkpoints(tmp_path, every=1))
    for ours, theirs in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)
    for part, other in zip(resumed._last_lstm_states, whole._last_lstm_states, strict=True):
        assert all(th.equal(a, b) for a, b in zip(part, other, strict=True))
