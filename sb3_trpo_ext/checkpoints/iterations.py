"""Where ``learn()`` and ``Checkpoints`` meet: at the boundaries between iterations.

There the state of a run is small and whole: an update has ended, the next rollout has not begun.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_trpo_ext.checkpoints.callback import Checkpoints
from sb3_trpo_ext.checkpoints.callbacks import callbacks_in
from sb3_trpo_ext.checkpoints.parts import Iterations
from sb3_trpo_ext.checkpoints.signals import Asked, listening

_CALLS: WeakKeyDictionary[OnPolicyAlgorithm, int] = WeakKeyDictionary()
"""How often ``learn()`` was called with checkpoints, in this process."""


class Boundaries(Iterations):
    """The iterations of one call of ``learn()``, and what happens between them.

    :param model: the algorithm
    :param checkpoints: the callback that saves, if there is one
    :param asked: the signal that asks to end, if one came
    """

    def __init__(self, model: OnPolicyAlgorithm, checkpoints: Checkpoints | None, asked: Asked) -> None:
        super().__init__()
        self._model, self._checkpoints, self._asked = model, checkpoints, asked

    def boundary(self) -> bool:
        """At the end of an iteration: whether to go on."""
        if self._checkpoints is None:
            return True
        is_last = self._model.num_timesteps >= self._model._total_timesteps
        return self._checkpoints.boundary(is_last, self._asked.name)


@contextmanager
def iterations_of(model: OnPolicyAlgorithm, callback: BaseCallback) -> Iterator[Boundaries]:
    """Around the loop of ``learn()``, once all callbacks know that training starts.

    :raises ValueError: if there are several :class:`Checkpoints`, or this one cannot begin
    """
    found = [child for child in callbacks_in(callback) if isinstance(child, Checkpoints)]
    if not found:
        yield Boundaries(model, None, Asked())
        return
    if len(found) > 1:
        raise ValueError(f"a run has one Checkpoints among its callbacks, got {len(found)}")
    (checkpoints,) = found
    _CALLS[model] = _CALLS.get(model, 0) + 1
    assert model.env is not None
    checkpoints.lock()
    try:
        with listening(checkpoints.signals, model.env) as asked:
            boundaries = Boundaries(model, checkpoints, asked)
            checkpoints.begin(boundaries, callback, _CALLS[model])
            yield boundaries
    finally:
        checkpoints.end()
