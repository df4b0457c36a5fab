"""The folder of a run's checkpoints: written whole or not at all, checked when read, the last few kept."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sb3_trpo_ext.checkpoints.plain_data import NotPlainError, dumps, loads

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

_MAGIC = b"sb3_trpo_ext checkpoint\n"
_HEADER = len(_MAGIC) + 8 + 32  # then the length and the checksum of what follows
_NAME = re.compile(r"learn(\d+)-iteration(\d+)\.checkpoint")
_UNFINISHED = ".unfinished"


class DamagedError(Exception):
    """A checkpoint that is not whole, or not what its name says."""


class Position(NamedTuple):
    """Which checkpoint: of which call of ``learn()``, the first being 1, after how many of its iterations."""

    call: int
    iteration: int

    @property
    def name(self) -> str:
        return f"learn{self.call}-iteration{self.iteration:08d}.checkpoint"


class Folder:
    """Checkpoints by position.

    :param keep: how many of the present call of ``learn()``; of each earlier one the last stays
    """

    def __init__(self, path: str | os.PathLike[str], keep: int = 1) -> None:
        self.path, self.keep = Path(path), keep
        self._lock: int | None = None

    # -- one process at a time ---------------------------------------------------------------------

    def lock(self) -> None:
        """Take the folder for this process; the system gives it back when the process ends, in whatever way.

        :raises ValueError: if another process has it
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self.unlock()
                raise ValueError(f"another run is using {self.path}: give each a folder of its own") from error
        for left in self.path.glob(f"*{_UNFINISHED}"):
            left.unlink(missing_ok=True)

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- writing -------------------------------------------------------------------------------------

    def write(self, position: Position, state: dict[str, Any]) -> None:
        """Write a checkpoint beside its place, and put it there once it is on the disk; then remove old ones.

        :raises OSError: if it cannot be written; what was there stays
        """
        payload = dumps({**state, "position": tuple(position)})
        unfinished = self.path / (position.name + _UNFINISHED)
        try:
            with unfinished.open("wb") as file:
                file.write(_MAGIC + len(payload).to_bytes(8, "little") + hashlib.sha256(payload).digest())
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path / position.name)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        self._sync()
        self._remove_old(position)

    def _sync(self) -> None:
        """Bring the names in the folder to the disk, too."""
        if os.name != "posix":
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _remove_old(self, written: Position) -> None:
        """What is later than ``written`` is of a course that the run did not take: it was passed over."""
        positions = self.positions()
        earlier = [position for position in positions if position <= written]
        last_of_call = {position.call: position for position in sorted(earlier)}
        of_this_call = [position for position in earlier if position.call == written.call]
        kept = {*of_this_call[: self.keep], *last_of_call.values()}
        for position in positions:
            if position not in kept:
                (self.path / position.name).unlink(missing_ok=True)

    # -- reading -------------------------------------------------------------------------------------

    def positions(self) -> list[Position]:
        """Of all checkpoints that are there by name, the newest first."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        found = [match for match in map(_NAME.fullmatch, names) if match]
        return sorted((Position(int(match[1]), int(match[2])) for match in found), reverse=True)

    def of_call(self, call: int) -> Iterator[Position]:
        """Those of one call of ``learn()``, the newest first."""
        yield from (position for position in self.positions() if position.call == call)

    def is_unfinished(self) -> bool:
        """Whether a run left off here before its end, and is not going on already."""
        if not self.positions():
            return False
        try:
            self.lock()
        except ValueError:
            return False
        self.unlock()
        for position in self.positions():
            with suppress(DamagedError):
                return not self.read(position).get("finished")
        return True

    def read(self, position: Position) -> dict[str, Any]:
        """:raises DamagedError: unless it is what was written, in the place it was written for"""
        try:
            data = (self.path / position.name).read_bytes()
        except OSError as error:
            raise DamagedError(str(error)) from error
        payload = data[_HEADER:]
        length, checksum = data[len(_MAGIC) : _HEADER - 32], data[_HEADER - 32 : _HEADER]
        if not data.startswith(_MAGIC):
            raise DamagedError("it does not begin as a checkpoint does")
        if len(payload) != int.from_bytes(length, "little"):
            raise DamagedError(f"it has {len(payload)} bytes of {int.from_bytes(length, 'little')}")
        if hashlib.sha256(payload).digest() != checksum:
            raise DamagedError("its checksum is wrong")
        try:
            state = loads(payload)
        except NotPlainError as error:
            raise DamagedError(str(error)) from error
        if not isinstance(state, dict) or state.get("position") != tuple(position):
            raise DamagedError("its name is that of another checkpoint")
        return state
