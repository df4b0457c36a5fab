"""What one pair's runs on one group of environments amount to, and whether the project's bars are reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from _measure import markdown_table
from _results import (
    DEFAULT_NORM,
    GROUPS,
    LEAST_SEEDS,
    NEVER,
    PAIRS,
    SEEDS,
    SHARES,
    ZOO,
    Pair,
    Results,
    Timed,
    median_time_ratio,
)
from _scores import Interval, interquartile_mean, interval, probability_of_improvement

# -- summaries --------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """How long we take to the reference's return, over its own time, on one processor.

    :param ratios: median of environments, by clock and share of the way
    """

    timed: Timed
    ratios: dict[tuple[str, float], Interval]

    def sentence(self, share: float) -> str:
        what = "sb3_contrib's final return" if share == 1.0 else f"{100 * share:.0f} % of the way there"
        ours, reference = map(len, self.timed.seeds.values())
        where = f"{self.timed.cpu}, {ours} seeds of ours, {reference} of sb3_contrib"
        words = f"wall-clock {in_words(self.ratios['wall', share])}, CPU {in_words(self.ratios['cpu', share])}"
        return f"- time to {what} over its own, median of environments: {words} ({where})"


class Summary(NamedTuple):
    """One pair on one group of environments.

    :param n_seeds: of ours and of the reference, that were run on all of them
    :param iqm_without: with each environment left out in turn; empty where there are one or two
    :param times: of each processor on which they can be compared, most seeds first
    """

    pair: Pair
    group: str
    env_ids: list[str]
    n_seeds: tuple[int, int]
    iqm: Interval
    iqm_reference: Interval
    iqm_without: dict[str, float]
    improvement: Interval
    times: list[Times]

    @property
    def seeds_in_words(self) -> str:
        ours, reference = self.n_seeds
        return f"{ours} seeds of ours, {reference} of sb3_contrib"

    def sentences(self) -> str:
        without = ", ".join(f"{env_id} {iqm:.2f}" for env_id, iqm in self.iqm_without.items())
        return "\n".join(
            [
                f"Over {', '.join(self.env_ids)} ({self.seeds_in_words} that were run on all):",
                "",
                f"- interquartile mean of normalised scores: {self.iqm} (sb3_contrib against itself: {self.iqm_reference})",
                *([f"- the same without one environment: {without}"] if without else []),
                f"- probability of improvement: {self.improvement}",
                *([] if self.times else ["- times: the two sides were not run on the same processor"]),
                *(times.sentence(share) for times in self.times for share in SHARES),
            ]
        )


def ratio_in_words(ratio: float) -> str:
    # half of it is the median of two environments of which one does not get there
    return "not reached" if ratio >= NEVER / 2 else f"{ratio:.2f}"


def in_words(ratio: Interval) -> str:
    return ratio.in_words(ratio_in_words)


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
        iqm_without_each(results, pair, env_ids),
        interval(probability_of_improvement, ours, reference, effort=0.2),
        times_of(results, pair, env_ids),
    )


def times_of(results: Results, pair: Pair, env_ids: list[str]) -> list[Times]:
    """Of the processor with most seeds, however few, and of others with enough of them."""
    found = results.timed_each(pair, *env_ids)
    shown = [timed for timed in found if timed is found[0] or timed.fewest >= LEAST_SEEDS]
    keys = [(clock, share) for clock in ("wall", "cpu") for share in SHARES]
    return [Times(timed, {key: median_time_ratio(results, pair, env_ids, timed, *key) for key in keys}) for timed in shown]


def iqm_without_each(results: Results, pair: Pair, env_ids: list[str]) -> dict[str, float]:
    """Whether one environment carries the whole."""
    rest = {env_id: [other for other in env_ids if other != env_id] for env_id in env_ids} if len(env_ids) > 2 else {}
    return {
        env_id: interquartile_mean(*(results.finals(name, others) for name in pair[1:]), results.random(others))
        for env_id, others in rest.items()
    }


def summaries_of(results: Results) -> dict[tuple[Pair, str], Summary]:
    """Of every pair and group with enough runs."""
    found = {}
    for pair in PAIRS:
        for group in GROUPS:
            env_ids = results.summed(pair, GROUPS[group])
            if env_ids:
                found[pair, group] = summarize(results, pair, group, env_ids)
    return found


# -- bars -------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """What was to be reached, what was, and by how many seeds.

    :param met: None where there are no runs to say
    :param stretch: whether what was hoped for beyond the bar was reached too; None where there is nothing beyond
    :param so_far: whether seeds are still to be run
    """

    what: str
    reached: str
    met: bool | None
    seeds: str
    stretch: bool | None = None
    so_far: bool = False

    @property
    def verdict(self) -> str:
        if self.met is None:
            return "not run"
        words = "further goal met" if self.met and self.stretch else "met" if self.met else "missed"
        return f"{words} so far" if self.so_far else words


STRETCH = {"HalfCheetah-v5": 6000.0, "Hopper-v5": 3372.0, "Walker2d-v5": 4933.0, "Swimmer-v5": 359.0}
"""Returns hoped for, set before any run; near what is published for PPO (HalfCheetah) and sb3_contrib.TRPO on v3."""


def bars(results: Results, summaries: Mapping[tuple[Pair, str], Summary]) -> list[Bar]:
    """What the project set out to reach, as far as there are runs to say."""
    zoo, norm = summaries.get((ZOO, "MuJoCo")), summaries.get((DEFAULT_NORM, "MuJoCo"))
    env_ids = [env_id for group in GROUPS.values() for env_id in results.environments(ZOO, group)]
    return [
        *zoo_bars(zoo),
        defaults_bar(norm),
        no_worse_bar(results, env_ids),
        *(mean_bar(results, env_id) for env_id in env_ids),
    ]


def standing(score: Interval) -> str:
    """What an interquartile mean of normalised scores says, 1 being the reference's mean."""
    if score.low > 1.0:
        return "ahead"
    if score.high < 1.0:
        return "behind"
    return "rather ahead, not clearly" if score.estimate >= 1.0 else "rather behind, not clearly"


