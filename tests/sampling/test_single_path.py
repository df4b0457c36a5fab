"""The rollout's contract: SB3's own loop, given the same actions, is the oracle."""

from typing import ClassVar

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize

from sb3_trpo_ext import SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.observations import leaves
from tests.cases import ACTION_SPACES
from tests.envs import Walk, limited

DICT = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)})
T = 40


def env_of(action_space=None, observation_space=None, n_envs=2, normalize=False):
    env = DummyVecEnv([lambda: limited(Walk(action_space, observation_space))] * n_envs)
    return VecNormalize(env) if normalize else env


def replaying(base):
    class Replaying(base):
        """Takes given actions, as SB3's own loop sees it."""

        actions = iter(())

        def forward(self, obs, deterministic=False):
            actions = th.as_tensor(next(self.actions))
            taken = actions.flatten(1) if isinstance(self.action_space, spaces.Box) else actions
            values, log_probs, _ = self.evaluate_actions(obs, taken)
            return actions, values, log_probs

    return Replaying


class Record(BaseCallback):
    def __init__(self, until=10**9):
        super().__init__()
        self.seen, self.starts, self.ends, self.until = [], 0, 0, until

    def _on_rollout_start(self):
        self.starts += 1

    def _on_rollout_end(self):
        self.ends += 1

    def _on_step(self):
        keys = ("actions", "clipped_actions", "rewards", "dones", "new_obs", "n_steps")
        self.seen.append({key: np.copy(self.locals[key]) for key in keys} | {"infos": self.locals["infos"]})
        assert self.locals["self"] is self.model and self.locals["rollout_buffer"] is self.model.rollout_buffer
        for of_policy, of_env in zip(leaves(self.locals["obs_tensor"]), leaves(self.model._last_obs), strict=True):
            assert of_policy.device == self.model.device and np.array_equal(of_policy.numpy(), of_env)
        assert self.num_timesteps == self.model.num_timesteps
        return len(self.seen) < self.until


def collect(model, method, until=10**9):
    callback = Record(until)
    _, callback_ = model._setup_learn(10**6, callback)
    assert method(model, model.env, callback_, model.rollout_buffer, T) is (until > T)
    callback.names = set(callback.locals) - LEFT_BY_SB3
    return callback


LEFT_BY_SB3 = {"idx", "done", "terminal_obs", "terminal_value"}
"""Of a loop inside SB3's loop, after the first time limit."""


CONTENTS = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns")

KINDS = {
    **{name: (dict(action_space=space), {}, "numpy") for name, space in ACTION_SPACES.items()},
    "normalize": (dict(normalize=True), {}, "numpy"),
    "one_env": (dict(n_envs=1), {}, "numpy"),
    "discrete_observations": (dict(observation_space=spaces.Discrete(4)), {}, "numpy"),
    "float64_observations": (dict(observation_space=spaces.Box(-10, 10, (3,), dtype=np.float64)), {}, "numpy"),
    "several_action_dimensions": (dict(action_space=spaces.Box(-1, 1, (2, 2))), {}, "numpy"),
    "dict": (dict(observation_space=DICT), {}, "torch"),
    "gsde": ({}, dict(use_sde=True, sde_sample_freq=4), "torch"),
    "gsde_squashed": ({}, dict(use_sde=True, policy_kwargs=dict(squash_output=True)), "torch"),
    "at_each_step": ({}, dict(values_at_each_step=True), "sb3"),
    "image": (dict(observation_space=spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)), {}, "sb3"),
}


