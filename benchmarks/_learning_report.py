"""What the learning runs say: tables and pictures from their CSV files, and what was not run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _learning_pictures import draw_curves, draw_profiles
from _measure import markdown_table
from _results import GROUPS, LEAST_SEEDS, NEVER, PAIRS, SEEDS, Pair, Results, median_time_ratio, time_ratio
from _runs import Run, read_all
from _scores import (
    Interval,
    interquartile_mean,
    interval,
    probability_of_improvement,
)

# -- tables -----------------------------------------------------------------------------------------------


def spread(scores: np.ndarray) -> str:
    deviation = f" ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""
    return f"{scores.mean():.1f}{deviation} ({len(scores)})"


def ratio_in_words(ratio: float) -> str:
    return "not reached" if ratio >= NEVER else f"{ratio:.2f}"


def environment_row(results: Results, pair: Pair, env_id: str) -> list[str]:
    ours, reference = (results.finals(name, [env_id]) for name in (pair.ours, pair.reference))
    curves = [results.curves(name, env_id) for name in (pair.ours, pair.reference)]
    minutes = [f"{c.seconds['cpu'][:, -1].mean() / 60:.1f}" for c in curves]
    enough = results.fewest(pair, env_id) >= LEAST_SEEDS
    return [
        env_id,
        f"{float(results.random([env_id])[0]):.1f}",
        spread(reference[:, 0]),
        spread(ours[:, 0]),
        str(interval(probability_of_improvement, ours, reference, effort=0.2)) if enough else "too few seeds",
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


def summaries_of(results: Results) -> dict[tuple[Pair, str], Summary]:
    """Of every pair and group with enough runs."""
    found = {}
    for pair in PAIRS:
        for group in GROUPS:
            env_ids = results.scored(pair, GROUPS[group])
            if env_ids and results.fewest(pair, *env_ids) >= LEAST_SEEDS:
                found[pair, group] = summarize(results, pair, group, env_ids)
    return found


def section(results: Results, pair: Pair, group: str, summary: Summary | None) -> str:
    """One pair on one group: a table and what it amounts to, or that there is nothing yet."""
    title = f"### {group}, {pair.title}"
    shown = results.environments(pair, GROUPS[group], least=1)
    if not shown:
        return f"{title}\n\nNot run."
    parts = [title, markdown_table(HEADER, [environment_row(results, pair, env_id) for env_id in shown])]
    if summary is not None:
        parts.append(summary.sentences())
    no_score = [env_id for env_id in results.environments(pair, shown) if env_id not in results.scored(pair, shown)]
    if no_score:
        parts.append(f"Not among the normalised scores, as sb3_contrib is not above the random policy: {', '.join(no_score)}.")
    missing = [f"{env_id} ({words})" for env_id in GROUPS[group] if (words := results.missing(pair, env_id))]
    if missing:
        parts.append(f"Not run: {'; '.join(missing)}.")
    return "\n\n".join(parts)


# -- bars -------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """What was to be reached, what was, and by how many seeds.

    :param stretch: whether what was hoped for beyond the bar was reached too; None where there is nothing beyond
    """

    what: str
    reached: str
    met: bool
    seeds: str
    stretch: bool | None = None

    @property
    def verdict(self) -> str:
        return "stretch met" if self.met and self.stretch else "met" if self.met else "missed"


STRETCH = {"HalfCheetah-v5": 6000.0, "Hopper-v5": 3372.0, "Walker2d-v5": 4933.0, "Swimmer-v5": 359.0}
"""Returns published for PPO (HalfCheetah) and sb3_contrib.TRPO (the others), on v3."""


def bars(results: Results, summaries: Mapping[tuple[Pair, str], Summary]) -> list[Bar]:
    """What the project set out to reach, as far as there are runs to say."""
    zoo, norm = summaries.get((PAIRS[0], "MuJoCo")), summaries.get((PAIRS[2], "MuJoCo"))
    found = []
    if zoo is not None:
        found += zoo_bars(zoo)
    if norm is not None:
        what = "MuJoCo, defaults, normalised observations: IQM ≥ 1"
        found.append(Bar(what, str(norm.iqm), bool(norm.iqm.estimate >= 1.0), seeds_in_words(norm)))
    env_ids = [env_id for group in GROUPS.values() for env_id in results.environments(PAIRS[0], group)]
    if env_ids:
        found.append(no_worse_bar(results, env_ids))
    return found + [mean_bar(results, env_id) for env_id in env_ids]


def seeds_in_words(summary: Summary) -> str:
    n_environments = f"{len(summary.env_ids)} of {len(GROUPS[summary.group])} environments"
    return f"{min(summary.n_seeds)} of {SEEDS[summary.pair]} on {n_environments}"


def zoo_bars(zoo: Summary) -> list[Bar]:
    seeds, iqm = seeds_in_words(zoo), zoo.iqm
    what = "MuJoCo, Zoo files: IQM ≥ 1.3 (stretch 1.6) and its interval above 1"
    found = [Bar(what, str(iqm), bool(iqm.low > 1.0 and iqm.estimate >= 1.3), seeds, bool(iqm.estimate >= 1.6))]
    for clock, ratio in (("CPU", zoo.cpu_ratio), ("wall-clock", zoo.wall_ratio)):
        what = f"the same: time to their final return, {clock} ≤ 1/3 (stretch 1/5)"
        found.append(Bar(what, str(ratio), bool(ratio.estimate <= 1 / 3), seeds, bool(ratio.estimate <= 1 / 5)))
    return found


def no_worse_bar(results: Results, env_ids: list[str]) -> Bar:
    """Over environments with enough runs: P(improvement) nowhere wholly under 0.5."""
    chances = {}
    for env_id in env_ids:
        ours, reference = (results.finals(name, [env_id]) for name in (PAIRS[0].ours, PAIRS[0].reference))
        chances[env_id] = interval(probability_of_improvement, ours, reference, effort=0.2)
    worse = [env_id for env_id, chance in chances.items() if chance.high < 0.5]
    seeds = f"at least {min(results.fewest(PAIRS[0], env_id) for env_id in env_ids)} of {SEEDS[PAIRS[0]]}"
    what = "Zoo files: no environment significantly worse, P(improvement) nowhere wholly under 0.5"
    return Bar(what, ", ".join(worse) or "none", not worse, f"{seeds} on {len(env_ids)} environments")


def mean_bar(results: Results, env_id: str) -> Bar:
    ours, reference = (results.finals(name, [env_id]).mean() for name in (PAIRS[0].ours, PAIRS[0].reference))
    stretch = STRETCH.get(env_id)
    return Bar(
        f"{env_id}, Zoo files: mean ≥ theirs" + ("" if stretch is None else f" (stretch {stretch:.0f})"),
        f"{ours:.1f} against {reference:.1f}",
        bool(ours >= reference),
        f"{results.fewest(PAIRS[0], env_id)} of {SEEDS[PAIRS[0]]}",
        None if stretch is None else bool(ours >= stretch),
    )


def bars_section(results: Results, summaries: Mapping[tuple[Pair, str], Summary]) -> str:
    rows = [(bar.what, bar.reached, bar.verdict, bar.seeds) for bar in bars(results, summaries)]
    if not rows:
        return f"### Bars\n\nFewer than {LEAST_SEEDS} seeds of anything: no verdict."
    return "### Bars\n\n" + markdown_table(("", "reached", "", "seeds"), rows)


# -- the report -------------------------------------------------------------------------------------------


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
when its own does; between evaluations curves are straight, so that below a twentieth of the budget the ratio is coarse."""


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
    try:
        runs = read_all(folder)
        results = Results(runs, arguments.seeds)
        summaries = summaries_of(results)
        sections = {
            (pair, group): section(results, pair, group, summaries.get((pair, group))) for group in GROUPS for pair in PAIRS
        }
    except ValueError as error:
        sys.exit(str(error))
    if not runs:
        sys.exit(f"no runs below {folder}")
    text = "\n\n".join(["# Learning runs", EXPLANATION, bars_section(results, summaries), *sections.values()]) + "\n"
    (folder / "report.md").write_text(text)
    (folder / "index.json").write_text(json.dumps(index(runs), indent=1) + "\n")
    print(text)
    for group, env_ids in GROUPS.items():
        name = group.split()[0].lower()
        draw_curves(results, PAIRS[:1], env_ids, folder, f"{name}-zoo")
        draw_curves(results, PAIRS[1:], env_ids, folder, f"{name}-default")
    draw_profiles(results, PAIRS, GROUPS, folder, "profiles")
    if arguments.readme is not None:
        picture = os.path.relpath(folder / "mujoco-zoo.png", arguments.readme.parent)
        table = sections[PAIRS[0], "MuJoCo"].partition("\n\n")[2]  # without its title
        put_into_readme(arguments.readme, f"![Return against steps and against time of training]({picture})\n\n{table}")
