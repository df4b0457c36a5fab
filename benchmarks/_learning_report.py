"""What the learning runs say: tables and pictures from their CSV files, and what was not run."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _learning_pictures import draw_curves, draw_profiles
from _measure import markdown_table
from _runs import CLASSIC, MUJOCO, RANDOM, Run, read_all
from _scores import (
    Interval,
    interquartile_mean,
    interval,
    probability_of_improvement,
    time_to_reach,
)

LEAST_SEEDS = 2
NEVER = 1e3
"""A ratio of times that stands for "not reached": finite, so that a bootstrap can go on."""


class Pair(NamedTuple):
    """Whom we compare with whom."""

    title: str
    ours: str
    reference: str


PAIRS = (
    Pair("the Zoo files' settings", "trpo_ext_zoo", "sb3_contrib_zoo"),
    Pair("default arguments", "trpo_ext_default", "sb3_contrib_default"),
    Pair("default arguments, normalised observations", "trpo_ext_default_norm", "sb3_contrib_default_norm"),
)
GROUPS = {"MuJoCo": [*MUJOCO], "Classic control and Box2D": [*CLASSIC]}
SEEDS = {PAIRS[0]: 10, PAIRS[1]: 5, PAIRS[2]: 5}
"""How many seeds are to be run of each."""


class Curves(NamedTuple):
    """Runs of one algorithm on one environment.

    :param timesteps: (points,)
    :param seconds: of training, by "wall" and "cpu", (runs, points) each
    :param returns: (runs, points)
    """

    timesteps: np.ndarray
    seconds: dict[str, np.ndarray]
    returns: np.ndarray


class Results:
    """Runs by algorithm, environment and seed."""

    def __init__(self, runs: Iterable[Run], seeds: Sequence[int]) -> None:
        self._runs: defaultdict[tuple[str, str], dict[int, Run]] = defaultdict(dict)
        for run in runs:
            if run.about["seed"] in seeds:
                self._runs[run.about["algorithm"], run.about["env"]][run.about["seed"]] = run

    def seeds(self, algorithm: str, *env_ids: str) -> list[int]:
        """Those that were run on all of these environments."""
        return sorted(set.intersection(*(set(self._runs[algorithm, env_id]) for env_id in env_ids)))

    def environments(self, pair: Pair, env_ids: Iterable[str]) -> list[str]:
        """Those of which there are enough runs on both sides."""

        def enough(env_id: str) -> bool:
            return all(len(self.seeds(name, env_id)) >= LEAST_SEEDS for name in (pair.ours, pair.reference))

        return [env_id for env_id in env_ids if enough(env_id)]

    def finals(self, algorithm: str, env_ids: Sequence[str]) -> np.ndarray:
        """Returns of the final policies, (runs, environments), of seeds that were run on all of them."""
        seeds = self.seeds(algorithm, *env_ids)
        return np.array([[self._runs[algorithm, env_id][seed].final for env_id in env_ids] for seed in seeds])

    def random(self, env_ids: Sequence[str]) -> np.ndarray:
        """Mean return of the random policy, (environments,)."""
        return np.array([self._runs[RANDOM, env_id][0].final for env_id in env_ids])

    def curves(self, algorithm: str, env_id: str, seeds: Sequence[int] | None = None) -> Curves:
        runs = self._runs[algorithm, env_id]
        rows = [runs[seed].rows for seed in (sorted(runs) if seeds is None else seeds)]
        columns = {name: np.array([run[name] for run in rows]) for name in rows[0]}
        seconds = {name: columns[f"{name}_seconds"] for name in ("wall", "cpu")}
        return Curves(columns["timesteps"][0], seconds, columns["mean"])

    def missing(self, pair: Pair, env_id: str) -> str:
        """How many runs are still to be made, in words; empty if none."""
        lacking = []
        for name in (pair.reference, pair.ours):
            seeds = sorted(set(range(SEEDS[pair])) - set(self.seeds(name, env_id)))
            if seeds:
                lacking.append(f"{name} {len(seeds)} of {SEEDS[pair]}")
        return ", ".join(lacking)


# -- times ------------------------------------------------------------------------------------------------


def time_ratio(ours: Curves, reference: Curves, clock: str) -> float:
    """Our time to the reference's final return, over the reference's own, both on mean curves."""
    level = float(reference.returns[:, -1].mean())
    times = [
        time_to_reach(level, curves.seconds[clock].mean(axis=0), curves.returns.mean(axis=0)) for curves in (ours, reference)
    ]
    return min(times[0] / max(times[1], 1e-9), NEVER)


def drawn(curves: Curves, rows: np.ndarray) -> Curves:
    """The curves of these runs."""
    seconds = {clock: times[rows] for clock, times in curves.seconds.items()}
    return Curves(curves.timesteps, seconds, curves.returns[rows])


def median_time_ratio(results: Results, pair: Pair, env_ids: Sequence[str], clock: str) -> Interval:
    """The median over environments; whole curves are resampled, by their row numbers."""
    curves = {
        name: [results.curves(name, env_id, results.seeds(name, *env_ids)) for env_id in env_ids]
        for name in (pair.ours, pair.reference)
    }

    def median(ours: np.ndarray, reference: np.ndarray) -> float:
        columns = range(len(env_ids))
        return float(
            np.median(
                [
                    time_ratio(
                        drawn(curves[pair.ours][i], ours[:, i]), drawn(curves[pair.reference][i], reference[:, i]), clock
                    )
                    for i in columns
                ]
            )
        )

    rows = [np.tile(np.arange(len(curves[name][0].returns))[:, None], len(env_ids)) for name in (pair.ours, pair.reference)]
    return interval(median, *rows, effort=0.2)


# -- tables -----------------------------------------------------------------------------------------------


def spread(scores: np.ndarray) -> str:
    return f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f} ({len(scores)})"


def ratio_in_words(ratio: float) -> str:
    return "not reached" if ratio >= NEVER else f"{ratio:.2f}"


def environment_row(results: Results, pair: Pair, env_id: str) -> list[str]:
    ours, reference = (results.finals(name, [env_id]) for name in (pair.ours, pair.reference))
    curves = [results.curves(name, env_id) for name in (pair.ours, pair.reference)]
    minutes = [f"{c.seconds['cpu'][:, -1].mean() / 60:.1f}" for c in curves]
    return [
        env_id,
        f"{float(results.random([env_id])[0]):.1f}",
        spread(reference[:, 0]),
        spread(ours[:, 0]),
        str(interval(probability_of_improvement, ours, reference, effort=0.2)),
        f"{minutes[1]} / {minutes[0]}",
        *(ratio_in_words(time_ratio(*curves, clock)) for clock in ("wall", "cpu")),
    ]


HEADER = (
    *("", "random", "sb3_contrib", "TRPOExt", "P(improvement)"),
    *("minutes of CPU, theirs / ours", "time to their final return: wall", "CPU"),
)


class Summary(NamedTuple):
    """One pair on one group of environments."""

    pair: Pair
    group: str
    env_ids: list[str]
    n_seeds: tuple[int, int]
    iqm: Interval
    iqm_reference: Interval
    improvement: Interval
    wall_ratio: Interval
    cpu_ratio: Interval

    def sentences(self) -> str:
        ours, reference = self.n_seeds
        return "\n".join(
            [
                f"Over {', '.join(self.env_ids)} ({ours} seeds of ours, {reference} of sb3_contrib that were run on all):",
                "",
                f"- interquartile mean of normalised scores: {self.iqm} (sb3_contrib against itself: {self.iqm_reference})",
                f"- probability of improvement: {self.improvement}",
                f"- time to sb3_contrib's final return over its own, median of environments: wall-clock {self.wall_ratio}, "
                f"CPU {self.cpu_ratio}",
            ]
        )


def summarize(results: Results, pair: Pair, group: str, env_ids: list[str]) -> Summary:
    ours, reference = (results.finals(name, env_ids) for name in (pair.ours, pair.reference))
    random = results.random(env_ids)
    return Summary(
        pair,
        group,
        env_ids,
        (len(ours), len(reference)),
        interval(lambda x, y: interquartile_mean(x, y, random), ours, reference),
        interval(lambda y: interquartile_mean(y, y, random), reference),
        interval(probability_of_improvement, ours, reference, effort=0.2),
        median_time_ratio(results, pair, env_ids, "wall"),
        median_time_ratio(results, pair, env_ids, "cpu"),
    )


def section(results: Results, pair: Pair, group: str) -> str:
    """One pair on one group: a table and what it amounts to, or that there is nothing yet."""
    title = f"### {group}, {pair.title}"
    env_ids = results.environments(pair, GROUPS[group])
    if not env_ids:
        return f"{title}\n\nNot run."
    parts = [title, markdown_table(HEADER, [environment_row(results, pair, env_id) for env_id in env_ids])]
    if min(len(results.seeds(name, *env_ids)) for name in (pair.ours, pair.reference)) >= LEAST_SEEDS:
        parts.append(summarize(results, pair, group, env_ids).sentences())
    missing = [f"{env_id} ({words})" for env_id in GROUPS[group] if (words := results.missing(pair, env_id))]
    if missing:
        parts.append(f"Not run: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def index(runs: Sequence[Run]) -> dict[str, Any]:
    """What was run, with which versions: each distinct combination once, and its runs."""
    kinds: list[dict[str, Any]] = []
    for run in runs:
        kind = {key: run.about.get(key) for key in ("algorithm", "setting", "timesteps", "sources", "versions")}
        entry = next((entry for entry in kinds if all(entry[key] == kind[key] for key in kind)), None)
        if entry is None:
            entry = {**kind, "runs": defaultdict(list)}
            kinds.append(entry)
        entry["runs"][run.about["env"]].append(run.about["seed"])
    return {"runs": kinds}


EXPLANATION = """\
Return: mean over 20 deterministic episodes with the final policy; mean ± standard deviation over seeds (number of
seeds). Normalised score: (return − random) / (mean of sb3_contrib − random). Square brackets: 95% intervals of a
stratified bootstrap, both sides resampled. Times are of training alone, on a shared machine: CPU time says more than
wall-clock. `time to their final return`: when our mean curve first reaches the mean final return of sb3_contrib, over
when its own does."""


README_MARKS = ("<!-- learning: made by benchmarks/learning.py report --readme -->\n", "<!-- /learning -->")


def put_into_readme(readme: Path, text: str) -> None:
    """Replace what stands between the two marks."""
    before, begin, rest = readme.read_text().partition(README_MARKS[0])
    _, end, after = rest.partition(README_MARKS[1])
    if not end:
        sys.exit(f"{readme}: expected a line {README_MARKS[0].strip()} and, below it, {README_MARKS[1]}")
    readme.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")


def report(arguments: argparse.Namespace) -> None:
    """``report.md``, ``index.json`` and the pictures, beside the runs; the tables also to the screen."""
    folder: Path = arguments.folder
    runs = read_all(folder)
    if not runs:
        sys.exit(f"no runs below {folder}")
    results = Results(runs, arguments.seeds)
    sections = [section(results, pair, group) for group in GROUPS for pair in PAIRS]
    text = "\n\n".join(["# Learning runs", EXPLANATION, *sections]) + "\n"
    (folder / "report.md").write_text(text)
    (folder / "index.json").write_text(json.dumps(index(runs), indent=1) + "\n")
    print(text)
    if arguments.readme is not None:
        # without its title
        put_into_readme(arguments.readme, section(results, PAIRS[0], "MuJoCo").partition("\n\n")[2])
    for group, env_ids in GROUPS.items():
        name = group.split()[0].lower()
        draw_curves(results, PAIRS[:1], env_ids, folder, f"{name}-zoo")
        draw_curves(results, PAIRS[1:], env_ids, folder, f"{name}-default")
    draw_profiles(results, PAIRS, GROUPS, folder, "profiles")
