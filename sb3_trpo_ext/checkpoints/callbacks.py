"""The callbacks of a run: found wherever they stand, and their state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.checkpoints.attributes import Attributes
from sb3_trpo_ext.checkpoints.environments import Environments

_OF_EVERY_CALLBACK = ("model", "locals", "globals", "parent", "verbose")
_COUNTERS = ("n_calls", "num_timesteps")


@runtime_checkable
class HasState(Protocol):
    """A callback that says itself what its state is: plain data."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


def callbacks_in(root: BaseCallback) -> Iterator[BaseCallback]:
    """A callback and those it holds, in lists and as attributes, each once."""
    waiting, met = [root], {id(root)}
    while waiting:
        callback = waiting.pop(0)
        yield callback
        for name, value in vars(callback).items():
            for child in _items(value) if name != "parent" else ():
                if isinstance(child, BaseCallback) and id(child) not in met:
                    met.add(id(child))
                    waiting.append(child)


def _items(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        return tuple(value.values())
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


class CallbackStates:
    """Of all callbacks of a run.

    :param root: the callback that holds them
    :param training_env: what is not theirs
    """

    def __init__(self, root: BaseCallback, training_env: VecEnv) -> None:
        self._callbacks: dict[str, BaseCallback] = {}
        met: Counter[str] = Counter()
        for callback in callbacks_in(root):
            kind = f"{type(callback).__module__}.{type(callback).__qualname__}"
            met[kind] += 1
            self._callbacks[f"{kind} {met[kind]}"] = callback
        self._attributes = {key: Attributes(callback, _OF_EVERY_CALLBACK) for key, callback in self._callbacks.items()}
        self.environments = {
            (key, name): Environments(value, must_be_wrapped=False)
            for key, callback in self._callbacks.items()
            for name, value in vars(callback).items()
            if isinstance(value, VecEnv) and value is not training_env and name not in _OF_EVERY_CALLBACK
        }

    def refusals(self) -> list[str]:
        """What cannot be carried, and what to do."""
        found = []
        for key, callback in self._callbacks.items():
            names = [] if _is_of_sb3(callback) or isinstance(callback, HasState) else self._attributes[key].not_carried()
            if names:
                kind = type(callback).__name__
                what = ", ".join(f"{kind}.{name}" for name in names)
                found.append(f"{what} is not plain data (give {kind} get_state() and set_state(state))")
        return found

    def state(self) -> dict[str, Any]:
        return {
            "attributes": {key: self._state_of(key, callback) for key, callback in self._callbacks.items()},
            "own": {key: callback.get_state() for key, callback in self._callbacks.items() if isinstance(callback, HasState)},
        }

    def _state_of(self, key: str, callback: BaseCallback) -> dict[str, Any]:
        if isinstance(callback, HasState):
            return {name: getattr(callback, name) for name in _COUNTERS}
        return self._attributes[key].state()

    def put(self, state: dict[str, Any]) -> None:
        """Callbacks that were not there then start as they are."""
        for key, attributes in state["attributes"].items():
            if key in self._callbacks:
                self._attributes[key].put(attributes)
        for key, own in state["own"].items():
            callback = self._callbacks.get(key)
            if isinstance(callback, HasState):
                callback.set_state(own)
        for callback in self._callbacks.values():
            _bring_up_to_date(callback)


def _is_of_sb3(callback: BaseCallback) -> bool:
    return type(callback).__module__.startswith("stable_baselines3.")


def _bring_up_to_date(callback: BaseCallback) -> None:
    """What a callback shows of its state outside of itself."""
    if isinstance(callback, ProgressBarCallback):
        callback.pbar.update(callback.model.num_timesteps - callback.model._num_timesteps_at_start - callback.pbar.n)
    if isinstance(callback, EvalCallback) and callback.log_path is not None:
        _write_evaluations(callback, Path(f"{callback.log_path}.npz"))


def _write_evaluations(callback: EvalCallback, path: Path) -> None:
    """As the callback does at each evaluation: what the file has of later ones has yet to happen."""
    if not callback.evaluations_timesteps:
        path.unlink(missing_ok=True)
        return
    successes = {"successes": callback.evaluations_successes} if callback.evaluations_successes else {}
    np.savez(
        path,
        timesteps=callback.evaluations_timesteps,
        results=callback.evaluations_results,
        ep_lengths=callback.evaluations_length,
        **successes,  # type: ignore[arg-type]
    )
