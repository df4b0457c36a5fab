"""Signals that ask a run to end: remembered until the run can end cleanly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv


class Asked:
    """Which signal came, if any."""

    name: str | None = None


@contextmanager
def listening(names: Sequence[str], venv: VecEnv) -> Iterator[Asked]:
    """Inside, these signals are remembered; worker processes, which get them too, ignore them.

    Afterwards all is as before. Only Python's main thread can listen; elsewhere nothing changes.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def remember(number: int, frame: Any) -> None:
        asked.name = signal.Signals(number).name

    numbers = [signal.Signals[name] for name in names]
    before = {number: signal.signal(number, remember) for number in numbers}
    _in_workers(venv, numbers, ignore=True)
    try:
        yield asked
    finally:
        # or they would ignore that they are told to end with this process
        _in_workers(venv, numbers, ignore=False)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _in_workers(venv: VecEnv, numbers: Sequence[signal.Signals], ignore: bool) -> None:
    base = venv.unwrapped
    if numbers and isinstance(base, SubprocVecEnv) and not base.closed:
        with suppress(EOFError, OSError):  # workers that are dead ignore everything
            if base.waiting:
                base.step_wait()
            base.has_attr(_Message("num_envs", [int(number) for number in numbers], ignore))


class _Message(str):
    """A question that any worker answers; taking it out of the pipe sets how signals are met there."""

    def __new__(cls, question: str, numbers: list[int], ignore: bool) -> _Message:
        message = super().__new__(cls, question)
        message.rest = numbers, ignore  # type: ignore[attr-defined]
        return message

    def __reduce__(self) -> Any:
        return _received, (str(self), *self.rest)  # type: ignore[attr-defined]


def _received(question: str, numbers: list[int], ignore: bool) -> str:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN if ignore else signal.SIG_DFL)
    return question
