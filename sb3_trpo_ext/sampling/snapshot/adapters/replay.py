"""Replay: for engines whose state cannot be put back.

The environment is reset as it was and takes the same actions again, so a restore costs as many steps as the
episode is old. Exact for whatever follows from ``np_random`` and the actions alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_trpo_ext.sampling.snapshot.adapters.base import SnapshotAdapter
from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError
from sb3_trpo_ext.sampling.snapshot.generators import set_state, state_of


class ReplayAdapter(SnapshotAdapter):
    """Records how an environment was reset, and the actions since.

    :param env: one whose only generator is ``np_random``, and whose episodes do not depend on those before
    """

    handles = None
    signature = "replay of actions"

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._env_reset, self._env_step = env.reset, env.step
        self._inside = False  # some environments step themselves in reset()
        self._episode = _Episode(None, None, None)
        # on the instance: the wrapper above it holds the environment already
        self.env.reset, self.env.step = self._reset, self._step

    def prepare_reset(self) -> None:
        """Before each reset: remove what would survive it."""

    def save(self) -> list[Any]:
        return self._episode.packed()

    def restore(self, state: list[Any]) -> None:
        episode = _Episode.unpacked(state)
        set_state(self.env.np_random, episode.generator)
        self._reset(seed=episode.seed, options=episode.options)
        reseedings = dict(episode.reseedings)
        for t, action in enumerate(episode.actions()):
            if t in reseedings:
                set_state(self.env.np_random, reseedings[t])
            self._env_step(action)
        if len(episode.taken) in reseedings:
            set_state(self.env.np_random, reseedings[len(episode.taken)])
        self._episode = episode

    def reseed(self, seed: int) -> None:
        self._episode.reseedings.append((len(self._episode.taken), state_of(self.env.np_random)[1]))

    def _reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._episode = _Episode(state_of(self.env.np_random)[1], seed, deepcopy(options))
        self.prepare_reset()
        self._inside = True
        try:
            return self._env_reset(seed=seed, options=options)
        finally:
            self._inside = False

    def _step(self, action: Any) -> Any:
        if not self._inside:
            self._episode.take(action)
        return self._env_step(action)


class _Episode:
    """What an episode follows from; the actions packed, because there are many."""

    def __init__(self, generator: Any, seed: int | None, options: dict[str, Any] | None) -> None:
        self.generator, self.seed, self.options = generator, seed, options
        self.taken: list[bytes] = []
        self.formats: list[tuple[int, str, tuple[int, ...]]] = []  # (from step, dtype, shape)
        self.reseedings: list[tuple[int, Any]] = []  # (before step, state)

    def take(self, action: Any) -> None:
        array = np.asarray(action)
        if array.dtype == object:
            raise SnapshotError(f"replay needs actions that are numbers or arrays, got {type(action).__qualname__}")
        if not self.formats or self.formats[-1][1:] != (array.dtype.str, array.shape):
            self.formats.append((len(self.taken), array.dtype.str, array.shape))
        self.taken.append(array.tobytes())

    def actions(self) -> Iterator[Any]:
        ends = [start for start, _, _ in self.formats[1:]] + [len(self.taken)]
        for (start, dtype, shape), end in zip(self.formats, ends, strict=False):
            for data in self.taken[start:end]:
                yield np.frombuffer(data, dtype).reshape(shape).copy()[()]

    def packed(self) -> list[Any]:
        lengths = [len(data) for data in self.taken[:1]] if len(self.formats) == 1 else [len(data) for data in self.taken]
        start = [self.generator, self.seed, self.options]
        return [*start, self.formats, list(self.reseedings), len(self.taken), lengths, b"".join(self.taken)]

    @classmethod
    def unpacked(cls, packed: list[Any]) -> _Episode:
        generator, seed, options, formats, reseedings, n_steps, lengths, data = packed
        episode = cls(generator, seed, options)
        episode.formats, episode.reseedings = formats, reseedings
        start = 0
        for length in lengths if len(lengths) == n_steps else lengths * n_steps:
            episode.taken.append(data[start : start + length])
            start += length
        return episode
