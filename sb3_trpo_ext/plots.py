"""Pictures of training from what it logged: ``python -m sb3_trpo_ext.plots LOGDIR [LOGDIR ...]``.

One page a call. Runs below one LOGDIR (``progress.csv`` or TensorBoard files) are taken as seeds of one setting
and drawn as their median with a band from the least to the greatest; several LOGDIRs stand side by side, a
column each with common scales. How to read it: docs/diagnostics.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from sb3_trpo_ext.checks import needs_extra, require, require_count, warn_user
from sb3_trpo_ext.logs import Entry, Log, Series, across_runs, as_log, numbers_of, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PICTURES_NEED = "pictures of training need"

# -- drawing ------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One quantity in a panel."""

    key: str
    label: str
    style: str = "-"


class Panel(NamedTuple):
    """One question about a run, and the keys that answer it."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    scale: str = "linear"
    stacked: bool = False


PANELS = (
    Panel(
        "Return",
        "undiscounted",
        (Line("rollout/ep_rew_mean", "training, last episodes"), Line("eval/mean_reward", "evaluation")),
    ),
    Panel(
        "KL(old ‖ new) against its bound",
        "nats",
        (Line("train/kl_divergence_loss", "step taken", "."), Line("trust_region/target_kl", "bound δ", "k--")),
    ),
    Panel(
        "Improvement of the surrogate",
        "normalised advantage",
        (Line("trust_region/expected_improvement", "expected", "--"), Line("trust_region/improvement", "actual")),
    ),
    Panel("Fraction of the full step taken", "fraction", (Line("trust_region/fraction", "taken", "."),)),
    Panel("Outcomes of the updates", "updates so far", ()),
    Panel("Residual of conjugate gradient", "‖g − (F + λI)x‖ / ‖g‖", (Line("trust_region/cg_residual", "residual"),), "log"),
    Panel("Explained variance of the critic", "1 is perfect", (Line("train/explained_variance", "before the update"),)),
    Panel(
        "Where the time went",
        "seconds an iteration",
        tuple(Line(f"time/{part}_seconds", part) for part in ("rollout", "policy", "critic")),
        stacked=True,
    ),
)


def draw_page(groups: Mapping[str, Sequence[Log]], columns: int = 4) -> Figure:
    """All panels: in rows for one group of runs; a column for each of several, with common scales.

    :param groups: by title, runs that differ in their seeds
    :param columns: of panels, for one group: a divisor of the number of panels
    """
    with needs_extra(_PICTURES_NEED, "plots"):
        from matplotlib.figure import Figure

    shape = (len(PANELS) // columns, columns) if len(groups) == 1 else (len(PANELS), len(groups))
    common: Literal["row", "none"] = "row" if len(groups) > 1 else "none"
    figure = Figure(figsize=(4.6 * shape[1], 3.3 * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False, sharex=common, sharey=common)
    # rows are panels, columns are groups
    for row, panel in zip(axes.reshape(len(PANELS), len(groups)), PANELS, strict=True):
        for ax, (title, runs) in zip(row, groups.items(), strict=True):
            _draw_panel(ax, panel, runs)
            ax.set_title(panel.title if len(groups) == 1 else f"{title}: {panel.title}", fontsize="medium")
    figure.suptitle("; ".join(_in_words(title, runs) for title, runs in groups.items()))
    return figure


def _in_words(title: str, runs: Sequence[Log]) -> str:
    return title if len(runs) == 1 else f"{title}: {len(runs)} runs, median, least and greatest"


def _draw_panel(ax: Axes, panel: Panel, runs: Sequence[Log]) -> None:
    if not panel.lines:
        runs = _with_all_outcomes(runs)
    lines = panel.lines or _outcome_lines(runs)
    drawn = _draw_stack(ax, lines, runs) if panel.stacked else [_draw_line(ax, line, runs) for line in lines]
    if any(drawn):
        ax.legend(fontsize="small")
    else:
        ax.text(0.5, 0.5, "not logged", ha="center", va="center", transform=ax.transAxes, color="grey")
    ax.set(xlabel="timesteps", ylabel=panel.unit, yscale=panel.scale)
    ax.locator_params(axis="x", nbins=5)
    ax.grid(alpha=0.3)


def _with_all_outcomes(runs: Sequence[Log]) -> list[Log]:
    """The outcomes of each run, 0 until they come up: they are logged from then on, and not by a run without them."""
    keys = {key for run in runs for key in run if key.startswith("outcome/")}
    counted: list[Log] = []
    for run in runs:
        logged = {key: run[key] for key in keys & run.keys()}
        if logged:
            steps = np.unique(np.concatenate([series.steps for series in logged.values()]))
            absent = Series(steps, np.zeros(len(steps)))
            counted.append({key: Series(steps, np.interp(steps, *logged.get(key, absent), left=0.0)) for key in keys})
    return counted


def _outcome_lines(runs: Sequence[Log]) -> list[Line]:
    """Which outcomes came up is known from the log alone."""
    keys = sorted({key for run in runs for key in run if key.startswith("outcome/")})
    return [Line(key, key.removeprefix("outcome/").replace("_", " ")) for key in keys]


def _draw_line(ax: Axes, line: Line, runs: Sequence[Log]) -> bool:
    """Median and band of one quantity; whether it was logged."""
    found = across_runs(runs, line.key)
    if found is None:
        return False
    steps, values = found
    style = line.style if len(steps) > 1 else line.style.rstrip("-.") + "."  # a line through one point is not seen
    (drawn,) = ax.plot(steps, np.nanmedian(values, axis=0), style, label=line.label, lw=1.3, ms=3.0)
    if len(values) > 1:
        ax.fill_between(steps, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=drawn.get_color(), alpha=0.2, lw=0)
    return True


def _draw_stack(ax: Axes, lines: Sequence[Line], runs: Sequence[Log]) -> list[bool]:
    """Medians on top of one another."""
    found = {line.label: logged for line in lines if (logged := across_runs(runs, line.key)) is not None}
    if not found:
        return []
    steps = min((steps for steps, _ in found.values()), key=len)
    heights = [np.interp(steps, at, np.nanmedian(values, axis=0)) for at, values in found.values()]
    ax.stackplot(steps, heights, labels=list(found), alpha=0.8)
    return [True]


def require_picture(picture: Path) -> None:
    """:raises ValueError: for a name that does not end as a picture's"""
    with needs_extra(_PICTURES_NEED, "plots"):
        from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    ending = picture.suffix.removeprefix(".").lower()
    require("picture", str(picture), ending in known, f"a file name that ends in one of {', '.join(sorted(known))}")


