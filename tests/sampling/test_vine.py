"""Vine sampling: what branches are, and that the trunk knows nothing of them."""

import gc
import random

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_trpo_ext import SnapshotWrapper, TRPOExt, VineRolloutBuffer
from sb3_trpo_ext.sampling.noise import global_generators_kept as _global_generators_kept
from sb3_trpo_ext.sampling.snapshot import BranchError, SnapshotError, VecSnapshot, WorkerDiedError
from tests.cases import ACTION_SPACES
from tests.envs import Noisy, Walk, limited

gym.register_envs(ale_py)

N_ENVS, T = 2, 16


def vec_env_of(env, n_envs=N_ENVS, cls=DummyVecEnv):
    return cls([lambda: SnapshotWrapper(env())] * n_envs)


def model_of(env, policy="MlpPolicy", vine=None, **arguments):
    arguments = dict(n_steps=T, batch_size=8, seed=3, device="cpu") | arguments
    if vine is not None:
        kwargs = dict(n_rollout_states=6, n_branch_actions=3, branch_length=5) | vine
        arguments |= dict(rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=kwargs)
    return TRPOExt(policy, env, **arguments)


def collect(model, rounds=1, callback=None):
    _, callback = model._setup_learn(10**9, callback)
    for _ in range(rounds):
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return getattr(model.rollout_buffer, "branches", None)


# -- no trace --------------------------------------------------------------------------------------------


def cartpole(folder):
    return make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=1, monitor_dir=folder, wrapper_class=SnapshotWrapper)


def cheetah(folder):
    def wrapped():
        return SnapshotWrapper(gym.make("HalfCheetah-v5", max_episode_steps=20))

    return VecNormalize(VecMonitor(DummyVecEnv([wrapped] * N_ENVS), folder + "/vec"))


def pong(folder):
    def wrapped(env):
        return SnapshotWrapper(gym.wrappers.TimeLimit(AtariWrapper(env, noop_max=3), 10))

    return VecFrameStack(
        make_vec_env(
            "ALE/Pong-v5",
            n_envs=N_ENVS,
            seed=1,
            monitor_dir=folder,
            wrapper_class=wrapped,
            env_kwargs={"frameskip": 1, "repeat_action_probability": 0.0},
        ),
        2,
    )


