"""Small runs that are interrupted, and what must be equal afterwards."""

import random

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import Checkpoints, SnapshotWrapper, TRPOExt

N_STEPS = 32


class Interrupt(BaseCallback):
    """Stands for a kill: nothing is saved on the way out."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def _on_step(self):
        if self.num_timesteps >= self.at:
            raise KeyboardInterrupt
        return True


def cartpole(n_envs=2, seed=0, wrapped=True, **kwargs):
    return make_vec_env("CartPole-v1", n_envs, seed=seed, wrapper_class=SnapshotWrapper if wrapped else None, **kwargs)


def make_model(env=None, algorithm=TRPOExt, policy="MlpPolicy", **kwargs):
    arguments = {"n_steps": N_STEPS, "seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [8]}, **kwargs}
    return algorithm(policy, cartpole() if env is None else env, **arguments)


def train(folder, steps, make=make_model, callbacks=(), kill_at=None, every=2, **kwargs):
    """One start of a script: the model and its Checkpoints."""
    scramble()
    model, checkpoints = make(), Checkpoints(folder, every=every, **kwargs)
    learn(model, steps, [*(make_callback() for make_callback in callbacks), checkpoints], kill_at)
    return model, checkpoints


def learn(model, steps, callbacks, kill_at=None, **kwargs):
    """Whether it came to its end."""
    killers = [] if kill_at is None else [Interrupt(kill_at)]
    try:
        model.learn(steps, [*killers, *callbacks], **kwargs)
    except KeyboardInterrupt:
        return False
    return True


def scramble():
    """Another process would have other generators."""
    random.seed()
    np.random.seed(None)
    th.seed()


def assert_equal_models(one, other):
    assert one.num_timesteps == other.num_timesteps and one._n_updates == other._n_updates
    for key, tensor in one.policy.state_dict().items():
        assert th.equal(tensor, other.policy.state_dict()[key]), key
    assert repr(one.policy.optimizer.state_dict()) == repr(other.policy.optimizer.state_dict())
    assert one.outcome_counts == other.outcome_counts and one.critic_damping == other.critic_damping
    assert [(e["r"], e["l"]) for e in one.ep_info_buffer] == [(e["r"], e["l"]) for e in other.ep_info_buffer]
    assert repr(one._last_obs) == repr(other._last_obs)
    np.testing.assert_array_equal(one._last_episode_starts, other._last_episode_starts)
