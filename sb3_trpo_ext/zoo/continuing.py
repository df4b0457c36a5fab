"""A run of the Zoo that was interrupted, found again: the same command goes on in the same folder."""

from __future__ import annotations

import argparse
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import yaml
from rl_zoo3.exp_manager import ExperimentManager

from sb3_trpo_ext.checkpoints import Checkpoints
from sb3_trpo_ext.checkpoints.folder import Folder

CHECKPOINTS = "checkpoints"
"""In a run's folder."""


class ContinuingExperimentManager(ExperimentManager):
    """rl_zoo3's, which gives each run a new folder, unless an unfinished run of the same command left checkpoints.

    A ``Checkpoints`` without a folder, as in a hyperparameter file, gets one in the run's.
    """

    def create_log_folder(self) -> None:
        """Called once the file's callbacks are made, before anything is written."""
        ours = [callback for callback in self.callbacks if isinstance(callback, Checkpoints) and callback.folder is None]
        if self.optimize_hyperparameters:
            # trials are short, and all in one process
            self.specified_callbacks = [entry for entry in _listed(self.specified_callbacks) if not _is_ours(entry)]
        elif ours:
            self._go_on()
        for callback in ours:
            callback.folder = Path(self.save_path) / CHECKPOINTS
        super().create_log_folder()

    def _go_on(self) -> None:
        """In the newest run of the same command that has ended before its time, if there is one."""
        runs = sorted(Path(self.log_path).glob(f"{self.env_name}_*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for run in runs:
            seed = self._seed_of(run)
            if seed is not None and Folder(run / CHECKPOINTS).is_unfinished():
                self.seed = self.args.seed = seed
                self.save_path, self.params_path = str(run), f"{run}/{self.env_name}"
                return

    def _seed_of(self, run: Path) -> int | None:
        """Of a run of the same command, the seed that was given or drawn; of others None."""
        try:
            # rl_zoo3 writes it; to load it would be to run whatever it says
            saved = (run / self.env_name / "args.yml").read_text()
        except OSError:
            return None
        found = re.search(r"- - seed\n\s+- (\d+)\n", saved)
        seed = self.seed if found is None or _seed_is_given() else int(found[1])
        same = yaml.dump(OrderedDict(sorted({**vars(self.args), "seed": seed}.items())))
        return seed if saved == same else None


def _seed_is_given() -> bool:
    """Else rl_zoo3 draws one at each start."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seed", type=int, default=-1)
    return parser.parse_known_args(sys.argv)[0].seed >= 0


def _listed(entries: Any) -> list[Any]:
    return entries if isinstance(entries, list) else [entries]


def _is_ours(entry: Any) -> bool:
    """Whether an entry of a file's ``callback:`` is a ``Checkpoints``."""
    name = next(iter(entry)) if isinstance(entry, dict) else entry
    return str(name).rpartition(".")[2] == Checkpoints.__name__
