"""Branches of a policy with memory go on from what the trunk remembered in their state."""

import itertools

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import KLPPOExt, SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.sampling.context import Context
from tests.algorithms.test_memory import GRU, MaskedRecall

N, T, E = 12, 20, 2
SMALL = dict(lstm_hidden_size=5, net_arch=[4])


def make(
    algorithm=TRPOExt, env_id="CartPole-v1", policy="MlpLstmPolicy", branch_length=1, n_branch_actions="all", **policy_kwargs
):
    env = make_vec_env(env_id, E, seed=0, wrapper_class=SnapshotWrapper)
    vine = dict(n_rollout_states=N, n_branch_actions=n_branch_actions, branch_length=branch_length)
    model = algorithm(
        policy,
        env,
        n_steps=T,
        batch_size=T,
        seed=0,
        critic="adam",
        device="cpu",
        policy_kwargs={**SMALL, **policy_kwargs},
        rollout_buffer_class=VineRolloutBuffer,
        rollout_buffer_kwargs=vine,
    )
    for parameter in model.policy.parameters():
        parameter.data += 0.3 * th.randn_like(parameter)
    return model


class Kept(BaseCallback):
    """Arrays of the trunk, before an update reorders them."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        names = ("values", "log_probs", "actions", "episode_starts", "rewards", "observations")
        self.model.trunk = {name: getattr(self.model.rollout_buffer, name).copy() for name in names}


def collected(**kwargs):
    model = make(**kwargs)
    model.train = lambda: None
    return model.learn(2 * T * E, callback=Kept())


@pytest.mark.parametrize("kind", [{}, dict(shared_lstm=True, enable_critic_lstm=False), dict(n_lstm_layers=2)])
def test_a_branch_that_does_what_the_trunk_did_finds_what_the_trunk_found(kind):
    model = collected(**kind)
    branches, trunk = model.rollout_buffer.branches, model.trunk
    assert trunk["episode_starts"][1:].any()
    compared = 0
    for n, state in enumerate(branches.states.tolist()):
        env, t = divmod(state, T)
        action = int(trunk["actions"][t, env, 0])
        # given what was remembered, first actions are as probable as they were in the trunk
        assert branches.log_probs[n, action] == pytest.approx(trunk["log_probs"][t, env], abs=1e-5)
        if t + 1 < T and not trunk["episode_starts"][t + 1, env]:
            # one step, then V of the next state: the trunk's own, with the memory of both
            wanted = trunk["rewards"][t, env] + model.gamma * trunk["values"][t + 1, env]
            assert branches.q_values[n, action] == pytest.approx(wanted, abs=1e-4)
            compared += 1
    assert compared >= 5


def test_later_actions_are_those_of_the_policy_that_saw_the_branch():
    """Branches of two steps, played again by hand."""
    model = collected(branch_length=2, env_id="Pendulum-v1", n_branch_actions=2)
    seen = []
    actor = model._make_branch_actor()
    act = type(actor).act_from

    def spied(self, observation, noise, context=None):
        before = self.memory
        actions = act(self, observation, noise, context)
        seen.append((observation.copy(), before, self.memory, actions.copy(), noise))
        return actions

    type(actor).act_from = spied
    try:
        model.learn(T * E, callback=Kept(), reset_num_timesteps=False)
    finally:
        type(actor).act_from = act
    assert len(seen) >= N
    for (_, _, after, _, _), (_, following, _, _, _) in itertools.pairwise(seen):
        going_on = [e for e in range(E) if th.equal(after.pi[0][e], following.pi[0][e])]
        assert len(going_on) in (0, E)  # all branches have two steps here
    for observation, before, _, actions, noise in seen:
        with th.no_grad():
            context = Context(episode_starts=th.zeros(E), memory=before)
            distribution = model.action_distribution(th.as_tensor(observation, dtype=th.float32), context)
            normal = distribution.distribution
        np.testing.assert_allclose(actions, normal.mean + normal.stddev * th.as_tensor(noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", [TRPOExt, KLPPOExt])
@pytest.mark.parametrize("env_id, n_branch_actions", [("CartPole-v1", "all"), ("Pendulum-v1", 3)])
def test_learning_from_branches(algorithm, env_id, n_branch_actions):
    model = make(algorithm, env_id, branch_length=5, n_branch_actions=n_branch_actions).learn(2 * T * E)
    assert model.rollout_buffer.branches is not None
    assert model.outcome_counts["accepted"] >= 1
    assert model._policy_problem(model._samples()).evaluate().kl == pytest.approx(0.0, abs=1e-9)


def test_a_recurrence_of_the_users_own_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"rollout_buffer_class must be another buffer than VineRolloutBuffer.* GRU overrides"
    ):
        make(policy=GRU)


@pytest.mark.parametrize("n_branch_actions", ["all", 3])
def test_branches_with_memory_keep_to_masks(n_branch_actions):
    """The environment itself refuses what is not allowed."""
    model = make(env_id=MaskedRecall, branch_length=2, n_branch_actions=n_branch_actions).learn(2 * T * E)
    allowed = model.rollout_buffer.branches.first.multiplicities.sum(axis=1)
    assert (allowed == (2 if n_branch_actions == "all" else 3)).all() and set(model.outcome_counts) == {"accepted"}