def contents(buffer):
    for name in CONTENTS:
        array = getattr(buffer, name)
        yield from array.items() if isinstance(array, dict) else [(name, array)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_buffer_holds_what_sb3s_own_loop_would_store(kind):
    env_arguments, arguments, path = KINDS[kind]
    arguments = dict(arguments, n_steps=T, seed=3, device="cpu", batch_size=T)
    if kind == "image":
        name, base = "CnnPolicy", TRPOExt.policy_aliases["CnnPolicy"]
    else:
        name, base = ("MultiInputPolicy", MultiInputActorCriticPolicy) if kind == "dict" else ("MlpPolicy", ActorCriticPolicy)
    ours = TRPOExt(name, env_of(**env_arguments), **arguments)
    assert ours.actor_path == path
    seen = collect(ours, type(ours).collect_rollouts)
    theirs = TRPOExt(replaying(base), env_of(**env_arguments), **arguments)
    assert theirs.actor_path == "sb3"
    theirs.policy.load_state_dict(ours.policy.state_dict())
    theirs.policy.actions = iter([step["actions"] for step in seen.seen])
    expected = collect(theirs, OnPolicyAlgorithm.collect_rollouts)
    for (name, a), (_, b) in zip(contents(ours.rollout_buffer), contents(theirs.rollout_buffer), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
    assert ours.rollout_buffer.full and ours.rollout_buffer.pos == T
    truncations = sum(info.get("TimeLimit.truncated", False) for step in seen.seen for info in step["infos"])
    assert truncations > 0
    assert len(seen.seen) == len(expected.seen) == T
    for a, b in zip(seen.seen, expected.seen, strict=True):
        for key in ("clipped_actions", "rewards", "dones", "n_steps"):
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-6, err_msg=key)
    assert (seen.starts, seen.ends) == (1, 1) and seen.names == expected.names
    assert ours.num_timesteps == theirs.num_timesteps
    assert len(ours.ep_info_buffer) == len(theirs.ep_info_buffer)


class OneArray(VecEnvWrapper):
    """Hands out terminal observations in one array that it keeps, as batched simulators do, with a bad number put in."""

    def __init__(self, venv, bad, rewards=np.float32):
        super().__init__(venv)
        self.bad, self.kind, self.array, self.rewards, self.stopped = (
            bad,
            rewards,
            np.zeros((venv.num_envs, 3), np.float32),
            [],
            [],
        )

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones):
            self.array[i] = infos[i]["terminal_observation"]
            if infos[i]["TimeLimit.truncated"]:
                self.stopped.append((len(self.rewards), i, self.array[i].copy()))
                self.array[i, 0] = self.bad
            infos[i]["terminal_observation"] = self.array[i]
        rewards = rewards.astype(self.kind)
        self.rewards.append(rewards.copy())
        return observations, rewards, dones, infos


@pytest.mark.parametrize("values_at_each_step", [False, True])
@pytest.mark.parametrize(("bad", "rewards"), [(0.0, np.float32), (np.nan, np.float32), (np.inf, np.float32), (0.0, np.int64)])
def test_a_time_limit_is_bootstrapped_from_where_it_stopped_the_episode(bad, rewards, values_at_each_step):
    env = OneArray(env_of(), bad, rewards)
    model = TRPOExt("MlpPolicy", env, n_steps=T, seed=3, device="cpu", values_at_each_step=values_at_each_step)
    collect(model, TRPOExt.collect_rollouts)
    expected = np.array(env.rewards, dtype=np.float64)
    assert len({i for _, i, _ in env.stopped}) < len(env.stopped)
    for t, i, terminal in env.stopped:
        terminal[0] = 0.0
        with th.no_grad():
            expected[t, i] += 0.99 * float(model.policy.predict_values(th.as_tensor(terminal)[None]))
    np.testing.assert_allclose(model.rollout_buffer.rewards, expected, rtol=1e-5)


def test_without_a_critic_values_are_zero_and_advantages_are_returns():
    for arguments in ({}, {"values_at_each_step": True}):
        model = TRPOExt("MlpPolicy", env_of(), n_steps=T, seed=0, critic="none", device="cpu", **arguments)
        collect(model, TRPOExt.collect_rollouts)
        buffer = model.rollout_buffer
        assert not buffer.values.any()
        expected, running = np.zeros_like(buffer.rewards), np.zeros(2)
        ends = np.vstack([buffer.episode_starts[1:], model._last_episode_starts[None]])
        for t in reversed(range(T)):
            running = buffer.rewards[t] + 0.99 * (1 - ends[t]) * running
            expected[t] = running
        np.testing.assert_allclose(buffer.advantages, expected, rtol=1e-5)
        np.testing.assert_allclose(buffer.returns, expected, rtol=1e-5)


