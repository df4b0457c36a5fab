"""One policy update against the installed sb3_contrib.TRPO, from the same buffer and parameters."""

import copy

import pytest
import torch as th
from sb3_contrib import TRPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_trpo_ext import TRPOExt
from tests.cases import ACTION_SPACES
from tests.envs import Walk, limited


def actor(model):
    return th.cat([p.detach().clone().flatten() for name, p in model.policy.named_parameters() if "value" not in name])


def full_step_of_sb3_contrib(model):
    """The first candidate of the line search, whether it is accepted or not."""
    before, seen = actor(model), []
    get_distribution = model.policy.get_distribution

    def spy(observations):
        seen.append(actor(model))
        return get_distribution(observations)

    model.policy.get_distribution = spy
    model.train()
    # called for the old distribution, the new one, and then once for each candidate
    return seen[2] - before


def full_step_of_ours(model):
    before = actor(model)
    model.train()
    return (actor(model) - before) / model.report.fraction


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("space", ACTION_SPACES)
def test_an_update_is_that_of_sb3_contrib(space, seed):
    arguments = dict(n_steps=512, batch_size=128, seed=seed, device="cpu", target_kl=0.01)
    env = DummyVecEnv([lambda: limited(Walk(ACTION_SPACES[space]))] * 2)
    theirs = TRPO("MlpPolicy", env, **arguments)
    theirs.learn(1024)  # away from the start
    _, callback = theirs._setup_learn(1024)
    theirs.collect_rollouts(theirs.env, callback, theirs.rollout_buffer, 512)
    ours = TRPOExt("MlpPolicy", env, kl_reduction="mean", critic="adam", line_search_accept_ratio=0.0, **arguments)
    ours.set_parameters(theirs.get_parameters())
    ours.rollout_buffer = copy.deepcopy(theirs.rollout_buffer)
    for model in (theirs, ours):
        model.set_logger(Logger(folder=None, output_formats=[]))
    a, b = full_step_of_sb3_contrib(theirs), full_step_of_ours(ours)
    assert float(a @ b / (a.norm() * b.norm())) >= 0.9999
    assert float(b.norm() / a.norm()) == pytest.approx(1.0, abs=0.01)
