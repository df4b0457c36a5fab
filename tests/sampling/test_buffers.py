import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_trpo_ext.sampling.buffers import adds_like_sb3, compute_returns

BOX = spaces.Box(-1, 1, (2,))


def filled(cls, n_steps, n_envs, gamma, gae_lambda, seed, space=BOX):
    rng = np.random.default_rng(seed)
    buffer = cls(n_steps, space, BOX, device="cpu", gamma=gamma, gae_lambda=gae_lambda, n_envs=n_envs)
    buffer.rewards[:] = rng.normal(size=(n_steps, n_envs))
    buffer.values[:] = rng.normal(size=(n_steps, n_envs))
    buffer.episode_starts[:] = rng.random((n_steps, n_envs)) < 0.2
    return buffer, th.as_tensor(rng.normal(size=(n_envs, 1)), dtype=th.float32), rng.random(n_envs) < 0.5


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_returns_are_those_of_sb3(n_steps, n_envs, gamma, gae_lambda, seed):
    ours, last_values, dones = filled(RolloutBuffer, n_steps, n_envs, gamma, gae_lambda, seed)
    theirs, _, _ = filled(RolloutBuffer, n_steps, n_envs, gamma, gae_lambda, seed)
    compute_returns(ours, last_values, dones)
    theirs.compute_returns_and_advantage(last_values, dones)
    np.testing.assert_allclose(ours.advantages, theirs.advantages, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.returns, theirs.returns, rtol=1e-5, atol=1e-5)
    assert ours.advantages.dtype == ours.returns.dtype == np.float32
    assert ours.advantages.shape == (n_steps, n_envs)


class OwnReturns(RolloutBuffer):
    def compute_returns_and_advantage(self, last_values, dones):
        self.returns[:] = 42.0


def test_a_buffers_own_method_is_called():
    buffer, last_values, dones = filled(OwnReturns, 3, 1, 0.9, 0.9, 0)
    compute_returns(buffer, last_values, dones)
    assert (buffer.returns == 42.0).all()


class OwnAdd(DictRolloutBuffer):
    def add(self, *args, **kwargs):
        super().add(*args, **kwargs)


@pytest.mark.parametrize(
    "cls, space, plain",
    [
        (RolloutBuffer, BOX, True),
        (OwnReturns, BOX, True),
        (DictRolloutBuffer, spaces.Dict({"a": BOX}), True),
        (OwnAdd, spaces.Dict({"a": BOX}), False),
    ],
)
def test_an_own_add_is_noticed(cls, space, plain):
    assert adds_like_sb3(cls(3, space, BOX, device="cpu")) is plain