class Record(BaseCallback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        self.seen.append({key: np.copy(self.locals[key]) for key in ("new_obs", "rewards", "dones", "actions")})
        return True


@pytest.mark.parametrize("make", [cartpole, cheetah, pong])
def test_the_trunk_is_that_of_a_run_without_branches_byte_for_byte(make, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.0)  # which monitor files hold
    runs = []
    seed = None if make is cartpole else 3
    for vine in (None, dict(n_branch_actions="all") if make is cartpole else {}):
        folder = tmp_path / str(vine is None)
        folder.mkdir()
        th.manual_seed(0), np.random.seed(0), random.seed(0)
        model = model_of(make(str(folder)), "CnnPolicy" if make is pong else "MlpPolicy", vine, seed=seed)
        callback = Record()
        collect(model, rounds=3, callback=callback)
        # where all generators stand
        after = th.rand(1).item(), np.random.rand(), random.random()
        model.env.close()
        runs.append((model, callback.seen, after, {path.name: path.read_bytes() for path in folder.glob("*.csv")}))
    (without, expected, *rest), (with_branches, seen, *got) = runs
    for a, b in zip(expected, seen, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert got == rest and len(got[1]) >= 1 and any(step["dones"].any() for step in seen)
    assert list(with_branches.ep_info_buffer) == list(without.ep_info_buffer)
    assert with_branches.num_timesteps > without.num_timesteps == 3 * T * N_ENVS
    for name in ("observations", "rewards", "advantages", "episode_starts"):
        np.testing.assert_array_equal(getattr(with_branches.rollout_buffer, name), getattr(without.rollout_buffer, name))
    if make is cheetah:
        assert with_branches.env.obs_rms.count == without.env.obs_rms.count
        np.testing.assert_array_equal(with_branches.env.returns, without.env.returns)


def test_callbacks_and_the_progress_bar_see_the_trunk_and_its_cost():
    model, bar, record = model_of(vec_env_of(Walk), vine={}), ProgressBarCallback(), Record()
    model.learn(100, callback=[bar, record])
    assert model.num_timesteps == bar.pbar.n > 100
    iterations = model._n_updates
    assert len(record.seen) == iterations * T  # what evaluation frequencies count
    assert model._current_progress_remaining == 0.0  # never below, whatever branches overshoot


def test_no_branches_where_a_callback_ends_the_trunk():
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 7

    model = model_of(vec_env_of(Walk), vine={})
    model.learn(100, callback=Stop())
    assert model.num_timesteps == 7 * N_ENVS and model.rollout_buffer.branches is None


# -- branches ----------------------------------------------------------------------------------------------


def test_branches_share_noise_from_the_second_step_and_the_seed_from_the_first():
    branches = collect(model_of(vec_env_of(Noisy), vine={}))
    # the noise of 5 environment steps and of 4 actions, the same for all branches of a state
    shared = branches.q_values - branches.first.actions.sum(axis=2)
    np.testing.assert_allclose(shared, shared[:, :1] * np.ones(3), rtol=1e-5)
    assert len(np.unique(shared[:, 0].round(3))) == len(shared)
    assert len(np.unique(branches.first.actions)) == branches.first.actions.size


@pytest.mark.parametrize("actions", ["box", "discrete"])
@pytest.mark.parametrize("common", [True, False])
def test_noise_comes_in_blocks_as_branches_need_it(actions, common, monkeypatch):
    """Gaussian or Gumbel; new at each step, and the same for all branches of a state only if it is to be."""
    monkeypatch.setattr("sb3_trpo_ext.sampling.lanes._NOISE_BLOCK", 3)
    env = vec_env_of(lambda: limited(Walk(ACTION_SPACES[actions], end_probability=0.0), 7), n_envs=1)
    vine = dict(proposal="policy", branch_length=10**9, n_branch_actions=3, common_random_numbers=common)
    model, seen, asked = model_of(env, vine=vine), [], []
    actor = model._make_branch_actor()
    noise, act_from = actor.noise, actor.act_from
    actor.noise = lambda shape, generator: asked.append(shape[0]) or noise(shape, generator)
    actor.act_from = lambda states, rows: seen.append(rows[0].copy()) or act_from(states, rows)
    model._make_branch_actor = lambda: actor
    branches = collect(model)
    assert set(asked) == {3}
    remaining = 7 - branches.states % 7  # with one environment, its time in the episode
    at = iter(seen)
    for n, draws in zip(remaining, branches.first.multiplicities, strict=True):
        of_state = [np.array([next(at) for _ in range(n)]) for draw in draws if draw > 0]
        assert all(len(np.unique(rows, axis=0)) == n for rows in of_state)
        assert all((rows == of_state[0]).all() == common for rows in of_state[1:])
    assert next(at, None) is None


def test_without_common_random_numbers_each_branch_has_its_own():
    branches = collect(model_of(vec_env_of(Noisy), vine=dict(common_random_numbers=False)))
    shared = branches.q_values - branches.first.actions.sum(axis=2)
    assert len(np.unique(shared.round(3))) == shared.size


def test_branches_know_nothing_of_the_trunks_future():
    model = model_of(vec_env_of(Noisy), vine=dict(branch_length=1, branch_bootstrap=False))
    branches = collect(model)
    envs, steps = np.divmod(branches.states, T)
    trunk_noise = model.rollout_buffer.rewards[steps, envs] - model.rollout_buffer.actions[steps, envs].sum(axis=1)
    noise = (branches.q_values - branches.first.actions.sum(axis=2))[:, 0]
    assert np.abs(noise - trunk_noise).min() > 1e-2


def test_the_same_seed_gives_the_same_branches_whatever_the_vec_env():
    q_values = [
        collect(model_of(vec_env_of(Walk, cls=cls), vine={}), rounds=2).q_values for cls in (DummyVecEnv, SubprocVecEnv)
    ]
    np.testing.assert_allclose(*q_values, rtol=1e-6)  # one gives rewards in single precision
    other = collect(model_of(vec_env_of(Walk), vine={}, seed=4), rounds=2).q_values
    assert not np.array_equal(q_values[0], other)


def test_without_a_seed_branches_follow_the_global_one():
    def branches(seed):
        set_random_seed(seed)
        model = model_of(vec_env_of(Walk), vine={}, seed=None)
        model.env.seed(0)
        first = collect(model)
        return first.states, first.first.actions, first.q_values, collect(model).q_values

    for one, again, other in zip(branches(5), branches(5), branches(6), strict=True):
        np.testing.assert_array_equal(one, again)
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("name", ACTION_SPACES)
@pytest.mark.parametrize("observations", [None, spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)})])
def test_every_action_and_observation_space_learns(name, observations):
    policy = "MlpPolicy" if observations is None else "MultiInputPolicy"
    for n_actions in (3, "all") if name != "box" else (3,):
        env = vec_env_of(lambda: limited(Walk(ACTION_SPACES[name], observations), 7))
        model = model_of(env, policy, dict(n_branch_actions=n_actions), ent_coef=0.01)
        model.learn(60)
        assert model.report.outcome == "accepted"
        assert np.isfinite(model.rollout_buffer.branches.q_values).all() if model.rollout_buffer.branches else True


