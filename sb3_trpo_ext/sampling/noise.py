"""Random numbers of rollouts: whose generators they come from, and which of them are left as they were."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch as th

_MOST_NUMBERS_AHEAD = 2**23
_NORMAL_NUMBERS_AT_A_TIME = 16


class NoiseInBlocks:
    """Noise of the steps of a rollout, by step, drawn a block of steps at a time as the steps come.

    It has the bits of noise drawn at once, as long as nobody else draws between blocks.

    :param draw: a number of steps ↦ their noise (steps, E, ·)
    :param block: steps in a block
    """

    def __init__(self, draw: Callable[[int], np.ndarray], n_steps: int, block: int) -> None:
        self._draw, self._n_steps, self._block = draw, n_steps, block
        self._start, self._noise = 0, np.empty(0)

    def __getitem__(self, step: int) -> np.ndarray:
        if step >= self._start + len(self._noise):
            self._start += len(self._noise)
            self._noise = np.empty(0)  # before the next is drawn
            rest = self._n_steps - self._start
            # no fewer numbers at the end than torch draws at a time
            self._noise = self._draw(rest if rest < self._block + _NORMAL_NUMBERS_AT_A_TIME else self._block)
        return self._noise[step - self._start]


def noise_ahead(draw: Callable[[int], np.ndarray], n_steps: int, numbers: int) -> np.ndarray | NoiseInBlocks:
    """Noise of that many steps of a rollout, by step: drawn now, or in blocks where it is a great deal.

    All noise that is drawn ahead of a rollout comes through here, in the order of steps and environments. Policies whose
    distributions have no head draw for themselves at each step, and gSDE its matrices, from torch's global generator.

    :param draw: a number of steps ↦ their noise (steps, E, ·)
    :param numbers: in the noise of one step
    """
    if n_steps * numbers <= _MOST_NUMBERS_AHEAD:
        return draw(n_steps)
    at_a_time = _NORMAL_NUMBERS_AT_A_TIME
    return NoiseInBlocks(draw, n_steps, max(1, _MOST_NUMBERS_AHEAD // (at_a_time * numbers)) * at_a_time)


def branch_generator(seed: int | None, n_updates: int, num_timesteps: int) -> np.random.Generator:
    """The generator of one vine: of the model's seed and of how far it has come, so that an archive has it too.

    Without a seed it follows the global generators of torch and NumPy, which are left where they are.
    """
    return np.random.default_rng([_global_entropy() if seed is None else seed, n_updates, num_timesteps])


def _global_entropy() -> int:
    return zlib.crc32(pickle.dumps((th.get_rng_state().numpy(), np.random.get_state(legacy=False))))


@contextmanager
def global_generators_kept(device: th.device, seed: int) -> Iterator[None]:
    """Context that leaves the global generators of NumPy, torch and the model's own CUDA device as they were.

    Inside, torch's are seeded, for policies that draw their own noise; those of other devices are not touched.
    """
    generators = [th.default_generator]
    if device.type == "cuda":
        generators.append(th.cuda.default_generators[th.cuda.current_device() if device.index is None else device.index])
    states, of_numpy = [generator.get_state() for generator in generators], np.random.get_state()
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        np.random.set_state(of_numpy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
