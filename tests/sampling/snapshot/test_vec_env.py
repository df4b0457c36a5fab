"""Branches over a whole stack of vectorized environments, and the trunk that knows nothing of them."""

import csv
import os
import random

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

from sb3_trpo_ext import SnapshotWrapper
from sb3_trpo_ext.sampling.snapshot import BranchError, SnapshotError, VecSimulator, WorkerDiedError, check_returns, workers
from tests.envs import Walk, limited
from tests.sampling.snapshot.families import Own, breakout, told

FORK = {"start_method": "fork"}


def vec_env(env_id, n_envs=3, subproc=False, **kwargs):
    if subproc:
        kwargs |= {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": FORK}
    return make_vec_env(env_id, n_envs=n_envs, seed=5, wrapper_class=SnapshotWrapper, **kwargs)


def dicts():
    spaces = gym.spaces
    return limited(
        Walk(spaces.Discrete(2), spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(0, 255, (12, 12, 3), np.uint8)}))
    )


def stack(name, folder):
    if name in ("CartPole", "HalfCheetah-v5"):
        env_id, limit = (told, {}) if name == "CartPole" else (name, dict(max_episode_steps=40))
        return VecNormalize(VecCheckNan(vec_env(env_id, monitor_dir=folder, env_kwargs=limit)))
    if name == "CartPole, worker processes":
        return VecNormalize(vec_env(told, 2, subproc=True, monitor_dir=folder))
    if name == "Breakout":
        os.makedirs(folder)
        games = DummyVecEnv([lambda i=i: SnapshotWrapper(Monitor(breakout(), f"{folder}/{i}")) for i in range(2)])
        games.seed(5)
        return VecTransposeImage(VecFrameStack(games, 4))
    walks = DummyVecEnv([lambda: SnapshotWrapper(dicts())] * 2)
    walks.seed(5)
    stacked = VecFrameStack(VecMonitor(walks, f"{folder}/"), 3, channels_order={"a": "last", "b": "last"})
    if name == "dict observations":
        return VecNormalize(VecTransposeImage(stacked), norm_obs_keys=["a"])
    return VecNormalize(VecExtractDictObs(stacked, "a"), gamma=0.5)


STACKS = ["CartPole", "HalfCheetah-v5", "CartPole, worker processes", "Breakout", "dict observations", "one of a dict"]


def frozen(value):
    """Arrays in whatever as bytes: reprs of screens are slow."""
    if isinstance(value, dict):
        return {key: frozen(child) for key, child in value.items() if key != "t"}  # Monitor's wall clock
    if isinstance(value, (list, tuple)):
        return [frozen(child) for child in value]
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def rows_of(folder):
    """Rows of all monitor files, without the wall clock."""
    rows = []
    for name in sorted(os.listdir(folder)):
        with open(folder / name) as file:
            rows.append([name, *((row["r"], row["l"]) for row in csv.DictReader(file.readlines()[1:]))])
    return rows


def visible_state(venv):
    """What SB3 and its users can see of a stack besides what steps give."""
    state = [frozen(venv.reset_infos), frozen(venv.unwrapped.reset_infos)]
    if venv.env_is_wrapped(Monitor)[0]:
        state += [venv.env_method("get_episode_rewards"), venv.env_method("get_total_steps")]
    while isinstance(venv, VecEnvWrapper):
        names = ("returns", "old_obs", "old_reward", "training", "episode_returns", "episode_lengths", "episode_count")
        state += [frozen(vars(venv).get(name)) for name in names]
        for statistics in np.atleast_1d(vars(venv).get("obs_rms", [])):
            parts = statistics.values() if isinstance(statistics, dict) else [statistics]
            state += [(part.mean.tobytes(), part.var.tobytes(), part.count) for part in parts]
        venv = venv.venv
    return state


def branches(simulator, snapshots, seed):
    """Some branches, of unequal lengths, on all environments but the last."""
    venv = simulator.venv
    rng = np.random.default_rng(seed)
    with simulator.branching():
        for snapshot in snapshots:
            for index in range(venv.num_envs - 1):
                simulator.restore(index, snapshot, seed=int(rng.integers(1000)))
            for t in range(25):
                simulator.step(actions(venv, rng))
                if t == 12:
                    simulator.park(0)
        np.random.random(), random.random()


