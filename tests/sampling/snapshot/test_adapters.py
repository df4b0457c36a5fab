"""Environments of one's own: what is carried by itself, what by two methods or an adapter, and what is refused."""

import dataclasses
import random
from collections import OrderedDict, defaultdict, deque

import Box2D
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.utils import EzPickle
from gymnasium.wrappers import NormalizeObservation, RecordVideo, TransformObservation
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sb3_trpo_ext import SnapshotWrapper, check_snapshot, register_snapshot_adapter
from sb3_trpo_ext.sampling.snapshot import ReplayAdapter, SnapshotAdapter, SnapshotError
from sb3_trpo_ext.sampling.snapshot.adapters import _BY_CLASS
from tests.sampling.snapshot.families import Own


class Engine:
    """A simulator behind a handle: no attributes, no pickle, a generator of its own."""

    __slots__ = ("generator", "value")

    def __init__(self):
        self.value, self.generator = 0.0, random.Random(0)

    def __reduce__(self):
        raise TypeError("an engine is not pickled")

    def run(self):
        self.value = 0.9 * self.value + self.generator.random()
        return self.value


class OnAnEngine(Own):
    def __init__(self):
        super().__init__()
        self.engine = Engine()

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.engine.value = 0.0
        return result

    def noise(self):
        return self.engine.run() + self.np_random.normal()


class WithTwoMethods(OnAnEngine):
    def snapshot_state(self):
        return {"position": self.position, "engine": (self.engine.value, self.engine.generator.getstate())}

    def restore_state(self, state):
        self.position = state["position"]
        self.engine.value, generator = state["engine"]
        self.engine.generator.setstate(generator)


class WithThreeMethods(WithTwoMethods):
    def seed_state(self, seed):
        self.engine.generator.seed(seed)


class EngineAdapter(SnapshotAdapter):
    handles = frozenset({"engine"})
    signature = "engine 1.0"

    def save(self):
        return self.env.engine.value, self.env.engine.generator.getstate()

    def restore(self, state):
        self.env.engine.value = state[0]
        self.env.engine.generator.setstate(state[1])

    def reseed(self, seed):
        self.env.engine.generator.seed(seed)


@pytest.fixture
def registry():
    before = dict(_BY_CLASS)
    yield
    _BY_CLASS.clear()
    _BY_CLASS.update(before)


class EngineNoiseAlone(WithThreeMethods):
    def noise(self):
        return self.engine.run()


@pytest.mark.parametrize("env_class", [WithTwoMethods, WithThreeMethods, EngineNoiseAlone])
def test_two_methods_are_enough(env_class):
    check_snapshot(env_class, n_steps=40)


def test_a_third_method_seeds_the_engine():
    env = SnapshotWrapper(EngineNoiseAlone())
    env.reset(seed=0)
    snapshot = env.snapshot()

    def future(seed):
        env.restore(snapshot, seed)
        return [float(env.step(0)[0][0]) for _ in range(3)]

    assert future(1) == future(1) != future(2)
    assert future(None) == future(None) != future(1)


class LateAndOpaque(Own):
    """Has an engine from its first reset on, and saves it as it is."""

    def reset(self, *, seed=None, options=None):
        self.engine = Engine()
        return super().reset(seed=seed)

    def snapshot_state(self):
        return self.position, self.engine

    def restore_state(self, state):
        raise AssertionError


def test_what_two_methods_save_must_be_plain():
    env = SnapshotWrapper(LateAndOpaque())
    env.reset()
    with pytest.raises(SnapshotError, match="snapshot_state of LateAndOpaque saved is not plain data"):
        env.snapshot()


def test_an_adapter_is_registered_for_a_class_and_those_derived_from_it(registry):
    with pytest.raises(SnapshotError, match=r"attribute 'engine' of layer OnAnEngine.*snapshot_state\(\)"):
        SnapshotWrapper(OnAnEngine())
    register_snapshot_adapter(OnAnEngine, EngineAdapter)
    check_snapshot(OnAnEngine, n_steps=40)
    derived = type("Derived", (OnAnEngine,), {})
    assert "engine 1.0" in SnapshotWrapper(derived()).signature()
    with pytest.raises(TypeError, match=r"subclass of gymnasium\.Env"):
        register_snapshot_adapter("OnAnEngine", EngineAdapter)


