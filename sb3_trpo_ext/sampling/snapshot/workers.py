"""Calls to the environments of a ``VecEnv`` that notice when a worker process dies.

SB3 waits for an answer for good where a dead worker's pipe is still open in another worker, as after a fork.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_trpo_ext.sampling.snapshot.errors import WorkerDiedError

_PATIENCE = 0.5  # seconds between looks at whether a silent worker is alive


def call(venv: VecEnv, method: str, *args: Any, index: int | None = None) -> list[Any]:
    """``env_method`` on one environment, or on all.

    :raises WorkerDiedError: if a worker process died, now or before
    """
    base = venv.unwrapped
    if not isinstance(base, SubprocVecEnv):
        return venv.env_method(method, *args, indices=index)
    indices = range(base.num_envs) if index is None else [index]
    try:
        for i in indices:
            base.remotes[i].send(("env_method", (method, args, {})))
        _await(base, indices)
        return [base.remotes[i].recv() for i in indices]
    except (EOFError, OSError) as error:
        raise _death(base) from error


def step(venv: VecEnv, actions: Any) -> Any:
    """``venv.step(actions)``.

    :raises WorkerDiedError: if a worker process died
    """
    base = venv.unwrapped
    if not isinstance(base, SubprocVecEnv):
        return venv.step(actions)
    try:
        venv.step_async(actions)
        _await(base, range(base.num_envs))
        return venv.step_wait()
    except (EOFError, OSError) as error:
        raise _death(base) from error


def settle(venv: VecEnv) -> None:
    """Throw away replies that nobody waits for any more, after an interrupt; dead workers are left to the next call.

    Otherwise each later call would be given the reply to the one before it.
    """
    base = venv.unwrapped
    if not isinstance(base, SubprocVecEnv):
        return
    token = uuid4().hex
    for index, remote in enumerate(base.remotes):
        try:
            remote.send(("env_method", ("echo", (token,), {})))
            reply = None
            # what of earlier replies was received is not known, but their order is
            while not (isinstance(reply, str) and reply == token):
                _await(base, [index])
                reply = remote.recv()
        except (EOFError, OSError):
            continue
    base.waiting = False


def _await(base: SubprocVecEnv, indices: Sequence[int]) -> None:
    for index in indices:
        while not base.remotes[index].poll(_PATIENCE):
            if not base.processes[index].is_alive():
                raise EOFError


def _death(base: SubprocVecEnv) -> WorkerDiedError:
    for process in base.processes:
        process.join(timeout=0.1)
    dead = [f"{i} (exit code {process.exitcode})" for i, process in enumerate(base.processes) if not process.is_alive()]
    return WorkerDiedError(f"worker processes have died, of environments {', '.join(dead) or '?'}")
