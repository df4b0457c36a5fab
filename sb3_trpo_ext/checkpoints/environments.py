"""A stack of vectorised environments as plain data, and the files of its Monitors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from sb3_trpo_ext.checkpoints.simulators import (
    continue_monitors,
    monitor_files,
    restore_simulator,
    rewrite,
    save_simulator,
    start_in,
)
from sb3_trpo_ext.sampling.snapshot import SnapshotError, SnapshotWrapper, VecSimulator, workers
from sb3_trpo_ext.sampling.snapshot.vec_layers import vec_layers

_LARGEST_SEED = 2**31 - 1


class Environments:
    """One stack.

    :param venv: the stack
    :param must_be_wrapped: whether each environment must be wrapped in ``SnapshotWrapper``, also where that could be
        done without: in this process
    """

    def __init__(self, venv: VecEnv, must_be_wrapped: bool) -> None:
        self.venv = venv
        self.refusal: str | None = None
        """Why it cannot be restored, if so."""
        try:
            self._check(must_be_wrapped)
        except SnapshotError as error:
            self.refusal = str(error)

    def _check(self, must_be_wrapped: bool) -> None:
        vec_layers(self.venv)
        if must_be_wrapped or not isinstance(self.venv.unwrapped, DummyVecEnv):
            VecSimulator(self.venv)
        self._on_each(save_simulator, False)

    # -- where it stands ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the layers above the environments keep, and the environments, if they can be restored."""
        state: dict[str, Any] = {
            "statistics": [_statistics(layer) for layer in self._layers_of(VecNormalize)],
            "episodes": [layer.episode_count for layer in self._layers_of(VecMonitor)],
            "simulators": None,
        }
        if self.refusal is not None:
            return state
        layers, base = vec_layers(self.venv), self.venv.unwrapped
        return state | {
            "simulators": self._on_each(save_simulator, isinstance(base, SubprocVecEnv)),
            "rows": [[layer.row(index) for layer in layers] for index in range(base.num_envs)],
            "reset with": [list(base._seeds), list(base._options)],
            "old": [[getattr(layer, name, None) for name in _OLD] for layer in self._layers_of(VecNormalize)],
        }

    def put_statistics(self, state: dict[str, Any]) -> None:
        """The part of :meth:`put` that needs no environment to be restored."""
        for layer, statistics in zip(self._layers_of(VecNormalize), state["statistics"], strict=True):
            _put_statistics(layer, statistics)
        for layer, episodes in zip(self._layers_of(VecMonitor), state["episodes"], strict=True):
            layer.episode_count = episodes

    def put(self, state: dict[str, Any]) -> None:
        """Return to where :meth:`state` was asked.

        :raises SnapshotError: if it is of other environments
        """
        self.put_statistics(state)
        layers, base = vec_layers(self.venv), self.venv.unwrapped
        for index, (simulator, rows) in enumerate(zip(state["simulators"], state["rows"], strict=True)):
            self._on(index, restore_simulator, simulator)
            for layer, row in zip(layers, rows, strict=True):
                layer.set_row(index, row)
        base._seeds, base._options = state["reset with"]
        for normalize, values in zip(self._layers_of(VecNormalize), state["old"], strict=True):
            vars(normalize).update({name: value for name, value in zip(_OLD, values, strict=True) if value is not None})

    def begin_anew(self, seed: int) -> Any:
        """New episodes; the first observations."""
        self.venv.seed(seed)
        return self.venv.reset()

    def seeds(self) -> list[int]:
        """What its episodes so far came from, and the first to come, as far as that can be seen."""
        pending = [seed for seed in getattr(self.venv.unwrapped, "_seeds", ()) if seed is not None]
        began = self.venv.get_attr("np_random_seed") if self.venv.unwrapped.has_attr("np_random_seed") else []
        return [seed for seed in (*pending, *began) if isinstance(seed, int) and 0 <= seed <= _LARGEST_SEED]

    def seeds_from(self, entropy: tuple[int, ...], used: list[int]) -> int:
        """A seed of which, and of those that count up from it, none was used before."""
        n_envs = self.venv.num_envs
        for seed in np.random.SeedSequence(entropy).generate_state(len(used) + 1, np.uint64).tolist():
            first = seed % (_LARGEST_SEED - n_envs)
            if all(abs(first - other) >= n_envs for other in used):
                break
        return first

    # -- Monitors' files -----------------------------------------------------------------------------

    def log_files(self) -> dict[str, Path]:
        """By a name that is the same in each run of the script."""
        files: dict[str, Path] = {}
        for index, paths in enumerate(self._monitor_files()):
            files |= {f"{index}/{number}": Path(path) for number, path in enumerate(paths)}
        return files | {name: Path(layer.results_writer.file_handler.name) for name, layer in self._vec_monitors()}

    def continue_logs(self, contents: dict[str, bytes]) -> None:
        """Let the files hold what they held."""
        for index, paths in enumerate(self._monitor_files()):
            old = [contents.get(f"{index}/{number}") for number in range(len(paths))]
            if any(content is not None for content in old):
                self._on(index, continue_monitors, old)
        for name, layer in self._vec_monitors():
            if name in contents:
                rewrite(layer.results_writer.file_handler, contents[name])
                layer.t_start = start_in(contents[name], layer.t_start)

    def _monitor_files(self) -> list[list[str]]:
        base = self.venv.unwrapped
        if isinstance(base, DummyVecEnv) or (isinstance(base, SubprocVecEnv) and all(base.env_is_wrapped(SnapshotWrapper))):
            return self._on_each(monitor_files)
        return []

    def _vec_monitors(self) -> Iterator[tuple[str, Any]]:
        for number, layer in enumerate(self._layers_of(VecMonitor)):
            if layer.results_writer is not None:
                yield f"VecMonitor {number}", layer

    # -- calls -----------------------------------------------------------------------------------------

    def _stack(self) -> Iterator[VecEnv]:
        layer = self.venv
        yield layer
        while isinstance(layer, VecEnvWrapper):
            layer = layer.venv
            yield layer

    def _layers_of(self, kind: type[VecEnv]) -> list[Any]:
        return [layer for layer in self._stack() if isinstance(layer, kind)]

    def _on(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        base = self.venv.unwrapped
        if isinstance(base, DummyVecEnv):
            return function(base.envs[index], *args)
        (result,) = workers.call(self.venv, "attempt", "apply", function, *args, index=index)
        if isinstance(result, SnapshotError):
            raise result
        return result

    def _on_each(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [self._on(index, function, *args) for index in range(self.venv.num_envs)]


_OLD = ("old_obs", "old_reward")


def _each(statistics: Any) -> dict[str, RunningMeanStd]:
    return statistics if isinstance(statistics, dict) else {"": statistics}


def _statistics(layer: VecNormalize) -> dict[str, Any]:
    """Running means and variances."""
    kept = {name: _each(getattr(layer, name)) for name in ("obs_rms", "ret_rms") if hasattr(layer, name)}
    return {name: {key: [rms.mean, rms.var, rms.count] for key, rms in each.items()} for name, each in kept.items()}


def _put_statistics(layer: VecNormalize, statistics: dict[str, Any]) -> None:
    for name, each in statistics.items():
        for key, rms in _each(getattr(layer, name)).items():
            rms.mean, rms.var, rms.count = each[key]
