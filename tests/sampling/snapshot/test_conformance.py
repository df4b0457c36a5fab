"""The check finds what does not return, and says what and when."""

import random

import numpy as np
import pytest
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import SnapshotWrapper, check_snapshot
from sb3_trpo_ext.sampling.snapshot import ReplayError, SnapshotError, check_returns
from sb3_trpo_ext.sampling.snapshot.conformance import difference
from tests.sampling.snapshot.families import Own

STEPS_TAKEN = [0]


class NumPysOwnGenerator(Own):
    def noise(self):
        return np.random.normal()


class PythonsOwnGenerator(Own):
    def noise(self):
        return random.random()


class OutsideTheInstance(Own):
    def noise(self):
        STEPS_TAKEN[0] += 1
        return 0.01 * STEPS_TAKEN[0]


class OnlyTheInfo(Own):
    def step(self, action):
        *result, info = super().step(action)
        STEPS_TAKEN[0] += 1
        return *result, info | {"nested": {"list": [0, STEPS_TAKEN[0]]}}


class PositionsAndVelocities(AntEnv):
    """What MuJoCo's users save most often."""

    def snapshot_state(self):
        return self.data.qpos.copy(), self.data.qvel.copy(), self.data.time

    def restore_state(self, state):
        self.set_state(*state[:2])
        self.data.time = state[2]


@pytest.mark.parametrize(
    "make_env, field",
    [
        (NumPysOwnGenerator, "step 1 after it, in observation"),
        (PythonsOwnGenerator, "step 1 after it, in observation"),
        (OutsideTheInstance, "step 1 after it, in observation"),
        (OnlyTheInfo, r"step 1 after it, in info\['nested'\]\['list'\]\[1\]: \d+ became \d+"),
        (PositionsAndVelocities, "differs first"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")
def test_what_does_not_return_is_told(make_env, field):
    with pytest.raises(ReplayError, match=field):
        check_snapshot(make_env)
    venv = make_vec_env(make_env, n_envs=2, seed=0, wrapper_class=SnapshotWrapper)
    venv.reset()
    if make_env is OnlyTheInfo:  # which training does not read
        return check_returns(venv)
    with pytest.raises(ReplayError, match="step 1"):
        check_returns(venv)


def test_infos_that_training_reads_are_compared():
    class Ends(Own):
        """At the third step, by itself or by a time limit in turns."""

        def reset(self, **kwargs):
            self.t = 0
            return super().reset(**kwargs)

        def step(self, action):
            self.t += 1
            STEPS_TAKEN[0] += self.t == 3
            by_itself = STEPS_TAKEN[0] % 2 == 0
            return *super().step(action)[:2], self.t == 3 and by_itself, self.t == 3 and not by_itself, {}

    venv = make_vec_env(Ends, n_envs=2, seed=0, wrapper_class=SnapshotWrapper)
    venv.reset()
    with pytest.raises(ReplayError, match=r"info\['TimeLimit.truncated'\]"):
        check_returns(venv)


def test_ignored_infos_are_ignored():
    check_snapshot(OnlyTheInfo, ignore_info=["nested"], n_steps=20)


def test_what_returns_passes_in_both_forms():
    check_snapshot(Own, n_steps=30)
    for n_envs in (1, 4):
        venv = make_vec_env(Own, n_envs=n_envs, seed=0, wrapper_class=SnapshotWrapper)
        venv.reset()
        check_returns(venv)
    with pytest.raises(SnapshotError, match="wrapper_class"):
        check_returns(make_vec_env(Own))


def test_a_simulator_that_only_returns_to_its_own_instance_is_refused():
    class Private(Own):
        """Its drift is a constant of the instance, which it has declared to be one of all."""

        snapshot_constants = ("drift",)

        def __init__(self):
            super().__init__()
            self.drift = np.random.normal()

        def noise(self):
            return self.drift

    with pytest.raises(ReplayError, match="restored into another instance"):
        check_snapshot(Private)
    venv = make_vec_env(Private, n_envs=2, seed=0, wrapper_class=SnapshotWrapper)
    venv.reset()
    with pytest.raises(ReplayError, match=r"environment 1, restored to step \d+ of environment 0"):
        check_returns(venv)


@pytest.mark.parametrize("bad", [{"n_steps": 0}, {"n_snapshots": -1}])
def test_counts_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        check_snapshot(Own, **bad)


@pytest.mark.parametrize(
    "one, other, found",
    [
        (np.zeros(2), np.zeros(2), None),
        (np.zeros(2), -np.zeros(2), "x"),
        (np.full(2, np.nan), np.full(2, np.nan), None),
        (np.zeros(2), np.zeros(2, np.float32), "x"),
        (np.zeros(2), np.zeros(3), "x"),
        ({"a": (1, 2.0)}, {"a": (1, 2.0)}, None),
        ({"a": (1, 2.0)}, {"a": (1, 2.5)}, "x['a'][1]: 2.0 became 2.5"),
        ({"a": 1}, {"b": 1}, "the keys of x"),
        ({"episode": {"t": 1.0, "r": 2}}, {"episode": {"t": 5.0, "r": 2}}, None),
        ({"t": 1.0}, {"t": 5.0}, "x['t']"),
        ([{1}], [{1}], None),
        ([{1}], [{2}], "x[0]"),
    ],
)
def test_differences_are_found_in_any_bit(one, other, found):
    got = difference(one, other, "x")
    assert got is None if found is None else got.startswith(found)
