"""Data goes to bytes and back, and nothing else comes out of them."""

import json
import os
import pickle
from collections import OrderedDict, defaultdict, deque
from contextlib import suppress

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from sb3_trpo_ext import SnapshotWrapper
from sb3_trpo_ext.checkpoints.plain_data import NotPlainError, dumps, loads
from sb3_trpo_ext.checkpoints.simulators import restore_simulator, save_simulator
from sb3_trpo_ext.sampling.snapshot import SnapshotError
from sb3_trpo_ext.sampling.snapshot.allowed import code_of_kind
from tests.sampling.snapshot.families import Own
from tests.sampling.snapshot.test_sharing import EXACT, OneListUnderManyNames, Views

VALUES = [
    None,
    True,
    -0.0,
    float("inf"),
    2**200,
    "ü\0",
    b"\0\1",
    1 + 2j,
    [1, [2, (3, None)]],
    {1: "a", (2, "b"): [3.0], None: {4}},
    frozenset({1, 2}),
    deque([1, 2], maxlen=5),
    OrderedDict(a=1),
    defaultdict(int, a=1),
    range(3),
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((2, 3, 4, 5), np.uint8).transpose(0, 3, 1, 2),
    np.arange(9.0)[::2],
    np.array(3.0),
    np.zeros((0, 4), np.float32),
    np.array([1, "a", None], dtype=object),
    np.array(["ab", "c"]),
    np.array(["2020-01-01"], dtype="datetime64[D]"),
    np.float32(0.1),
    np.bool_(True),
    np.random.get_state(),
    np.random.default_rng(0).bit_generator.state,
    th.arange(6.0).reshape(2, 3),
    th.tensor(1.5, dtype=th.bfloat16),
    th.tensor([True]),
    th.get_rng_state(),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back(value):
    found = loads(dumps(value))
    assert type(found) is type(value) and repr(found) == repr(value)
    if isinstance(value, np.ndarray):
        assert found.dtype == value.dtype and found.flags.writeable
        assert found.strides == value.copy(order="K").strides
    if isinstance(value, th.Tensor):
        assert found.dtype == value.dtype and th.equal(found, value)
    if isinstance(value, deque):
        assert found.maxlen == value.maxlen


def test_nan_comes_back_with_its_bits():
    value = np.frombuffer(b"\1\0\0\0\0\0\xf8\x7f")
    assert loads(dumps(value)).tobytes() == value.tobytes()


def test_what_is_one_thing_stays_one():
    array, inner = np.zeros(3), [1]
    value = {"a": array, "b": array, "c": [inner, inner]}
    value["self"] = value
    found = loads(dumps(value))
    assert found["a"] is found["b"] and found["c"][0] is found["c"][1] and found["self"] is found


class Thing:
    pass


@pytest.mark.parametrize(
    "value",
    [Thing(), Thing, print, os.system, lambda: 1, gym.spaces.Discrete(2)],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_is_no_plain_data_is_refused(value):
    with pytest.raises(NotPlainError, match="is not plain data"):
        dumps({"a": [value]})


def test_what_is_too_deep_is_refused():
    value = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(NotPlainError, match="deep"):
        dumps(value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_no_plain_data(tmp_path):
    with pytest.raises(NotPlainError):
        loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()


def forged(tree, buffers=b""):
    data = json.dumps(tree).encode()
    return len(data).to_bytes(8, "little") + data + buffers


FORGERIES = [
    ["code", "os", "mkdir"],
    ["object", "subprocess", "Popen", [["args", "true"]]],
    ["enum", "os", "mkdir", "x"],
    ["fields", "os", "stat_result", []],
    ["stands for", "generator", 0],
    ["no such tag"],
    ["array", "O", [1], [0], 0, 8],
    ["array", "<f8", [10**12], [0], 0, 8],
    ["array", "<f8", [1], [0], 0, 10**9],
    ["array", "<f8", [1], [1], 0, 8],
    ["array", "<f8", [1, 1], [0, 0], 0, 8],
    ["array", "__import__('os')", [1], [0], 0, 8],
    ["tensor", "load", [1], 0, 8],
    ["same", 7],
    ["dict", [[["list", []], 1]]],
    ["deque", "x", []],
    ["defaultdict", "print", []],
    [["list"]],
    {"a": 1},
    [],
]


@pytest.mark.parametrize("tree", FORGERIES, ids=str)
def test_a_forged_tree_is_refused(tree):
    with pytest.raises(NotPlainError):
        loads(forged(tree, bytes(8)))


def test_any_bytes_are_read_or_refused():
    rng, data = np.random.default_rng(0), dumps({"a": [1, np.zeros(9), (2, "b")], "b": deque([1.5])})
    for _ in range(500):
        harmed = bytearray(data)
        for position in rng.integers(0, len(harmed), 3):
            harmed[position] = rng.integers(256)
        with suppress(NotPlainError):
            loads(bytes(harmed[: rng.integers(1, len(harmed) + 1)]))


# -- environments ----------------------------------------------------------------------------------------


class Part:
    def __init__(self):
        raise AssertionError("no constructor is called")


class WithParts(Own):
    """Holds an object of its own, and chooses among functions."""

    def __init__(self):
        super().__init__()
        self.part = object.__new__(Part)
        self.part.values = [1, 2]
        self.choices = {"length": len, "x": 1}

    def step(self, action):
        self.part.values.append(self.choices["length"](self.part.values))
        return super().step(action)


def wrapped(env_class=WithParts):
    env = SnapshotWrapper(env_class())
    env.reset(seed=0)
    return env


def test_an_environment_with_objects_of_its_own_returns():
    env = wrapped()
    env.step(1)
    kept = save_simulator(env, False)
    expected = [env.step(1)[0].tobytes() for _ in range(3)]
    other = wrapped()
    restore_simulator(other, kept)
    assert other.unwrapped.part.values == [1, 2, 2] and type(other.unwrapped.part) is Part
    assert [other.step(1)[0].tobytes() for _ in range(3)] == expected


IN_NO_FILE = (Views, OneListUnderManyNames)  # arrays of records, a defaultdict with a factory of its own


def started_again(env_class, seed):
    """As in another process, where no environment has named any code."""
    code_of_kind.cache_clear()
    env = SnapshotWrapper(env_class())
    env.reset(seed=seed)
    return env


@pytest.mark.parametrize("env_class", [kind for kind in EXACT if kind not in IN_NO_FILE])
def test_what_is_shared_stays_shared_in_a_file(env_class):
    env, actions = started_again(env_class, 0), [int(t % 3 > 0) for t in range(20)]
    for action in actions[:7]:
        env.step(action)
    kept = save_simulator(env, False)
    expected = [env.step(action)[0].tobytes() for action in actions]
    other = started_again(env_class, 1)
    restore_simulator(other, kept)
    assert [other.step(action)[0].tobytes() for action in actions] == expected


@pytest.mark.parametrize("env_class", IN_NO_FILE)
def test_what_no_file_can_hold_is_told(env_class):
    with pytest.raises(SnapshotError, match="cannot be kept in a file"):
        save_simulator(started_again(env_class, 0), False)


@pytest.mark.parametrize(
    "forgery",
    [
        ["made", "os.system", ["true"], None],
        ["made", "place", ["os", "", "system"], None],
        ["made", "module", ["os"], None],
        ["made", "function", ["os", "0" * 32, "f", "f", ["tuple", []]], None],
        ["made", "method", [["made", "place", [0], None], 0, "__reduce__"], None],
        ["made", "attribute", [["list", []], "__class__"], None],
        ["made", "view", [["bytearray", 0, 8], 0, ["dtype", "'|O'"], ["tuple", [1]], ["tuple", [8]], True], None],
    ],
    ids=str,
)
def test_an_environment_has_nothing_made_that_is_not_its_own(forgery):
    env = wrapped()
    data = save_simulator(env, False)
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:end]))
    changed = json.loads(text.replace('["code", "builtins", "len"]', json.dumps(forgery)))
    with pytest.raises(SnapshotError):
        restore_simulator(env, forged(changed, data[end:]))
    assert env.unwrapped.choices["length"] is len