class Unrestorable(Own):
    """Can only be reset."""

    def __init__(self):
        super().__init__()
        self.hidden = iter(range(10**9))

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.hidden = iter(range(10**9))
        self.step(0)  # as Box2D environments do
        return result

    def noise(self):
        return 0.1 * next(self.hidden) + self.np_random.normal()


def test_replay_serves_what_can_only_be_reset(registry):
    register_snapshot_adapter(Unrestorable, ReplayAdapter)
    check_snapshot(Unrestorable, n_steps=40)
    env, other = SnapshotWrapper(Unrestorable()), SnapshotWrapper(Unrestorable())
    env.reset(seed=3, options={"a": 1})
    env.step(1)
    branched = env.snapshot()
    env.restore(branched, seed=8)
    env.step(np.array(0, dtype=np.int8))
    in_branch = env.snapshot()  # its replay needs the seed in the middle
    expected = env.step(1)[0]
    other.restore(in_branch)
    np.testing.assert_array_equal(other.step(1)[0], expected)


@dataclasses.dataclass(slots=True)
class Record:
    number: float
    others: list


class Rich(Own):
    """Every kind of plain data, generators in several places, and references across."""

    def __init__(self):
        super().__init__()
        self.env_of_parts = Record(1.0, [])
        self.queue, self.counts, self.order = deque([1.0], maxlen=3), defaultdict(int), OrderedDict(a=1)
        self.legacy, self.python = np.random.RandomState(0), random.Random(0)
        self.nested = {"generator": np.random.default_rng(0), "set": {1, 2}}
        self.alias = None
        self.myself = [self]

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.alias = self.np_random
        self.observation_space.seed(int(self.np_random.integers(100)))
        return result

    def noise(self):
        assert self.alias is self.np_random and self.myself[0] is self
        draws = [self.legacy.normal(), self.python.random(), self.nested["generator"].normal(), self.alias.normal()]
        self.queue.append(sum(draws))
        self.env_of_parts.others = [self.env_of_parts.number, *self.env_of_parts.others[:3]]
        self.env_of_parts.number = sum(self.queue)
        self.counts[len(self.queue)] += 1
        if self.counts[3] == 5:
            self.came_later = 1.0
        return self.env_of_parts.number + getattr(self, "came_later", 0.0) + float(self.observation_space.sample()[0])


class NamedLikeAWindow(Own):
    """Its clock and its window are numbers."""

    def __init__(self):
        super().__init__()
        self.clock, self.window = 0.0, deque(maxlen=2)

    def noise(self):
        self.clock += 0.1
        self.window.append(self.clock)
        return sum(self.window) - 2.0 * self.clock + self.np_random.normal()


def test_state_may_have_the_name_of_a_window():
    check_snapshot(NamedLikeAWindow, n_steps=40)


class ViewsOfTheEngine(HopperEnv):
    """Reads the torso through an array that MuJoCo writes."""

    def __init__(self):
        super().__init__()
        self.height, self.steps = self.data.qpos[1:2], np.zeros(1)

    def step(self, action):
        observation, reward, *flags = super().step(action)
        self.steps = self.steps + self.height
        return observation, reward + float(self.steps[0]), *flags


def test_views_of_an_engines_memory_stay_views():
    check_snapshot(ViewsOfTheEngine, n_steps=40)


def test_plain_data_is_carried_whatever_its_shape():
    check_snapshot(Rich, n_steps=40)


@pytest.mark.parametrize("shared", [True, False])
def test_generators_are_shared_after_a_restore_where_they_were(shared):
    envs = [SnapshotWrapper(Own()) for _ in range(2)]
    for env, share in zip(envs, (shared, not shared), strict=True):
        env.unwrapped.one = np.random.default_rng(1)
        env.unwrapped.other = env.unwrapped.one if share else np.random.default_rng(2)
        env.reset(seed=0)
    envs[1].restore(envs[0].snapshot())
    draws = [[env.unwrapped.one.random(), env.unwrapped.other.random(), env.unwrapped.one.random()] for env in envs]
    assert draws[0] == draws[1]
    assert (envs[1].unwrapped.one is envs[1].unwrapped.other) is shared


