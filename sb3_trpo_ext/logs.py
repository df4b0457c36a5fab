"""What runs logged, read back: ``progress.csv`` and TensorBoard files as series of numbers."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sb3_trpo_ext.checks import needs_extra, warn_user

_STEP_KEY = "time/total_timesteps"

Points = defaultdict[str, list[tuple[float, float]]]
"""By log key, timesteps and values as they come."""


class Series(NamedTuple):
    """Values of one log key, and the timesteps at which they were logged; both (n,)."""

    steps: np.ndarray
    values: np.ndarray


Log = Mapping[str, Series]
"""One run's scalars by log key."""


def as_log(points: Points) -> Log:
    return {key: Series(*np.array(pairs, dtype=float).T) for key, pairs in points.items()}


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
    points: Points = defaultdict(list)
    for row in rows:
        step = number_of(row.get(_STEP_KEY))
        for key, cell in row.items():
            value = number_of(cell)
            if step is not None and value is not None:
                points[key].append((step, value))
    if _STEP_KEY not in points:
        raise ValueError(f"{path}: expected rows with numbers in a column {_STEP_KEY}, got {len(rows)} rows without")
    return as_log(points)


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

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    points: Points = defaultdict(list)
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            if math.isfinite(event.value):
                points[tag].append((event.step, event.value))
    return as_log(points)


def read_runs(folder: Path) -> list[Log]:
    """Every run in or below a folder; a run with both kinds of file is read from its ``progress.csv``.

    A run that has not logged anything yet is passed over with a warning, unless there is no other.

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
            warn_user(f"{tables.pop(run)} is empty: this run is passed over")
    return [*map(read_progress, tables.values()), *map(_read_events, sorted(events))]


def across_runs(runs: Sequence[Log], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A key's values in all runs that logged it: steps (n,), values (runs, n); None where none did.

    Runs are laid on the steps of the first, as far as all of them go.
    """
    logged = [run[key] for run in runs if key in run]
    if not logged:
        return None
    last = min(series.steps[-1] for series in logged)
    steps = logged[0].steps[logged[0].steps <= last]
    if len(steps) == 0:
        return None
    return steps, np.array([np.interp(steps, series.steps, series.values) for series in logged])