def test_a_callback_can_stop_a_rollout_and_nothing_is_added_for_that_step():
    model = TRPOExt("MlpPolicy", env_of(), n_steps=T, device="cpu")
    callback = Record(until=7)
    model.learn(1000, callback=callback)
    assert model.num_timesteps == 14 and model.rollout_buffer.pos == 6
    assert callback.ends == 0


@pytest.mark.parametrize("kind", ["box", "dict"])
@pytest.mark.parametrize("until", [1, 30])
def test_a_rollout_that_was_stopped_leaves_what_sb3s_own_loop_would_have_stored(until, kind):
    env_arguments, arguments, _ = KINDS[kind]
    name, base = ("MultiInputPolicy", MultiInputActorCriticPolicy) if kind == "dict" else ("MlpPolicy", ActorCriticPolicy)
    arguments = dict(arguments, n_steps=T, seed=3, device="cpu")
    ours = TRPOExt(name, env_of(**env_arguments), **arguments)
    seen = collect(ours, TRPOExt.collect_rollouts, until)
    theirs = TRPOExt(replaying(base), env_of(**env_arguments), **arguments)
    theirs.policy.load_state_dict(ours.policy.state_dict())
    theirs.policy.actions = iter([step["actions"] for step in seen.seen])
    collect(theirs, OnPolicyAlgorithm.collect_rollouts, until)
    assert ours.rollout_buffer.pos == theirs.rollout_buffer.pos == until - 1 and not ours.rollout_buffer.full
    for (name, a), (_, b) in zip(contents(ours.rollout_buffer), contents(theirs.rollout_buffer), strict=True):
        np.testing.assert_allclose(a[: until - 1], b[: until - 1], rtol=1e-5, atol=1e-5, err_msg=name)


class OwnFeatures(ActorCriticPolicy):
    def extract_features(self, *args, **kwargs):
        return 2 * super().extract_features(*args, **kwargs)


def test_features_that_a_policy_makes_itself_are_those_of_sb3s_own_loop():
    ours, theirs = (TRPOExt(OwnFeatures, env_of(), n_steps=T, seed=3, device="cpu") for _ in range(2))
    assert ours.actor_path == "sb3"
    for model, method in ((ours, TRPOExt.collect_rollouts), (theirs, OnPolicyAlgorithm.collect_rollouts)):
        th.manual_seed(0)
        collect(model, method)
    for (name, a), (_, b) in zip(contents(ours.rollout_buffer), contents(theirs.rollout_buffer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


class OwnAdd(RolloutBuffer):
    calls = 0

    def add(self, *args, **kwargs):
        type(self).calls += 1
        super().add(*args, **kwargs)


def test_a_buffer_with_its_own_add_is_called_at_each_step():
    model = TRPOExt("MlpPolicy", env_of(), n_steps=T, device="cpu", rollout_buffer_class=OwnAdd)
    assert model.actor_path == "sb3"
    collect(model, TRPOExt.collect_rollouts)
    assert OwnAdd.calls == T


def test_a_function_as_callback_sees_the_same_locals():
    seen = []
    model = TRPOExt("MlpPolicy", env_of(), n_steps=T, device="cpu")
    model.learn(T, callback=lambda local, _: seen.append(local["obs_tensor"].shape) or True)
    assert seen == [(2, 3)] * T


class Telling(Walk):
    """Keeps the actions that it gets, those of all copies in one list."""

    told: ClassVar[list] = []

    def step(self, action):
        self.told.append(np.copy(action))
        return super().step(action)


WAYS = {
    "numpy": {},
    "torch": dict(policy_kwargs=dict(activation_fn=th.nn.GELU)),
    "sb3": dict(values_at_each_step=True),
    "gsde": dict(use_sde=True, policy_kwargs=dict(squash_output=True)),
    "own_add": dict(rollout_buffer_class=OwnAdd),
    "vine": dict(
        rollout_buffer_class=VineRolloutBuffer,
        rollout_buffer_kwargs=dict(n_rollout_states=4, n_branch_actions=2, branch_length=3),
    ),
}


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 1, 4)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_environments_get_the_actions_that_are_theirs_in_the_shape_of_the_space(n_envs, way, shape):
    space = spaces.Box(-0.5, 0.5, shape)
    env = DummyVecEnv([lambda: SnapshotWrapper(limited(Telling(space)))] * n_envs)
    model = TRPOExt("MlpPolicy", env, n_steps=8, device="cpu", seed=0, **WAYS[way])
    _, callback = model._setup_learn(1000)
    Telling.told.clear()
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 8)
    assert {action.shape for action in Telling.told} == {shape}
    assert len(Telling.told) > 8 * n_envs if way == "vine" else len(Telling.told) == 8 * n_envs
    trunk, kept = np.reshape(Telling.told[: 8 * n_envs], (8, n_envs, -1)), model.rollout_buffer.actions
    expected = 0.5 * kept if way == "gsde" else np.clip(kept, -0.5, 0.5)
    np.testing.assert_allclose(trunk, expected, rtol=1e-6, atol=1e-6)
    model.train()
    assert model.outcome_counts.keys() <= {"accepted", "no_improvement"}


