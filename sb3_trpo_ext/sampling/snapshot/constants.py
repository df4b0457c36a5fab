"""Large arrays that stay as they are: a snapshot tells them by their content, and holds no copy.

A copy is kept beside each array that the first snapshot met. Whoever takes or restores a snapshot compares the two, so
an array that changes after all is carried by value, and put back where a snapshot had it as it was.

Branches are many and short, so there the arrays are made read-only instead. Whoever writes to one gets an error, and
with it the branch is gone once more, with arrays that can be written to and are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from hashlib import blake2b
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from sb3_trpo_ext.sampling.snapshot.errors import SnapshotError
from sb3_trpo_ext.sampling.snapshot.memory import memory_of

LARGE = 1 << 15  # bytes
_CHUNK = 1 << 17  # words that are compared at once

Key = tuple[str, int]  # digest of the content, and which of the arrays that had the same

# for another environment in this process, which may not have the array itself; never written to
_contents: WeakValueDictionary[str, np.ndarray] = WeakValueDictionary()


class UnknownConstantError(SnapshotError):
    """A snapshot of an environment with an array that this one has never had."""

    def __init__(self, digest: str) -> None:
        super().__init__(digest)
        self.digest = digest

    def __str__(self) -> str:
        return (
            f"the snapshot tells a large array by its content ({self.digest[:8]}), and no environment in this process has it: "
            "reset() one that makes the same before restoring"
        )


class Constants:
    """Those of one environment."""

    def __init__(self) -> None:
        self._keys: dict[int, Key] = {}  # by the id of the array
        self._arrays: dict[Key, np.ndarray] = {}
        self._copies: dict[str, np.ndarray] = {}
        self._frozen: set[Key] = set()
        self._may_freeze = True
        self.learning = False  # whether arrays not met before are taken for constants

    def key_of(self, array: np.ndarray) -> Key | None:
        """What tells an array that has not changed; ``None`` for others."""
        if not _can_be(array):
            return None
        key = self._keys.get(id(array))
        if key is None:
            return self._meet(array) if self.learning else None
        return key if self._is_as_it_was(key, array) else None

    def array_of(self, key: Key) -> np.ndarray:
        """This environment's own, with the content it had.

        :raises UnknownConstantError: if no environment in this process has had it
        """
        array = self._arrays.get(key)
        if array is None:
            copy = self.content_of(key[0])
            if copy is None:
                raise UnknownConstantError(key[0])
            return self._keep(key, copy.copy(order="K"), copy)
        if not self._is_as_it_was(key, array):
            copy = self._copies[key[0]]
            if not array.flags.writeable:
                return self._keep(key, copy.copy(order="K"), copy)
            array[...] = copy
        return array

    def _is_as_it_was(self, key: Key, array: np.ndarray) -> bool:
        return (key in self._frozen and not array.flags.writeable) or _same(array, self._copies[key[0]])

    def freeze(self, keys: Iterable[Key], shared: Collection[int]) -> None:
        """Make those read-only that have just been told by their content, unless others share their memory."""
        for key in keys if self._may_freeze else ():
            array = self._arrays[key]
            if array.flags.writeable and id(memory_of(array)[1]) not in shared:
                array.flags.writeable = False
                self._frozen.add(key)

    def thaw(self, for_good: bool = False) -> None:
        """Undo :meth:`freeze`.

        :param for_good: never freeze them again
        """
        for key in self._frozen:
            self._arrays[key].flags.writeable = True
        self._frozen.clear()
        self._may_freeze &= not for_good

    def changed_while_frozen(self) -> list[np.ndarray]:
        """Those that were written to through others that share their memory."""
        return [self._arrays[key] for key in self._frozen if not _same(self._arrays[key], self._copies[key[0]])]

    @property
    def frozen(self) -> bool:
        return bool(self._frozen)

    def content_of(self, digest: str) -> np.ndarray | None:
        """For an environment in another process."""
        return _contents.get(digest)

    def take(self, digest: str, content: np.ndarray) -> None:
        """From an environment in another process."""
        self._copies[digest] = _contents.setdefault(digest, content)

    def _meet(self, array: np.ndarray) -> Key:
        # a digest takes longer than comparing with what others have
        digest = next((digest for digest, copy in _contents.items() if _same(array, copy)), None)
        if digest is None:
            digest = _digest(array)
            self.take(digest, array.copy(order="K"))
        self._copies[digest] = _contents[digest]
        number = sum(known == digest for known, _ in self._arrays)
        self._keep((digest, number), array, self._copies[digest])
        return digest, number

    def _keep(self, key: Key, array: np.ndarray, copy: np.ndarray) -> np.ndarray:
        replaced = self._arrays.get(key)
        if replaced is not None:
            del self._keys[id(replaced)]
        self._arrays[key], self._copies[key[0]], self._keys[id(array)] = array, copy, key
        return array


def _can_be(array: np.ndarray) -> bool:
    return type(array) in (np.ndarray, np.memmap) and not array.dtype.hasobject


def _words(array: np.ndarray) -> Any:
    flat = (np.asarray(array) if array.flags.forc else np.ascontiguousarray(array)).reshape(-1, order="A")
    return flat.view(np.uint64 if flat.nbytes % 8 == 0 else np.uint8)


def _same(array: np.ndarray, copy: np.ndarray) -> bool:
    """In every bit."""
    if array.shape != copy.shape or array.dtype != copy.dtype or array.flags.fnc != copy.flags.fnc:
        return False
    one, other = _words(array), _words(copy)
    starts = range(0, len(one), _CHUNK)
    return all(np.array_equal(one[start : start + _CHUNK], other[start : start + _CHUNK]) for start in starts)


def _digest(array: np.ndarray) -> str:
    digest = blake2b(f"{array.dtype.descr} {array.shape} {array.flags.fnc}".encode(), digest_size=16)
    digest.update(_words(array).data)
    return digest.hexdigest()


class Unread(Constants):
    """Takes every large array for a constant, to see whether the rest can be carried."""

    def key_of(self, array: np.ndarray) -> Key | None:
        return ("", 0) if _can_be(array) else None
