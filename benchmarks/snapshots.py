"""What snapshots cost: time and bytes by environment, and branch steps a second against bare environments.

    python benchmarks/snapshots.py [--quick] [--out DIR]

Branch steps are those of eight HalfCheetahs, each branch restored and seeded, in turns with plain steps of the same
environments without SnapshotWrapper; both without a policy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
from _measure import (
    Comparison,
    argument_parser,
    interleave,
    print_comparisons,
    print_table,
    set_up,
    write_json,
)
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext import SnapshotWrapper
from sb3_trpo_ext.sampling.snapshot import VecSimulator

BAR = 0.70
N_ENVS = 8
N_SNAPSHOTS = 512


def standard(env_id: str) -> gym.Env:
    return Monitor(gym.make(env_id))


def pong() -> gym.Env:
    return Monitor(FrameStackObservation(AtariPreprocessing(gym.make("PongNoFrameskip-v4")), 4))


def breakout() -> gym.Env:
    return AtariWrapper(Monitor(gym.make("BreakoutNoFrameskip-v4")))


ENVIRONMENTS: dict[str, Callable[[], gym.Env]] = {
    **{
        env_id: partial(standard, env_id)
        for env_id in (
            "CartPole-v1",
            "Taxi-v4",
            "Hopper-v5",
            "HalfCheetah-v5",
            "Ant-v5",
            "Humanoid-v5",
            "LunarLander-v3",
            "BipedalWalker-v3",
        )
    },
    "Pong, AtariPreprocessing, 4 frames": pong,
    "Breakout, AtariWrapper": breakout,
}


def microseconds(function: Callable[[], Any], repeats: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1e6 * float(np.median(times))


def cost(make_env: Callable[[], gym.Env], repeats: int) -> dict[str, float]:
    """Save, restore and step in µs and bytes, at the state after 40 random actions."""
    env = SnapshotWrapper(make_env())
    env.action_space.seed(100)
    env.reset(seed=100)
    for _ in range(40):
        if any(env.step(env.action_space.sample())[2:4]):
            env.reset()
    snapshot = env.snapshot()
    figures = {
        "save": microseconds(env.snapshot, repeats),
        "restore": microseconds(lambda: env.restore(snapshot), repeats),
        "bytes": len(snapshot),
    }
    times = []
    env.reset()
    for _ in range(repeats):
        action = env.action_space.sample()
        started = time.perf_counter()
        result = env.step(action)
        times.append(time.perf_counter() - started)
        if result[2] or result[3]:
            env.reset()
    env.close()
    return {**figures, "step": 1e6 * float(np.median(times))}


def atari_megabytes(n_snapshots: int) -> float:
    """What so many snapshots along a game of Breakout hold."""
    env = SnapshotWrapper(breakout())
    env.action_space.seed(100)
    env.reset(seed=100)
    held = 0
    for _ in range(n_snapshots):
        if any(env.step(env.action_space.sample())[2:4]):
            env.reset()
        held += len(env.snapshot())
    return held * (N_SNAPSHOTS / n_snapshots) / 1e6


def plain_speed(venv: VecEnv, actions: np.ndarray, n_branches: int, _: int) -> float:
    venv.reset()
    started = time.perf_counter()
    for _ in range(n_branches):
        for batch in actions:
            venv.step(batch)
    return n_branches * len(actions) * N_ENVS / (time.perf_counter() - started)


def branch_speed(venv: VecEnv, actions: np.ndarray, n_branches: int, _: int) -> float:
    """Snapshots and the trunk's own way back included."""
    venv.reset()
    simulator = VecSimulator(venv)
    started = time.perf_counter()
    snapshots = [simulator.snapshot(index) for index in range(N_ENVS)]
    with simulator.branching():
        for branch in range(n_branches):
            for index in range(N_ENVS):
                simulator.restore(index, snapshots[index], seed=branch)
            for batch in actions:
                simulator.step(batch)
    return n_branches * len(actions) * N_ENVS / (time.perf_counter() - started)


def speeds(arguments: argparse.Namespace) -> list[Comparison]:
    n_branches, repeats = (2, 2) if arguments.quick else (10, 9)
    comparisons = []
    for length in (10, 100):
        bare = make_vec_env("HalfCheetah-v5", N_ENVS, seed=100)
        wrapped = make_vec_env("HalfCheetah-v5", N_ENVS, seed=100, wrapper_class=SnapshotWrapper)
        shape = (length, N_ENVS, *bare.action_space.shape)  # type: ignore[misc]
        actions = np.random.default_rng(100).uniform(-1, 1, shape).astype(np.float32)
        n = n_branches * 100 // length
        turns = {"bare": partial(plain_speed, bare, actions, n), "branches": partial(branch_speed, wrapped, actions, n)}
        figures = interleave(turns, repeats)
        name = f"branches of {length} steps, HalfCheetah-v5, {N_ENVS} environments"
        bar = BAR if length == 100 else None
        comparisons.append(
            Comparison(name, "steps/s", figures["branches"], figures["bare"], bar, True, against="bare DummyVecEnv")
        )
    return comparisons


def main() -> None:
    arguments = argument_parser(__doc__).parse_args()
    set_up()
    gym.register_envs(ale_py)
    repeats = 20 if arguments.quick else 300
    costs = {name: cost(make_env, repeats) for name, make_env in ENVIRONMENTS.items()}
    rows = [(name, *(f"{c[key]:.0f}" for key in ("save", "restore", "bytes", "step"))) for name, c in costs.items()]
    print_table("One snapshot", ("", "save, µs", "restore, µs", "bytes", "a step, µs"), rows)
    megabytes = atari_megabytes(16 if arguments.quick else N_SNAPSHOTS)
    print(f"\n{N_SNAPSHOTS} snapshots of Breakout: {megabytes:.1f} MB (bar: 150)")
    comparisons = speeds(arguments)
    print_comparisons("Branch steps", comparisons, "branches")
    content = {"costs": costs, "atari_megabytes": megabytes, "speeds": [c.as_json() for c in comparisons]}
    write_json(arguments.out, "snapshots", arguments, content)


if __name__ == "__main__":
    main()
