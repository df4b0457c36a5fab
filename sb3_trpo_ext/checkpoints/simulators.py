"""One environment as plain data. These functions run where the environment is, in a worker process too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor

from sb3_trpo_ext.checkpoints.plain_data import NotPlainError, dumps, loads
from sb3_trpo_ext.checkpoints.trees import OfAnEnvironment, snapshot_of, tree_of
from sb3_trpo_ext.sampling.snapshot import SnapshotError, SnapshotWrapper
from sb3_trpo_ext.sampling.snapshot.adapters import adapter_factory
from sb3_trpo_ext.sampling.snapshot.adapters.replay import ReplayAdapter
from sb3_trpo_ext.sampling.snapshot.chain import Chain
from sb3_trpo_ext.sampling.snapshot.generators import global_states, set_global_states


def chain_of(env: gym.Env) -> Chain:
    """:raises SnapshotError: if it cannot be carried as it is"""
    if isinstance(env, SnapshotWrapper):
        env.signature()  # raises what was wrong with it
        return env._chain
    factory = adapter_factory(env.unwrapped)
    if isinstance(factory, type) and issubclass(factory, ReplayAdapter):
        name = type(env.unwrapped).__qualname__
        raise SnapshotError(f"{name} returns by replay, so that SnapshotWrapper has to see all of its episodes")
    return Chain(env, env)


def save_simulator(env: gym.Env, with_generators: bool) -> bytes:
    """Where an environment stands.

    :param with_generators: those of the process, too
    :raises SnapshotError: if it cannot be carried
    """
    chain = chain_of(env)
    tree = tree_of(chain, chain.save(getattr(env, "_last_observation", None)))
    try:
        return dumps((tree, global_states() if with_generators else None), OfAnEnvironment(chain))
    except NotPlainError as error:
        raise SnapshotError(f"the state of {chain.layers[-1].name} cannot be kept in a file: {error}") from error


def restore_simulator(env: gym.Env, data: bytes) -> None:
    """The counterpart.

    :raises SnapshotError: if it is of another environment, or no such data
    """
    chain = chain_of(env)
    of_itself = OfAnEnvironment(chain)
    dumps(tree_of(chain, chain.save(getattr(env, "_last_observation", None))), of_itself)  # knows now what it names
    try:
        tree, generators = loads(data, of_itself)
        snapshot = snapshot_of(chain, tree)
    except (NotPlainError, ValueError, TypeError) as error:
        raise SnapshotError(f"not the state of {chain.layers[-1].name}: {error}") from error
    observation = chain.restore(snapshot)
    if isinstance(env, SnapshotWrapper):
        env._last_observation = observation
    if generators is not None:
        set_global_states(generators)


# -- what belongs to the process, not to the simulation --------------------------------------------------


def monitors(env: gym.Env) -> Iterator[Monitor]:
    """The Monitors of one environment that write files."""
    layer = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, Monitor) and layer.results_writer is not None:
            yield layer
        layer = layer.env


def monitor_files(env: gym.Env) -> list[str]:
    return [monitor.results_writer.file_handler.name for monitor in monitors(env)]  # type: ignore[union-attr]


def continue_monitors(env: gym.Env, contents: list[bytes | None]) -> None:
    """Let the files of Monitors hold what they held, and go on from there.

    :param contents: one for each of :func:`monitor_files`; None: it stays as it is
    """
    for monitor, content in zip(monitors(env), contents, strict=True):
        if content is not None:
            assert monitor.results_writer is not None
            rewrite(monitor.results_writer.file_handler, content)
            monitor.t_start = start_in(content, monitor.t_start)


def rewrite(file: Any, content: bytes) -> None:
    """Replace what is in an open text file."""
    file.flush()
    file.seek(0)
    file.truncate()
    file.write(content.decode())
    file.flush()


def start_in(content: bytes, otherwise: float) -> float:
    """When the clock of a Monitor's file started."""
    try:
        return float(json.loads(content.partition(b"\n")[0].removeprefix(b"#"))["t_start"])
    except (ValueError, KeyError, TypeError):
        return otherwise
