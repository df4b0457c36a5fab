"""Many runs in one compressed CSV: a comment line of JSON for each run, then one table of all evaluations.

``pandas.read_csv(path, comment="#")`` reads the table.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from _runs import COLUMNS, Run, as_read

KEYS = ("algorithm", "env", "seed")


def pack(runs: Iterable[Run], path: Path) -> None:
    """The same runs make the same bytes; the file is there whole or not at all."""
    ordered = sorted(runs, key=lambda run: tuple(run.about[key] for key in KEYS))
    abouts = [f"# {json.dumps(run.about)}\n" for run in ordered]
    tables = [run.rows[[*COLUMNS]].assign(**{key: run.about[key] for key in KEYS}) for run in ordered]
    table = pd.concat(tables)[[*KEYS, *COLUMNS]].round(3).to_csv(index=False, lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(gzip.compress("".join([*abouts, table]).encode(), mtime=0))
    unfinished.replace(path)


def unpack(path: Path) -> list[Run]:
    """:raises ValueError: for a file that ``pack`` has not written, and for a run that is not whole"""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        abouts = [json.loads(line.removeprefix("# ")) for line in file if line.startswith("# ")]
    rows = {key: table[[*COLUMNS]].reset_index(drop=True) for key, table in pd.read_csv(path, comment="#").groupby([*KEYS])}
    keys = [tuple(about[key] for key in KEYS) for about in abouts]
    if sorted(rows) != sorted(keys):
        raise ValueError(f"{path}: expected a table of the runs {sorted(keys)}, got {sorted(rows)}")
    return [as_read(Run(about, rows[key]), str(path)) for about, key in zip(abouts, keys, strict=True)]
