"""What the learning runs say: tables and pictures from their CSV files, and what was not run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _learning_pictures import draw_curves, draw_profiles
from _learning_summary import Summary, bars_section, ratio_in_words, standing, summaries_of
from _measure import markdown_table
from _results import (
    DEFAULT,
    DEFAULT_NORM,
    GROUPS,
    LEAST_SEEDS,
    PAIRS,
    SHARES,
    ZOO,
    Curves,
    Pair,
    Results,
    cpu_of,
    time_ratio,
)
from _runs import Run, outdated, read_all
from _scores import COVERAGE, interval, probability_of_improvement, spread
from _settings import ALGORITHMS, RANDOM, comparable

# -- tables -----------------------------------------------------------------------------------------------

HEADER = (
    *("", "random", "sb3_contrib", "TRPOExt", "P(improvement)", "minutes of training, theirs / ours (CPU)"),
    *("time to their final return, ours / theirs (CPU)", "to 95 % of it (CPU)"),
)


def environment_row(results: Results, pair: Pair, env_id: str, together: Sequence[str]) -> list[str]:
    """
    :param together: environments on all of which a seed must have been run for its times to count
    """
    ours, reference = (results.finals(name, [env_id]) for name in (pair.ours, pair.reference))
    enough = results.fewest(pair, env_id) >= LEAST_SEEDS
    return [
        env_id,
        f"{float(results.random([env_id])[0]):.1f}",
        spread(reference[:, 0]),
        spread(ours[:, 0]),
        str(interval(probability_of_improvement, ours, reference, effort=0.2)) if enough else "too few seeds",
        *cells_of_times(results, pair, env_id, together),
    ]


def cells_of_times(results: Results, pair: Pair, env_id: str, together: Sequence[str]) -> list[str]:
    """Of runs on one processor: minutes of training, and the ratios of times at ``SHARES`` of the way."""
    timed = results.timed(pair, *together)
    if timed is None:
        return ["no common processor"] * (1 + len(SHARES))
    sides = [results.curves(name, env_id, seeds) for name, seeds in timed.seeds.items()]
    start = float(results.random([env_id])[0])

    def minutes(side: Curves) -> str:
        wall, cpu = (f"{side.seconds[clock][:, -1].mean() / 60:.1f}" for clock in ("wall", "cpu"))
        return f"{wall} ({cpu})"

    def ratio(share: float) -> str:
        wall, cpu = (ratio_in_words(time_ratio(*sides, clock, start, share)) for clock in ("wall", "cpu"))
        return wall if wall == cpu else f"{wall} ({cpu})"

    return [f"{minutes(sides[1])} / {minutes(sides[0])}", *map(ratio, SHARES)]


def section(results: Results, pair: Pair, group: str, summary: Summary | None) -> str:
    """One pair on one group: a table and what it amounts to, or that there is nothing yet."""
    title = f"### {group}, {pair.title}"
    shown = results.environments(pair, GROUPS[group], least=1)
    if not any(results.runs(name, env_id) for name in (pair.ours, pair.reference) for env_id in GROUPS[group]):
        return f"{title}\n\nNot run."
    parts = [title]
    if shown:
        # the seeds that the summary's times rest on, so that its median is that of the column
        rows = [environment_row(results, pair, env_id, results.together(pair, env_id, GROUPS[group])) for env_id in shown]
        parts.append(markdown_table(HEADER, rows))
    if summary is not None:
        parts.append(summary.sentences())
    no_score = [env_id for env_id in results.environments(pair, shown) if env_id not in results.scored(pair, shown)]
    if no_score:
        parts.append(
            f"Not among the normalised scores, as sb3_contrib is not clearly above the random policy: {', '.join(no_score)}."
        )
    missing = [f"{env_id} ({words})" for env_id in GROUPS[group] if (words := results.missing(pair, env_id))]
    if missing:
        parts.append(f"Not run: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def runs_section(results: Results) -> str:
    """Every run that was counted: its final return, and how much its episodes differ."""
    rows = []
    env_ids = [env_id for group in GROUPS.values() for env_id in group]
    # pairs may share a reference
    for name, env_id in dict.fromkeys(
        (name, env_id) for pair in PAIRS for env_id in env_ids for name in (pair.reference, pair.ours)
    ):
        runs = results.runs(name, env_id)
        if runs:
            finals = [f"{seed}: {run.final:.0f} ± {run.rows['std'].iloc[-1]:.0f}" for seed, run in runs.items()]
            cpus = {cpu: [seed for seed, run in runs.items() if cpu_of(run) == cpu] for cpu in map(cpu_of, runs.values())}
            where = "; ".join(f"{cpu} ({', '.join(map(str, seeds))})" for cpu, seeds in cpus.items())
            rows.append((env_id, name, ", ".join(finals), where))
    header = ("", "", "seed: final return ± standard deviation between its 20 episodes", "processor (seeds)")
    return "### Every run\n\n" + markdown_table(header, rows)


# -- the report -------------------------------------------------------------------------------------------


def index(runs: Sequence[Run]) -> dict[str, Any]:
    """What was run, with which versions: each distinct combination once, and its runs."""
    kinds: list[dict[str, Any]] = []
    for run in runs:
        about = {**run.about, "setting": comparable(run.about)}
        kind = {key: about.get(key) for key in ("algorithm", "setting", "timesteps", "sources", "versions")}
        entry = next((entry for entry in kinds if all(entry[key] == kind[key] for key in kind)), None)
        if entry is None:
            entry = {**kind, "runs": defaultdict(list)}
            kinds.append(entry)
        entry["runs"][run.about["env"]].append(run.about["seed"])
    return {"runs": kinds}


EXPLANATION = f"""\
Return: mean over 20 deterministic episodes with the final policy; mean ± standard deviation over seeds (number of
seeds). Normalised score: (return − random) / (mean of sb3_contrib − random). Square brackets: 95% intervals of a
stratified percentile bootstrap, both sides resampled; of few runs such intervals are too narrow (of normal samples of
{", ".join(map(str, COVERAGE))} they cover the mean about {", ".join(map(str, COVERAGE.values()))} times in 100).
Summaries over several environments take the seeds that were run on all of them.