class Countdown(gym.Env):
    """Pays 1 a step; ends by itself after ``end`` steps."""

    action_space, observation_space = spaces.Discrete(2), spaces.Box(0.0, 1e3, (1,))

    def __init__(self, end=10**9):
        self.end, self.t = end, 0

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, dtype=np.float32), 1.0, self.t >= self.end, False, {}


class TimeAsValue(TRPOExt):
    def predict_values(self, observations):
        return 1000.0 + observations


@pytest.mark.parametrize("bootstrap", [True, False])
def test_returns_of_branches_that_end_that_a_time_limit_stops_and_that_are_cut(bootstrap):
    gamma, length = 0.9, 4
    for end, limit in ((6, 10**9), (10**9, 6), (10**9, 10**9)):
        env = vec_env_of(lambda end=end, limit=limit: limited(Countdown(end), limit))
        kwargs = dict(n_rollout_states=10, n_branch_actions="all", branch_length=length, branch_bootstrap=bootstrap)
        model = TimeAsValue(
            "MlpPolicy", env, n_steps=T, batch_size=8, gamma=gamma, seed=0, device="cpu",
            rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=kwargs,
        )  # fmt: skip
        before = model.num_timesteps
        branches = collect(model)
        envs, steps = np.divmod(branches.states, T)
        expected, n_steps = [], 0
        for t in model.rollout_buffer.observations[steps, envs, 0]:
            n = int(min(length, end - t, limit - t))
            cut, stopped = t + n < min(end, limit), t + n == limit
            last = 1000.0 + t + n if stopped or (cut and bootstrap) else 0.0
            expected.append((1 - gamma**n) / (1 - gamma) + gamma**n * last)
            n_steps += 2 * n
        np.testing.assert_allclose(branches.q_values, np.array(expected)[:, None] * np.ones(2), rtol=1e-6)
        assert model.num_timesteps - before - T * N_ENVS == n_steps
        assert model.logger.name_to_value["vine/branch_steps"] == n_steps


def test_rollout_states_are_drawn_anew_each_time_and_over_the_whole_trunk():
    model, seen = model_of(vec_env_of(Noisy), vine=dict(branch_length=1)), []
    _, callback = model._setup_learn(10**9)
    for _ in range(30):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, T)
        states = model.rollout_buffer.branches.states
        assert len(np.unique(states)) == 6
        seen += states.tolist()
    counts = np.bincount(seen, minlength=T * N_ENVS)
    assert counts.min() > 0 and ((counts - 180 / 32) ** 2 / (180 / 32)).sum() < 31 + 4 * np.sqrt(62)


def test_policies_that_draw_their_own_noise_branch_too_and_leave_the_generator_alone():
    class Own(TRPOExt):
        def action_distribution(self, observations, samples=None):
            distribution = super().action_distribution(observations, samples)
            return (
                distribution
                if samples is not None
                else type("Own", (type(distribution),), {})(2).proba_distribution(
                    distribution.distribution.mean, self.policy.log_std
                )
            )

    model = Own("MlpPolicy", vec_env_of(Walk), n_steps=T, batch_size=8, seed=0, device="cpu",
        rollout_buffer_class=VineRolloutBuffer, rollout_buffer_kwargs=dict(n_rollout_states=4, branch_length=3))  # fmt: skip
    model.learn(60)
    assert model.actor_path == "torch" and model.report.outcome == "accepted"


def test_generators_of_other_devices_are_not_touched(monkeypatch):
    model = model_of(vec_env_of(Walk), vine={})
    own, other = th.Generator().manual_seed(1), th.Generator().manual_seed(1)
    monkeypatch.setattr("torch.cuda.default_generators", (other, own))
    # torch.manual_seed() calls it, and on a machine without CUDA it would be remembered for later
    monkeypatch.setattr("torch.cuda.manual_seed_all", lambda seed: other.manual_seed(seed))
    collect(model)
    with _global_generators_kept(th.device("cuda", 1), seed=5):
        assert own.initial_seed() == 5
        th.rand(3, generator=own)
    expected = th.Generator().manual_seed(1).get_state()
    assert th.equal(other.get_state(), expected) and th.equal(own.get_state(), expected)