data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | arrays(np.float32, (2,)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(data)
def test_plain_data_comes_back(value):
    one, other = SnapshotWrapper(Own()), SnapshotWrapper(Own())
    one.reset(seed=0)
    one.unwrapped.something = value
    other.restore(one.snapshot())
    assert repr(other.unwrapped.something) == repr(value)


class Pickled(EzPickle):
    def __init__(self, size=3):
        EzPickle.__init__(self, size)
        self.size, self.state = size, 0


@pytest.mark.parametrize("value", [Pickled(), open, (i for i in range(3)), Engine(), gym.make("CartPole-v1")])
def test_what_has_its_own_idea_of_being_pickled_is_refused_by_name(value):
    env = Own()
    env.thing = {"inside": [value, 1.0]}
    if value is open:  # a function by name is as good as its name
        SnapshotWrapper(env)
        return
    with pytest.raises(SnapshotError, match=r"attribute 'thing' of layer Own.*snapshot_constants"):
        SnapshotWrapper(env)


def test_what_is_said_to_be_constant_is_left_alone():
    env = type("Constant", (Own,), {"snapshot_constants": ("thing",)})()
    env.thing = Pickled()
    wrapped = SnapshotWrapper(env)
    wrapped.reset(seed=0)
    wrapped.restore(wrapped.snapshot())
    assert isinstance(env.thing, Pickled)


def test_gymnasiums_wrappers_are_carried():
    def make_env():
        env = TransformObservation(NormalizeObservation(Own()), lambda observation: 2 * observation, Own.observation_space)
        return gym.wrappers.RecordEpisodeStatistics(env)

    check_snapshot(make_env, n_steps=40)


class Slots(gym.Wrapper):
    __slots__ = ("count",)


class OwnBox2D(Own):
    def __init__(self):
        super().__init__()
        self.world = Box2D.b2World()


@pytest.mark.filterwarnings("ignore:.*Overwriting existing videos")
def test_layers_that_cannot_be_carried_are_refused(tmp_path):
    with pytest.raises(SnapshotError, match="Slots keeps attributes in __slots__"):
        SnapshotWrapper(Slots(Own()))
    with pytest.raises(SnapshotError, match="ReplayAdapter"):
        SnapshotWrapper(OwnBox2D())
    video = RecordVideo(gym.make("CartPole-v1", render_mode="rgb_array"), str(tmp_path))
    with pytest.raises(SnapshotError, match="RecordVideo would film branches"):
        SnapshotWrapper(video)
    with pytest.raises(SnapshotError, match="already"):
        SnapshotWrapper(gym.wrappers.TimeLimit(SnapshotWrapper(Own()), 3))
    with pytest.raises(SnapshotError, match=r"repeat_action_probability=0.*StickyActionEnv"):
        SnapshotWrapper(gym.make("ALE/Pong-v5"))


@pytest.mark.parametrize(
    "make_other",
    [
        lambda: gym.make("FrozenLake-v1", is_slippery=False),
        lambda: gym.make("FrozenLake8x8-v1"),
        lambda: gym.make("FrozenLake-v1", desc=["SFFF", "FHFH", "FFFH", "HFFG"]),
        lambda: gym.make("FrozenLake-v1", map_name=None),
        lambda: gym.wrappers.TimeLimit(gym.make("FrozenLake-v1"), 5),
    ],
)
def test_a_snapshot_of_another_environment_is_refused_naming_both(make_other):
    one, other = SnapshotWrapper(gym.make("FrozenLake-v1")), SnapshotWrapper(make_other())
    one.reset()
    other.reset()
    with pytest.raises(SnapshotError) as refusal:
        other.restore(one.snapshot())
    assert one.signature() in str(refusal.value) and other.signature() in str(refusal.value)
    other.step(0)  # as it was


def test_what_is_no_snapshot_is_refused():
    env = SnapshotWrapper(Own())
    env.reset()
    for wrong in (b"", b"nothing", None, {"state": 1}):
        with pytest.raises(SnapshotError, match="expected what"):
            env.restore(wrong)


def test_render_handles_stay_with_their_instance():
    envs = [SnapshotWrapper(gym.make("CartPole-v1", render_mode="rgb_array")) for _ in range(2)]
    for env in envs:
        env.reset(seed=0)
    envs[0].render()
    screen = envs[0].unwrapped.screen
    envs[1].restore(envs[0].snapshot())
    envs[0].restore(envs[1].snapshot())
    assert envs[1].unwrapped.screen is None and envs[0].unwrapped.screen is screen
    assert envs[0].render().shape == envs[1].render().shape
    [env.close() for env in envs]
