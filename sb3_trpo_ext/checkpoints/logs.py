"""Where the logger stands: what it is going to write, and what it has written."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stable_baselines3.common import logger as sb3_logger
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    Logger,
    TensorBoardOutputFormat,
)

from sb3_trpo_ext.checkpoints.plain_data import NotPlainError, dumps
from sb3_trpo_ext.checkpoints.simulators import rewrite

_EVENTS = "events.out.tfevents.*"


def pending(logger: Logger) -> dict[str, Any]:
    """What was recorded since it last wrote; pictures and films of a user's are not kept."""
    values = {name: value for name, value in logger.name_to_value.items() if _is_plain(value)}
    return {
        "name_to_value": values,
        "name_to_count": dict(logger.name_to_count),
        "name_to_excluded": {name: logger.name_to_excluded[name] for name in values if name in logger.name_to_excluded},
    }


def put_pending(logger: Logger, state: dict[str, Any]) -> None:
    for attribute, values in state.items():
        held = getattr(logger, attribute)
        held.clear()
        held.update(values)


def _is_plain(value: Any) -> bool:
    try:
        dumps(value)
    except NotPlainError:
        return False
    return True


# -- text files ----------------------------------------------------------------------------------------


def text_files(logger: Logger) -> Iterator[tuple[str, Any]]:
    """The formats that write one text file each, by a name that is the same in each run of the script."""
    met: Counter[str] = Counter()
    for format in logger.output_formats:
        is_file = isinstance(format, (CSVOutputFormat, JSONOutputFormat))
        if is_file or (isinstance(format, HumanOutputFormat) and format.own_file):
            kind = type(format).__name__
            met[kind] += 1
            yield f"{kind} {met[kind]}", format


def log_files(logger: Logger) -> dict[str, tuple[Path, Any]]:
    """By name, the file, and what changes when it is written anew: a table gets more columns."""
    return {name: (Path(format.file.name), list(getattr(format, "keys", ()))) for name, format in text_files(logger)}


def continue_text_files(logger: Logger, contents: dict[str, bytes], columns: dict[str, list[str]]) -> None:
    for name, format in text_files(logger):
        if name in contents:
            rewrite(format.file, contents[name])
        if isinstance(format, CSVOutputFormat) and name in columns:
            format.keys = list(columns[name])


# -- TensorBoard -----------------------------------------------------------------------------------------


def tensorboards(logger: Logger) -> list[dict[str, Any]]:
    """Where each TensorBoard writer stands: its folder, and how long the files in it are."""
    return [_tensorboard(format) for format in logger.output_formats if isinstance(format, TensorBoardOutputFormat)]


def _tensorboard(format: TensorBoardOutputFormat) -> dict[str, Any]:
    format.writer.flush()
    folder = Path(format.writer.log_dir).absolute()
    return {"folder": str(folder), "files": {path.name: path.stat().st_size for path in folder.glob(_EVENTS)}}


def continue_tensorboards(logger: Logger, states: list[dict[str, Any]]) -> None:
    """Go on in the folders of before, as if nothing had been written there since."""
    formats = [format for format in logger.output_formats if isinstance(format, TensorBoardOutputFormat)]
    for format, state in zip(formats, states, strict=False):
        if Path(state["folder"]).is_dir():
            _continue_tensorboard(logger, format, state)


def _continue_tensorboard(logger: Logger, format: TensorBoardOutputFormat, state: dict[str, Any]) -> None:
    folder, new_folder = Path(state["folder"]), Path(format.writer.log_dir).absolute()
    format.close()
    if new_folder != folder:
        for path in new_folder.glob(f"{_EVENTS}.{os.getpid()}.*"):
            path.unlink()  # what this process has opened, and not written to
        if not any(new_folder.iterdir()):
            new_folder.rmdir()
    for path in folder.glob(_EVENTS):
        size = state["files"].get(path.name)
        if size is None:
            path.unlink()  # of this process, or of one that was killed after this checkpoint
        elif path.stat().st_size > size:
            os.truncate(path, size)
    if logger.dir is not None and Path(logger.dir).absolute() == new_folder:
        logger.dir = str(folder)
    _await_the_next_second(folder)
    format.writer = sb3_logger.SummaryWriter(log_dir=str(folder))
    format._is_closed = False


def _await_the_next_second(folder: Path) -> None:
    """TensorBoard reads files in the order of their names, which have the second first and a counter last."""
    while any(int(path.name.split(".")[3]) >= int(time.time()) for path in folder.glob(_EVENTS)):
        time.sleep(0.05)
