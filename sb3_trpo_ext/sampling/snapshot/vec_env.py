"""Branching from visited states, over a whole stack of vectorized environments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.sampling.snapshot import workers
from sb3_trpo_ext.sampling.snapshot.allowed import UnknownCodeError
from sb3_trpo_ext.sampling.snapshot.constants import UnknownConstantError
from sb3_trpo_ext.sampling.snapshot.errors import BranchError, SnapshotError
from sb3_trpo_ext.sampling.snapshot.generators import global_states, set_global_states
from sb3_trpo_ext.sampling.snapshot.vec_layers import vec_layers
from sb3_trpo_ext.sampling.snapshot.wrapper import BRANCH_ERROR, SnapshotWrapper

HOW_TO_WRAP = "make it with make_vec_env(..., wrapper_class=SnapshotWrapper)"


class VecSnapshot(NamedTuple):
    """Where one environment of a stack stood: plain data, of use to any environment of the stack."""

    env: bytes
    rows: tuple[Any, ...]  # what the layers above keep of it


class VecSimulator:
    """A ``VecEnv`` whose environments return to states that any of them has been in.

    .. code-block:: python

        snapshot = simulator.snapshot(index=3)                # while the trunk goes on
        with simulator.branching():
            observation = simulator.restore(0, snapshot, seed=7)
            observations, rewards, dones, infos = simulator.step(actions)
        # the trunk stands where it stood, random generators, statistics and files included

    :param venv: wrappers of SB3's over a ``DummyVecEnv`` or ``SubprocVecEnv`` over environments whose
        outermost wrapper is :class:`SnapshotWrapper`
    :raises SnapshotError: naming the layer that cannot be carried, or saying what to wrap
    """

    def __init__(self, venv: VecEnv) -> None:
        self.venv = venv
        self._layers = vec_layers(venv)
        self._require_wrapped()
        self._branching = False

    def _require_wrapped(self) -> None:
        if not all(self.venv.env_is_wrapped(SnapshotWrapper)):
            raise SnapshotError(f"the environments are not wrapped in SnapshotWrapper: {HOW_TO_WRAP}")
        for name in self.venv.env_method("class_name"):
            if name != SnapshotWrapper.__name__:
                raise SnapshotError(f"layer {name} is outside of SnapshotWrapper, which must be outermost: {HOW_TO_WRAP}")
        signatures = self._call("signature")
        for signature in signatures:
            if signature != signatures[0]:
                raise SnapshotError(f"the environments differ: snapshots of\n  {signatures[0]}\ndo not fit\n  {signature}")

    def snapshot(self, index: int) -> VecSnapshot:
        """Where environment ``index`` stands."""
        (env,) = self._call("snapshot", False, index=index)
        return VecSnapshot(env, tuple(layer.row(index) for layer in self._layers))

    @contextmanager
    def branching(self) -> Iterator[None]:
        """Inside, nothing is recorded and nothing lasts: afterwards all goes on as if nothing had happened.

        Each environment stands still until it is restored, and again from the end of its episode on.

        :raises WorkerDiedError: at the end, if a worker process has died meanwhile
        """
        if self._branching:
            raise RuntimeError("branches do not branch: this VecSimulator is branching already")
        random_states = global_states()
        for layer in self._layers:
            layer.freeze()
        self._branching = True
        try:
            self._call("begin_branches")
            yield
        except BaseException:
            workers.settle(self.venv)
            raise
        finally:
            self._branching = False
            for layer in self._layers:
                layer.thaw()
            set_global_states(random_states)
            self._call("end_branches")

    def restore(self, index: int, snapshot: VecSnapshot, seed: int | None = None) -> Any:
        """Put environment ``index`` where a snapshot was taken, of this environment or another.

        :param seed: if given, every random generator of the environment is seeded afresh from it
        :return: its last observation as it leaves the stack, without the axis of environments
        """
        self._require_branching()
        observation = self._restore_env(index, snapshot.env, seed)
        for layer, row in zip(self._layers, snapshot.rows, strict=True):
            layer.set_row(index, row)
            observation = layer.observe(index, observation)
        return {k: batch[0] for k, batch in observation.items()} if isinstance(observation, dict) else observation[0]

    def _restore_env(self, index: int, snapshot: bytes, seed: int | None) -> Any:
        while True:
            try:
                return self._call("restore", snapshot, seed, index=index)[0]
            except UnknownConstantError as error:  # of another worker process
                self._hand_over("content", error.digest, error, index)
            except UnknownCodeError as error:
                self._hand_over("code", error.key, error, index)

    def _hand_over(self, what: str, key: Any, error: SnapshotError, index: int) -> None:
        """To environment ``index``, what another one has.

        :raises SnapshotError: the error, if none has it
        """
        found = [held for held in self._call(f"{what}_of", key) if held is not None]
        if not found:
            raise error
        self._call(f"take_{what}", key, found[0], index=index)

    def go_on(self, index: int) -> None:
        """Let environment ``index`` run from where it stands, as the trunk would."""
        self._require_branching()
        self._call("go_on", index=index)

    def park(self, index: int) -> None:
        """Let environment ``index`` stand still until it is restored again."""
        self._require_branching()
        self._call("park", index=index)

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, Any]:
        """One step of all environments through the stack; those that stand still ignore their action.

        :raises BranchError: if an environment raised; it and the trunk are as good as before
        :raises WorkerDiedError: if a worker process died
        """
        self._require_branching()
        observations, rewards, dones, infos = workers.step(self.venv, actions)
        if np.count_nonzero(dones):
            for index in np.flatnonzero(dones):
                if BRANCH_ERROR in infos[index]:
                    raise BranchError(f"environment {index} raised in a branch: {infos[index][BRANCH_ERROR]}")
        return observations, rewards, dones, infos

    def _require_branching(self) -> None:
        if not self._branching:
            raise RuntimeError("restore(), park() and step() belong inside `with simulator.branching():`")

    def _call(self, method: str, *args: Any, index: int | None = None) -> list[Any]:
        results = workers.call(self.venv, "attempt", method, *args, index=index)
        for result in results:
            if isinstance(result, SnapshotError):
                raise result
        return results