def actions(venv, rng):
    space = venv.action_space
    if isinstance(space, gym.spaces.Discrete):
        return rng.integers(space.n, size=venv.num_envs)
    return rng.uniform(-1, 1, (venv.num_envs, *space.shape)).astype(np.float32)


def trunk(name, folder, with_branches, n_steps=90):
    venv = stack(name, folder)
    rng = np.random.default_rng(1)
    np.random.seed(3), random.seed(3)
    log = [frozen(venv.reset())]
    snapshots = []
    if with_branches:
        simulator = VecSimulator(venv)
        check_returns(venv)
    for t in range(n_steps):
        observations, rewards, dones, infos = venv.step(actions(venv, rng))
        log.append(frozen((observations, rewards, dones, infos)))
        log.append((visible_state(venv), np.random.random(), random.random()))
        if with_branches and t % 10 == 3:
            snapshots.append(simulator.snapshot(t % venv.num_envs))
        if with_branches and t % 30 == 23:
            kept = frozen(observations)
            branches(simulator, snapshots[-3:], t)
            assert frozen(observations) == kept  # the policy's last observations may be a view of a buffer
    venv.close()
    return log, rows_of(folder)


@pytest.mark.parametrize("name", STACKS)
def test_branches_leave_no_trace(name, tmp_path):
    n_steps = 50 if name == "Breakout" else 90
    plain = trunk(name, tmp_path / "plain", with_branches=False, n_steps=n_steps)
    branched = trunk(name, tmp_path / "branched", with_branches=True, n_steps=n_steps)
    for t, (one, other) in enumerate(zip(plain[0], branched[0], strict=True)):
        assert one == other, t
    assert plain[1] == branched[1]
    assert sum(map(len, plain[1])) > len(plain[1]), "no episode ended: this test shows nothing"


@pytest.mark.parametrize("name", STACKS)
def test_a_restored_environment_is_seen_as_the_trunk_was(name, tmp_path):
    """Observations and what follows are those of the trunk, in every environment, by one and the same statistics."""
    venv = stack(name, tmp_path / "m")
    simulator = VecSimulator(venv)
    rng = np.random.default_rng(1)
    venv.reset()
    for _ in range(7):
        venv.step(actions(venv, rng))
    if isinstance(venv, VecNormalize):
        venv.training = False
    seen = venv.step(actions(venv, rng))[0]
    snapshot = simulator.snapshot(1)
    chosen = [np.repeat(actions(venv, rng)[:1], venv.num_envs, axis=0) for _ in range(10)]
    with simulator.branching():
        restored = [simulator.restore(index, snapshot) for index in range(venv.num_envs)]
        branched = [simulator.step(batch) for batch in chosen]
    of_trunk = [venv.step(batch) for batch in chosen]
    venv.close()
    for observation in restored:
        for key in observation if isinstance(observation, dict) else [...]:
            np.testing.assert_array_equal(observation[key], seen[key][1] if isinstance(seen, dict) else seen[1])
            assert observation[key].dtype == (seen[key] if isinstance(seen, dict) else seen).dtype
    for (obs, rewards, dones, _), (trunk_obs, trunk_rewards, trunk_dones, _) in zip(branched, of_trunk, strict=True):
        if trunk_dones.any() or dones.any():
            break  # the trunk is reset, branches stand still
        for index in range(venv.num_envs):
            assert rewards[index] == trunk_rewards[1]
            for one, other in zip(*(x.values() if isinstance(x, dict) else [x] for x in (obs, trunk_obs)), strict=True):
                np.testing.assert_array_equal(one[index], other[1])


