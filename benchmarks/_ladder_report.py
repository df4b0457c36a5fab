"""What the ladder's runs say: a table of returns, a table of steps with the verdict of the rule, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _ladder_rungs import CHECK, CHOICES, RUNGS, STEPS, Step
from _measure import markdown_table, new_figure, save_figure
from _results import LEAST_SEEDS, Results
from _runs import Run
from _scores import Interval, interquartile_mean, interval, probability_of_improvement, spread
from _settings import MUJOCO

DECIDING_SEEDS = 10
"""Of both rungs on every environment; with fewer nothing is decided."""
LEAST_RATIO = 0.95


def iqm_ratio(scores: np.ndarray, reference: np.ndarray, random: np.ndarray) -> float:
    """IQM over IQM, both normalised by the random policy and the reference's mean, (runs, environments) both."""
    return interquartile_mean(scores, reference, random) / interquartile_mean(reference, reference, random)


class Comparison(NamedTuple):
    """Two rungs on some environments.

    :param n_seeds: that were run on all of them, of the upper and the lower rung
    """

    env_ids: list[str]
    n_seeds: tuple[int, int]
    ratio: Interval
    chance: Interval

    @property
    def hurts(self) -> bool:
        return bool(self.chance.high < 0.5 or (self.ratio.estimate < LEAST_RATIO and self.ratio.high < 1.0))

    @property
    def decides(self) -> bool:
        return len(self.env_ids) == len(MUJOCO) and min(self.n_seeds) >= DECIDING_SEEDS


def compared(results: Results, step: Step, env_ids: Sequence[str]) -> Comparison | None:
    """On those of these environments where both rungs have enough seeds; None where too few have been run on all of them."""
    shown = [env_id for env_id in env_ids if min(len(results.seeds(rung, env_id)) for rung in step.rungs) >= LEAST_SEEDS]
    if not shown or min(len(results.seeds(rung, *shown)) for rung in step.rungs) < LEAST_SEEDS:
        return None
    scores, reference = (results.finals(rung, shown) for rung in step.rungs)
    random = results.random(shown)
    return Comparison(
        shown,
        (len(scores), len(reference)),
        interval(lambda x, y: iqm_ratio(x, y, random), scores, reference),
        interval(probability_of_improvement, scores, reference, effort=0.2),
    )


def verdict(step: Step, found: Comparison) -> str:
    """Of the rule in ``benchmarks/results/tuning/ladder.md``."""
    if step is CHECK:
        differs = not found.ratio.low <= 1.0 <= found.ratio.high
        said = "differs: to be looked into" if differs else "no difference seen"
    elif step in CHOICES:
        said = "hurts" if found.hurts else "does not hurt"
    else:
        return ""
    return said if found.decides else f"open; so far: {said}"


def table_of_returns(results: Results) -> str:
    """Mean ± standard deviation and number of runs, by rung and environment."""

    def cell(rung: str, env_id: str) -> str:
        return spread(results.finals(rung, [env_id])[:, 0]) if results.seeds(rung, env_id) else "not run"

    rows = [(f"`{name}`", rung.words, *(cell(name, env_id) for env_id in MUJOCO)) for name, rung in RUNGS.items()]
    return markdown_table(("rung", "", *MUJOCO), rows)


def row_of(step: Step, results: Results) -> list[str]:
    found = compared(results, step, [*MUJOCO])
    title = f"{step.title}: `{step.ours}` over `{step.reference}`"
    if found is None:
        return [title, "", "", "", f"fewer than {LEAST_SEEDS} seeds", ""]
    single = {env_id: compared(results, step, [env_id]) for env_id in found.env_ids}
    worse = [env_id for env_id, alone in single.items() if alone is not None and alone.chance.high < 0.5]
    seeds = f"{found.n_seeds[0]} and {found.n_seeds[1]} on {', '.join(found.env_ids)}"
    return [title, str(found.ratio), str(found.chance), ", ".join(worse) or "none", seeds, verdict(step, found)]


def table_of_steps(results: Results) -> str:
    header = (
        "step",
        "ratio of interquartile means",
        "P(improvement)",
        "wholly under 0.5 on",
        "seeds on all of these",
        "verdict",
    )
    return markdown_table(header, [row_of(step, results) for step in STEPS])


def draw(results: Results, folder: Path) -> Path:
    """Final returns of every run, rung by rung from the bottom up, and their means."""
    drawing, axes = new_figure(4.0 * len(MUJOCO), 4.2, 1, len(MUJOCO))
    for ax, env_id in zip(axes[0], MUJOCO, strict=True):
        for height, rung in enumerate(RUNGS):
            finals = results.finals(rung, [env_id])[:, 0] if results.seeds(rung, env_id) else np.empty(0)
            color = "tab:orange" if rung.startswith("sb3_contrib") else "tab:blue"
            ax.plot(finals, np.full(len(finals), height), "o", color=color, alpha=0.5, ms=5)
            if len(finals):
                ax.plot([finals.mean()] * 2, [height - 0.35, height + 0.35], color=color, lw=2)
        ax.set(title=env_id, xlabel="return of the final policy", ylim=(-0.6, len(RUNGS) - 0.4))
        ax.set_yticks(range(len(RUNGS)), [*RUNGS] if ax is axes[0, 0] else [])
        ax.grid(alpha=0.3)
    return save_figure(drawing, folder, "ladder")


TEXT = """# The ladder from sb3_contrib.TRPO to TRPOExt

What is compared and the rule that decides were [written before any run](../tuning/ladder.md). Default arguments,
normalised observations, 1M steps; return of 20 deterministic episodes with the final policy, mean ± standard deviation over
seeds (how many). Made by `python benchmarks/ladder.py report` from the `.csv.gz` files beside this page, which hold every
evaluation of every run (`pandas.read_csv(path, comment="#")`). Their times mean nothing."""


def report(runs: Sequence[Run], folder: Path) -> None:
    """``report.md`` and ``ladder.png`` of whatever is there; the tables also to the screen.

    :param runs: the random policy's among them
    """
    seeds = sorted({run.about["seed"] for run in runs if run.about["algorithm"] in RUNGS})
    results = Results(runs, seeds)
    states = {run.about["sources"] for run in runs if run.about.get("base", "").startswith("trpo_ext")}
    made = f"Runs of ours were made with {len(states)} state(s) of the library: {', '.join(map(str, sorted(states)))}."
    picture = draw(results, folder)
    parts = [TEXT, table_of_returns(results), "## Step by step", table_of_steps(results), made, f"![ladder]({picture.name})"]
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text)
    print(text)