@pytest.mark.parametrize(
    "forgery",
    [
        ["code", "os", "system"],
        ["code", "builtins", "eval"],
        ["object", "subprocess", "Popen", []],
        ["object", "tempfile", "_TemporaryFileCloser", []],
        ["object", __name__, "Malicious", []],
    ],
    ids=str,
)
def test_an_environment_takes_no_code_that_is_not_its_own(forgery):
    env = wrapped()
    data = save_simulator(env, False)
    end = 8 + int.from_bytes(data[:8], "little")
    tree = json.loads(data[8:end])
    text = json.dumps(tree)
    assert '["code", "builtins", "len"]' in text
    changed = json.loads(text.replace('["code", "builtins", "len"]', json.dumps(forgery)))
    with pytest.raises(SnapshotError, match="is not part of this environment"):
        restore_simulator(env, forged(changed, data[end:]))


def test_an_environments_pickle_is_refused(tmp_path):
    with pytest.raises(SnapshotError):
        restore_simulator(wrapped(), pickle.dumps(Malicious(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()


class Items(list):
    """A snapshot in memory can carry it."""


class WithItems(Own):
    def __init__(self):
        super().__init__()
        self.items = Items([1])


def test_an_environment_that_no_file_can_hold_is_refused():
    with pytest.raises(SnapshotError, match="cannot be kept in a file"):
        save_simulator(wrapped(WithItems), False)
