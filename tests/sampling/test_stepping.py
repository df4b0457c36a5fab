"""The lean step is SB3's, exactly: what it gives, and what it leaves behind."""

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize, VecTransposeImage

from sb3_trpo_ext import originals
from sb3_trpo_ext.sampling.stepping import _REPLACED, _update, step
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
    ended = 0
    for t in range(450):
        actions = np.array([ours.action_space.sample() for _ in range(n_envs)])
        found, expected = step(ours, actions), theirs.step(actions)
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
    observations, rewards, dones, infos = step(env, np.zeros((2, 2), dtype=np.float32))
    kept = [np.copy(observations), np.copy(rewards), np.copy(dones)]
    observations *= 2.0  # the original observation is the environment's own
    np.testing.assert_array_equal(2.0 * env.get_original_obs(), observations)
    observations /= 2.0
    infos[0]["mine"] = True
    step(env, np.ones((2, 2), dtype=np.float32))
    assert "mine" not in env.venv.buf_infos[0]
    for array, before in zip((observations, rewards, dones), kept, strict=True):
        np.testing.assert_array_equal(array, before)


class Telling(Walk):
    """Infos that hold one array twice, and change it from step to step."""

    shared = np.zeros(3)

    def step(self, action):
        self.shared[:] += 1.0
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"shared": self.shared, "again": self.shared, "number": 1.5}


def test_mutable_contents_of_infos_are_copied_once():
    env = DummyVecEnv([Telling])
    env.reset()
    infos = [step(env, np.zeros((1, 2), dtype=np.float32))[3][0] for _ in range(3)]
    assert [info["shared"][0] for info in infos] == [1.0, 2.0, 3.0]
    assert all(info["shared"] is info["again"] for info in infos)


class Ending(Walk):
    """Ends in every way there is, one after the other."""

    ends = ((True, True), (True, False), (False, True), (False, False), (np.True_, np.True_), (np.False_, np.True_))
    steps = 0

    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        self.steps += 1
        return obs, reward, *self.ends[self.steps % len(self.ends)], info


def test_an_end_is_the_time_limits_only_if_nothing_else_ended_it():
    ours, theirs = (DummyVecEnv([Ending]) for _ in range(2))
    seen = []
    for env in (ours, theirs):
        env.seed(0)
        env.reset()
    for _ in range(2 * len(Ending.ends)):
        actions = np.zeros((1, 2), dtype=np.float32)
        found, expected = step(ours, actions), theirs.step(actions)
        assert_same(found, expected)
        seen.append((bool(found[2][0]), bool(found[3][0]["TimeLimit.truncated"])))
    assert seen[:6] == [(True, False), (True, True), (False, False), (True, False), (True, True), (True, False)]


def test_images_keep_the_order_in_which_their_numbers_lie():
    # channels last, seen as channels first; spaces sample, so each has its own
    def images():
        return Walk(observation_space=spaces.Box(0, 255, (8, 6, 3), np.uint8))

    ours, theirs = (VecNormalize(VecTransposeImage(DummyVecEnv([images] * 2)), norm_obs=False) for _ in range(2))
    for env in (ours, theirs):
        env.seed(0)
        env.reset()
    actions = np.zeros((2, 2), dtype=np.float32)
    found, expected = step(ours, actions), theirs.step(actions)
    assert_same(found[:3], expected[:3])
    assert found[0].strides == expected[0].strides


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_statistics_of_any_kind_of_number(dtype, shape):
    ours, theirs = RunningMeanStd(shape=shape), RunningMeanStd(shape=shape)
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 7, 20):
        rows = (10.0 * rng.normal(size=(n, *shape))).astype(dtype)
        _update(ours, rows)
        theirs.update(rows)
        assert_same(vars(ours), vars(theirs))


class Louder(DummyVecEnv):
    pass


def calls(monkeypatch, env, owner, name):
    """How often one step calls this method once it has been patched."""
    n_calls, method = [0], getattr(owner, name)

    def counted(*args, **kwargs):
        n_calls[0] += 1
        return method(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, counted)
        step(env, np.zeros((2, 2), dtype=np.float32))
    return n_calls[0]


def test_whatever_is_not_exactly_known_is_stepped_by_itself(monkeypatch):
    dummy = DummyVecEnv([Walk] * 2)
    vectors = spaces.Dict(a=spaces.Box(-1.0, 1.0, (2,)), b=spaces.Box(-1.0, 1.0, (3,)))
    others = (
        *(Louder([Walk] * 2), VecMonitor(dummy), VecFrameStack(dummy, 2)),
        VecNormalize(DummyVecEnv([lambda: Walk(observation_space=vectors)] * 2)),
    )
    for env in others:
        env.reset()
        assert calls(monkeypatch, env, type(env), "step_wait") == 1


@pytest.mark.parametrize("name", ["step_async", "step_wait", "normalize_obs", "_normalize_obs", "_update_reward"])
@pytest.mark.parametrize("on_instance", [True, False])
def test_a_method_that_was_patched_is_called_at_the_very_next_step(monkeypatch, name, on_instance):
    env = VecNormalize(DummyVecEnv([Walk] * 2))
    env.reset()
    step(env, np.zeros((2, 2), dtype=np.float32))
    assert calls(monkeypatch, env, env if on_instance else VecNormalize, name) >= 1
    if name in ("step_async", "step_wait"):
        assert calls(monkeypatch, env, env.venv if on_instance else DummyVecEnv, name) == 1
    assert calls(monkeypatch, env, env.obs_rms if on_instance else RunningMeanStd, "update") == (1 if on_instance else 2)


@pytest.mark.parametrize(
    "cls, name", [(DummyVecEnv, "step_wait"), (VecNormalize, "_update_reward"), (RunningMeanStd, "update")]
)
def test_a_method_that_was_patched_before_anything_was_known_of_it_is_called(monkeypatch, cls, name):
    monkeypatch.setattr(_REPLACED[cls], "known", None)
    env = VecNormalize(DummyVecEnv([Walk] * 2))
    env.reset()
    assert calls(monkeypatch, env, cls, name) >= 1
    step(env, np.zeros((2, 2), dtype=np.float32))
    assert _REPLACED[cls].known is not None, "SB3's own again, and taken for it"


def test_the_methods_of_an_sb3_that_was_not_read_are_called(monkeypatch):
    env, name = DummyVecEnv([Walk] * 2), "vec_env.dummy_vec_env.DummyVecEnv.step_wait"
    env.reset()
    monkeypatch.setattr(_REPLACED[DummyVecEnv], "known", None)
    monkeypatch.setitem(originals.KNOWN, name, "of another version")
    originals._is_known.cache_clear()
    stepped = []
    monkeypatch.setattr("sb3_trpo_ext.sampling.stepping._step_dummy", lambda *args: stepped.append(args))
    step(env, np.zeros((2, 2), dtype=np.float32))
    originals._is_known.cache_clear()
    assert not stepped


def test_environments_that_are_exchanged_on_the_way_are_stepped(monkeypatch):
    env, other = VecNormalize(DummyVecEnv([Walk] * 2)), Louder([Walk] * 2)
    for stack in (env, other):
        stack.reset()
    env.venv = other
    # by what VecNormalize calls, which is not step()
    monkeypatch.setattr(Louder, "step", None)
    assert calls(monkeypatch, env, other, "step_wait") == 1