def test_nothing_of_a_collection_stays_but_the_branches():
    model = model_of(vec_env_of(Walk), vine={})
    collect(model, rounds=2)
    gc.collect()
    assert not any(type(thing) is VecSnapshot for thing in gc.get_objects())


# -- faults ------------------------------------------------------------------------------------------------


class Fragile(Walk):
    """Breaks, or takes its process along, when it is asked for action 2."""

    def __init__(self, deadly=False):
        super().__init__(spaces.Discrete(3))
        self.deadly = deadly

    def step(self, action):
        if action == 2:
            if self.deadly:
                import os

                os._exit(3)
            raise ArithmeticError("action 2")
        return super().step(action)


@pytest.mark.parametrize("deadly", [False, True])
def test_a_branch_that_dies_is_an_error_and_the_trunk_is_not_lost(deadly, monkeypatch):
    env = vec_env_of(lambda: Fragile(deadly), cls=SubprocVecEnv if deadly else DummyVecEnv)
    model = model_of(env, vine=dict(n_branch_actions="all"))
    with th.no_grad():
        model.policy.action_net.bias[2] = -1e3  # the trunk never takes it
    # the random actions of the check would find it first
    monkeypatch.setattr("sb3_trpo_ext.algorithms.environments.check_returns", lambda env: None)
    with pytest.raises(WorkerDiedError if deadly else BranchError, match="rollout buffer holds the whole trunk"):
        model.learn(100)
    assert model.rollout_buffer.full and model.rollout_buffer.branches is None
    start = {name: p.clone() for name, p in model.policy.named_parameters()}
    model.train()  # from the trunk alone
    assert model.report.outcome == "accepted"
    assert any(not th.equal(start[name], p) for name, p in model.policy.named_parameters())


CALLS_UNTIL_FAILURE = {}


class Failing(Countdown):
    """Fails once, where the test wants it."""

    def _count(self, method):
        CALLS_UNTIL_FAILURE[method] = CALLS_UNTIL_FAILURE.get(method, 0) - 1
        if CALLS_UNTIL_FAILURE[method] == 0:
            raise ArithmeticError(f"no {method}")

    def step(self, action):
        self._count("step")
        return super().step(action)

    def snapshot_state(self):
        self._count("snapshot")
        return self.t

    def restore_state(self, state):
        self._count("restore")
        self.t = state


class Arm(BaseCallback):
    def __init__(self, method, calls):
        super().__init__()
        self.method, self.calls = method, calls

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        CALLS_UNTIL_FAILURE[self.method] = self.calls


@pytest.mark.parametrize("method, calls, n_steps", [("step", 5, 4), ("restore", 4, 15)])
def test_a_branch_that_fails_has_cost_what_it_took(method, calls, n_steps):
    model, bar = model_of(vec_env_of(Failing, n_envs=1), vine=dict(n_branch_actions=2)), ProgressBarCallback()
    with pytest.raises(BranchError, match=f"no {method}; the rollout buffer holds the whole trunk"):
        model.learn(100, callback=[bar, Arm(method, calls)])
    bar.pbar.close()
    assert model.num_timesteps == bar.pbar.n == T + n_steps
    assert model.rollout_buffer.full and model.rollout_buffer.branches is None


def test_a_state_that_cannot_be_saved_does_not_cost_the_trunk(monkeypatch):
    monkeypatch.setattr("sb3_trpo_ext.algorithms.environments.check_returns", lambda env: None)
    model = model_of(vec_env_of(Failing), vine={})
    CALLS_UNTIL_FAILURE["snapshot"] = 3
    with pytest.raises(SnapshotError, match="no snapshot; the rollout buffer holds the whole trunk"):
        model.learn(100)
    assert model.rollout_buffer.full and model.num_timesteps == T * N_ENVS
    assert CALLS_UNTIL_FAILURE["snapshot"] == 0  # once is enough
    model.train()
    assert model.report.outcome == "accepted"


def test_bad_numbers_in_branches_skip_the_update():
    model = model_of(vec_env_of(Walk), vine={})
    collect(model)
    model.rollout_buffer.branches.q_values[2, 1] = np.nan
    start = {name: p.clone() for name, p in model.policy.named_parameters()}
    with pytest.warns(UserWarning, match="huge branch returns"):
        model.train()
    assert all(th.equal(start[name], p) for name, p in model.policy.named_parameters())
