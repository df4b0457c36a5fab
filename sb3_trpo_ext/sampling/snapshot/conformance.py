"""Whether a simulator returns: snapshots are taken, restored and replayed, and compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.checks import require_count
from sb3_trpo_ext.masks import METHOD, allowed_action, has_masks
from sb3_trpo_ext.sampling.snapshot.errors import ReplayError
from sb3_trpo_ext.sampling.snapshot.vec_env import VecSimulator, VecSnapshot
from sb3_trpo_ext.sampling.snapshot.wrapper import SnapshotWrapper

_SEED = 12345  # of branches, where the check needs some seed
_USED_INFO = ("terminal_observation", "TimeLimit.truncated")  # all that training reads of infos


class Step(NamedTuple):
    """What one step gave; the flags are ``None`` for a reset, reward included."""

    observation: Any
    reward: Any
    terminated: Any
    truncated: Any
    info: dict[str, Any]


def check_snapshot(
    make_env: Callable[[], gym.Env],
    *,
    n_snapshots: int = 8,
    n_steps: int = 100,
    seed: int = 0,
    ignore_info: Collection[str] = (),
) -> None:
    """Raise unless an environment returns to its snapshots, bit for bit.

    Snapshots are taken along episodes of random actions. Each is restored into the instance it is of, into
    another that has finished an episode, and into a new one; then the same ``n_steps`` actions, through ends of
    episodes and resets, must give the same observations, rewards, flags and infos. Then the same again with
    the generators seeded afresh, as branches have them.

    :param make_env: makes an environment, wrapped in :class:`SnapshotWrapper` or not
    :param n_snapshots: how many, at growing distances of each other
    :param n_steps: how far each is replayed
    :param seed: of the first reset and of the actions
    :param ignore_info: keys of infos that tell of the outer world, such as times (Monitor's is known)
    :raises SnapshotError: if the environment cannot be saved; as :class:`ReplayError` if it went another way, with
        the first step and field that differ
    """
    require_count("n_snapshots", n_snapshots)
    require_count("n_steps", n_steps)
    subject, veteran = _wrapped(make_env()), _wrapped(make_env())
    actions = deepcopy(subject.action_space)
    actions.seed(seed)
    subject.reset(seed=seed)
    veteran.reset(seed=seed + 1)
    _play(veteran, [actions.sample() for _ in range(n_steps)])
    for number in range(n_snapshots):
        _play(subject, [actions.sample() for _ in range(3 + 7 * number)])
        where = f"snapshot {number + 1} of {n_snapshots}"
        chosen = [actions.sample() for _ in range(n_steps)]
        fresh = _wrapped(make_env())
        snapshot = subject.snapshot()
        expected = [_start(deepcopy(subject._last_observation)), *_play(subject, chosen)]
        for branch_seed in (None, _SEED):
            if branch_seed is not None:
                expected = _replay(subject, snapshot, chosen, branch_seed)
            for name, env in (("the same", subject), ("another", veteran), ("a new", fresh)):
                got = _replay(env, snapshot, chosen, branch_seed)
                _compare(expected, got, f"{where}, restored into {name} instance, seed {branch_seed}", ignore_info)
        subject.restore(snapshot)
        fresh.close()
    subject.close()
    veteran.close()


def _wrapped(env: gym.Env) -> SnapshotWrapper:
    return env if isinstance(env, SnapshotWrapper) else SnapshotWrapper(env)


def _play(env: gym.Env, actions: Sequence[Any]) -> list[Step]:
    """Steps, and resets where episodes end; copies, because some environments reuse their arrays."""
    steps = []
    for action in actions:
        if env.has_wrapper_attr(METHOD):
            action = allowed_action(env.action_space, action, env.get_wrapper_attr(METHOD)())
        step = Step(*deepcopy(env.step(action)))
        steps.append(step)
        if step.terminated or step.truncated:
            observation, info = env.reset()
            steps.append(Step(deepcopy(observation), None, None, None, deepcopy(info)))
    return steps


def _replay(env: SnapshotWrapper, snapshot: bytes, actions: Sequence[Any], seed: int | None) -> list[Step]:
    return [_start(deepcopy(env.restore(snapshot, seed))), *_play(env, actions)]


def _compare(expected: Sequence[Step], got: Sequence[Step], where: str, ignore_info: Collection[str] = ()) -> None:
    """:raises ReplayError: naming the first step and field that differ"""
    for number, (one, other) in enumerate(zip(expected, got, strict=False)):
        for field in Step._fields:
            found = difference(getattr(one, field), getattr(other, field), field, frozenset(ignore_info))
            if found:
                when = f"at step {number} after it" if number else "in the observation that restore() gave"
                raise ReplayError(f"the environment does not return: {where}, differs first {when}, in {found}")
    if len(expected) != len(got):
        raise ReplayError(f"the environment does not return: {where}, gave {len(got)} steps for {len(expected)}")


def difference(expected: Any, got: Any, name: str, ignored: frozenset[str] = frozenset()) -> str | None:
    """Where two values differ in any bit, and how; ``None`` if they do not."""
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        if expected.keys() != got.keys():
            return f"the keys of {name}: {sorted(map(str, expected.keys() ^ got.keys()))} are in one only"
        keys = [key for key in expected if key not in ignored and not (name.endswith("'episode']") and key == "t")]
        pairs = [(expected[key], got[key], f"{name}[{key!r}]") for key in keys]
    elif isinstance(expected, (list, tuple)) and isinstance(got, type(expected)) and len(expected) == len(got):
        pairs = [(*both, f"{name}[{i}]") for i, both in enumerate(zip(expected, got, strict=True))]
    else:
        return None if _same_bits(expected, got) else f"{name}: {_shown(expected)} became {_shown(got)}"
    return next(filter(None, (difference(one, other, path, ignored) for one, other, path in pairs)), None)


def _same_bits(expected: Any, got: Any) -> bool:
    one, other = np.asarray(expected), np.asarray(got)
    if one.dtype == object or other.dtype == object:
        return type(expected) is type(got) and bool(expected == got)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def check_returns(venv: VecEnv, n_steps: int = 32) -> None:
    """The short form of :func:`check_snapshot`, for a vectorized environment in use: it leaves no trace.

    Three times random actions from where its first environment stands, with snapshots on the way; from these the rest
    again in the first, second and last environment. The first way is one that nothing has interrupted, and is gone
    once more after the trunk was put back. Compared is what training uses: observations, rewards, flags, and of infos
    whether and where a time limit stopped.

    :param venv: what :class:`VecSimulator` takes, reset before
    :param n_steps: how far each way goes, unless an episode ends before
    :raises SnapshotError: if it cannot branch; as :class:`ReplayError` if it does not return
    """
    simulator = VecSimulator(venv)
    space = deepcopy(venv.action_space)
    space.seed(_SEED)
    ways = [[np.stack([space.sample()] * venv.num_envs) for _ in range(n_steps)] for _ in range(3)]
    trunk = simulator.snapshot(0)
    with simulator.branching():
        simulator.go_on(0)
        ahead = _check_way(simulator, ways[0])
        for seed, actions in enumerate(ways[1:], start=_SEED):
            start = _start(simulator.restore(0, trunk, seed))
            way = [start, *_check_way(simulator, actions)]
            _compare(way, _branch(simulator, 0, trunk, actions, seed), f"environment 0, restored and seeded with {seed}")
    with simulator.branching():
        simulator.go_on(0)
        again = _steps(simulator, 0, ways[0])
    _compare([_start(None), *ahead], [_start(None), *again], "environment 0, put back after branches")


def _check_way(simulator: VecSimulator, actions: Sequence[np.ndarray]) -> list[Step]:
    """Go on in environment 0; then go the rest again from snapshots that were taken on the way."""
    snapshots: dict[int, VecSnapshot] = {}
    way, n_envs = _steps(simulator, 0, actions, snapshots), simulator.venv.num_envs
    for at in sorted({0, *list(snapshots)[-3:]}):
        for index in sorted({0, min(1, n_envs - 1), n_envs - 1}):
            got = _branch(simulator, index, snapshots[at], actions[at:])
            start = _start(way[at - 1].observation) if at else got[0]
            _compare([start, *way[at:]], got, f"environment {index}, restored to step {at} of environment 0")
    return way


def _start(observation: Any) -> Step:
    return Step(observation, None, None, None, {})


def _branch(
    simulator: VecSimulator, index: int, snapshot: VecSnapshot, actions: Sequence[np.ndarray], seed: int | None = None
) -> list[Step]:
    return [_start(simulator.restore(index, snapshot, seed)), *_steps(simulator, index, actions)]


def _steps(
    simulator: VecSimulator, index: int, actions: Sequence[np.ndarray], snapshots: dict[int, VecSnapshot] | None = None
) -> list[Step]:
    """The steps of one environment, to the end of its episode at the latest; the others stand still.

    :param snapshots: filled with some on the way, by the number of steps before them
    """
    steps: list[Step] = []
    venv = simulator.venv
    for batch in actions:
        if snapshots is not None and len(steps) & (len(steps) - 1) == 0:  # 0, 1, 2, 4, 8, ...
            snapshots[len(steps)] = simulator.snapshot(index)
        if has_masks(venv):
            (mask,) = venv.env_method(METHOD, indices=[index])
            batch = np.stack([allowed_action(venv.action_space, batch[index], mask)] * venv.num_envs)
        observations, rewards, dones, infos = simulator.step(batch)
        row = {k: v[index] for k, v in observations.items()} if isinstance(observations, dict) else observations[index]
        info = {key: infos[index][key] for key in _USED_INFO if key in infos[index]}
        steps.append(Step(deepcopy(row), rewards[index], dones[index], None, info))
        if dones[index]:
            break
    simulator.park(index)
    return steps
