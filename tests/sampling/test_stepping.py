"""The lean step is SB3's, exactly: what it gives, and what it leaves behind."""

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_trpo_ext.sampling.stepping import step_of
from tests.envs import Walk, limited

STATISTICS = ("mean", "var", "count")


def assert_same(one, other):
    """Equality of nested dictionaries, lists and arrays, types included."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"t"}:  # of Monitor, the time by the wall
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        np.testing.assert_array_equal(one, other, strict=isinstance(one, np.ndarray))


def state_of(env):
    """What other code may read of the two classes."""
    dummy = env.venv if isinstance(env, VecNormalize) else env
    state = {name: getattr(dummy, name) for name in ("buf_rews", "buf_dones", "buf_infos", "reset_infos", "actions")}
    state["buf_obs"] = dict(dummy.buf_obs)
    if isinstance(env, VecNormalize):
        state |= {name: getattr(env, name) for name in ("old_obs", "old_reward", "returns")}
        kinds = ("obs_rms", "ret_rms") if env.norm_obs else ("ret_rms",)
        state |= {f"{rms}.{name}": getattr(getattr(env, rms), name) for rms in kinds for name in STATISTICS}
    return state


def env_of(env_id, n_envs, normalize):
    env = make_vec_env(env_id, n_envs=n_envs, seed=3)
    return env if normalize is None else VecNormalize(env, **normalize)


@pytest.mark.parametrize(
    "env_id, n_envs, normalize",
    [
        ("CartPole-v1", 3, None),
        ("CartPole-v1", 3, {}),  # float32 observations, episodes that end
        ("Hopper-v5", 2, {"gamma": 0.9}),
        ("Hopper-v5", 1, {"norm_reward": False}),
        ("Hopper-v5", 9, {"norm_obs": False, "clip_reward": 0.1}),
        ("Pendulum-v1", 4, {"clip_obs": 0.5}),  # time limits
        ("Pendulum-v1", 2, {"training": False}),
    ],
)
def test_steps_and_state_are_those_of_sb3(env_id, n_envs, normalize):
    ours, theirs = (env_of(env_id, n_envs, normalize) for _ in range(2))
    assert_same(ours.reset(), theirs.reset())
    ours.action_space.seed(0)
    step, ended = step_of(ours), 0
    assert step != ours.step
    for t in range(450):
        actions = np.array([ours.action_space.sample() for _ in range(n_envs)])
        found, expected = step(actions), theirs.step(actions)
        assert_same(found, expected)
        assert_same(state_of(ours), state_of(theirs))
        ended += found[2].sum()
        if isinstance(ours, VecNormalize):
            assert_same(ours.get_original_obs(), theirs.get_original_obs())
            ours.training = theirs.training = t % 50 > 0 and theirs.training | (t % 50 == 1)  # statistics frozen now and then
    assert ended > 0


def test_what_is_given_out_stays_as_it_was():
    env = VecNormalize(DummyVecEnv([lambda: limited(Walk())] * 2), norm_obs=False)
    env.reset()
    step = step_of(env)
    observations, rewards, dones, infos = step(np.zeros((2, 2), dtype=np.float32))
    kept = [np.copy(observations), np.copy(rewards), np.copy(dones), [dict(info) for info in infos]]
    observations *= 2.0  # the original observation is the environment's own
    np.testing.assert_array_equal(2.0 * env.get_original_obs(), observations)
    observations /= 2.0
    infos[0]["mine"] = True
    step(np.ones((2, 2), dtype=np.float32))
    assert "mine" not in env.venv.buf_infos[0]
    np.testing.assert_array_equal(observations, kept[0])
    np.testing.assert_array_equal(rewards, kept[1])
    np.testing.assert_array_equal(dones, kept[2])


def test_mutable_contents_of_infos_are_copied():
    shared = np.zeros(3)

    class Telling(Walk):
        def step(self, action):
            shared[:] += 1.0
            obs, reward, terminated, truncated, _ = super().step(action)
            return obs, reward, terminated, truncated, {"shared": shared, "number": 1.5}

    env = DummyVecEnv([Telling])
    env.reset()
    step = step_of(env)
    infos = [step(np.zeros((1, 2), dtype=np.float32))[3][0] for _ in range(3)]
    assert [info["shared"][0] for info in infos] == [1.0, 2.0, 3.0]


class Louder(DummyVecEnv):
    pass


def test_whatever_is_not_exactly_known_is_stepped_by_itself():
    dummy = DummyVecEnv([Walk])
    boxes = spaces.Dict(a=spaces.Box(-1.0, 1.0, (2,)), b=spaces.Box(-1.0, 1.0, (3,)))
    for env in (Louder([Walk]), VecMonitor(dummy), VecFrameStack(dummy, 2)):
        assert step_of(env) == env.step
    env = VecNormalize(DummyVecEnv([lambda: Walk(observation_space=boxes)]))
    assert step_of(env) == env.step
    dummy.step = lambda actions: None
    assert step_of(dummy) is dummy.step
