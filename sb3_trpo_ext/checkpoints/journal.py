"""Copies of log files, in one file that only grows.

A script that is run again opens its ``monitor.csv`` and ``progress.csv`` anew, which empties them before anyone can
look. So what was logged is kept here, and only what is new is written at each checkpoint.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sb3_trpo_ext.checkpoints.folder import DamagedError


class Journal:
    """What has been logged, by the name of the log.

    :param path: the file
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._length, self._checksum = 0, 0
        self._lengths: dict[str, int] = {}
        self._versions: dict[str, Any] = {}

    def write(self, logs: dict[str, tuple[Path, Any]]) -> dict[str, Any]:
        """Bring the journal up to the logs.

        :param logs: by name, the file and what changes when the file is not just longer, but written anew
        :return: where the journal stands now: what :meth:`contents` takes
        :raises OSError: if it cannot be written; the next attempt begins where this one did
        """
        if self._length and not (self.path.exists() and self.path.stat().st_size >= self._length):
            self._length, self._checksum, self._lengths = 0, 0, {}
        records = [record for name, (path, version) in logs.items() if (record := self._news(name, path, version))]
        data = b"".join(
            len(header).to_bytes(4, "little") + header + content
            for name, start, content in records
            for header in [json.dumps([name, start, len(content)]).encode()]
        )
        if data:
            with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                file.seek(self._length)
                file.truncate()  # what followed is of a course that the run did not take
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self._length += len(data)
        self._checksum = zlib.crc32(data, self._checksum)
        for name, start, content in records:
            self._lengths[name] = start + len(content)
        self._versions = {name: version for name, (_, version) in logs.items()}
        return {"length": self._length, "checksum": self._checksum, "lengths": dict(self._lengths)}

    def _news(self, name: str, path: Path, version: Any) -> tuple[str, int, bytes] | None:
        start = self._lengths.get(name, 0)
        try:
            with path.open("rb") as file:
                if version != self._versions.get(name, version) or os.fstat(file.fileno()).st_size < start:
                    start = 0
                file.seek(start)
                content = file.read()
        except FileNotFoundError:
            return None  # its owner has removed it
        return (name, start, content) if content or start != self._lengths.get(name, 0) else None

    def contents(self, mark: dict[str, Any]) -> dict[str, bytes]:
        """What was logged, by name, up to where :meth:`write` left off then.

        :raises DamagedError: if the journal is not what it was
        """
        try:
            with self.path.open("rb") as file:
                data = file.read(mark["length"])
        except FileNotFoundError:
            data = b""
        if len(data) != mark["length"] or zlib.crc32(data) != mark["checksum"]:
            raise DamagedError(f"of the logs, {self.path.name} does not have what it had")
        found: dict[str, bytearray] = {}
        for name, start, content in _records(data):
            log = found.setdefault(name, bytearray())
            log[start:] = content
        return {name: bytes(log) for name, log in found.items()}

    def continue_from(self, mark: dict[str, Any], versions: dict[str, Any]) -> None:
        """Go on after what :meth:`write` gave; nothing is cut off before something is written."""
        self._length, self._checksum = mark["length"], mark["checksum"]
        self._lengths, self._versions = dict(mark["lengths"]), versions


def _records(data: bytes) -> Iterator[tuple[str, int, bytes]]:
    position = 0
    while position < len(data):
        end = position + 4 + int.from_bytes(data[position : position + 4], "little")
        name, start, length = json.loads(data[position + 4 : end])
        yield name, start, data[end : end + length]
        position = end + length
