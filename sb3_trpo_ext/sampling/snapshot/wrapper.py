"""A wrapper that makes an environment return to states it has been in, exactly."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from copy import deepcopy
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor

from sb3_trpo_ext.sampling.snapshot.allowed import Key
from sb3_trpo_ext.sampling.snapshot.chain import Chain
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError
from sb3_trpo_ext.sampling.snapshot.generators import global_states, set_global_states
from sb3_trpo_ext.sampling.snapshot.layers import MonitorRecords

BRANCH_ERROR = "branch_error"  # key of infos: what a simulator raised in a branch


_Way = tuple[tuple[bytes, int | None], list[Any]]  # of a branch: snapshot and seed, and the actions since
_NOWHERE: _Way = ((b"", None), [])


class SnapshotWrapper(gym.Wrapper, RecordConstructorArgs):
    """Takes snapshots of an environment and returns to them: the outermost wrapper.

    The same actions after :meth:`restore` give the same observations, rewards, flags and infos, bit for bit,
    also in another instance of the same environment and in another process. Use :func:`check_snapshot` to
    see it of your own environment.

    :param env: any chain of wrappers over plain Python, MuJoCo, ALE or Box2D; or over an environment with
        ``snapshot_state()`` and ``restore_state(state)``, or with a registered adapter
    :raises SnapshotError: naming the layer and what to do, if something in the chain cannot be carried
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        self._refusal: SnapshotError | None = None
        try:
            if is_wrapped(env, SnapshotWrapper):
                raise SnapshotError("the environment is wrapped in SnapshotWrapper already")
            self._chain = Chain(env, self)
        except SnapshotError as error:
            if multiprocessing.parent_process() is None:
                raise
            self._refusal = error  # a worker process must live to tell: see attempt()
        self._last_observation: Any = None
        self._reset_info: dict[str, Any] | None = None
        self._trunk: _Trunk | None = None
        self._way = _NOWHERE
        self._parked = False

    @classmethod
    def class_name(cls) -> str:
        """Also of derived classes: whoever asks wants to know what is outermost."""
        return SnapshotWrapper.__name__

    def signature(self) -> str:
        """Environments of equal signature exchange snapshots."""
        if self._refusal is not None:
            raise self._refusal
        return self._chain.signature

    def attempt(self, method: str, *args: Any) -> Any:
        """Call a method; an error is returned, not raised, because a worker process would die of it."""
        try:
            return getattr(self, method)(*args)
        except SnapshotError as error:
            return error
        except Exception as error:
            return SnapshotError(f"{method}() failed: {type(error).__name__}: {error}")

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(self, *args)``, where the environment is."""
        return function(self, *args)

    def echo(self, token: str) -> str:
        """The token: a worker process's reply to it is known among others."""
        return token

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self._trunk is not None:  # a VecEnv resets whatever is done; the next restore is what counts
            return self._last_observation, self._reset_info or {}
        self._last_observation, self._reset_info = self.env.reset(seed=seed, options=options)
        return self._last_observation, self._reset_info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        if self._trunk is not None:
            return self._step_branch(action)
        result = self.env.step(action)
        self._last_observation = result[0]
        return result

    def snapshot(self, self_contained: bool = True) -> bytes:
        """Where the simulation stands, with its random generators and the last observation.

        :param self_contained: if not, large arrays that have not changed since the first such snapshot are told by their
            content, not copied; it is then of use to environments of a process that has them
        :raises SnapshotError: before the first reset, or if something in the chain cannot be carried
        """
        if self._refusal is not None:
            raise self._refusal
        if self._last_observation is None:
            raise SnapshotError("there is no state to save before the first reset()")
        return self._chain.save(self._last_observation, self_contained)

    def restore(self, snapshot: bytes, seed: int | None = None) -> Any:
        """Return to a snapshot, of this or another instance.

        :param seed: if given, every random generator of the chain is seeded afresh from it
        :return: the observation that was the last at the snapshot
        :raises SnapshotError: if the snapshot is of an environment with another signature
        """
        try:
            self._last_observation = self._chain.restore(snapshot, seed)
        except Exception as error:
            if isinstance(error, SnapshotError) or not self._chain.constants.frozen:
                raise
            self._chain.constants.thaw(for_good=True)  # an environment's own way to restore may write to them
            self._last_observation = self._chain.restore(snapshot, seed)
        self._parked = False
        if self._trunk is not None:
            self._way = (snapshot, seed), []
        return self._last_observation

    def begin_branches(self) -> None:
        """From here on until :meth:`end_branches` nothing is recorded, and nothing lasts.

        :meth:`reset` does nothing, and an environment that is done, or was not yet restored, stands still.
        """
        if self._trunk is None:
            self._trunk = _Trunk(self)
            self._parked = True
            self._way = (self._trunk.snapshot, None), []
            self._chain.freeze_constants()

    def end_branches(self) -> None:
        """Go on where :meth:`begin_branches` was called, as if nothing had happened since.

        :raises SnapshotError: if branches were not what they should have been, because a large array that had never
            changed was written to through another that shares its memory
        """
        if self._trunk is None:
            return
        constants = self._chain.constants
        names = [self._chain.name_of(array) for array in constants.changed_while_frozen()]
        if names:
            constants.thaw(for_good=True)
        self._trunk.restore(self)
        constants.thaw()
        self._trunk, self._parked, self._way = None, False, _NOWHERE
        if names:
            raise SnapshotError(
                f"{', '.join(names)} had not changed before, and did in a branch, through another array that shares its "
                "memory. From now on it is looked at each time: start again"
            )

    def park(self) -> None:
        """In branches: stand still until the next :meth:`restore`."""
        self._parked = True

    def go_on(self) -> None:
        """In branches: run from where the environment stands, as the trunk would."""
        self._parked = False

    def content_of(self, digest: str) -> np.ndarray | None:
        """Of a large array that snapshots tell by its digest, for a process that does not have it."""
        return self._chain.constants.content_of(digest)

    def take_content(self, digest: str, content: np.ndarray) -> None:
        """From another process."""
        self._chain.constants.take(digest, content)

    def code_of(self, key: Key) -> bytes | None:
        """Of what a snapshot may name, for a process where no environment of this kind has; see ``Code.told``."""
        return self._chain.code.told(key)

    def take_code(self, key: Key, code: bytes) -> None:
        """From another process."""
        self._chain.code.trust(key, code)

    def _step_branch(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        if self._parked:
            return self._last_observation, 0.0, False, False, {}
        try:
            result = self._step_in_branch(action)
        except Exception as error:  # in a worker process it would take the trunk down with it
            self._parked = True
            return self._last_observation, 0.0, False, True, {BRANCH_ERROR: f"{type(error).__name__}: {error}"}
        self._last_observation = result[0]
        self._parked = bool(result[2] or result[3])
        return result

    def _step_in_branch(self, action: Any) -> Any:
        if not self._chain.constants.frozen:
            return self.env.step(action)
        start, taken = self._way
        taken.append(np.copy(action) if isinstance(action, np.ndarray) else deepcopy(action))
        try:
            return self.env.step(action)
        except Exception:
            # it may have written to what had never changed: the same way again, with all that can be
            self._chain.constants.thaw(for_good=True)
            self.restore(*start)
            for before in taken[:-1]:
                self.env.step(before)
            return self.env.step(action)


class _Trunk:
    """What an environment goes back to after branches: state, records, and the process's own generators."""

    def __init__(self, wrapper: SnapshotWrapper) -> None:
        self.snapshot = wrapper.snapshot(self_contained=False)
        self._globals = global_states()
        monitors = [layer.env for layer in wrapper._chain.layers if isinstance(layer.env, Monitor)]
        self._records = [MonitorRecords(monitor) for monitor in monitors]

    def restore(self, wrapper: SnapshotWrapper) -> None:
        for record in self._records:
            record.undo()
        wrapper.restore(self.snapshot)
        set_global_states(self._globals)
