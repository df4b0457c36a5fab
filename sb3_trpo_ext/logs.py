"""What runs logged, read back: ``progress.csv`` and TensorBoard files as series of numbers."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sb3_trpo_ext.checks import needs_extra, warn_user

_STEP_KEY = "time/total_timesteps"

Entry = tuple[float, Mapping[str, float]]
"""What was logged at once: timesteps, and values by log key."""


class Series(NamedTuple):
    """Values of one log key, and the timesteps at which they were logged; both (n,)."""

    steps: np.ndarray
    values: np.ndarray


Log = Mapping[str, Series]
"""One run's scalars by log key."""


def as_log(entries: Iterable[Entry]) -> Log:
    """Entries in the order in which they were logged, by key.

    Where timesteps are counted anew (``learn()`` again, with ``reset_num_timesteps``), they go on from where they were.
    Where they fall back, to more than ever lay between two entries, training was taken up from a checkpoint: what had
    been logged after it is replaced.
    """
    points: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    offset = last = longest = 0.0
    for step, values in entries:
        if offset + step < last and step <= longest:
            offset = last
        now = offset + step
        if now < last:
            # steps only rise in what is kept, so that all that goes is at the end
            for logged in points.values():
                while logged and logged[-1][0] >= now:
                    logged.pop()
            # the entry before is gone, and how far it was with it
            last = now
        longest, last = max(longest, now - last), now
        for key, value in values.items():
            points[key].append((now, value))
    return {key: Series(*np.array(pairs, dtype=float).T) for key, pairs in points.items() if pairs}


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a row are finite numbers."""
    return {key: number for key, value in row.items() if (number := number_of(value)) is not None}


def number_of(value: Any) -> float | None:
    """A finite number; None for an empty cell, for words, for NaN and infinity."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read_progress(path: Path) -> Log:
    """The scalars of a ``progress.csv``, as SB3's logger writes it.

    :raises ValueError: where there is no row with timesteps
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    entries = [(values[_STEP_KEY], values) for values in map(numbers_of, rows) if _STEP_KEY in values]
    if not entries:
        raise ValueError(f"{path}: expected rows with numbers in a column {_STEP_KEY}, got {len(rows)} rows without")
    return as_log(entries)


def read_tensorboard(folder: Path) -> Log:
    """The scalars of the newest run below a folder.

    :raises FileNotFoundError: where there is no TensorBoard event file
    """
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no TensorBoard event file below {folder}")
    return _read_events(files[-1].parent)


def _read_events(folder: Path) -> Log:
    """The scalars of all event files in a folder: training that goes on writes another."""
    with needs_extra("TensorBoard files need", "extra"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # what was logged before timesteps were counted anew is no orphan
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    scalars = [
        (event.wall_time, event.step, tag, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    ]
    return as_log((step, numbers_of({tag: value})) for _, step, tag, value in sorted(scalars))


def read_runs(folder: Path) -> list[Log]:
    """Every run in or below a folder; a run with both kinds of file is read from its ``progress.csv``.

    A run that has not logged anything yet is skipped with a warning, unless there is no other.

    :raises FileNotFoundError: where there is neither
    :raises ValueError: for a ``progress.csv`` that is not SB3's
    """
    tables = {path.parent: path for path in sorted(folder.rglob("progress.csv"))}
    events = {path.parent for path in folder.rglob("events.out.tfevents.*")} - tables.keys()
    if not tables and not events:
        raise FileNotFoundError(f"no progress.csv and no TensorBoard event file below {folder}")
    empty = [run for run, path in tables.items() if path.stat().st_size == 0]
    if len(empty) < len(tables) + len(events):
        for run in empty:
            warn_user(f"{tables.pop(run)} is empty: this run is skipped")
    return [*map(read_progress, tables.values()), *map(_read_events, sorted(events))]


def across_runs(runs: Sequence[Log], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A key's values in all runs that logged it: steps (n,), values (runs, n); None where none did.

    The steps are those of all runs; between its own a run is straight, and outside of them it is NaN.
    """
    logged = [run[key] for run in runs if key in run]
    if not logged:
        return None
    steps = np.unique(np.concatenate([series.steps for series in logged]))
    values = [np.interp(steps, series.steps, series.values, left=np.nan, right=np.nan) for series in logged]
    return steps, np.array(values)