class Forbidding(TRPOExt):
    """Takes action 0 out of every distribution."""

    def action_distribution(self, observations, samples=None):
        distribution = super().action_distribution(observations, samples)
        distribution.distribution = th.distributions.Categorical(
            logits=distribution.distribution.logits.index_fill(1, th.tensor([0]), -1e8)
        )
        return distribution


@pytest.mark.parametrize(
    "arguments", [{}, dict(values_at_each_step=True), dict(rollout_buffer_class=OwnAdd)], ids=["plain", "values", "own_add"]
)
def test_the_one_method_is_asked_however_the_buffer_is_filled(arguments):
    model = Forbidding("MlpPolicy", env_of(spaces.Discrete(3)), n_steps=T, seed=0, device="cpu", **arguments)
    assert model.actor_path == "torch"
    collect(model, TRPOExt.collect_rollouts)
    assert model.rollout_buffer.actions.min() == 1
    with th.no_grad():
        obs = th.as_tensor(model.rollout_buffer.observations.reshape(-1, 3))
        taken = th.as_tensor(model.rollout_buffer.actions.reshape(-1))
        expected = model.action_distribution(obs).log_prob(taken)
        values = model.policy.predict_values(obs)
    np.testing.assert_allclose(model.rollout_buffer.log_probs.reshape(-1), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.rollout_buffer.values.reshape(-1), values.flatten(), rtol=1e-5, atol=1e-6)
    model.train()
    assert model.outcome_counts == {"accepted": 1}


class SetMean(BaseCallback):
    def _on_rollout_start(self):
        self.model.policy.log_std.data.fill_(-5.0)
        self.model.policy.action_net.bias.data.fill_(0.5)

    def _on_step(self):
        return True


def test_what_a_callback_changes_at_the_start_of_a_rollout_is_acted_on():
    model = TRPOExt("MlpPolicy", env_of(), n_steps=T, device="cpu")
    _, callback = model._setup_learn(1000, SetMean())
    model.collect_rollouts(model.env, callback, model.rollout_buffer, T)
    assert abs(model.rollout_buffer.actions.mean() - 0.5) < 0.1 and model.rollout_buffer.actions.std() < 0.1


class OwnDistribution(TRPOExt):
    asked = 0

    def action_distribution(self, observations, samples=None):
        self.asked += 1
        return super().action_distribution(observations, samples)


def test_every_distribution_comes_from_the_one_method():
    model = OwnDistribution("MlpPolicy", env_of(), n_steps=T, device="cpu")
    assert model.actor_path == "torch"
    collect(model, TRPOExt.collect_rollouts)
    assert model.asked == T + 1
    model.policy.get_distribution = lambda obs: pytest.fail("asked past the hook")
    model.action_distribution = lambda obs, samples=None: ActorCriticPolicy.get_distribution(model.policy, obs)
    model.train()
    assert model.outcome_counts == {"accepted": 1}