def save_page(groups: Mapping[str, Sequence[Log]], picture: Path) -> None:
    """Draw the page into a file, which is there whole or as it was before.

    :raises ValueError: for a name that does not end as a picture's
    """
    require_picture(picture)
    unfinished = picture.with_name(f".unfinished-{picture.name}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_page(groups).savefig(unfinished, dpi=110)
    unfinished.replace(picture)


def draw_training(folder: Path, picture: Path) -> None:
    """The page of the runs below one folder, as one PNG.

    :param folder: holds ``progress.csv`` or TensorBoard files
    :param picture: where to write
    """
    save_page({folder.name: read_runs(folder)}, picture)


# -- while training ------------------------------------------------------------------------------------


class _Recorder(KVWriter):
    """An output of SB3's logger that keeps what is logged."""

    def __init__(self, after_write: Callable[[], None]) -> None:
        self.entries: list[Entry] = []
        self.writes = 0
        self.after_write = after_write

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.entries.append((step, numbers_of(key_values)))
        self.writes += 1
        self.after_write()

    def close(self) -> None:
        pass


class TrainingPage(BaseCallback):
    """Writes the page of :mod:`sb3_trpo_ext.plots` while training goes on, and at its end.

    A pickle or a deep copy has what was logged so far, and no model until it is given to a training.

    :param picture: the file to write
    :param every: how many times SB3's logger writes (once an iteration by default) between two pages
    :raises ValueError: for an ``every`` below 1, or a file name that does not end as a picture's
    """

    def __init__(self, picture: str | Path, every: int = 20, verbose: int = 0) -> None:
        super().__init__(verbose)
        require_count("every", every)
        self.picture = Path(picture)
        require_picture(self.picture)
        self.every = every
        self._recorder = _Recorder(self._write_when_due)
        self._algorithm = "no training yet"

    def __getstate__(self) -> dict[str, Any]:
        # a model in training has loggers with open files
        of_a_training = {"model", "parent", "locals", "globals"}
        own = {name: value for name, value in vars(self).items() if name not in of_a_training}
        return {**own, "parent": None, "locals": {}, "globals": {}}

    def get_state(self) -> list[Entry]:
        """For :class:`~sb3_trpo_ext.Checkpoints`: what has been logged so far."""
        return self._recorder.entries

    def set_state(self, state: list[Entry]) -> None:
        self._recorder.entries, self._recorder.writes = state, len(state)

    def _on_training_start(self) -> None:
        self._algorithm = type(self.model).__name__
        # it is there already where the last training was interrupted
        if self._recorder not in self.logger.output_formats:
            self.logger.output_formats.append(self._recorder)

    def _write_when_due(self) -> None:
        if self._recorder.writes % self.every == 0:
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self.write()
        except OSError as error:
            # a full disk is no reason to end the training, nor to lose the model at its end
            warn_user(f"the page of training was not written: {error}")

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        # rl_zoo3 ends the training of its first callback twice
        if self._recorder in self.logger.output_formats:
            self.logger.output_formats.remove(self._recorder)
            self._try_to_write()

    def write(self) -> None:
        """Write the page of what has been logged so far."""
        title = f"{self._algorithm}, {self.num_timesteps:,} steps"
        save_page({title: [as_log(self._recorder.entries)]}, self.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="LOGDIR")
    parser.add_argument("--out", type=Path, default=Path("training.png"), help="the picture to write (training.png)")
    arguments = parser.parse_args()
    try:
        require_picture(arguments.out)
        groups = {str(folder): read_runs(folder) for folder in arguments.folders}
    except ImportError as error:
        sys.exit(str(error))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    save_page(groups, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
