"""Every row of the families: the same, another and a new instance, and another process, bit for bit."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

from sb3_trpo_ext import SnapshotWrapper, check_snapshot
from sb3_trpo_ext.sampling.snapshot import ReplayError
from sb3_trpo_ext.sampling.snapshot.adapters import mujoco
from tests.sampling.snapshot.families import FAMILIES, MUJOCO, breakout


@pytest.mark.parametrize("family", FAMILIES)
def test_returns_exactly(family):
    slow = family[:4] in ("Pong", "Brea", "Bipe")
    check_snapshot(FAMILIES[family], n_snapshots=2 if slow else 3, n_steps=15 if slow else 60)


def test_returns_exactly_through_a_time_limit():
    check_snapshot(lambda: TimeLimit(FAMILIES["Swimmer-v5"](), 23), n_snapshots=2, n_steps=60)


def recorded(env, actions):
    """What a replay gives, compared by a way other than check_snapshot's."""
    steps = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        info.get("episode", {}).pop("t", None)
        steps.append((np.array(observation), np.float64(reward), terminated, truncated, pickle.dumps(info)))
        if terminated or truncated:
            steps.append(np.array(env.reset()[0]))
    return pickle.dumps(steps)


ROOT = Path(__file__).parents[3]
OTHER_PROCESS = """
import pickle, sys, warnings
warnings.simplefilter("ignore")
from sb3_trpo_ext import SnapshotWrapper
from tests.sampling.snapshot.families import FAMILIES
from tests.sampling.snapshot.test_exactness import recorded
for family, snapshot, actions, expected in pickle.load(sys.stdin.buffer):
    env = SnapshotWrapper(FAMILIES[family]())
    env.restore(snapshot)
    if recorded(env, actions) != expected:
        print(family)
"""


def test_another_process_goes_on_exactly():
    cases = []
    for family in ("CartPole-v1", "Taxi-v4", "Hopper-v5", "Humanoid-v5", "LunarLander-v3", "Pong", "Breakout, sticky"):
        env = SnapshotWrapper(FAMILIES[family]())
        env.action_space.seed(1)
        env.reset(seed=1)
        recorded(env, [env.action_space.sample() for _ in range(12)])
        snapshot = env.snapshot()
        actions = [env.action_space.sample() for _ in range(30)]
        cases.append((family, snapshot, actions, recorded(env, actions)))
    # once imported, rl_zoo3 has put a layer of its own in TimeLimit's place, and layers are part of the signature
    program = ("import rl_zoo3\n" if "rl_zoo3" in sys.modules else "") + OTHER_PROCESS
    other = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(cases), capture_output=True, cwd=ROOT)
    assert other.returncode == 0, other.stderr.decode()
    assert [line for line in other.stdout.decode().splitlines() if line.strip() in FAMILIES] == []


@pytest.mark.parametrize("family", ["CartPole-v1", "Hopper-v5", "FrozenLake-v1", "LunarLander-v3", "Breakout, sticky"])
def test_a_seed_gives_one_future_and_another_seed_another(family):
    one, other = SnapshotWrapper(FAMILIES[family]()), SnapshotWrapper(FAMILIES[family]())
    one.action_space.seed(0)
    one.reset(seed=0)
    actions = [one.action_space.sample() for _ in range(80)]
    snapshot = one.snapshot()
    futures = []
    for env, seed in ((one, 5), (other, 5), (one, 6), (one, None)):
        env.restore(snapshot, seed)
        futures.append(recorded(env, actions))
    assert futures[0] == futures[1]
    assert len(set(futures)) == 3


def test_the_observation_is_the_last_one_and_the_snapshot_does_not_change():
    env = SnapshotWrapper(FAMILIES["Hopper-v5"]())
    env.reset(seed=0)
    last = env.step(env.action_space.sample())[0].copy()
    snapshot = env.snapshot()
    again = bytes(bytearray(snapshot))
    env.step(env.action_space.sample())
    assert isinstance(snapshot, bytes) and snapshot == again
    np.testing.assert_array_equal(env.restore(snapshot), last)


def test_the_cheaper_state_of_mujoco_is_not_enough(monkeypatch):
    """Ant and Humanoid are exact because of what is saved with the integration state."""
    monkeypatch.setattr(mujoco, "_DERIVED", ())
    check_snapshot(FAMILIES[MUJOCO[0]], n_snapshots=1, n_steps=10)
    with pytest.raises(ReplayError, match="reward"):
        check_snapshot(FAMILIES["Ant-v5"], n_snapshots=1, n_steps=10)


def test_512_snapshots_of_an_atari_game_fit_in_150_megabytes():
    env = SnapshotWrapper(breakout())
    env.action_space.seed(0)
    env.reset(seed=0)
    sizes = []
    for _ in range(100):
        if any(env.step(env.action_space.sample())[2:4]):
            env.reset()
        sizes.append(len(env.snapshot()))
    assert 512 * max(sizes) < 150e6