Times are of training alone, one thread, and compared only between runs on processors of the same name: under a table
with a summary, of the seeds that were run there on all of its environments. `time to their final return`: when our mean
curve first reaches the mean final return of sb3_contrib, over when its own does, by wall-clock and, in brackets, by CPU
time, both of these runs, not of all that the return beside it is the mean of; between evaluations curves are straight,
so that below a twentieth of the budget the ratio is coarse. On a plateau the moment when a noisy curve first touches
its own final value is arbitrary; `to 95 % of it` takes 95 % of the way from the random policy to that return, for both
sides."""


CAPTION = """\
One million steps, both with the settings of an RL Zoo file: sb3_contrib.TRPO with the Zoo's own `trpo.yml`, `TRPOExt`
with `zoo_configs/trpo_ext.yml`, which was tuned on v5 on other seeds than these ([how, and what had been
seen]({tuning})); sb3_contrib's was not tuned again.
{defaults}
Return: mean of 20 deterministic episodes with the final policy, mean ± standard deviation over (so many) seeds;
`random`: the random policy, from which scores count; square brackets: 95% bootstrap intervals. Minutes and ratios of
times are of those of the seeds that both sides ran on one kind of processor, which stands below the table."""


def of_defaults(summaries: Mapping[tuple[Pair, str], Summary], report: str) -> str:
    """How default arguments compare on MuJoCo, so that nobody takes the Zoo files' figures for theirs."""
    found = [summaries[pair, "MuJoCo"] for pair in PAIRS[1:] if (pair, "MuJoCo") in summaries]
    if not found:
        return f"Default arguments against default arguments, as far as they were run: [report.md]({report})."
    scores = "; ".join(
        f"{summary.pair.title}: {summary.iqm}, {standing(summary.iqm)} ({summary.seeds_in_words})" for summary in found
    )
    what = "Without these files, interquartile mean of scores, 1 being the mean of sb3_contrib with its default arguments:"
    return f"{what}\n{scores}; [report.md]({report})."


PAGE_MARKS = ("<!-- learning: made by benchmarks/learning.py report --page -->\n", "<!-- /learning -->")


def put_into_page(page: Path, text: str) -> None:
    """Replace what stands between the two marks."""
    before, begin, rest = page.read_text().partition(PAGE_MARKS[0])
    _, end, after = rest.partition(PAGE_MARKS[1])
    if not end:
        sys.exit(f"{page}: expected a line {PAGE_MARKS[0].strip()} and, below it, {PAGE_MARKS[1]}")
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")


def say_outdated(runs: Sequence[Run]) -> None:
    """Name, on stderr, whose runs are not what the present files and defaults would make."""
    found: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    for run in runs:
        algorithm, env_id, seed = (run.about[key] for key in ("algorithm", "env", "seed"))
        if algorithm in (*ALGORITHMS, RANDOM) and (changed := outdated(run)):
            found[algorithm, env_id, ", ".join(changed)].append(seed)
    for (algorithm, env_id, changed), seeds in found.items():
        words = ", ".join(map(str, sorted(seeds)))
        print(f"{algorithm} on {env_id}, seeds {words}: not run with what is there now ({changed})", file=sys.stderr)


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
    if not arguments.quick:  # whose budget is never that of the settings
        say_outdated(runs)
    pictures = draw_all(results, folder)
    parts = ["# Learning runs", EXPLANATION, bars_section(results, summaries), *sections.values(), runs_section(results)]
    text = "\n\n".join([*parts, *(f"![{path.stem}]({path.name})" for path in pictures)]) + "\n"
    (folder / "report.md").write_text(text)
    (folder / "index.json").write_text(json.dumps(index(runs), indent=1) + "\n")
    print(text)
    if arguments.page is not None:
        table = sections[ZOO, "MuJoCo"].partition("\n\n")[2]  # without its title
        shown = [path for path in pictures if path.name == "mujoco-zoo.png"]

        def link(path: Path) -> str:
            return Path(os.path.relpath(path, arguments.page.parent)).as_posix()

        links = [f"![Return against steps and against time]({link(path)})" for path in shown]
        caption = CAPTION.format(
            defaults=of_defaults(summaries, link(folder / "report.md")), tuning=link(folder.parent / "tuning" / "README.md")
        )
        put_into_page(arguments.page, "\n\n".join([caption, *links, table]))


def draw_all(results: Results, folder: Path) -> list[Path]:
    """The pictures that there are runs for."""
    drawn = []
    for group, env_ids in GROUPS.items():
        name = group.split()[0].lower()
        drawn.append(draw_curves(results, [ZOO], env_ids, folder, f"{name}-zoo"))
        drawn.append(draw_curves(results, [DEFAULT, DEFAULT_NORM], env_ids, folder, f"{name}-default"))
    drawn.append(draw_profiles(results, [ZOO, DEFAULT, DEFAULT_NORM], GROUPS, folder, "profiles"))
    return [path for path in drawn if path is not None]