def seeds_in_words(summary: Summary) -> tuple[str, bool]:
    """How many, and whether some are still to be run."""
    n_seeds, planned, env_ids = min(summary.n_seeds), SEEDS[summary.pair], GROUPS[summary.group]
    words = f"{n_seeds} of {planned} on {len(summary.env_ids)} of {len(env_ids)} environments"
    return words, n_seeds < planned or len(summary.env_ids) < len(env_ids)


def zoo_bars(zoo: Summary | None) -> list[Bar]:
    score = "MuJoCo, Zoo files: IQM ≥ 1.3 (further goal 1.6) and its interval above 1"
    times = {clock: f"the same: time to their final return, {clock} ≤ 1/3 (further goal 1/5)" for clock in ("wall", "cpu")}
    if zoo is None:
        return [Bar(what, "", None, "") for what in (score, *times.values())]
    (seeds, so_far), iqm = seeds_in_words(zoo), zoo.iqm
    found = [Bar(score, str(iqm), bool(iqm.low > 1.0 and iqm.estimate >= 1.3), seeds, bool(iqm.estimate >= 1.6), so_far)]
    for clock, what in times.items():
        if not zoo.times:
            found.append(Bar(what, "no common processor", None, ""))
            continue
        # on every processor: a figure of the one with most seeds alone would be a choice
        ratios = [times.ratios[clock, 1.0] for times in zoo.times]
        reached = "; ".join(f"{in_words(ratio)} ({times.timed.cpu})" for ratio, times in zip(ratios, zoo.times, strict=True))
        met, stretch = (all(ratio.estimate <= bound for ratio in ratios) for bound in (1 / 3, 1 / 5))
        n_seeds = [times.timed.fewest for times in zoo.times]
        few = so_far or max(n_seeds) < SEEDS[zoo.pair]
        found.append(Bar(what, reached, met, f"{', '.join(map(str, n_seeds))} on one processor", stretch, few))
    return found


def defaults_bar(norm: Summary | None) -> Bar:
    what = "MuJoCo, defaults, normalised observations: IQM ≥ 1"
    if norm is None:
        return Bar(what, "", None, "")
    seeds, so_far = seeds_in_words(norm)
    return Bar(what, str(norm.iqm), bool(norm.iqm.estimate >= 1.0), seeds, so_far=so_far)


def no_worse_bar(results: Results, env_ids: list[str]) -> Bar:
    """Over environments with enough runs: P(improvement) nowhere wholly under 0.5."""
    what = "Zoo files: no environment significantly worse, P(improvement) nowhere wholly under 0.5"
    if not env_ids:
        return Bar(what, "", None, "")
    chances = {}
    for env_id in env_ids:
        ours, reference = (results.finals(name, [env_id]) for name in (ZOO.ours, ZOO.reference))
        chances[env_id] = interval(probability_of_improvement, ours, reference, effort=0.2)
    worse = [env_id for env_id, chance in chances.items() if chance.high < 0.5]
    fewest, planned = min(results.fewest(ZOO, env_id) for env_id in env_ids), SEEDS[ZOO]
    n_planned = sum(map(len, GROUPS.values()))
    seeds = f"at least {fewest} of {planned} on {len(env_ids)} of {n_planned} environments"
    so_far = fewest < planned or len(env_ids) < n_planned
    return Bar(what, ", ".join(worse) or "none", not worse, seeds, so_far=so_far)


def mean_bar(results: Results, env_id: str) -> Bar:
    ours, reference = (results.finals(name, [env_id]).mean() for name in (ZOO.ours, ZOO.reference))
    stretch, n_seeds, planned = STRETCH.get(env_id), results.fewest(ZOO, env_id), SEEDS[ZOO]
    return Bar(
        f"{env_id}, Zoo files: mean ≥ theirs" + ("" if stretch is None else f" (further goal {stretch:.0f})"),
        f"{ours:.1f} against {reference:.1f}",
        bool(ours >= reference),
        f"{n_seeds} of {planned}",
        None if stretch is None else bool(ours >= stretch),
        n_seeds < planned,
    )


def bars_section(results: Results, summaries: Mapping[tuple[Pair, str], Summary]) -> str:
    rows = [(bar.what, bar.reached, bar.verdict, bar.seeds) for bar in bars(results, summaries)]
    table = markdown_table(("", "reached", "", "seeds"), rows)
    what = "What the project set itself to reach before any of these runs, and what it hoped for beyond it."
    return f"### Goals\n\n{what}\n\n{table}"