def test_a_mujoco_state_returns_in_another_worker_process():
    venv = vec_env("HalfCheetah-v5", 2, subproc=True)
    simulator, rng = VecSimulator(venv), np.random.default_rng(1)
    venv.reset()
    for _ in range(5):
        venv.step(actions(venv, rng))
    snapshot = simulator.snapshot(1)
    chosen = [np.repeat(actions(venv, rng)[:1], 2, axis=0) for _ in range(20)]
    of_trunk = [venv.step(batch)[:2] for batch in chosen]
    with simulator.branching():
        for index in range(2):
            simulator.restore(index, snapshot)
        branched = [simulator.step(batch)[:2] for batch in chosen]
    venv.close()
    for (obs, rewards), (trunk_obs, trunk_rewards) in zip(branched, of_trunk, strict=True):
        np.testing.assert_array_equal(obs, trunk_obs[[1, 1]])
        np.testing.assert_array_equal(rewards, trunk_rewards[[1, 1]])
        assert not np.array_equal(trunk_obs[0], trunk_obs[1])


def test_environments_that_are_not_running_stand_still():
    venv = vec_env("CartPole-v1")
    venv.reset()
    simulator = VecSimulator(venv)
    snapshot = simulator.snapshot(0)
    with simulator.branching():
        start = simulator.restore(0, snapshot)
        final = None
        for _ in range(60):
            observations, rewards, dones, infos = simulator.step(np.ones(3, dtype=int))
            assert rewards[1] == 0 and not dones[1:].any()
            if final is not None:
                np.testing.assert_array_equal(observations[0], final)
                assert rewards[0] == 0 and not dones[0]
            elif dones[0]:
                final = infos[0]["terminal_observation"]
                assert rewards[0] == 1
        assert final is not None
        np.testing.assert_array_equal(simulator.restore(0, snapshot), start)
        assert simulator.step(np.ones(3, dtype=int))[1][0] == 1
        simulator.park(0)
        assert simulator.step(np.ones(3, dtype=int))[1][0] == 0


class Fragile(Own):
    """Cannot bear an action that nobody takes in the trunk."""

    def step(self, action):
        if action == 1 and self.np_random.bit_generator.state["state"]["state"] != 0:
            if os.environ.get("FRAGILE") == "exit":
                os._exit(7)
            raise ZeroDivisionError("nobody does that")
        return super().step(action)


@pytest.mark.parametrize("subproc", [False, True])
def test_an_error_in_a_branch_is_told_and_the_trunk_goes_on(subproc):
    venv = vec_env(Fragile, 2, subproc=subproc)
    venv.reset()
    simulator = VecSimulator(venv)
    snapshot = simulator.snapshot(0)
    with simulator.branching():
        simulator.restore(0, snapshot)
        expected = simulator.step(np.array([0, 0]))[0][0]
    with pytest.raises(BranchError, match="environment 1 raised in a branch: ZeroDivisionError: nobody does that"):  # noqa: SIM117
        with simulator.branching():
            simulator.restore(1, snapshot)
            simulator.step(np.array([1, 1]))
    np.testing.assert_array_equal(venv.step(np.array([0, 0]))[0][0], expected)
    venv.close()


def test_a_worker_that_dies_is_named(monkeypatch):
    monkeypatch.setenv("FRAGILE", "exit")
    venv = vec_env(Fragile, 2, subproc=True)
    venv.reset()
    simulator = VecSimulator(venv)
    snapshot = simulator.snapshot(0)
    with pytest.raises(WorkerDiedError, match=r"1 \(exit code 7\)"), simulator.branching():
        simulator.restore(1, snapshot)
        simulator.step(np.array([1, 1]))
    for process in venv.processes:
        process.kill()


def test_an_exception_of_the_caller_restores_the_trunk():
    venv = vec_env("CartPole-v1")
    venv.reset()
    simulator = VecSimulator(venv)
    snapshot = simulator.snapshot(0)
    with simulator.branching():
        for index in range(3):
            simulator.restore(index, snapshot)
        expected = simulator.step(np.zeros(3, dtype=int))[0][0]
    with pytest.raises(KeyboardInterrupt), simulator.branching():
        simulator.restore(0, snapshot)
        simulator.step(np.ones(3, dtype=int))
        raise KeyboardInterrupt
    np.testing.assert_array_equal(venv.step(np.zeros(3, dtype=int))[0][0], expected)


