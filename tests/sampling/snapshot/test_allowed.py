"""No code comes out of a snapshot that was not the environment's own."""

import collections
import dataclasses
import enum
import operator
import os
import pickle
import subprocess

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_trpo_ext import SnapshotWrapper
from sb3_trpo_ext.sampling.snapshot import SnapshotError, VecSimulator, code, memory, plain
from sb3_trpo_ext.sampling.snapshot.allowed import code_of_kind, loads_plain
from tests.sampling.snapshot.families import Own


class Call:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Loud:
    def __init__(self, *args):
        raise AssertionError("was called")


def calls(path):
    return {
        "os.mkdir": Call(os.mkdir, str(path)),
        "eval": Call(eval, f"open({str(path)!r}, 'w')"),
        "Popen": Call(subprocess.Popen, ["touch", str(path)]),
        "a class": Call(Loud, 1),
        "getattr": Call(getattr, Call(collections.OrderedDict), "__class__"),
        "attrgetter": Call(operator.attrgetter, "__class__"),
    }


@pytest.fixture
def env():
    wrapped = SnapshotWrapper(Own())
    wrapped.reset(seed=0)
    return wrapped


NAMES = list(calls("x"))


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_in_place_of_a_snapshot_is_refused(env, tmp_path, name):
    with pytest.raises(SnapshotError, match="expected what snapshot"):
        env.restore(pickle.dumps(calls(tmp_path / "ran")[name]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_inside_of_a_snapshot_is_refused(env, tmp_path, name):
    *other, _ = pickle.loads(env.snapshot())
    body = pickle.dumps(([], calls(tmp_path / "ran")[name], None))
    before = env.unwrapped.position.copy()
    with pytest.raises(SnapshotError, match="no environment of this kind"):
        env.restore(pickle.dumps((*other, body)))
    assert not list(tmp_path.iterdir())
    assert env.unwrapped.position.tobytes() == before.tobytes()


def test_nothing_is_imported():
    with pytest.raises(pickle.UnpicklingError, match="antigravity"):
        loads_plain(b"cantigravity\nfly\n.")


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Goal:
    at: float

    def moved(self):
        return self.at + 1


Pair = collections.namedtuple("Pair", "a b")


class Late(Own):
    """Gets objects in mid-episode that it did not have when it was made."""

    def step(self, action):
        self.goal, self.colour, self.pair = Goal(2.0), Colour.RED, Pair(1, [2])
        self.table = {"f": abs, "m": self.goal.moved, "x": 1}
        return super().step(action)


def test_what_came_later_is_carried_into_another_instance():
    one, other = (SnapshotWrapper(Late()) for _ in range(2))
    one.reset(seed=0)
    one.step(1)
    other.restore(one.snapshot())
    late = other.unwrapped
    assert late.goal == Goal(2.0) and type(late.goal) is Goal and late.colour is Colour.RED and late.pair == Pair(1, [2])
    assert late.table["f"] is abs and late.table["m"]() == 3.0


def helper():
    return 3.0


class NamesCodeLate(Own):
    """Of another kind each: a function, a class as a value, a function without a name, a module."""

    def step(self, action):
        if action == 1:
            self.table = [helper, Goal, (lambda by: lambda: by + 1)(1.0), operator, Goal(2.0).moved]
        observation, *rest = super().step(action)
        return observation + np.float32(self.said()), *rest

    def said(self):
        if not hasattr(self, "table"):
            return 0.0
        function, kind, nameless, module, method = self.table
        return function() + kind(1.0).at + nameless() + module.add(1, 1) + method()


def test_what_came_later_is_carried_into_another_worker_process():
    venv = make_vec_env(
        NamesCodeLate, 2, wrapper_class=SnapshotWrapper, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}
    )
    venv.reset()
    simulator = VecSimulator(venv)
    venv.step(np.array([1, 0]))
    snapshot = simulator.snapshot(0)
    with simulator.branching():
        for index in range(2):
            simulator.restore(index, snapshot)
        observations = simulator.step(np.zeros(2, dtype=int))[0]
    assert venv.env_method("said") == [11.0, 0.0]
    venv.close()
    np.testing.assert_array_equal(*observations)


def test_another_process_says_what_it_does_not_know():
    env = SnapshotWrapper(NamesCodeLate())
    env.reset(seed=0)
    env.step(1)
    snapshot = env.snapshot()
    code_of_kind.cache_clear()  # as in another process
    with pytest.raises(SnapshotError, match=r"names .*test_allowed\.helper, which no environment of this kind"):
        SnapshotWrapper(NamesCodeLate()).restore(snapshot)


BUILDERS = {
    "what a module holds": Call(plain._place, "os", "", "system"),
    "an attribute that does not stay": Call(plain._place, 0, "position"),
    "an object by its address": Call(memory.view_of, np.ones(1), 0, np.dtype("O"), (1,), (8,), True),
    "the same, by NumPy": Call(np.ndarray, (1,), np.dtype("O"), b"12345678"),
    "a class of another kind": Call(plain._instance, "subprocess", "Popen"),
    "what frees a file at its end": Call(plain._instance, "tempfile", "_TemporaryFileCloser"),
    "a function without a name": Call(code.function_of, "os", "0" * 32, "f", "f", ()),
    "a module": Call(code.module_named, "os"),
    "a hidden method": Call(code.method_of, Call(plain._place, 0), -1, "__reduce__"),
    "a pickle of torch's": Call(th.storage._load_from_bytes, pickle.dumps(Call(os.getcwd), protocol=2)),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_what_snapshots_are_built_with_builds_nothing_else(env, name):
    *other, _ = pickle.loads(env.snapshot())
    with pytest.raises(SnapshotError):
        env.restore(pickle.dumps((*other, pickle.dumps(([], BUILDERS[name], None)))))


def test_it_reads_what_plain_data_is_made_of():
    value = {"a": np.arange(3.0), "b": (np.float32(1), {1, 2}, collections.deque([1])), "c": 1j}
    found = loads_plain(pickle.dumps(value, protocol=5))
    assert repr(found) == repr(value)
    with pytest.raises(pickle.UnpicklingError):
        loads_plain(pickle.dumps(gym.spaces.Discrete(2)))