@pytest.mark.parametrize("where", ["restore", "step", "half of the replies"])
def test_an_interrupt_while_workers_are_at_work_restores_the_trunk(where, monkeypatch):
    def interrupted(base, indices):
        if where == "half of the replies":
            await_(base, indices)
            base.remotes[0].recv()
        monkeypatch.setattr(workers, "_await", await_)
        raise KeyboardInterrupt

    venv, await_ = vec_env("CartPole-v1", 2, subproc=True), workers._await
    venv.reset()
    simulator = VecSimulator(venv)
    snapshot = simulator.snapshot(0)
    with simulator.branching():
        simulator.restore(0, snapshot)
        expected = simulator.step(np.zeros(2, dtype=int))[0][0]
    with pytest.raises(KeyboardInterrupt), simulator.branching():
        if where != "restore":
            simulator.restore(0, snapshot)
        monkeypatch.setattr(workers, "_await", interrupted)
        if where == "restore":
            simulator.restore(0, snapshot)
        simulator.step(np.ones(2, dtype=int))
    assert not venv.waiting
    np.testing.assert_array_equal(venv.step(np.zeros(2, dtype=int))[0][0], expected)
    assert venv.env_method("class_name") == ["SnapshotWrapper"] * 2
    venv.close()


def test_a_processs_own_generators_are_put_back():
    """As in a worker process, where the environments may be the only ones to draw from them."""
    env = SnapshotWrapper(Own())
    env.reset()
    states = np.random.get_state()[1].tolist(), random.getstate()
    env.begin_branches()
    np.random.random(), random.random()
    env.end_branches()
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states


def test_what_cannot_be_carried_in_a_worker_process_is_told_in_this_one():
    class Opaque(Own):
        def __init__(self):
            super().__init__()
            self.file = open(os.devnull)  # noqa: SIM115

    venv = vec_env(Opaque, 2, subproc=True)
    with pytest.raises(SnapshotError, match=r"attribute 'file' of layer .*Opaque"):
        VecSimulator(venv)
    venv.close()


class Outside(gym.Wrapper):
    pass


class Unknown(VecEnvWrapper):
    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


class TunedNormalize(VecNormalize):
    """Acts as SB3's does."""


class OwnNormalize(VecNormalize):
    def step_wait(self):
        return super().step_wait()


def test_stacks_that_cannot_branch_are_refused_by_name(tmp_path):
    with pytest.raises(SnapshotError, match=r"wrapper_class=SnapshotWrapper"):
        VecSimulator(make_vec_env("CartPole-v1"))
    with pytest.raises(ValueError, match="layer Outside is outside of SnapshotWrapper"):
        VecSimulator(make_vec_env("CartPole-v1", wrapper_class=lambda env: Outside(SnapshotWrapper(env))))
    for wrapper in (Unknown, OwnNormalize, lambda env: VecVideoRecorder(env, str(tmp_path), lambda _: False)):
        wrapped = wrapper(vec_env("CartPole-v1"))
        with pytest.raises(SnapshotError, match=type(wrapped).__name__):
            VecSimulator(wrapped)
    VecSimulator(TunedNormalize(vec_env("CartPole-v1")))
    mixed = DummyVecEnv([lambda p=p: SnapshotWrapper(gym.make("FrozenLake-v1", is_slippery=p)) for p in (True, False)])
    with pytest.raises(SnapshotError, match=r"is_slippery=true[\s\S]*is_slippery=false"):
        VecSimulator(mixed)


def test_misuse_is_refused():
    venv = vec_env("CartPole-v1")
    simulator = VecSimulator(venv)
    with pytest.raises(SnapshotError, match="before the first reset"):
        simulator.snapshot(0)
    with pytest.raises(SnapshotError, match="before the first reset"), simulator.branching():
        pass
    venv.reset()
    snapshot = simulator.snapshot(0)
    with pytest.raises(RuntimeError, match="branching"):
        simulator.restore(0, snapshot)
    with simulator.branching(), pytest.raises(RuntimeError, match="already"), simulator.branching():
        pass
    venv.step(np.zeros(3, dtype=int))
